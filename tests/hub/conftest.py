import functools
import io
import json
import logging
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import constants, file_download, utils
from huggingface_hub.utils import _http as http
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hybridize.checkpoint import open_base, open_checkpoint
from hybridize.conversions import convert, plan
from hybridize.core import GateResult, Metric, Report, Verdict
from hybridize.fingerprint import weights_hash
from hybridize.hub import bundle
from tests.hub.server import LoopbackHub
from tests.tiny import tiny_base

TOKEN = "hf_" + "CanaryOfTheTests" * 2


@pytest.fixture(autouse=True, scope="session")
def _pictures_once():
    """Each picture is drawn once in a session, as drawing takes longer than all the rest of a push."""
    before = bundle.layer_map
    kept = functools.cache(lambda words: before(*json.loads(words)))
    bundle.layer_map = lambda *arguments: kept(json.dumps(arguments))
    yield
    bundle.layer_map = before


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub on the loopback that this process's huggingface_hub talks to, as user `me` with the token above."""
    with LoopbackHub() as found:
        found.tokens[TOKEN] = {"name": "me", "write": True}
        point_at(monkeypatch, found.url, tmp_path / "hf")
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield found
    utils.close_session()


def point_at(monkeypatch, url, home):
    """Set what huggingface_hub read from the environment when it was imported; no waiting between its retries."""
    for name, value in {
        "ENDPOINT": url, "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True, "HF_HOME": str(home), "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"), "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
    }.items():  # fmt: skip
        monkeypatch.setattr(constants, name, value)
    for module in (http, file_download):
        monkeypatch.setattr(module, "time", SimpleNamespace(sleep=lambda _: None, time=http.time.time))
    utils.close_session()


@pytest.fixture
def logged():
    """Every log line of every library at DEBUG, as a StringIO."""
    stream, root = io.StringIO(), logging.getLogger()
    handler, level = logging.StreamHandler(stream), root.level
    handler.setFormatter(logging.Formatter("%(name)s %(message)s"))
    library = logging.getLogger("huggingface_hub")
    before = library.level, library.propagate
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    library.setLevel(logging.DEBUG)
    library.addHandler(handler)
    library.propagate = False
    yield stream
    root.removeHandler(handler)
    library.removeHandler(handler)
    root.setLevel(level)
    library.setLevel(before[0])
    library.propagate = before[1]


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A tiny Llama with a tokenizer and an MIT licence."""
    path = tiny_base("llama", tmp_path_factory.mktemp("base"))
    words = ["<s>", "<unk>", *(f"w{i}" for i in range(62))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>").save_pretrained(path)
    (path / "LICENSE").write_text(
        "MIT License\n\nPermission is hereby granted, free of charge, to any person obtaining a copy of"
    )
    return path


def make_hybrid(base, out, keep=1, sink_tokens=2):
    """A hybrid of windows beside attention, as the command line writes it."""
    section = {"keep": {"layers": [keep]}, "mixer": {"name": "streaming", "sink_tokens": sink_tokens, "window_tokens": 6}}
    convert(plan(open_base(base), section, "streaming", 0), out, base_path=base)
    return out


@pytest.fixture(scope="session")
def hybrid(base, tmp_path_factory):
    return make_hybrid(base, tmp_path_factory.mktemp("hybrid") / "streamed")


def judged(folder, passed=True, weights=None):
    """A report, the base's, and a verdict, of a hybrid's weights."""
    weights = weights or weights_hash(open_checkpoint(folder))
    metrics = {
        "perplexity": Metric(value=12.5, stderr=0.25, unit="per token", samples=40),
        "arc_easy/acc": Metric(value=0.375, stderr=0.02, unit="", higher_is_better=True, samples=570),
        "state_bytes@1024": Metric(value=4096.0, unit="bytes", samples=1),
    }
    versions = {"torch": torch.__version__, "device": "cpu"}
    report = Report(checkpoint=str(folder), checkpoint_hash="0", metrics=metrics, versions=versions, weights=weights)
    better = {**metrics, "perplexity": Metric(value=12.0, stderr=0.25, unit="per token", samples=40)}
    baseline = Report(checkpoint="base", checkpoint_hash="1", metrics=better, weights="b" * 64)
    gate = GateResult(name="max_ratio perplexity", passed=passed, value=1.0417, limit=1.05, detail="within the limit")
    return {"report": report, "baseline": baseline, "verdict": Verdict(passed=passed, gates=(gate,), weights=weights)}
