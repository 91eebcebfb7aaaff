"""The table of conversions, keyed by the mixer that each one makes."""

from hybridize.registry import Registry

CONVERSIONS = Registry(
    "conversion",
    {
        "attention": "hybridize.conversions.keep:Keep",
        "streaming": "hybridize.conversions.keep:Keep",
        "mamba2": "hybridize.conversions.mamba2_from_gqa:Mamba2FromGQA",
        "gla": "hybridize.conversions.gla_from_attention:GLAFromAttention",
        "lolcats": "hybridize.conversions.lolcats_from_attention:LoLCATsFromAttention",
    },
)
