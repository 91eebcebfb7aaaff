"""hybridize: pretrained transformers in, hybrids that cost a fraction of the memory out.

Importing it registers the hybrid classes with transformers' Auto classes, lets what they save carry its code, and loads
nothing else.
"""

from pathlib import Path as _Path
from typing import Any as _Any

from hybridize.config import HybridConfigMixin as _HybridConfigMixin
from hybridize.modeling import register as _register
from hybridize.version import __version__

__all__ = ["__version__"]


def _write_code(config: _Any, folder: _Path) -> None:
    """As hybridize.remote.write_code, which is loaded when first used."""
    from hybridize.remote import write_code

    write_code(config, folder)


_register()
_HybridConfigMixin.write_code = _write_code
