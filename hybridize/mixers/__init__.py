"""What runs in place of attention, and ships with a checkpoint. One file each."""

from hybridize.registry import Registry

MIXERS = Registry(
    "mixer",
    {
        "attention": "hybridize.mixers.attention:Attention",
        "low_rank_kv": "hybridize.mixers.low_rank_kv:LowRankKV",
        "streaming": "hybridize.mixers.streaming:Streaming",
        "block_sparse": "hybridize.mixers.block_sparse:BlockSparse",
        "streaming_heads": "hybridize.mixers.streaming_heads:StreamingHeads",
        "nha": "hybridize.mixers.nha:NativeHybrid",
        "parallel": "hybridize.mixers.parallel:Parallel",
        "mamba2": "hybridize.mixers.mamba2:Mamba2",
        "gdn": "hybridize.mixers.gdn:GDN",
        "kda": "hybridize.mixers.kda:KDA",
        "gla": "hybridize.mixers.gla:GLA",
        "lolcats": "hybridize.mixers.lolcats:LoLCATs",
        "xkv": "hybridize.mixers.xkv:XKV",
        "gmu": "hybridize.mixers.gmu:GMU",
        "mla": "hybridize.mixers.mla:MLA",
    },
)
