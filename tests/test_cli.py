"""The command line as its user meets it: exit codes, one-line errors, JSON, and the whole line on a tiny model."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from hybridize.checkpoint import open_checkpoint
from hybridize.cli import app
from tests.tiny import tiny_base

WORDS = ["<s>", "<unk>", *(f"w{i}" for i in range(62))]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tiny_base("llama", tmp_path_factory.mktemp("base"))
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "t.txt"
    draw = torch.randint(0, 62, (60, 80), generator=torch.Generator().manual_seed(0))
    path.write_text("\n<|endoftext|>\n".join(" ".join(f"w{int(i)}" for i in row) for row in draw))
    return path


def call(*words, capsys=None):
    """Run a command; with capsys, what this command alone printed."""
    if capsys:
        capsys.readouterr()
    code = app([str(word) for word in words])
    out = capsys.readouterr() if capsys else None
    return code, out


SMALL = [
    "--set", "distill=[{name: align, tokens: 1024, seq_tokens: 32, rows: 4}, {name: kl, tokens: 1024, seq_tokens: 32, rows: 4}]",
    "--set", "evaluate=[{name: perplexity, context: 32}, {name: kl_to_base, context: 32}, {name: state_bytes}]",
    "--set", "gates=[{name: max_ratio, metric: perplexity, max: 1.5}, {name: max_ratio, metric: state_bytes, max: 0.6}]",
]  # fmt: skip


@pytest.fixture(scope="module")
def work(base, text, tmp_path_factory):
    """The directory of a whole run."""
    out = tmp_path_factory.mktemp("run") / "w"
    assert call("--quiet", "run", "mamba2", "--base", base, "--data", text, "--out", out, *SMALL)[0] == 0
    return out


def test_the_whole_line_and_then_nothing_to_do(base, text, work, capsys):
    names = {"plan.json", "recipe.yaml", "converted", "distilled", "report.json", "report-base.json", "report-converted.json",
             "verdict.json", "report.html", "distilled.metrics.jsonl"}  # fmt: skip
    assert names <= {path.name for path in work.iterdir()}
    stamps = {name: (work / name).stat().st_mtime_ns for name in ("converted", "distilled", "report.json")}
    words = ["run", "mamba2", "--base", base, "--data", text, "--out", work]
    code, out = call("--json", *words, *SMALL, capsys=capsys)
    assert code == 0, out.err
    value = json.loads(out.out)
    assert value["verdict"]["passed"] is True
    assert value["cost"] == []
    assert [row[0] for row in value["table"]][1] == "perplexity"
    assert stamps == {name: (work / name).stat().st_mtime_ns for name in stamps}
    code, out = call(*words, "--set", "plan.keep=all", capsys=capsys)
    assert code == 2
    assert "holds the run of another plan" in out.err


@pytest.mark.slow
def test_what_a_run_will_cost_is_said_before_it_starts(base, text, tmp_path, capsys):
    out = tmp_path / "w"
    words = ["run", "mamba2", "--base", base, "--out", out, *SMALL[:2], "--set", "plan.mixer={name: streaming}"]
    # Neither text nor weights are read.
    bare = tmp_path / "base"
    bare.mkdir()
    (bare / "config.json").write_text((base / "config.json").read_text())
    dry = [str(bare) if word is base else word for word in words]
    code, said = call(*dry, "--dry-run", capsys=capsys)
    assert code == 0, said.err
    assert "streaming" in said.out
    assert "40% of 989 TFLOP/s" in said.out
    assert "fits: the most a process needs is" in said.out
    assert call(*dry, "--dry-run", "--quiet", capsys=capsys)[1].out == ""
    code, shown = call("--json", *dry, "--dry-run", capsys=capsys)
    value = json.loads(shown.out)
    assert [stage["name"] for stage in value["cost"]] == ["align", "kl"]
    assert value["cost"][0]["tokens"] == 1024
    # The same figures that distill has for the hybrid once it is there.
    assert call("convert", base, "--recipe", "mamba2", *words[-2:], "--out", tmp_path / "c")[0] == 0
    code, told = call(
        "--json", "distill", tmp_path / "c", "--recipe", "mamba2", *SMALL[:2], "--out", out, "--dry-run", capsys=capsys
    )
    assert json.loads(told.out) == value["cost"]
    code, small = call(*words, "--data", text, "--memory-gb", "0.0001", capsys=capsys)
    assert code == 2
    assert "stage 1 (align): will not fit" in small.err
    assert len(small.err.strip().splitlines()) == 1
    assert not out.exists()


def test_a_failed_gate_is_exit_code_one(base, text, work, capsys):
    words = ["run", "mamba2", "--base", base, "--data", text, "--out", work, *SMALL, "--set", "gates.0.max=0.5"]
    code, out = call(*words, capsys=capsys)
    assert code == 1
    assert out.out.rstrip().endswith("FAIL")
    code, out = call("gate", work / "report.json", "--baseline", work / "report-base.json", "--rule",
                     "max_ratio perplexity 5", capsys=capsys)  # fmt: skip
    assert code == 0
    assert out.out.rstrip().endswith("PASS")


def test_the_report_of_a_run(work, tmp_path, capsys):
    code, out = call("--json", "report", work, "--out", tmp_path / "r.html", capsys=capsys)
    assert code == 0
    files = json.loads(out.out)
    assert [Path(files[what]).name for what in ("out", "html", "markdown", "json")] == ["r.html", "r.html", "r.md", "r.all.json"]
    # `run` wrote the same.
    assert (tmp_path / "r.html").read_bytes() == (work / "report.html").read_bytes()
    assert json.loads((work / "report.all.json").read_text())["runs"][0]["verdict"]["passed"] is not None
    assert (work / "report.items.jsonl").is_file()
    code, out = call("report", work, work, "--out", tmp_path / "s.html", capsys=capsys)
    assert (code, len(out.err.splitlines())) == (2, 1)
    assert "is there twice" in out.err


def test_verbs_one_by_one(base, text, tmp_path, capsys):
    code, out = call("plan", base, "--recipe", "streaming", "--out", tmp_path / "p.json", "--json", capsys=capsys)
    assert code == 0
    assert len(json.loads(out.out)["layers"]) == 3
    assert call("convert", base, "--plan", tmp_path / "p.json", "--out", tmp_path / "c", "--dry-run")[0] == 0
    assert not (tmp_path / "c").exists()
    assert call("convert", base, "--plan", tmp_path / "p.json", "--out", tmp_path / "c")[0] == 0
    code, out = call("info", tmp_path / "c", "--json", capsys=capsys)
    assert json.loads(out.out)["mixers"] == ["streaming", "attention", "streaming"]
    small = ["--set", "distill=[{name: kl, tokens: 512, seq_tokens: 32, rows: 4}]"]
    assert call("distill", tmp_path / "c", "--recipe", "streaming", "--data", text, "--out", tmp_path / "d", *small)[0] == 0
    assert open_checkpoint(tmp_path / "d").is_hybrid
    code, out = call("eval", tmp_path / "d", "--data", text, "--out", tmp_path / "r.json", "--json", capsys=capsys)
    assert code == 0
    assert json.loads(out.out)["metrics"]["perplexity"]["value"] > 1
    code, out = call("generate", tmp_path / "d", "--prompt", "w1 w2", "--tokens", "5", "--json", capsys=capsys)
    assert len(json.loads(out.out)["tokens"]) == 8 - 1
    code, out = call("bench", tmp_path / "d", "--against", base, "--contexts", "16", "--repeats", "1", "--json", capsys=capsys)
    assert code == 0
    assert "decode_speedup" in json.loads(out.out)["rows"][0]


def test_ranks_from_scores_through_every_verb(base, text, tmp_path, capsys):
    scores = tmp_path / "s.json"
    words = ["score", base, "--metric", "energy", "--metric", "{name: fisher, samples: 4}", "--data", text, "--out", scores]
    code, out = call(*words, "--json", capsys=capsys)
    assert code == 0, out.err
    assert json.loads(out.out) == json.loads(scores.read_text())
    assert "score fisher: 100%" in out.err
    code, out = call("score", base, "--metric", "energy", "--recipe", "x-ecomla", "--out", tmp_path / "e.json", capsys=capsys)
    assert "mla rope_dim=8" in out.out
    assert "low_rank_kv" not in out.out
    fisher = ["--recipe", "palu", "--set", "plan.mixer={name: low_rank_kv, method: svd, rank: {fisher: 0.5}}"]
    assert call("plan", base, *fisher, "--scores", scores, "--out", tmp_path / "p.json")[0] == 0
    planned = json.loads((tmp_path / "p.json").read_text())
    assert all(type(layer["mixer"]["rank"]) is int for layer in planned["layers"])
    assert call("convert", base, *fisher, "--scores", scores, "--out", tmp_path / "c")[0] == 0
    assert call("convert", base, "--plan", tmp_path / "p.json", "--out", tmp_path / "d")[0] == 0
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "c" / name).read_bytes() == (tmp_path / "d" / name).read_bytes()
    run = ["run", "palu", "--base", base, "--data", text, "--out", tmp_path / "w", *fisher[2:], *SMALL[2:], "--set", "distill=[]"]
    assert call(*run, "--scores", scores)[0] == 0
    assert json.loads((tmp_path / "w" / "scores.json").read_text()) == json.loads(scores.read_text())
    assert json.loads((tmp_path / "w" / "plan.json").read_text())["layers"] == planned["layers"]


def test_a_teacher_is_written_once_and_read_in_its_place(base, text, tmp_path, capsys):
    assert call("convert", base, "--recipe", "streaming", "--out", tmp_path / "c")[0] == 0
    recipe = ["--recipe", "streaming", "--set", "distill=[{name: kl, tokens: 512, seq_tokens: 32, rows: 4}]"]
    teach = ["teach", tmp_path / "c", *recipe, "--data", text, "--out", tmp_path / "t"]
    code, out = call(*teach, "--dry-run", "--json", capsys=capsys)
    assert code == 0
    assert json.loads(out.out)["bytes"] == 512 * 32 * 4 + 16 * 8 + 64 * 32 * 4
    assert not (tmp_path / "t").exists()
    code, out = call(*teach, capsys=capsys)
    assert code == 0, out.err
    assert "kl" in out.out
    assert f"--teacher {tmp_path / 't'}" in out.out
    assert "teach kl: 100%" in out.err
    words = ["distill", tmp_path / "c", *recipe, "--data", text, "--out", tmp_path / "d", "--teacher", tmp_path / "t"]
    (base / "config.json").rename(base / "away.json")
    try:
        assert call(*words)[0] == 0
    finally:
        (base / "away.json").rename(base / "config.json")
    assert open_checkpoint(tmp_path / "d").is_hybrid


@pytest.mark.slow
@pytest.mark.parametrize("held_out", [[], ["--held-out"]])
def test_a_whole_run_on_a_cache(base, text, tmp_path, capsys, held_out):
    held_out = [*held_out, text.with_name("other.txt")] if held_out else []
    if held_out:
        held_out[1].write_text("w1 w2 w3 w4 " * 40)
    small = [*SMALL[2:], "--set", "distill=[{name: align, tokens: 512, seq_tokens: 32}, {name: kl, tokens: 512, seq_tokens: 32}]"]
    common = [*small, "--data", text, *held_out]
    assert call("run", "mamba2", "--base", base, "--out", tmp_path / "w", *common)[0] == 0
    teach = ["teach", tmp_path / "w/converted", "--recipe", "mamba2", *common, "--out", tmp_path / "t", "--as-run"]
    code, out = call(*teach, capsys=capsys)
    assert code == 0, out.err
    assert "align reads more of its teacher than logits: distill will run" in out.out
    code, out = call(
        "run", "mamba2", "--base", base, "--out", tmp_path / "v", *common, "--teacher", tmp_path / "t", capsys=capsys
    )
    assert code == 0, out.err
    one, two = (tmp_path / name / "distilled" / "model.safetensors" for name in ("w", "v"))
    assert one.read_bytes() == two.read_bytes()
    # A cache of all the text is refused before anything is converted.
    assert call(*teach[:-3], "--out", tmp_path / "all")[0] == (2 if held_out else 0)
    words = ["run", "mamba2", "--base", base, "--out", tmp_path / "x", *common, "--teacher"]
    code, out = call(*words, tmp_path / ("nowhere" if held_out else "all"), capsys=capsys)
    assert (code, len(out.err.strip().splitlines()[-1:])) == (2, 1)
    assert ("no such directory, expected a model's" if held_out else "the text's hash is") in out.err
    assert not (tmp_path / "x" / "converted").exists()


def test_keep_all_is_the_base_bit_for_bit(base, tmp_path):
    assert call("convert", base, "--recipe", "streaming", "--set", "plan.keep=all", "--out", tmp_path / "d")[0] == 0
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        ours = AutoModelForCausalLM.from_pretrained(tmp_path / "d")(ids).logits
        theirs = AutoModelForCausalLM.from_pretrained(base)(ids).logits
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["info", "nowhere"], "no such directory"),
        (["plan", "BASE", "--recipe", "mamba3"], "Did you mean 'mamba2'"),
        (["plan", "BASE"], "--recipe is missing"),
        (["plan", "BASE", "--recipe", "mamba2", "--set", "plan.keep.layers=[0]"], "every, layers together"),
        (["plan", "BASE", "--recipe", "mamba2", "--set", "plan.keep={layers: [9]}"], "9"),
        (["plan", "BASE", "--recipe", "mamba2", "--set", "plan.mixer.nmae=x"], "has no option 'nmae'"),
        (["convert", "BASE", "--recipe", "mamba2", "--out", "OUT"], "Give --data"),
        (["convert", "BASE", "--out", "OUT"], "either --recipe or --plan"),
        (["run", "mamba2", "--base", "BASE", "--out", "OUT"], "--data is missing"),
        (["run", "mamba2", "--base", "BASE", "--data", "nothing.txt", "--out", "OUT"], "no such file"),
        (["eval", "BASE", "--tasks", "no_such_task"], "no_such_task"),
        (["eval", "BASE"], "got no probes"),
        (["gate", "nothing.json", "--rule", "max_value perplexity 2"], "no such file"),
        (["gate", "nothing.json", "--suite", "ofline"], "no suite 'ofline': neither a file nor built in. Did you mean 'offline'"),
        (["eval", "BASE", "--suite", "ofline"], "Did you mean 'offline'"),
        (["eval", "BASE", "--suite", "offline", "--task-data", "OUT", "--data", "t.txt"], "are for tasks of lm-eval; name some"),
        (["recipes", "suites", "ofline"], "Did you mean 'offline'"),
        (["bench", "BASE", "--contexts", "x"], "expected numbers"),
        (["bench"], "neither DIR and --shape"),
        (["bench", "BASE", "--shape", "llama-3.2-1b"], "both DIR and --shape"),
        (["bench", "BASE", "--recipe", "mamba2"], "--recipe goes with --shape"),
        (["bench", "--shape", "llama-3.2-1x"], "Did you mean 'llama-3.2-1b'"),
        (["bench", "BASE", "--set", "a=b"], "give --recipe"),
        (["bench", "BASE", "--dtype", "int8"], "not one of 'bfloat16'"),
        (["plan", "BASE", "--nope"], "No such option"),
        (["plan", "BASE", "--recipe", "palu", "--scores", "nothing.json"], "nothing.json: no such file; expected scores"),
        (
            ["plan", "BASE", "--recipe", "palu", "--set", "plan.mixer.rank={energy: 0.9}"],
            "--metric energy --out scores.json, then",
        ),
        (["convert", "BASE", "--plan", "p.json", "--scores", "s.json", "--out", "OUT"], "--scores goes with a recipe"),
        (["score", "BASE", "--metric", "fisher", "--out", "OUT"], "Give --data TEXT"),
        (["score", "BASE", "--metric", "enrgy", "--out", "OUT"], "Did you mean 'energy'"),
        (["score", "BASE", "--metric", "{name: energy, k: 1}", "--out", "OUT"], "unknown option 'k'"),
        (["score", "BASE", "--metric", "[", "--out", "OUT"], "--metric: line"),
        (["score", "BASE", "--metric", "energy", "--set", "a=b", "--out", "OUT"], "give --recipe"),
        (["score", "BASE", "--metric", "energy", "--recipe", "mamba2", "--out", "OUT"], "truncates nothing"),
        (["score", "BASE", "--metric", "energy"], "Missing option '--out'"),
        (["teach", "BASE", "--recipe", "mamba2", "--data", "t.txt", "--out", "OUT"], "lineage.json: no such file"),
        (["teach", "BASE", "--recipe", "mamba2", "--held-out", "t.txt", "--out", "OUT"], "--held-out goes with --as-run"),
        (["push", "BASE", "me/x"], "has no lineage.json, expected a hybrid or export"),
        (["push", "nowhere", "me/x"], "no such directory or file"),
        (["push", "BASE", "me/x", "--run", "BASE"], "holds no plan.json"),
        (["push", "BASE"], "Missing argument 'REPO'"),
        (["nope"], "No such command"),
    ],
    ids=lambda value: " ".join(value[:4]) if isinstance(value, list) else "",
)
def test_errors_are_one_line_and_exit_code_two(words, message, base, tmp_path, capsys):
    words = [str(base) if w == "BASE" else str(tmp_path / "out") if w == "OUT" else w for w in words]
    code, out = call(*words, capsys=capsys)
    assert code == 2
    assert message in out.err
    assert len(out.err.strip().splitlines()) == 1
    assert out.err.startswith("hybridize: ")
    assert not (tmp_path / "out" / "converted").exists()


def test_help_names_every_verb(capsys):
    code, out = call("--help", capsys=capsys)
    assert code == 0
    for verb in (
        "recipes",
        "info",
        "score",
        "plan",
        "convert",
        "distill",
        "teach",
        "eval",
        "gate",
        "bench",
        "report",
        "run",
        "generate",
        "chat",
        "demo",
        "push",
    ):
        assert f"  {verb} " in out.out


def test_recipe_commands(capsys):
    assert "lighttransfer" in call("recipes", "ls", capsys=capsys)[1].out
    assert "window_tokens" in call("recipes", "show", "streaming", capsys=capsys)[1].out
    assert call("recipes", "validate", "mamba2")[0] == 0
    assert "standard" in call("recipes", "suites", capsys=capsys)[1].out
    assert "nll_at@*" in call("recipes", "suites", "offline", capsys=capsys)[1].out
    schema = json.loads(call("recipes", "schema", "--json", capsys=capsys)[1].out)
    assert "mamba2" in schema["components"]["mixers"]
