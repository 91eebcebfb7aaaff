"""The table of conversions, keyed by the mixer that each one makes."""

from hybridize.registry import Registry

CONVERSIONS = Registry(
    "conversion",
    {
        "attention": "hybridize.conversions.keep:Keep",
        "low_rank_kv": "hybridize.conversions.low_rank_from_gqa:LowRankFromGQA",
        "streaming": "hybridize.conversions.keep:Keep",
        "block_sparse": "hybridize.conversions.keep:Keep",
        "streaming_heads": "hybridize.conversions.streaming_heads:HeadsFromGQA",
        "nha": "hybridize.conversions.nha_from_gqa:NHAFromGQA",
        "parallel": "hybridize.conversions.parallel_from_gqa:ParallelFromGQA",
        "mamba2": "hybridize.conversions.mamba2_from_gqa:Mamba2FromGQA",
        "gdn": "hybridize.conversions.gdn_from_gqa:GDNFromGQA",
        "kda": "hybridize.conversions.gdn_from_gqa:GDNFromGQA",
        "gla": "hybridize.conversions.gla_from_attention:GLAFromAttention",
        "lolcats": "hybridize.conversions.lolcats_from_attention:LoLCATsFromAttention",
        "xkv": "hybridize.conversions.xkv_from_gqa:XKVFromGQA",
        "gmu": "hybridize.conversions.gmu_from_gqa:GMUFromGQA",
        "mla": "hybridize.conversions.mla_from_gqa:MLAFromGQA",
    },
)
