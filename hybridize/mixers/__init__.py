"""What runs in place of attention, and ships with a checkpoint. One file each."""

from hybridize.registry import Registry

MIXERS = Registry(
    "mixer",
    {
        "attention": "hybridize.mixers.attention:Attention",
        "low_rank_kv": "hybridize.mixers.low_rank_kv:LowRankKV",
        "streaming": "hybridize.mixers.streaming:Streaming",
        "mamba2": "hybridize.mixers.mamba2:Mamba2",
    },
)
