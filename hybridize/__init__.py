"""hybridize: pretrained transformers in, hybrids that cost a fraction of the memory out.

Importing it registers the hybrid classes with transformers' Auto classes and loads nothing else.
"""

from hybridize import modeling as _modeling  # noqa: F401  registers the classes
from hybridize.version import __version__

__all__ = ["__version__"]
