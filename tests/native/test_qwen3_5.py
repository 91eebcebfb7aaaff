"""Qwen3 with Gated DeltaNet as qwen3_5_text: the same function in every dtype, and each thing that is undone is needed."""

import pytest
import torch
from transformers import AutoConfig
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5TextRotaryEmbedding

from hybridize.errors import ConfigError
from hybridize.mixers import MIXERS
from hybridize.native import native_verdict, qwen3_5
from hybridize.native.export import export
from tests.native.exported import assert_same, difference
from tests.native.hybrids import random_hybrid
from tests.tiny import SIZES

GDN = {"name": "gdn", "proj_bias": False, "qk_norm": False}
KEPT = {"name": "attention"}
LAYERS = {"layers": {1: KEPT, 2: {**GDN, "heads": "grouped"}, "default": GDN}}
CLASS = "Qwen3_5ForCausalLM"


def made(tmp_path, *args, **overrides):
    return random_hybrid("qwen3", tmp_path, LAYERS, *args, **{"max_position_embeddings": 64, **overrides})


@pytest.mark.parametrize("tied", [True, False])
def test_the_export_is_the_hybrid(tied, tmp_path):
    hybrid = made(tmp_path, tie_word_embeddings=tied)
    if tied:
        assert_same(hybrid, "auto", tmp_path / "out", CLASS, new_tokens=12)
    else:
        assert export(hybrid, "auto", tmp_path / "out").proof[0].exact


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_no_bit_is_lost_in_half_precision(dtype, tmp_path):
    """Norms of any size and sign: those of the stream go through the next linear, a rotary pair's through the other norm."""
    ranges = {"norms": (-0.4, 0.4), "qk_norms": ((0.02, 0.1), (20.0, 60.0))}
    found = export(made(tmp_path, dtype, **ranges, tie_word_embeddings=False), "auto", tmp_path / "out").proof
    assert all(proof.exact for proof in found)


@pytest.mark.parametrize(
    "ranges",
    [{"norms": (0.02, 0.2), "tie_word_embeddings": True}, {"qk_norms": ((0.02, 0.1), (0.5, 1.5)), "tie_word_embeddings": False}],
    ids=["head", "q_norm"],
)
def test_what_rounds_is_refused(ranges, tmp_path):
    """A tied head's columns cannot be scaled, and a pair small in the q-norm needs one large in the k-norm."""
    with pytest.raises(ConfigError, match="computes another function"):
        export(made(tmp_path, torch.bfloat16, **ranges), "auto", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_norm_and_what_reads_it_are_the_norm(dtype):
    weight = torch.cat([torch.randn(500) * 10 ** torch.linspace(-4, 2, 500), torch.tensor([0.0, 1.0, 2.0, -1.0])]).to(dtype)
    rows = torch.randn(3, len(weight)).to(dtype)
    product = (1 + qwen3_5._norm(weight).double()) * qwen3_5._behind_norm(rows, weight).double()
    want = weight.double() * rows.double()
    # fp16 has no smaller numbers to put a tiny weight into.
    assert (product == want)[want.abs() > (2e-4 if dtype == torch.float16 else 0)].all()
    assert (product - want).abs().max() < 1e-7


def by_tiling(config, spec):
    def repeated(rows):
        q, k, v = rows.split([32, 16, 16])
        return torch.cat([q, k, k, v, v])

    return repeated if spec["heads"] == "grouped" else None


def quarter(self, config, mixers):
    fields = right(self, config, mixers)
    return {**fields, "rope_parameters": {**fields["rope_parameters"], "partial_rotary_factor": 0.25}}


right = qwen3_5.Qwen35.config
WRONG = {
    "gate": (qwen3_5, "_ungated", lambda rows, width: rows.unflatten(0, (-1, width)).repeat(1, 2, 1).flatten(0, 1)),
    "o_proj": (qwen3_5, "_doubled", lambda rows: rows),
    "zero-centred": (qwen3_5, "_less_one", lambda weight: weight),
    "columns": (qwen3_5, "_behind_norm", lambda rows, norm: rows),
    "signs": (qwen3_5, "_signed", lambda rows, before, norm: qwen3_5._behind_norm(rows, before)),
    "heads": (qwen3_5, "_repeated", by_tiling),
    "rotary": (qwen3_5.Qwen35, "config", quarter),
}


@pytest.fixture(scope="module")
def crooked(tmp_path_factory):
    """A hybrid whose norms need every part."""
    ranges = {"norms": (0.1, 0.4), "qk_norms": ((-1.5, 1.5), (0.5, 1.5))}
    return made(tmp_path_factory.mktemp("crooked"), **ranges, tie_word_embeddings=False)


@pytest.mark.parametrize("wrong", WRONG)
def test_every_part_is_needed(wrong, crooked, tmp_path, monkeypatch):
    monkeypatch.setattr(*WRONG[wrong])
    assert difference(crooked, tmp_path / "out") > 1e-3


ROPES = [
    {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
]  # fmt: skip


def config_of(family="qwen3", **base):
    return AutoConfig.for_model(family, **{**SIZES, "dtype": "float32", **base})


def whole(*specs):
    """Mixers with every option."""
    return [{"name": spec["name"], **vars(MIXERS.build(spec))} for spec in specs]


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope["rope_type"])
def test_every_rotary_embedding_is_the_bases(rope):
    base = config_of(rope_parameters={"rope_theta": 10000.0, **rope})
    native = AutoConfig.for_model(**qwen3_5.Qwen35().config(base, whole(KEPT, GDN, GDN)))
    x, ids = torch.zeros(1, 1, 8), torch.arange(300)[None]
    want, found = Qwen3RotaryEmbedding(base)(x, ids), Qwen3_5TextRotaryEmbedding(native)(x, ids)
    assert all(torch.equal(a, b) for a, b in zip(want, found, strict=True))


@pytest.mark.parametrize(
    ("mixers", "base", "words"),
    [
        ((KEPT, {"name": "gdn"}), {}, "no place for proj_bias: true"),
        ((KEPT, {**GDN, "qk_norm": True}), {}, "no place for qk_norm: true"),
        ((KEPT, {**GDN, "rope": True}), {}, "no place for rope: true"),
        ((KEPT, {**GDN, "beta_max": 2}), {}, "no place for beta_max: 2"),
        ((KEPT, {**GDN, "norm_eps": 1e-3}), {}, "norm_eps is 0.001"),
        ((KEPT, GDN, {**GDN, "conv_tokens": 2}), {}, "one conv_tokens"),
        ((GDN, GDN), {}, "at least one attention layer"),
        ((KEPT, GDN), {"family": "llama"}, "q/k-norms in its attention layers, which the base has not"),
        ((KEPT, GDN), {"attention_bias": True}, "biases in its attention"),
        ((KEPT, GDN), {"hidden_act": "gelu"}, "hidden_act is gelu"),
        ((KEPT, GDN, {"name": "mamba2"}), {}, "mixes attention, gdn, mamba2"),
    ],
)
def test_no_native_class(mixers, base, words):
    found = native_verdict(config_of(**base), whole(*mixers))
    assert found["target"] == "none"
    assert words in found["reason"]


@pytest.mark.parametrize(
    ("mixers", "every"),
    [((GDN, KEPT, GDN), 2), ((GDN, GDN, KEPT), 3), ((GDN, KEPT, KEPT), None), ((KEPT, GDN, KEPT), None)],
)
def test_engines_that_go_by_an_interval(mixers, every):
    """Counted from the end of the first stretch; a plan that keeps layers in another order is for the other engines."""
    assert qwen3_5.interval(whole(*mixers)) == every
    found = native_verdict(config_of(), whole(*mixers))
    runs = {engine: said["target"] == "qwen3_5_text" for engine, said in found["engines"].items()}
    assert runs == {"transformers": True, "vLLM": True, "SGLang": every is not None, "llama.cpp": every is not None}
    fields = qwen3_5.Qwen35().config(config_of(), whole(*mixers))
    assert fields.get("full_attention_interval") == every


@pytest.mark.slow
def test_where_hybridize_is_not(tmp_path):
    """Longer than a chunk, in a process that has transformers alone."""
    hybrid = made(tmp_path, head_dim=16, tie_word_embeddings=False, max_position_embeddings=512)
    assert_same(hybrid, "auto", tmp_path / "out", CLASS, new_tokens=200, elsewhere=True)
