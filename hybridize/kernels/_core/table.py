"""Every function of every op that is described by an OpSpec."""

import importlib
from collections.abc import Iterable

from hybridize.errors import ConfigError
from hybridize.kernels._core.spec import OpSpec

SPECS = {
    "gla": "hybridize.kernels.gla.spec:GLA",
    "gated_rms_norm": "hybridize.kernels.gated_norm.spec:GATED_NORM",
}


def specs(names: Iterable[str] | None = None) -> list[OpSpec]:
    """Specs by name of the function, all of them for None.

    Raises:
        ConfigError: a name that there is not.
    """
    found = []
    for name in SPECS if names is None else names:
        if name not in SPECS:
            raise ConfigError(f"unknown function {name!r}. Known: {', '.join(SPECS)}")
        module, attribute = SPECS[name].split(":")
        found.append(getattr(importlib.import_module(module), attribute))
    return found
