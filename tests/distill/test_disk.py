"""Alignment from disk: the weights of the engine in memory, bit for bit, whatever stops it on the way."""

import json

import pytest
import torch
from safetensors.torch import load_file

from hybridize.checkpoint import describe
from hybridize.data import Tokens
from hybridize.distill import disk, distill, loop, metrics_path
from hybridize.distill.align import Align
from hybridize.distill.options import StageOptions
from hybridize.distill.stages import STAGES
from hybridize.distill.streams import Rows, readers_of, scratch_bytes
from hybridize.errors import ConfigError
from hybridize.lineage import read_lineage
from hybridize.modeling import mixer_options
from hybridize.storage import partial_folder
from tests.distill.pair import BOTH, KEEP, STREAMING, tiny_pair, tiny_tokens
from tests.distill.test_distill import Stop, stop_after

ALIGN = {
    "name": "align",
    "tokens": 3 * 64,
    "seq_tokens": 16,
    "rows": 4,
    "lr": 3e-3,
    "save_tokens": 64,
    "clip": 0.05,
    "losses": BOTH,
}
KL = {"name": "kl", "tokens": 64, "seq_tokens": 16, "rows": 4}
MAMBA, GMU, XKV = {"name": "mamba2"}, {"name": "gmu", "reads": 0}, {"name": "xkv", "group_layers": 2}
MATRIX = [{"name": "mixing_matrix"}, {"name": "relations"}, {"name": "mixer_output", "at": "context"}]


@pytest.fixture(scope="module")
def readers(tmp_path_factory):
    """A layer that reads another one's memory, with a layer between them that learns by itself."""
    torch.manual_seed(0)
    return tiny_pair(tmp_path_factory.mktemp("readers"), (MAMBA, STREAMING, GMU), attention_bias=True)


def run(folders, out, stages, engine, **about):
    stages = [{**stage, "engine": engine} if stage["name"] == "align" else stage for stage in stages]
    return distill(folders[1], stages, tiny_tokens(), out, teacher=folders[0], **about)


def weights(out):
    return load_file(out / "model.safetensors")


def same(one, two):
    one, two = weights(one), weights(two)
    return all(torch.equal(one[name], two[name]) for name in one)


def rows_of(out):
    return [json.loads(line) for line in metrics_path(out).read_text().splitlines()]


def packed() -> Tokens:
    starts = torch.arange(0, 4000, 9).numpy()
    return Tokens(ids=tiny_tokens().ids, text_bytes=1, sha256="packed", bos_id=1, starts=starts)


@pytest.mark.parametrize(
    ("mixers", "overrides", "options"),
    [
        ((XKV, {**XKV, "reads": 0}, STREAMING), {"dtype": "bfloat16"}, {"dtype": "bf16", "rows": 2, "accumulate": 2}),
        pytest.param(
            (KEEP, {"name": "lolcats", "window_tokens": 4}, KEEP),
            {"tie_word_embeddings": True},
            {"losses": MATRIX},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["memories, bf16", "matrices"],
)
def test_the_weights_are_those_of_the_engine_in_memory(tmp_path, mixers, overrides, options):
    torch.manual_seed(0)
    folders = tiny_pair(tmp_path, mixers, **overrides)
    outs = [run(folders, tmp_path / engine, [{**ALIGN, **options}], engine) for engine in ("memory", "disk")]
    assert same(*outs)
    assert not same(outs[1], folders[1])
    assert not partial_folder(outs[1]).exists()


@pytest.fixture(scope="module")
def whole(readers, tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole")
    stages = [{**ALIGN, "documents": "reset"}, {**ALIGN, "lr": 1e-3, "train": ["*.layers.[12].*"]}, KL]
    calls = []
    return {
        "stages": stages, "memory": distill(readers[1], stages, packed(), folder / "memory", teacher=readers[0]),
        "disk": distill(
            readers[1], [{**s, "engine": "disk"} if s["name"] == "align" else s for s in stages], packed(), folder / "disk",
            teacher=readers[0], progress=lambda label, done, total: calls.append((label, done / total)),
        ),
        "calls": calls,
    }  # fmt: skip


@pytest.mark.slow
def test_stages_one_after_the_other_and_layers_that_stay_frozen(whole):
    """Two stages from disk, documents apart, a reader of a layer that learns and of one that does not; then kl as ever."""
    assert same(whole["memory"], whole["disk"])
    about = [read_lineage(whole[name])["distill"][0]["stages"] for name in ("memory", "disk")]
    assert [stage.get("engine") for stage in about[1]] == ["disk", "disk", None]
    assert [{**stage, "engine": 0} for stage in about[0]] == [{**stage, "engine": 0} for stage in about[1]]
    rows = rows_of(whole["disk"])
    assert [(r["stage"], r["step"]) for r in rows] == [(s, i) for s, n in ((1, 9), (2, 6), (3, 1)) for i in range(1, n + 1)]
    assert [done for label, done in whole["calls"] if "align" in label][:9] == [pytest.approx(i / 9) for i in range(1, 10)]
    # Layer by layer what the other engine logs step by step.
    both = rows_of(whole["memory"])
    for index in range(3):
        for step in range(3):
            assert rows[3 * index + step][f"layer.{index}"] == both[step][f"layer.{index}"]


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 5, 9, 13])
def test_a_stopped_run_resumes_to_the_same_weights(readers, whole, tmp_path, steps):
    stages = [{**s, "engine": "disk"} if s["name"] == "align" else s for s in whole["stages"]]
    with pytest.raises(Stop):
        distill(readers[1], stages, packed(), tmp_path / "out", teacher=readers[0], progress=stop_after(steps))
    out = distill(readers[1], stages, packed(), tmp_path / "out", teacher=readers[0], resume=True)
    assert same(out, whole["disk"])
    drop = {"tokens_per_s"}
    assert [{k: v for k, v in r.items() if k not in drop} for r in rows_of(out)] == [
        {k: v for k, v in r.items() if k not in drop} for r in rows_of(whole["disk"])
    ]


@pytest.mark.slow
def test_a_wrong_stream_or_memory_would_show(readers, whole, tmp_path, monkeypatch):
    """Rounded on its way through a file; or of another step: each is other weights."""
    stages, right = [ALIGN], run(readers, tmp_path / "right", [ALIGN], "disk")
    real = Rows.read
    monkeypatch.setattr(Rows, "read", lambda self, row, count: real(self, row, count).bfloat16().float())
    assert not same(run(readers, tmp_path / "rounded", stages, "disk"), right)
    late = lambda self, row, count: real(self, 0 if "memory" in self.path.name else row, count)  # noqa: E731
    monkeypatch.setattr(Rows, "read", late)
    found, right = weights(run(readers, tmp_path / "late", stages, "disk")), weights(right)
    changed = {name for name in found if not torch.equal(found[name], right[name])}
    assert changed
    assert all(".layers.2." in name for name in changed)


@pytest.mark.slow
def test_a_file_that_was_cut_or_removed_is_named(readers, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(Stop):
        run(readers, out, [ALIGN], "disk", progress=stop_after(2))
    folder = partial_folder(out) / "scratch" / "disk-00"
    assert sorted(path.name for path in folder.iterdir()) == [
        "memory-00000.float32", "state-00-000000001.safetensors", "stream-00000", "stream-00001.partial",
    ]  # fmt: skip
    for name, reason in (("stream-00000", "was cut"), ("stream-00001.partial", "has 0 b"), ("memory-00000.float32", "has 0 b")):
        kept = (folder / name).read_bytes()
        (folder / name).write_bytes(kept[: len(kept) // 2 if name == "stream-00000" else 0])
        with pytest.raises(ConfigError, match=f"{name}.*{reason}.*start again"):
            run(readers, out, [ALIGN], "disk", resume=True)
        (folder / name).write_bytes(kept)
    run(readers, out, [ALIGN], "disk", resume=True)


@pytest.mark.slow
def test_layers_neither_shorten_nor_skip_each_others_steps(readers, tmp_path, monkeypatch):
    alone = run(readers, tmp_path / "alone", [{**ALIGN, "train": ["*.layers.1.*"]}], "memory")
    together = run(readers, tmp_path / "together", [ALIGN], "memory")
    names = [name for name in weights(alone) if ".layers.1." in name]
    assert all(torch.equal(weights(alone)[name], weights(together)[name]) for name in names)
    real = loop.judge

    def judge(guard, on_spike, name, losses, *args):
        """Every step of one layer is a spike but the first."""
        return real(guard, on_spike, name, losses, *args) and not (name == "layer.1" and guard.losses)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "judge", judge)
        skipped = [run(readers, tmp_path / f"skipped-{e}", [ALIGN], e) for e in ("memory", "disk")]
    assert same(*skipped)
    assert [row.get("skipped", 0) for row in rows_of(skipped[0])] == [0, 1, 1]
    found, right = weights(skipped[0]), weights(together)
    changed = {name for name in found if not torch.equal(found[name], right[name])}
    assert changed
    assert all(".layers.1." in name for name in changed)
    # With one norm for all of them, as other stages have it, the first assertion would fail.
    monkeypatch.setattr(Align, "learners", StageOptions.learners)
    shorter = weights(run(readers, tmp_path / "shorter", [ALIGN], "memory"))
    assert not all(torch.equal(weights(alone)[name], shorter[name]) for name in names)


@pytest.mark.slow
def test_what_it_cannot_do_is_one_line(readers, tmp_path, monkeypatch):
    for options, reason in (
        ({"parallel": "layers"}, "engine is disk and parallel layers"),
        ({"lora": {"targets": ["*.self_attn.q_proj"]}}, "engine is disk and lora"),
        ({"train": ["*.mlp.*"]}, "which matches none"),
        ({"gradient_checkpointing": True}, "gradient_checkpointing is true"),
    ):
        with pytest.raises(ConfigError, match=reason):
            run(readers, tmp_path / "out", [{**ALIGN, **options}], "disk", resume=True)
    with pytest.raises(ConfigError, match="engine is disk with --shard, expected one process"):
        run(readers, tmp_path / "shard", [ALIGN], "disk", shard=True)
    with pytest.raises(ConfigError, match="attention_dropout is 0.1, expected 0"):
        run(tiny_pair(tmp_path, attention_dropout=0.1), tmp_path / "drop", [ALIGN], "disk")
    asked = []
    monkeypatch.setattr(disk, "require_space", lambda folder, needed: asked.append(needed))
    run(readers, tmp_path / "space", [ALIGN], "disk")
    # Two streams of 192 tokens of width 32 and one memory of width 32, in fp32; weights twice, moments of the largest layer.
    options, mixers = STAGES.build(ALIGN), readers_mixers(readers)
    counts = trained_by_layer(readers, tmp_path / "space")
    assert asked == [int(scratch_bytes(options, mixers[0], mixers[1], counts, 4))]
    assert asked[0] == 192 * 4 * (32 * 2 + 32) + 8 * sum(counts.values()) + 36 * max(counts.values())


def readers_mixers(folders):
    config = describe(folders[1]).config
    assert readers_of(mixer_options(config)) == {0: 2}
    return config, mixer_options(config)


def trained_by_layer(folders, out):
    before, after = weights(folders[1]), weights(out)
    return {i: sum(after[n].numel() for n in before if f".layers.{i}.self_attn." in n) for i in range(3)}
