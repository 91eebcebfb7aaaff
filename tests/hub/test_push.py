"""Push against a Hub on the loopback: what arrives, what a reader sees meanwhile, and what stops it."""

import dataclasses
import json
import shutil
import types

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from hybridize.checkpoint import load_model, open_checkpoint
from hybridize.cli import app
from hybridize.core import Scores, Verdict
from hybridize.errors import CheckpointError, ConfigError, GateFailedError
from hybridize.hub import Evidence, Statement, bundle_document, bundle_model, push, resolve_base
from hybridize.hub.layer_map import layer_map
from hybridize.lineage import read_lineage
from hybridize.native.export import export
from hybridize.storage import write_json
from tests.hub.conftest import TOKEN, judged, make_hybrid

# huggingface_hub hands httpx a file as `data`.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
REPO = "me/tiny-streaming"
SAID = Statement(base_model="someone/tiny")


@pytest.fixture(scope="session")
def bundle(hybrid):
    return bundled(hybrid)


def bundled(hybrid, repo=REPO, said=SAID, **changes):
    return bundle_model(hybrid, repo, Evidence(**{**judged(hybrid), "recipe": "name: streaming\n", **changes}), said)


def main(hub, repo=REPO):
    return hub.repos[repo].files("main")


def test_what_arrives_is_whole_private_and_loads(hub, hybrid, bundle):
    done = push(bundle)
    assert done.private
    assert hub.repos[REPO].private
    files = main(hub)
    assert files["model.safetensors"] == (hybrid / "model.safetensors").read_bytes()
    assert {"README.md", "config.json", "lineage.json", "layers.png", "LICENSE", "hybridize/verdict.json"} <= set(files)
    # One commit: before it there was nothing but what the Hub itself puts there.
    assert len(hub.repos[REPO].commits) == 2
    again = resolve_base(REPO)
    assert open_checkpoint(again).config.mixers == open_checkpoint(hybrid).config.mixers
    assert AutoModelForCausalLM.from_pretrained(again, local_files_only=True).config.model_type == "hybrid_llama"
    # The same again sends nothing and makes no commit.
    sent = dict(hub.put_bytes)
    assert push(bundle).commit == done.commit
    assert hub.put_bytes == sent


def test_a_push_that_was_cut_shows_nothing_and_goes_on(hub, bundle):
    hub.fail("PUT", "/lfs/", cut=100, times=6)
    with pytest.raises(CheckpointError, match="the connection broke.*nothing is sent twice"):
        push(bundle)
    assert set(main(hub)) == {".gitattributes"}
    # The weights arrive, the picture does not.
    hub.failures.clear()
    hub.fail("POST", "/commit/", status=503)
    with pytest.raises(CheckpointError, match="trouble of its own"):
        push(bundle)
    assert set(main(hub)) == {".gitattributes"}
    hub.failures.clear()
    sent = dict(hub.put_bytes)
    push(bundle)
    assert hub.put_bytes == sent
    assert set(main(hub)) == {".gitattributes", *(file.name for file in bundle.files)}


@pytest.mark.slow
def test_an_earlier_push_leaves_nothing_that_would_be_loaded(hub, bundle, base, tmp_path):
    push(bundle)
    hub.repos[REPO].commit("main", {**main(hub), "model-00001-of-00002.safetensors": b"old", "notes.md": b"mine"})
    other = make_hybrid(base, tmp_path / "other", keep=2)
    done = push(bundled(other))
    assert done.removed == ("model-00001-of-00002.safetensors",)
    assert main(hub)["notes.md"] == b"mine"
    assert json.loads(main(hub)["lineage.json"])["plan"]["layers"][2]["mixer"]["name"] == "attention"


def test_places_that_would_surprise_are_refused(hub, bundle):
    hub.add(REPO, {"README.md": b"x"}, private=False)
    with pytest.raises(ConfigError, match="is public, and what is pushed is private by default. Say --public"):
        push(bundle)
    push(bundle, public=True)
    hub.add("me/other", {"model.safetensors": b"x"}, private=True)
    with pytest.raises(ConfigError, match="holds model.safetensors, a model that is not ours"):
        push(dataclasses.replace(bundle, repo="me/other"))
    done = push(dataclasses.replace(bundle, repo="me/third"), revision="try")
    assert (done.revision, set(main(hub, "me/third"))) == ("try", {".gitattributes"})
    assert "model.safetensors" in hub.repos["me/third"].files("try")


@pytest.mark.slow
def test_another_writer_in_between_is_seen(hub, hybrid, bundle):
    push(bundle)
    changed = bundled(hybrid, said=dataclasses.replace(SAID, data_licence="CC0"))
    preupload, moved = type(hub.repos[REPO]).files, []

    def files(self, revision):
        # Another commit after the push read the branch's head.
        if hub.asked("POST", "/preupload/") > seen and not moved:
            moved.append(True)
            self.commit("main", {**preupload(self, "main"), "notes.md": b"theirs"})
        return preupload(self, revision)

    seen = hub.asked("POST", "/preupload/")
    type(hub.repos[REPO]).files = files
    try:
        with pytest.raises(CheckpointError, match="the branch moved while files were sent"):
            push(changed)
    finally:
        type(hub.repos[REPO]).files = preupload
    push(changed)
    assert b"CC0" in main(hub)["README.md"]
    assert main(hub)["notes.md"] == b"theirs"


@pytest.mark.parametrize(
    ("method", "path", "status", "headers", "message"),
    [
        ("POST", "/repos/create", 401, {}, "the Hub does not know the token"),
        ("POST", "/preupload/", 403, {}, "Take one with write access to me"),
        ("POST", "/preupload/", 429, {"RateLimit": '"api";r=0;t=37'}, "Wait 37 s"),
        ("POST", "/commit/", 409, {}, "another change came in between"),
        ("GET", "/api/models/", 503, {}, "has trouble of its own"),
        *(pytest.param(*row, marks=pytest.mark.slow) for row in (
            ("POST", "/repos/create", 403, {}, "the token may not write there"),
            ("POST", "/repos/create", 500, {}, "has trouble of its own"),
            ("POST", "/preupload/", 404, {"X_Error_Code": "RepoNotFound"}, "no such repository"),
            ("POST", "/batch", 429, {"Retry_After": "12"}, "Wait 12 s"),
            ("PUT", "/lfs/", 500, {}, "has trouble of its own"),
            ("POST", "/commit/", 400, {}, "refused by the Hub"),
        )),
    ],
)  # fmt: skip
def test_what_the_hub_answers_is_one_line(hub, bundle, method, path, status, headers, message):
    hub.fail(method, path, status, **headers)
    with pytest.raises(CheckpointError, match=message) as caught:
        push(bundle)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(REPO)
    assert caught.value.__suppress_context__


def test_no_hub_no_token_and_another_users_place(hub, bundle, monkeypatch):
    with pytest.raises(
        CheckpointError, match="someone/x: the token may not write there .403.. Take one with write access to someone"
    ):
        push(dataclasses.replace(bundle, repo="someone/x"))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(CheckpointError, match="the Hub cannot be reached"):
        push(bundle)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://me:secret@127.0.0.1:9")
    with pytest.raises(ConfigError, match="holds a name or password") as caught:
        push(bundle)
    assert "secret" not in str(caught.value)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    with pytest.raises(CheckpointError, match="there is no token here. Run `hf auth login`"):
        push(bundle)


def test_only_a_passed_verdict_of_these_weights(hybrid, base, tmp_path):
    with pytest.raises(GateFailedError, match="has no verdict. Give --verdict"):
        bundled(hybrid, verdict=None)
    with pytest.raises(GateFailedError, match="did not pass .max_ratio perplexity"):
        bundled(hybrid, **judged(hybrid, passed=False))
    other = judged(hybrid, weights="c" * 64)
    with pytest.raises(GateFailedError, match="verdict: is of other weights .cccccccccccc"):
        bundled(hybrid, verdict=other["verdict"])
    with pytest.raises(GateFailedError, match="report: is of other weights"):
        bundled(hybrid, report=other["report"])
    with pytest.raises(ConfigError, match="names no weights"):
        bundled(hybrid, verdict=dataclasses.replace(other["verdict"], weights=""))
    text = bundled(hybrid, verdict=None, report=None, waived=True).card
    assert "**It was published without a verdict:**" in text
    text = bundled(hybrid, **judged(hybrid, passed=False), waived=True).card
    assert "without a passed verdict" in text
    assert "FAIL" in text
    # One bit of one weight is another model, and no folder that was changed goes out.
    changed = tmp_path / "changed"
    shutil.copytree(hybrid, changed)
    data = bytearray((changed / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (changed / "model.safetensors").write_bytes(data)
    assert judged(changed)["verdict"].weights != judged(hybrid)["verdict"].weights
    with pytest.raises(CheckpointError, match="was changed"):
        bundled(changed)
    with pytest.raises(CheckpointError, match="has no lineage.json"):
        bundled(base)


def test_an_export_is_judged_by_its_hybrid(hybrid, tmp_path):
    export = tmp_path / "export"
    export.mkdir()
    lineage = read_lineage(hybrid)
    verdict = judged(hybrid)
    for name in lineage["files"]:
        shutil.copy(hybrid / name, export / name)
    raw = {**json.loads((hybrid / "config.json").read_text()), "model_type": "ministral"}
    (export / "config.json").write_text(json.dumps(raw))
    from hybridize.storage import file_sha256

    of = {"weights": verdict["verdict"].weights, "lineage": lineage}
    files = {name: file_sha256(export / name) for name in lineage["files"]}
    record = {"verb": "export", "target": "ministral", "base": lineage["base"], "of": of, "files": files, "versions": {}}
    write_json(export / "lineage.json", record)
    text = bundle_model(export, REPO, Evidence(**verdict), SAID).card
    assert "`ministral`" in text
    assert f"`vllm serve {REPO}`" in text
    assert "import hybridize" not in text
    write_json(export / "lineage.json", {**record, "approximate": "0.2 of a logit"})
    with pytest.raises(GateFailedError, match="computes not quite what was judged"):
        bundle_model(export, REPO, Evidence(**verdict), SAID)
    write_json(export / "lineage.json", {**record, "of": {}})
    with pytest.raises(GateFailedError, match="is of other weights"):
        bundle_model(export, REPO, Evidence(**verdict), SAID)


@pytest.mark.slow
def test_a_real_export_goes_out_and_loads_as_its_class(hub, base, tmp_path):
    hybrid = make_hybrid(base, tmp_path / "h", keep=1, sink_tokens=0)
    summary = export(hybrid, "auto", tmp_path / "n")
    push(bundle_model(tmp_path / "n", "me/native", Evidence(**judged(hybrid)), SAID))
    card = main(hub, "me/native")["README.md"].decode()
    assert "`vllm serve me/native`" in card
    assert "Export's logits against the hybrid's, random:** " in card
    assert "layers.png" in card
    folder = resolve_base("me/native")
    found = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    assert not found.config.model_type.startswith("hybrid_")
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.allclose(found(ids).logits, load_model(hybrid)(ids).logits, atol=1e-5)
    assert summary.proof


def test_the_card_says_it_all_and_the_hub_can_read_it(hybrid):
    bundle = bundled(hybrid, said=dataclasses.replace(SAID, data_licence="CC0-1.0"))
    data = ModelCard(bundle.card).data
    assert (data.license, data.base_model, data.base_model_relation) == ("mit", "someone/tiny", "finetune")
    assert {"hybridize", "streaming"} <= set(data.tags)
    values = {result.metric_name: result.metric_value for result in data.eval_results}
    assert values == {"perplexity": 12.5, "arc_easy/acc": 0.375}
    files = {file.name: file.source for file in bundle.files}
    assert yaml.safe_load(files[".eval_results/arc_easy.yaml"]) == [{
        "dataset": {"id": "allenai/ai2_arc", "task_id": "ARC-Easy"}, "value": 0.375,
        "notes": "lm-eval arc_easy, acc; 570 samples, standard error 0.02",
    }]  # fmt: skip
    for part in ("12.5 ± 0.25", "| 12 ± 0.25 |", "at 131,072 tokens", "max_ratio perplexity | 1.0417 | 1.05 | pass", "CC0-1.0",
                 "import hybridize", "![Mixer and cache", "name: streaming",
                 "[LICENSE](LICENSE)"):  # fmt: skip
        assert part in bundle.card, part
    # Drawn again it is the same to the byte.
    spec = [{"name": "streaming"}, {"name": "attention"}, {"name": "streaming"}]
    assert files["layers.png"].startswith(b"\x89PNG")
    assert layer_map(spec, [5, 9, 5], 9, 32768) == layer_map(spec, [5, 9, 5], 9, 32768) != layer_map(spec, [5, 9, 6], 9, 32768)


def test_nothing_of_this_machine_is_published(hybrid, base):
    bundle = bundled(hybrid, recipe=f"data: {{mixture: {{{base}/t.txt: 0.7}}}}\n")
    for file in bundle.files:
        if isinstance(file.source, bytes):
            assert str(base.parent).encode() not in file.source, file.name
            assert str(hybrid.parent).encode() not in file.source, file.name
    lineage = json.loads(next(file.source for file in bundle.files if file.name == "lineage.json"))
    assert lineage["base"]["location"] == base.name
    assert lineage["files"] == read_lineage(hybrid)["files"]
    # Without that, the test would see it: the record on disk has the folder.
    assert str(base) in (hybrid / "lineage.json").read_text()


def test_scores_and_plans_have_a_place_of_their_own(hub, base, tmp_path):
    from hybridize.checkpoint import open_base
    from hybridize.conversions import plan

    made = plan(open_base(base), {"keep": "all", "mixer": {"name": "streaming"}}, "streaming", 0)
    write_json(tmp_path / "p.json", made.to_dict())
    scores = {"base": str(base), "base_hash": "0", "tables": [], "version": Scores.version}
    write_json(tmp_path / "s.json", scores)
    for name in ("p.json", "s.json"):
        push(bundle_document(tmp_path / name, "me/plans"))
    files = main(hub, "me/plans")
    assert {"hybridize/p.json", "hybridize/s.json"} <= set(files)
    assert json.loads(files["hybridize/p.json"])["base"] == base.name
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(CheckpointError, match="neither tables nor layers"):
        bundle_document(tmp_path / "x.json", "me/plans")


@pytest.mark.parametrize("repo", ["nothing", "a/b/c", "me/x y", "https://hf.co/me/x", "me/.x", f"me/{TOKEN}", ""])
def test_names_that_cannot_be(hybrid, repo, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(ConfigError, match="expected owner/name") as caught:
        bundled(hybrid, repo)
    assert TOKEN not in str(caught.value)


@pytest.mark.parametrize("name", ["config.json", "LICENSE", "tokenizer_config.json"])
def test_a_token_in_a_file_stops_it(hybrid, tmp_path, name):
    from hybridize.storage import file_sha256

    folder = tmp_path / "h"
    shutil.copytree(hybrid, folder)
    key = "ghp_" + "0aZ9" * 9
    text = (folder / name).read_text()
    (folder / name).write_text(text.rstrip()[:-1] + f', "note": "{key}"}}' if name.endswith("json") else text + "\n" + key)
    lineage = read_lineage(folder)
    write_json(folder / "lineage.json", {**lineage, "files": {**lineage["files"], name: file_sha256(folder / name)}})
    with pytest.raises(ConfigError, match=f"{name} .*holds what looks like a token") as caught:
        bundled(folder, **judged(folder))
    assert key not in str(caught.value)


@pytest.mark.parametrize("passed", [True, False])
def test_a_run_publishes_what_passed(passed, tmp_path, monkeypatch):
    verdict = Verdict(passed=passed, gates=())
    made = types.SimpleNamespace(table=lambda: [["a"]], html=tmp_path / "report.html", verdict=verdict)
    told = []
    monkeypatch.setattr("hybridize.pipeline.run", lambda *args, **options: made)
    monkeypatch.setattr("hybridize.cli.make.publish_run", lambda work, section: told.append((work, section.repo, section.public)))
    words = ["run", "demo", "--base", "demo", "--out", str(tmp_path / "w"), "--set", "push={repo: me/model, public: true}"]
    assert app([*words, "--quiet"]) == (0 if passed else 1)
    assert told == ([(tmp_path / "w", "me/model", True)] if passed else [])


def test_a_recipes_push_knows_its_keys(capsys):
    assert app(["recipes", "validate", "demo", "--set", "push={repos: me/model}"]) == 2
    assert "push" in capsys.readouterr().err
