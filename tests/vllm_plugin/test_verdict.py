"""What vLLM is said to serve, and the words of each refusal."""

import pytest

from hybridize.mixers import MIXERS
from hybridize.modeling import mixer_options
from hybridize.vllm_plugin.verdict import SERVED, extra_fields, latent_width, obstacle
from tests.vllm_plugin.toys import config_of

WINDOW = {"name": "streaming", "sink_tokens": 0, "window_tokens": 8}
LATENT = {"name": "mla", "rope_dim": 4}


def verdict(family, mixers, gpus=1, **sizes):
    config = config_of(family, mixers, **sizes)
    return obstacle(config, config.mixers, gpus)


@pytest.mark.parametrize(
    "mixers",
    [
        ["attention", WINDOW],
        ["mamba2", "attention", "mamba2"],
        ["mamba2", "mamba2"],
        ["gdn", "mamba2", WINDOW, "attention"],
        [LATENT, "gdn"],
        [LATENT, "attention", WINDOW],
        [LATENT, {**LATENT, "latent_norm": "rms"}],
        [LATENT, "attention", "mamba2"],
    ],
    ids=str,
)
def test_served(mixers):
    assert verdict("llama", mixers) is None


@pytest.mark.parametrize(
    ("family", "mixers", "reason"),
    [
        ("llama", ["attention", {"name": "streaming", "sink_tokens": 4}], "layer 1 (streaming): sink_tokens is 4"),
        ("llama", [{"name": "mamba2", "conv_tokens": 5}, "attention"], "layer 0 (mamba2): conv_tokens is 5"),
        ("qwen3", [{"name": "gdn"}, "attention"], "no q/k-norms behind the convolution"),
        ("llama", [{"name": "gdn", "rope": True}], "does not rotate"),
        ("llama", [{"name": "gdn", "beta_max": 2}], "beta_max is 2"),
        ("llama", [{"name": "mla", "rope_dim": "full"}], "every key dimension is rotary"),
        ("llama", [LATENT, {**LATENT, "kv_rank": 4}], "(4, 4), (8, 4)"),
    ],
    ids=str,
)
def test_refused(family, mixers, reason):
    found = verdict(family, mixers)
    assert reason in found
    assert "\n" not in found


@pytest.mark.parametrize("name", [name for name in MIXERS.names() if name not in SERVED])
def test_other_mixers_are_named(name):
    config = config_of("llama", ["attention"])
    found = obstacle(config, [{"name": "attention"}, {"name": name}])
    assert found == f"layer 1 is {name}, which vLLM has no layer for; served are {', '.join(SERVED)}"


def test_the_base_has_a_say():
    assert "gelu" in verdict("llama", ["attention"], hidden_act="gelu")
    assert verdict("llama", ["gdn"], attention_bias=True).endswith("has none")
    turned = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    assert "dynamic" in verdict("llama", ["attention"], rope_parameters=turned)
    assert verdict("llama", ["mamba2"], attention_bias=True) is None


def test_gpus_divide_heads():
    assert verdict("llama", ["attention", "mamba2"], 4) is None
    assert "4 heads" in verdict("llama", ["attention"], 3)
    assert "2 key/value heads" in verdict("llama", ["attention"], 3, num_attention_heads=6, hidden_size=48)


def test_pages_of_latents_and_attention():
    """8 x 128 x 2 = 2048 numbers of attention: 4 of 512, not 3.6 of 576; alone, or without a state, any width will do."""
    big = {"hidden_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 128}
    wide, narrow = ({"name": "mla", "kv_rank": rank, "rope_dim": 64} for rank in (512, 128))
    assert "have 2048 numbers on a GPU, its latent 576" in verdict("llama", [wide, "attention", "gdn"], **big)
    assert "have 1024 numbers on a GPU, its latent 576" in verdict("llama", [wide, WINDOW, "gdn"], 2, **big)
    for mixers in ([wide, "gdn"], [wide, "attention"], [narrow, "attention", "gdn"]):
        for gpus in (1, 2, 4, 8):
            assert verdict("llama", mixers, gpus, **big) is None
    widths = [
        latent_width(config, mixer_options(config))
        for config in (
            config_of("llama", mixers, **big) for mixers in ([narrow], [narrow, "gdn"], [narrow, "attention", "gdn"], [wide])
        )
    ]
    assert widths == [320, 320, 512, 576]
    assert "is 672, vLLM's cache of latents has up to 576" in verdict("llama", [{**wide, "kv_rank": 608}], **big)


def test_fields_that_vllm_looks_for():
    config = config_of("qwen3", ["attention", "mamba2", LATENT])
    fields = extra_fields(config, mixer_options(config))
    assert fields["layer_types"] == ["full_attention", "linear_attention", "full_attention"]
    assert (fields["kv_lora_rank"], fields["qk_rope_head_dim"], fields["qk_nope_head_dim"]) == (316, 4, 8)
    assert "kv_lora_rank" not in extra_fields(config_of("qwen3", ["attention"]), mixer_options(config_of("qwen3", ["attention"])))
