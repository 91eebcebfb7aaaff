"""The table of conversions, keyed by the mixer that each one makes."""

from hybridize.registry import Registry

CONVERSIONS = Registry(
    "conversion",
    {
        "attention": "hybridize.conversions.keep:Keep",
        "low_rank_kv": "hybridize.conversions.low_rank_from_gqa:LowRankFromGQA",
        "streaming": "hybridize.conversions.keep:Keep",
        "mamba2": "hybridize.conversions.mamba2_from_gqa:Mamba2FromGQA",
    },
)
