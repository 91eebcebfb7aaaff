"""The table of conversions, keyed by the mixer that each one makes."""

from hybridize.registry import Registry

CONVERSIONS = Registry(
    "conversion",
    {
        "attention": "hybridize.conversions.keep:Keep",
        "streaming": "hybridize.conversions.keep:Keep",
        "nha": "hybridize.conversions.nha_from_gqa:NHAFromGQA",
        "parallel": "hybridize.conversions.parallel_from_gqa:ParallelFromGQA",
        "mamba2": "hybridize.conversions.mamba2_from_gqa:Mamba2FromGQA",
    },
)
