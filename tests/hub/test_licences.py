"""Licences: read from files, cards and ids; names that Llama's ask for; nothing guessed."""

import json
import shutil

import pytest

from hybridize.cli import app
from hybridize.errors import ConfigError
from hybridize.hub import Evidence, Statement, bundle_model
from hybridize.hub.licences import TERMS, Licence, card_licence, check_name, notice, repo_licence, settle, text_licence
from hybridize.lineage import read_lineage
from hybridize.storage import write_json
from tests.hub.conftest import judged

HEADING = {
    "llama2": "LLAMA 2 COMMUNITY LICENSE AGREEMENT", "llama3": "META LLAMA 3 COMMUNITY LICENSE AGREEMENT",
    "llama3.1": "LLAMA 3.1 COMMUNITY LICENSE\n  AGREEMENT", "llama3.2": "LLAMA 3.2 COMMUNITY LICENSE AGREEMENT",
    "llama3.3": "LLAMA 3.3 COMMUNITY LICENSE AGREEMENT", "llama4": "LLAMA 4 COMMUNITY LICENSE AGREEMENT",
    "apache-2.0": "                Apache License\n           Version 2.0, January 2004", "mit": "Permission is hereby granted, "
    "free of charge, to any person obtaining a copy of this", "qwen-research": "Qwen RESEARCH LICENSE AGREEMENT",
}  # fmt: skip


@pytest.mark.parametrize("known", HEADING)
def test_a_licence_is_known_by_its_text(known):
    found = text_licence({"LICENSE.txt": f"{HEADING[known]}\nSome terms.".encode(), "USE_POLICY.md": b"LLAMA 9 COMMUNITY"})
    assert found.title == known
    assert (found.terms is not None) == known.startswith("llama")


def test_other_texts_are_not_known():
    assert text_licence({"LICENSE": b"All rights reserved."}) is None
    assert text_licence({"NOTICE": HEADING["llama3"].encode()}) is None


@pytest.mark.parametrize(
    ("repo", "licence"),
    [("meta-llama/Meta-Llama-3-8B", "llama3"), ("meta-llama/Meta-Llama-3-8B-Instruct", "llama3"),
     ("meta-llama/Llama-3.1-8B", "llama3.1"), ("meta-llama/Llama-3.2-1B", "llama3.2"), ("meta-llama/Llama-2-7b-hf", "llama2"),
     ("meta-llama/Llama-3.3-70B-Instruct", "llama3.3"), ("someone/Llama-3.1-8B", None), ("meta-llama/Prompt-Guard-86M", None)],
)  # fmt: skip
def test_metas_own_repositories_name_theirs(repo, licence):
    assert getattr(repo_licence(repo), "id", None) == licence


@pytest.mark.parametrize(
    ("licence", "name", "allowed"),
    [("llama3", "Llama-3-8B-mamba2", True), ("llama3", "Llama3-x", True), ("llama3", "Llama_3", True),
     ("llama3", "Meta-Llama-3-8B", False), ("llama3", "llama-3-8b", False), ("llama3", "Llama-3.1-8B-x", False),
     ("llama3", "Llama-30B", False), ("llama3", "mamba-Llama-3", False), ("llama3", "Llama-8B", False),
     ("llama3.1", "Llama-3.1-8B-x", True), ("llama3.1", "Llama-anything", True), ("llama3.1", "my-Llama", False),
     ("llama3.2", "LLama-x", False), ("llama2", "anything", True)],
)  # fmt: skip
def test_the_beginning_of_a_name(licence, name, allowed):
    if allowed:
        check_name(f"me/{name}", TERMS[licence], "its base", "meta-llama/Meta-Llama-3-8B", "mamba2")
        return
    with pytest.raises(ConfigError, match="at the beginning of any such AI model name") as caught:
        check_name(f"me/{name}", TERMS[licence], "its base", "meta-llama/Meta-Llama-3-8B", "mamba2")
    # The name it offers is one that would do.
    offered = str(caught.value).rsplit(" ", 1)[1]
    assert offered == "me/Llama-3-8B-mamba2"
    check_name(offered, TERMS[licence], "its base", "", "")


def test_sources_have_to_agree():
    mit, llama = Licence(id="mit", source="the text in LICENSE"), Licence(id="llama3.1", source="the base's card")
    assert settle([mit], None, "--license") is mit
    assert settle([], None, "--license") is None
    assert settle([], "apache-2.0", "--license").source == "--license"
    assert settle([mit, llama], "MIT", "--license") is mit
    with pytest.raises(ConfigError, match="the text in LICENSE says mit; the base's card says llama3.1. Say which"):
        settle([mit, llama], None, "--license")
    with pytest.raises(ConfigError, match="got 'mit', but the base's card says llama3.1"):
        settle([llama], "mit", "--license")


def test_cards_are_read_as_input_from_strangers(tmp_path):
    for text, said in [("---\nlicense: other\nlicense_name: psf-2.0\n---\n# x", "psf-2.0"), ("---\nlicense: [a]\n---", None),
                       ("# no metadata\nlicense: mit", None), ("---\n!!python/object:os.system {}\n---\n", None),
                       ("---\nlicense: llama3.1\n---", "llama3.1")]:  # fmt: skip
        (tmp_path / "README.md").write_text(text)
        assert getattr(card_licence(tmp_path), "title", None) == said


def test_the_notice_is_the_bases_or_one_more():
    terms = TERMS["llama3.1"]
    assert notice({}, terms) == ("NOTICE", f"{terms.notice}\n".encode())
    own = {"Notice.txt": f"Ours.\n{terms.notice}".encode()}
    assert notice(own, terms) == ("Notice.txt", own["Notice.txt"])
    assert notice({"NOTICE": b"Another."}, terms)[0] == "NOTICE-Llama-3.1"


@pytest.fixture
def llama(hybrid, tmp_path):
    """A hybrid whose files say that its base is Llama 3."""
    folder = tmp_path / "h"
    shutil.copytree(hybrid, folder)
    (folder / "LICENSE").write_text(f"{HEADING['llama3']}\nMeta Llama 3 Version Release Date: April 18, 2024")
    lineage = read_lineage(folder)
    files = {name: sha for name, sha in lineage["files"].items() if name != "LICENSE"}
    base = {"name": "x", "location": "/gone", "hash": "0", "repo": "meta-llama/Meta-Llama-3-8B", "revision": "c" * 40}
    write_json(folder / "lineage.json", {**lineage, "files": files, "base": base})
    return folder


def test_a_derivative_of_llama_3_under_another_name_is_refused(llama, hub, tmp_path, capsys):
    found = judged(llama)
    for name in ("report", "verdict"):
        write_json(tmp_path / f"{name}.json", found[name].to_dict())
    words = ["--report", str(tmp_path / "report.json"), "--verdict", str(tmp_path / "verdict.json"), "--dry-run"]
    assert app(["push", str(llama), "me/streaming-8b", *words]) == 2
    said = capsys.readouterr().err
    assert "you shall also include “Llama 3” at the beginning of any such AI model name." in said
    assert "Such as me/Llama-3-8B-streaming" in said
    assert len(said.strip().splitlines()) == 1
    assert app(["--json", "push", str(llama), "me/Llama-3-8B-streaming", *words]) == 0
    value = json.loads(capsys.readouterr().out)
    assert "**Built with Meta Llama 3**" in value["card"]
    assert "license: llama3\n" in value["card"]
    assert "at commit `" + "c" * 40 in value["card"]
    assert {"LICENSE", "NOTICE"} <= {file["name"] for file in value["files"]}
    assert hub.requests == []  # --dry-run touches no network


def test_the_text_of_the_licence_has_to_go_along(llama):
    (llama / "LICENSE").unlink()
    with pytest.raises(ConfigError, match="asks for a copy of itself beside the model .1.b.i., and there is none"):
        bundle_model(llama, "me/Llama-3-8B-x", Evidence(**judged(llama)), Statement())


def test_where_no_file_says_it_the_publisher_has_to(hybrid, tmp_path):
    folder = tmp_path / "h"
    shutil.copytree(hybrid, folder)
    (folder / "LICENSE").unlink()
    lineage = read_lineage(folder)
    files = {name: sha for name, sha in lineage["files"].items() if name != "LICENSE"}
    write_json(
        folder / "lineage.json", {**lineage, "files": files, "base": {"name": "a-llama", "location": "/gone", "hash": "0"}}
    )
    evidence = Evidence(**judged(folder))
    with pytest.raises(ConfigError, match="cannot be told; looked at licence files in h, the base 'a-llama', which is not here"):
        bundle_model(folder, "me/x", evidence, Statement())
    with pytest.raises(ConfigError, match="no file says which model its base is"):
        bundle_model(folder, "me/x", evidence, Statement(licence="mit"))
    text = bundle_model(folder, "me/x", evidence, Statement(licence="mit", base_model="a model of mine")).card
    assert "made with hybridize from a model of mine" in text
    assert "base_model" not in text
    with pytest.raises(ConfigError, match="got 'mit', but the repository meta-llama/Llama-3.1-8B says llama3.1"):
        bundle_model(folder, "me/x", evidence, Statement(licence="mit", base_model="meta-llama/Llama-3.1-8B"))


def test_a_teachers_licence_counts_too(hybrid, tmp_path):
    folder = tmp_path / "h"
    shutil.copytree(hybrid, folder)
    lineage, evidence, said = read_lineage(folder), Evidence(**judged(hybrid)), Statement(base_model="someone/tiny")
    record = {"stages": [{"name": "kl", "tokens": 10}], "seed": 0, "text": "0", "teacher": "another", "student": "s"}

    def bundle(repo, teacher, **changes):
        write_json(folder / "lineage.json", {**lineage, "distill": [record], "teachers": [teacher]})
        return bundle_model(folder, repo, evidence, Statement(base_model=said.base_model, **changes))

    big = {"name": "big", "repo": "meta-llama/Llama-3.1-70B", "revision": "0"}
    with pytest.raises(ConfigError, match="its teacher 'big' is under the Llama 3.1 licence"):
        bundle("me/tiny", big)
    assert "**Built with Llama**" in bundle("me/Llama-tiny", big).card
    with pytest.raises(ConfigError, match="not use the Llama Materials or any output"):
        bundle("me/Llama-3-tiny", {**big, "repo": "meta-llama/Meta-Llama-3-70B"})
    with pytest.raises(ConfigError, match="no file says that teacher's licence, which may ask.*--teacher-license"):
        bundle("me/tiny", {"name": "local"})
    assert "**Teacher:** local" in bundle("me/tiny", {"name": "local"}, teacher_licence="apache-2.0").card
