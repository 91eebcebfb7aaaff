"""What runs in place of attention, and ships with a checkpoint. One file each."""

from hybridize.registry import Registry

MIXERS = Registry(
    "mixer",
    {
        "attention": "hybridize.mixers.attention:Attention",
        "streaming": "hybridize.mixers.streaming:Streaming",
        "nha": "hybridize.mixers.nha:NativeHybrid",
        "parallel": "hybridize.mixers.parallel:Parallel",
        "mamba2": "hybridize.mixers.mamba2:Mamba2",
    },
)
