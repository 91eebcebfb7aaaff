"""Stage `long`: the stretched embedding against its formula, growing rows, and what comes after reads the new context."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from hybridize.checkpoint import describe, load_model, open_checkpoint
from hybridize.data import Batch, Tokens
from hybridize.distill import distill, teach
from hybridize.distill.cost import Machine, run_cost
from hybridize.distill.job import configs_of
from hybridize.distill.long import stretched
from hybridize.distill.run import build_stages, load_pair
from hybridize.distill.stages import STAGES
from hybridize.errors import ConfigError
from hybridize.eval.context import EvalContext
from hybridize.families import FAMILIES, family_of
from hybridize.modeling import state_bytes
from hybridize.pipeline import fitted
from tests.distill.pair import KEEP, STREAMING, tiny_pair, tiny_tokens
from tests.distill.test_distill import Stop, hashes, rows_of, stop_after
from tests.tiny import SIZES, tiny_base
from tests.tolerances import TOLERANCES, assert_close, rms_ratio

MLA = {"name": "mla", "rope_dim": 4}
# A base made for 128 tokens, then rows of up to 512: 2 + 2 + 2 steps of 512 tokens.
LONG = {
    "name": "long", "contexts": [64, 256, 512], "tokens": 6 * 512, "rows": 1, "accumulate": 1, "lr": 1e-3,
    "teacher_rope": "yarn", "documents": "joined", "save_tokens": 512,
}  # fmt: skip
# Rows that only the new context has room for.
AFTER = {"name": "kl", "tokens": 2 * 300, "seq_tokens": 300, "rows": 1, "losses": [{"name": "cross_entropy"}]}
STAGED = [LONG, AFTER]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return tiny_pair(tmp_path_factory.mktemp("pair"), (STREAMING, KEEP, MLA))


@pytest.fixture(scope="module")
def whole(folders, tmp_path_factory):
    torch.set_num_threads(1)
    return distill(folders[1], STAGED, tiny_tokens(), tmp_path_factory.mktemp("whole") / "out")


def config_of(family="llama", **fields):
    extra = {"sliding_window": None} if family == "mistral" else {}
    return AutoConfig.for_model(family, **{**SIZES, "dtype": "float32", **extra, **fields})


def rope(kind, **more):
    return {"rope_type": kind, "rope_theta": 10000.0, **more}


def yarn_by_definition(base, width, original, factor):
    """(inverse frequencies, length of cos and sin), fp64: Peng et al., arXiv 2309.00071, with the authors' whole borders."""
    plain = base ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    # The (fractional) pair that turns so many times within the original context.
    low, high = (width * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base)) for turns in (32, 1))
    low, high = max(math.floor(low), 0), min(math.ceil(high), width - 1)
    slowed = ((torch.arange(width // 2, dtype=torch.float64) - low) / (high - low)).clamp(0, 1)
    return plain * (1 - slowed) + plain / factor * slowed, 0.1 * math.log(factor) + 1


@pytest.mark.parametrize("family", FAMILIES)
def test_angles_are_those_of_yarn(family):
    config = stretched(config_of(family), 512, "yarn", "student")
    rotary = family_of(config).rotary(config)
    cos, sin = (angle[0].double() for angle in rotary(torch.zeros(1), torch.arange(512)[None]))

    def expected(factor, lengthened=True):
        frequencies, length = yarn_by_definition(1e4, 8, 128, factor)
        turned = torch.arange(512)[:, None] * torch.cat([frequencies, frequencies])
        return torch.stack([turned.cos(), turned.sin()]) * (length if lengthened else 1)

    # Positions in fp32 are good to 512 * 2^-24; the frequencies themselves are at full precision.
    assert_close(rotary.inv_freq, yarn_by_definition(1e4, 8, 128, 4)[0], "fp32")
    assert rms_ratio(torch.stack([cos, sin]), expected(4)) < 1e-4
    assert_close(torch.stack([cos, sin])[:, :16], expected(4)[:, :16], "fp32")
    for wrong in (expected(2), expected(1), expected(4, lengthened=False)):
        assert rms_ratio(torch.stack([cos, sin]), wrong) > 0.05


def test_within_the_context_nothing_changes():
    config = config_of()
    for tokens in (16, 128):
        assert stretched(config, tokens, "yarn", "student") is config
    kept = stretched(config, 512, "keep", "student")
    assert (kept.max_position_embeddings, kept.rope_parameters) == (512, config.rope_parameters)


def test_what_is_stretched_already_goes_on_from_its_original():
    once = stretched(config_of(), 256, "yarn", "student")
    twice = stretched(once, 1024, "yarn", "student")
    assert twice.rope_parameters == stretched(config_of(), 1024, "yarn", "student").rope_parameters
    assert twice.max_position_embeddings == 1024
    # A factor of 4 beyond what the config says is a context already.
    config = config_of(rope_parameters=rope("yarn", factor=4.0, original_max_position_embeddings=128))
    found = stretched(config, 256, "yarn", "student")
    assert (found.max_position_embeddings, found.rope_parameters) == (512, config.rope_parameters)
    ratio = config_of(
        rope_parameters=rope("yarn", factor=2.0, original_max_position_embeddings=64, mscale=1.0, mscale_all_dim=0.5)
    )
    expected = (0.1 * math.log(16) + 1) / (0.05 * math.log(16) + 1)
    assert stretched(ratio, 1024, "yarn", "student").rope_parameters["attention_factor"] == pytest.approx(expected)


LLAMA3 = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)


@pytest.mark.parametrize(
    ("parameters", "how", "words"),
    [
        (LLAMA3, "yarn", "of type llama3, which yarn does not go on from; set rope to keep.* or set contexts to at most 128"),
        (rope("linear", factor=2.0), "yarn", "of type linear, which yarn does not go on from; set rope to keep"),
        (rope("dynamic", factor=2.0), "yarn", "of type dynamic, which yarn does not go on from; set contexts to at most 128"),
        (rope("dynamic", factor=2.0), "keep", "of type dynamic, whose angles depend on the context; set rope to yarn, or"),
        (rope("default", partial_rotary_factor=0.5), "yarn", "with partial_rotary_factor, which yarn would read in another way"),
        (
            rope("yarn", factor=2.0, original_max_position_embeddings=64, attention_factor=1.3), "yarn",
            "an attention_factor of 1.3, which was chosen for a factor of 2",
        ),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_stretched_is_refused(parameters, how, words):
    with pytest.raises(ConfigError, match=words) as caught:
        stretched(config_of(rope_parameters=parameters), 512, how, "student")
    assert "\n" not in str(caught.value)
    if parameters is LLAMA3:
        assert stretched(config_of(rope_parameters=LLAMA3), 512, "keep", "student").rope_parameters["rope_type"] == "llama3"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"contexts": []}, "contexts is \\[\\], expected rising numbers"),
        ({"contexts": [64, 64]}, "expected rising numbers"),
        ({"contexts": [48, 512]}, "contexts has 48, expected a divisor of the longest \\(512\\)"),
        ({"shares": [1.0]}, "shares is \\[1.0\\], expected 3 numbers above 0"),
        ({"shares": [1.0, 0.0, 1.0]}, "expected 3 numbers above 0"),
        ({"seq_tokens": 64}, "seq_tokens is 64, expected none beside contexts"),
        ({"tokens": 1024}, "tokens is 1024, which are 2 steps of 512; expected one at least for each of the 3 contexts"),
        ({"tokens": 100}, "expected at least one step of 512"),
        ({"rope": "ntk"}, "rope is 'ntk', expected one of 'yarn', 'keep'"),
    ],
    ids=str,
)
def test_options_that_make_no_sense(change, words):
    with pytest.raises(ConfigError, match=words) as caught:
        STAGES.build({**LONG, **change})
    assert "\n" not in str(caught.value)


def test_rows_that_a_teacher_has_no_positions_for(folders, tmp_path):
    base, student = folders
    without = {key: value for key, value in LONG.items() if key != "teacher_rope"}
    for stages, words in (
        (
            [without],
            "'long': seq_tokens is 512, .* teacher's max_position_embeddings of 128; set teacher_rope to yarn, or losses",
        ),
        ([LONG, {**AFTER, "losses": [{"name": "kl"}]}], "'kl': seq_tokens is 300, expected at most the teacher's"),
        ([LONG, {**AFTER, "seq_tokens": 600}], "'kl': seq_tokens is 600, expected at most the student's .* of 512"),
    ):
        with pytest.raises(ConfigError, match=words) as caught:
            distill(student, stages, tiny_tokens(), tmp_path / "out")
        assert "\n" not in str(caught.value)
    found, teacher = (open_checkpoint(path).config for path in (student, base))
    (own, other), (later, plain) = configs_of(found, teacher, build_stages(STAGED))
    assert own.max_position_embeddings == other.max_position_embeddings == later.max_position_embeddings == 512
    assert own.rope_parameters == other.rope_parameters == later.rope_parameters
    assert plain is teacher
    assert found.max_position_embeddings == 128
    alone = build_stages([{**without, "losses": [{"name": "cross_entropy"}]}])
    assert configs_of(found, teacher, alone)[0][1] is teacher


def test_the_output_has_the_new_context(folders, whole):
    base, student = folders
    saved = json.loads((whole / "config.json").read_text())
    assert saved["max_position_embeddings"] == 512
    assert saved["rope_parameters"] == {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128,
        "attention_factor": pytest.approx(0.1 * math.log(4) + 1),
    }  # fmt: skip
    before = json.loads((student / "config.json").read_text())
    assert {k for k in saved if saved[k] != before.get(k)} == {"max_position_embeddings", "rope_parameters"}
    record = json.loads((whole / "lineage.json").read_text())["distill"][0]["stages"][0]
    assert (record["contexts"], record["rope"], record["teacher_rope"]) == ([64, 256, 512], "yarn", "yarn")
    found = describe(whole).config
    assert state_bytes(found, 512) == state_bytes(describe(student).config, 512)
    model = load_model(whole)
    assert model.model.layers[2].self_attn.plain_scale == pytest.approx((0.1 * math.log(4) + 1) ** 2)
    ids = torch.from_numpy(tiny_tokens(200).ids.astype("int64"))[None]
    text = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(model.generate(ids, **text), model.generate(ids, use_cache=False, **text))


def test_probes_read_blocks_that_the_base_has_room_for(folders, whole):
    """Unless told otherwise: figures before and after are of the same blocks."""
    contexts = [
        EvalContext(checkpoint=p, model=SimpleNamespace(config=describe(p).config), tokenizer=None) for p in (*folders, whole)
    ]
    assert [context.usual_tokens for context in contexts] == [128, 128, 128]
    contexts[2].need_context("perplexity", 512)


def test_contexts_come_in_order_with_one_schedule_and_equal_steps(whole):
    rows = [row for row in rows_of(whole) if row["name"] == "long"]
    assert [row["seq_tokens"] for row in rows] == [64] * 2 + [256] * 2 + [512] * 2
    assert [row["tokens"] for row in rows] == [512 * step for step in range(1, 7)]
    fall = [0.1 + 0.9 * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(5)]
    assert [row["lr"] / 1e-3 for row in rows] == pytest.approx([1.0, *fall])
    options = STAGES.build({**LONG, "shares": [1, 1, 2], "rows": 2, "accumulate": 3, "tokens": 8 * 6 * 512})
    assert [(p.seq_tokens, p.rows, p.accumulate, p.steps) for p in options.parts] == [
        (64, 16, 3, 2), (256, 4, 3, 2), (512, 2, 3, 4),
    ]  # fmt: skip
    assert {part.step_tokens for part in options.parts} == {6 * 512}
    assert [options.place(step) for step in range(8)] == [(0, 0), (0, 1), (1, 0), (1, 1), *((2, step) for step in range(4))]


def test_a_run_stopped_in_its_second_context_resumes_to_the_same_bytes(folders, whole, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(Stop):
        distill(folders[1], STAGED, tiny_tokens(), out, progress=stop_after(3))
    distill(folders[1], STAGED, tiny_tokens(), out, resume=True)
    assert hashes(out) == hashes(whole)


def test_a_resume_that_began_its_context_again_would_show(folders, whole, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with pytest.raises(Stop):
        distill(folders[1], STAGED, tiny_tokens(), out, progress=stop_after(3))
    place = STAGES.load("long").place
    monkeypatch.setattr(STAGES.load("long"), "place", lambda self, step: (place(self, step)[0], 0))
    distill(folders[1], STAGED, tiny_tokens(), out, resume=True)
    assert hashes(out) != hashes(whole)


def test_the_loss_is_that_of_two_stretched_models(folders):
    """kl from the two directories' own weights, both loaded with the new config; the old one has another."""
    options = STAGES.build(LONG)
    ids = torch.from_numpy(tiny_tokens(512).ids.astype("int64"))[None]
    configs = configs_of(*(open_checkpoint(path).config for path in folders[::-1]), [("long", options)])[0]
    found = {}
    for name, used in (("new", configs), ("old", (None, None))):
        student, teacher, _ = load_pair(folders[1], folders[0], options, "long", {}, torch.device("cpu"), None, 0, used)
        found[name] = options.start(student, teacher, Batch(ids))(Batch(ids), 1.0)["loss"]
    with torch.no_grad():
        models = [load_model(path, None, config) for path, config in zip(folders[::-1], configs, strict=True)]
        log_q, log_p = (model(ids).logits.log_softmax(-1) for model in models)
    expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    assert_close(found["new"], expected, "fp32")
    assert rms_ratio(found["old"], expected) > 100 * TOLERANCES["fp32"][0]


def test_a_second_run_goes_on_from_the_first_one(whole, folders, tmp_path):
    again = {**LONG, "contexts": [512, 1024], "tokens": 2 * 1024}
    out = distill(whole, [again], tiny_tokens(), tmp_path / "out", teacher=folders[0])
    saved = json.loads((out / "config.json").read_text())
    assert (saved["rope_parameters"]["factor"], saved["rope_parameters"]["original_max_position_embeddings"]) == (8.0, 128)
    assert (saved["rope_parameters"]["attention_factor"], saved["max_position_embeddings"]) == (0.1 * math.log(8) + 1, 1024)


def test_documents_apart_must_reach_where_rows_are_long_for(caplog):
    def text(*lengths):
        ids = np.full(sum(lengths), 5, dtype=np.int32)
        return Tokens(ids=ids, text_bytes=1, sha256="x", bos_id=1, starts=np.cumsum([0, *lengths[:-1]]))

    options = STAGES.build({**LONG, "documents": "reset"})
    with pytest.raises(ConfigError, match="longest document has 256 tokens .* no row would teach more than one of 256"):
        options.check_text(text(9, 255, 3))
    options.check_text(text(9, 511, 3))
    assert not caplog.records
    options.check_text(text(9, 256, 3))
    assert "the longest document has 257 tokens" in caplog.text
    STAGES.build(LONG).check_text(text(9, 5))
    assert STAGES.build({key: value for key, value in LONG.items() if key != "documents"}).documents == "reset"


def test_what_each_context_costs_is_said(folders):
    some = {"train": ["*.layers.2.*"]}
    small = {**LONG, **some, "contexts": [64, 256], "tokens": 512}
    stages = build_stages([small, {**AFTER, **some, "seq_tokens": 64}])
    costs = run_cost(folders[1], folders[0], stages, Machine())
    assert [(cost.name, cost.stage, cost.steps) for cost in costs] == [
        ("long at 64", 1, 1), ("long at 256", 1, 1), ("kl", 2, 9),
    ]  # fmt: skip
    assert costs[0].tokens == costs[1].tokens == 256
    assert costs[0].flops < costs[1].flops
    # Rows times tokens are the same; weights, gradients and moments do not follow the rows.
    assert len({cost.certain_bytes for cost in costs[:2]}) == 1
    # No teacher where the loss is with the text alone.
    assert costs[2].memory["frozen"] < costs[1].memory["frozen"]


def test_recipes_cut_rows_to_the_context_but_not_those_of_long():
    config = config_of()
    plain = {"name": "kl", "tokens": 10_000, "seq_tokens": 600, "rows": 1}
    assert fitted([plain, LONG, plain], config) == [{**plain, "seq_tokens": 128}, LONG, {**plain, "seq_tokens": 512}]


@pytest.mark.slow
def test_divided_weights_and_checkpoints_change_nothing(folders, whole, tmp_path):
    for extra, shard in (({"gradient_checkpointing": True}, False), ({}, True)):
        out = tmp_path / f"out-{shard}"
        distill(folders[1], [{**LONG, **extra}, AFTER], tiny_tokens(), out, shard=shard)
        assert (out / "config.json").read_bytes() == (whole / "config.json").read_bytes()
        mine, theirs = (load_model(path).state_dict() for path in (out, whole))
        joined = [torch.cat([tensor.flatten() for tensor in state.values()]) for state in (mine, theirs)]
        assert rms_ratio(*joined) < 1e-4


@pytest.mark.slow
def test_a_cached_stage_behind_it_has_its_context(folders, tmp_path):
    """Rows that only the stretched student and a teacher of a long context have room for, from a cache as from the teacher."""
    far = tiny_base("llama", tmp_path, max_position_embeddings=1024)
    losses = [{"name": "cross_entropy"}]
    stages = [{**LONG, "losses": losses, "teacher_rope": "keep"}, {**AFTER, "losses": [{"name": "kl"}]}]
    said = teach(folders[1], stages, tiny_tokens(), tmp_path / "said", teacher=far)
    found = [
        distill(folders[1], stages, tiny_tokens(), tmp_path / out, teacher=t) for out, t in (("live", far), ("cached", said))
    ]
    assert hashes(found[0])["model.safetensors"] == hashes(found[1])["model.safetensors"]
