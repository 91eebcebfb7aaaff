"""Latent attention in every layer as deepseek_v3: the same function in every dtype, and each thing that is changed must be."""

from functools import cache
from itertools import islice

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

from hybridize.checkpoint import open_base
from hybridize.conversions import convert, plan
from hybridize.data import eval_blocks, read_documents, tokenize
from hybridize.mixers import MIXERS
from hybridize.native import deepseek, native_verdict
from hybridize.native.export import export
from tests.native.exported import assert_same, difference
from tests.native.hybrids import random_hybrid
from tests.tiny import SIZES, tiny_base

MLA = {"name": "mla", "latent_norm": "rms", "frequencies": "uniform", "kv_rank": 10, "qk_norm": "fold"}
CLASS = "DeepseekV3ForCausalLM"
SMALL = {"max_position_embeddings": 64}
ROPES = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24, "mscale": 1.0, "mscale_all_dim": 0.5,
    },
    "no yarn": {"rope_type": "yarn", "factor": 1.0, "original_max_position_embeddings": 96, "attention_factor": 1.5},
}  # fmt: skip


def section(**options):
    return {"keep": {"layers": []}, "mixer": {**MLA, **options}}


def made(tmp_path, family="llama", rope="default", rope_dim=8, **more):
    parameters = {"rope_theta": 10000.0, **ROPES[rope]}
    return random_hybrid(family, tmp_path, section(rope_dim=rope_dim), **{**SMALL, "rope_parameters": parameters, **more})


@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("qwen3", False)])
def test_the_export_is_the_hybrid(family, tied, tmp_path):
    hybrid = made(tmp_path, family, tie_word_embeddings=tied)
    if tied:
        assert_same(hybrid, "auto", tmp_path / "out", CLASS, new_tokens=12)
    else:
        assert export(hybrid, "auto", tmp_path / "out").proof[0].exact


@pytest.mark.parametrize(
    ("rope", "width"),
    [("default", 2), ("linear", 4), ("llama3", 8), ("yarn", 8), ("no yarn", 8)],
)
def test_no_bit_is_lost_in_bf16(rope, width, tmp_path):
    """The scale is in the config, whatever the rotary embedding; a rotary key narrower than a head has every second frequency."""
    found = export(made(tmp_path, rope=rope, rope_dim=width, dtype=torch.bfloat16), "auto", tmp_path / "out").proof
    assert all(proof.exact for proof in found)


def as_the_base(config, rope):
    return dict(config.rope_parameters)


def with_the_usual_ramp(config, rope):
    return {key: value for key, value in right(config, rope).items() if not key.startswith("beta")}


def longer(config, rope):
    return {**right(config, rope), "attention_factor": 1.1}


right = deepseek.rope_parameters
WRONG = {
    "pairs": ("paired", lambda rows: rows, "default"),
    "scale": ("rope_parameters", as_the_base, "llama3"),
    "scale of a plain one": ("rope_parameters", as_the_base, "default"),
    "ramp": ("rope_parameters", with_the_usual_ramp, "default"),
    "YaRN's factor": ("rope_parameters", longer, "yarn"),
}


@pytest.fixture(scope="module")
def hybrids(tmp_path_factory):
    return cache(lambda rope: made(tmp_path_factory.mktemp("hybrid"), rope=rope))


@pytest.mark.parametrize("wrong", WRONG)
def test_every_part_is_needed(wrong, hybrids, tmp_path, monkeypatch):
    name, function, rope = WRONG[wrong]
    hybrid = hybrids(rope)
    monkeypatch.setattr(deepseek, name, function)
    assert difference(hybrid, tmp_path / "out") > 1e-3


def test_a_seeded_layer_exports_too(tmp_path):
    """Norms of a seed are what the latent's are, and its rows what the base's are."""
    base = open_base(tiny_base("qwen3", tmp_path, **SMALL))
    ids = torch.randint(3, 64, (2, 20), generator=torch.Generator().manual_seed(1))
    convert(plan(base, section(), "t", 0), tmp_path / "hybrid", ids)
    assert export(tmp_path / "hybrid", "auto", tmp_path / "out").proof[0].exact


def engines(rope="default", layers=3, **base):
    config = AutoConfig.for_model("llama", **SIZES, rope_parameters={"rope_theta": 10000.0, **ROPES[rope]}, **base)
    mixers = [{"name": "mla", **vars(MIXERS.build(MLA))}] * layers
    return {
        engine: (said["target"] != "none", said["reason"]) for engine, said in native_verdict(config, mixers)["engines"].items()
    }


def test_engines():
    found = engines(rms_norm_eps=1e-5)
    assert found["transformers"] == (True, "DeepseekV3ForCausalLM")
    # 18 numbers a token are no width of vLLM's cache; the plugin makes them up with zeros.
    assert found["vLLM"] == (True, "with the plugin of hybridize[vllm]")
    assert found["SGLang"] == (True, "DeepseekV3ForCausalLM; its latent norm has eps 1e-05 in place of 1e-06")
    assert not found["llama.cpp"][0]
    assert "26 or 27 layers alone" in found["llama.cpp"][1]
    scaled = engines(rope="llama3")
    assert [runs for runs, _ in scaled.values()] == [True, True, False, False]
    assert scaled["SGLang"][1] == "reads a rotary embedding of type llama3 as DeepSeek's YaRN, which is another"


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.parametrize(("name", "new"), [("stories260K", 200), ("tinystories-656k", 60), ("babyllama-tok105", 60)])
def test_a_real_model_where_hybridize_is_not(name, new, shared_data, tmp_path):
    folder = shared_data / "models" / name
    tokenizer = AutoTokenizer.from_pretrained(folder)
    documents = islice(read_documents(shared_data / "text" / "tinystories" / "v1_dev.txt"), 60)
    rows = eval_blocks(tokenize(tokenizer, documents), 128, 1)
    base = open_base(folder)
    convert(plan(base, section(kv_rank="full"), "t", 0), tmp_path / "hybrid", rows[:24])
    assert_same(tmp_path / "hybrid", "auto", tmp_path / "out", CLASS, new, base.config.vocab_size, elsewhere=True)
