"""hybridize: pretrained transformers in, hybrids that cost a fraction of the memory out.

Importing it registers the hybrid classes with transformers' Auto classes, lets what they save carry its code, and loads
nothing else.
"""

from hybridize.config import HybridConfigMixin as _HybridConfigMixin
from hybridize.modeling import register as _register
from hybridize.remote import write_code as _write_code
from hybridize.version import __version__

__all__ = ["__version__"]

_register()
_HybridConfigMixin.write_code = _write_code
