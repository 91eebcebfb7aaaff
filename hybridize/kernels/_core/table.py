"""Every function of every op that is described by an OpSpec."""

import importlib
from collections.abc import Iterable

from hybridize.errors import ConfigError
from hybridize.kernels._core.spec import OpSpec

SPECS = {
    "causal_conv1d": "hybridize.kernels.conv.spec:CONV",
    "causal_conv1d_step": "hybridize.kernels.conv.spec:CONV_STEP",
    "mamba2_mixer_step": "hybridize.kernels.mixer_step.spec:MAMBA2",
    "gdn_mixer_step": "hybridize.kernels.mixer_step.spec:GDN",
    "linear_kl": "hybridize.kernels.linear_kl.spec:LINEAR_KL",
    "mla_decode": "hybridize.kernels.mla_decode.spec:MLA_DECODE",
    "gla": "hybridize.kernels.gla.spec:GLA",
    "gated_rms_norm": "hybridize.kernels.gated_norm.spec:GATED_NORM",
    "ssd": "hybridize.kernels.ssd.spec:SSD",
    "ssd_step": "hybridize.kernels.ssd.spec:SSD_STEP",
    "stream_attn": "hybridize.kernels.stream_attn.spec:STREAM_ATTN",
    "stream_attn_step": "hybridize.kernels.stream_attn.spec:STREAM_ATTN_STEP",
    "gdn": "hybridize.kernels.gdn.spec:GDN",
    "gdn_step": "hybridize.kernels.gdn.spec:GDN_STEP",
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
