"""What counts as a token, what does not, and what of a record may be published."""

import logging
import time

import pytest

from hybridize.hub import demo_model
from hybridize.hub.published import published, published_lineage
from hybridize.redact import holds_secret, known_secrets, scrub, scrubbed_logs

KEYS = ["hf_" + "aB3" * 11, "ghp_" + "x1" * 18, "sk-proj-" + "Ab1" * 14, "AKIA" + "ABCD" * 4, "glpat-" + "a1" * 10,
        "-----BEGIN RSA PRIVATE KEY-----", "eyJhbGciOiJIUzI1.eyJzdWIiOiIxMjM0.c2lnbmF0dXJlMTIz"]  # fmt: skip


@pytest.mark.parametrize("key", KEYS)
def test_well_known_keys_are_hidden(key):
    assert key not in scrub(f"before {key} after", [])
    assert holds_secret(f'{{"a": "{key}"}}'.encode(), [])


@pytest.mark.parametrize(
    "text",
    ["hf_hub_download", "me/model@main", "task-sk-short", "someone@example.com", "https://huggingface.co/a/b@c", "base: a/b@0123",
     "http://127.0.0.1:8000/x", "the hidden_states of model.layers.0"],
)  # fmt: skip
def test_ordinary_words_stay(text):
    assert scrub(text, []) == text
    assert not holds_secret(text.encode(), [])


def test_credentials_of_urls_and_own_tokens(monkeypatch):
    assert scrub("git https://me:pw@host/x and https:/tok@host", []) == "git https://[hidden]@host/x and https:/[hidden]@host"
    monkeypatch.setenv("HF_TOKEN", "plainwordtoken")
    assert known_secrets()[0] == "plainwordtoken"
    assert scrub("a plainwordtoken b") == "a [hidden] b"
    assert holds_secret(b"x plainwordtoken", known_secrets())
    monkeypatch.setenv("HF_TOKEN", "word")  # too short to be told from text
    assert scrub("a word") == "a word"


def test_the_bundled_tokenizer_and_long_words_are_no_keys():
    for path in demo_model().glob("*.json"):
        assert not holds_secret(path.read_bytes(), []), path.name
    start = time.process_time()
    scrub("a" * 1_000_000 + "http://" + "b" * 1_000_000, [])
    assert time.process_time() - start < 2


def test_every_librarys_log_is_scrubbed(caplog, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "plainwordtoken")
    with scrubbed_logs():
        logging.getLogger("some.library").warning("sent %s", "plainwordtoken")
        try:
            raise ValueError("plainwordtoken")
        except ValueError:
            logging.getLogger("some.library").exception("failed")
    assert "plainwordtoken" not in caplog.text
    assert "sent [hidden]" in caplog.text
    logging.getLogger("some.library").warning("sent %s", "plainwordtoken")
    assert "plainwordtoken" in caplog.text  # without it, it is there


def test_folders_of_this_machine_become_names(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    cached = "/home/x/.cache/huggingface/hub/models--org--name/snapshots/0a1b"
    value = {
        "a": ["/home/x/model", cached, "~/data/t.txt", "C:\\Users\\x\\m", "a/b", 3],
        "/data/t.txt": f"in {tmp_path}/work/x.txt",
    }
    assert published(value) == {"a": ["model", "org/name", "t.txt", "m", "a/b", 3], "t.txt": "in work/x.txt"}
    lineage = {"base": {"location": "/opt/hybridize/demo/model"}}
    assert published_lineage(lineage, True)["base"]["location"] == "demo"
    assert lineage["base"]["location"].startswith("/opt")
