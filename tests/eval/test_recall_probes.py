"""Prompts read as a person would read them, and scored by models that know, half know, and do not know the answers."""

import copy
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import hybridize
from hybridize.checkpoint import load_model
from hybridize.errors import ConfigError
from hybridize.eval import PROBES
from hybridize.eval.answers import Prompt, score
from hybridize.eval.probes.copying import Copying
from hybridize.eval.probes.induction import Induction
from hybridize.eval.probes.needle import KINDS, Needle
from hybridize.eval.probes.passkey import FILLER, Passkey
from hybridize.eval.probes.recall import Recall
from hybridize.eval.prompts import TEMPLATES, ask, spelled
from hybridize.eval.scoring import scores_at
from hybridize.pipeline import load_tokenizer
from tests.eval.toys import CopyingModel, Parrot, context_of, toy_text
from tests.tolerances import assert_close

LENGTH = 256
MODELS = ["stories260K", "tinystories-656k", "babyllama-tok105"]


@pytest.fixture(scope="module")
def model(base):
    return load_model(base, torch.float32)


def solved(kind: str, text: str) -> list[str]:
    """The answers that the facts in a text give, by reading them line by line; the question is its last lines."""
    facts = [tuple(line.split(" = ")) for line in text.split("\n") if re.fullmatch(r"\w+ = \w+( \w+)*", line)]
    if kind == "tracking":
        number, shown = facts[-1]
        known = dict(fact for fact in facts[:-1] if " " not in fact[1])

        def value(name):
            return value(known[name]) if name in known else name

        example = {name for fact in facts if " " in fact[1] for name in fact[1].split()} - set(shown.split())
        names = [name for name in known if value(name) == number and name not in example]
        assert [known[name] for name in names] == [number, *names[:-1]]
        return names
    if kind == "threading":
        asked = facts[8:]
        links, at, path = dict(facts[:8]), asked[0][0], []
        for _ in asked:
            at = links[at]
            path.append(at)
        return path
    hidden = 1 if kind == "single" else 4
    asked = [key for key, _ in facts[hidden:]]
    if kind == "multivalue":
        assert {key for key, _ in facts} == {asked[0]}
        return [value for _, value in facts[:hidden]]
    return [dict(facts[:hidden])[key] for key in asked]


@pytest.mark.parametrize("values", ["numbers", "words"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_needle_prompt_asks_for_what_its_text_says(kind, values, model, tokenizer):
    context = context_of(model, tokenizer)
    probe = Needle(kinds=[kind], template=TEMPLATES[0], values=values)
    for place, index in ((0, 0), (4, 1)):
        prompt = probe.prompt(context, kind, LENGTH, place, index)
        assert len(prompt.ids) == LENGTH
        assert prompt.ids[0] == context.bos_id
        assert prompt.answers[-1][1] == LENGTH
        text = tokenizer.decode(prompt.ids[1:])
        expected = solved(kind, text)
        assert [tokenizer.decode(prompt.ids[first:stop]).strip() for first, stop in prompt.answers] == expected
        # A place further on is not the answer.
        assert [tokenizer.decode(prompt.ids[first - 1 : stop - 1]).strip() for first, stop in prompt.answers] != expected
        # Text is around the needles: the held-out text's own words stand in front of the question.
        assert "steps" in text


@pytest.mark.parametrize("kind", ["single", "multikey"])
def test_the_needle_asked_for_stands_at_its_depth(kind, model, tokenizer):
    probe = Needle(kinds=[kind], depths=[0.0, 0.5, 1.0], template=TEMPLATES[0])
    for place, depth in enumerate(probe.depths):
        prompt = probe.prompt(context_of(model, tokenizer), kind, LENGTH, place, 0)
        text = tokenizer.decode(prompt.ids[1:])
        question = text.rsplit("\n", 1)[1]
        assert abs(text.index(question) / text.rindex(question) - depth) < 0.2


def test_needles_of_models_that_know_and_that_do_not(model, tokenizer, monkeypatch):
    probe = Needle(kinds=list(KINDS), lengths_tokens=[160], samples=1, depths=[0.5], template=TEMPLATES[0])
    context = context_of(CopyingModel(), tokenizer)
    found = {name: metric.value for name, metric in probe(context).metrics.items() if "nll" not in name}
    assert set(found) == {f"{metric}@160" for _, metric, _ in KINDS.values()}
    # One that copies what stood behind the same line finds all keys, the last of one key's values, and lists no names.
    assert [found[f"{name}@160"] for name in ("needle", "needle_multikey", "needle_multiquery", "threading")] == [1, 1, 1, 1]
    assert found["needle_multivalue@160"] < 0.6
    assert found["tracking@160"] < 0.6
    # By heart, all of it.
    rows = [probe.prompt(context, kind, 160, 0, 0).ids for kind in KINDS]
    knows = probe(context_of(Parrot(rows), tokenizer))
    assert {metric.value for name, metric in knows.metrics.items() if "nll" not in name} == {1.0}
    ignorant = probe(context_of(model, tokenizer)).metrics
    assert max(metric.value for name, metric in ignorant.items() if "nll" not in name) < 0.2
    # Without needles there is nothing to copy.
    monkeypatch.setattr("hybridize.eval.probes.needle.hide", lambda hay, needles, _: (hay * 99)[: len(hay + sum(needles, []))])
    assert probe(context_of(CopyingModel(), tokenizer)).metrics["needle@160"].value == 0


def test_a_thread_counts_as_a_whole(tokenizer):
    context = context_of(CopyingModel(), tokenizer)
    probe = Needle(kinds=["threading", "multiquery"], samples=1, depths=[0.5], template=TEMPLATES[0], lengths_tokens=[192])
    broken = []
    for kind in probe.kinds:
        ids = list(probe.prompt(context, kind, 192, 0, 0).ids)
        ids[probe.prompt(context, kind, 192, 0, 0).answers[2][1] - 1] = 5
        broken.append(ids)
    found = probe(context_of(Parrot(broken), tokenizer)).metrics
    assert found["needle_multiquery@192"].value == 0.5  # the third is wrong, and the fourth's prompt is not as this one knows it
    assert found["threading@192"].value == 0


def test_a_pass_key_is_said_and_asked_for(model, tokenizer):
    context = context_of(CopyingModel(), tokenizer)
    probe = Passkey(lengths_tokens=[192], samples=2)
    for place, depth in enumerate(probe.depths):
        prompt = probe.prompt(context, 192, place, 1)
        text = tokenizer.decode(prompt.ids[1:])
        (key,) = set(re.findall(r"\d{5}", text))
        ((first, stop),) = prompt.answers
        assert tokenizer.decode(prompt.ids[first:stop]).strip() == key
        assert len(prompt.ids) == 192 == stop
        said = text.index(f" The pass key is {key}. Remember it.")
        # Between two sentences of the filler, as near as they allow.
        hay = text[: text.index(" What is")].replace(f" The pass key is {key}. Remember it. {key} is the pass key.", "")
        assert (FILLER * 9).startswith(hay)
        assert text[said - 1] == "." or said == 0
        assert abs(said / len(hay) - depth) < 0.15
    assert probe(context).metrics["passkey@192"].value == 1
    assert probe(context_of(model, tokenizer)).metrics["passkey@192"].value < 0.2


@pytest.mark.parametrize("probe", [Copying(lengths_tokens=[101], samples=4), Induction(lengths_tokens=[101], samples=4)])
def test_the_second_copy_is_the_first(probe, model, tokenizer):
    context = context_of(CopyingModel(), tokenizer)
    name = PROBES.names()[[type(probe) is PROBES.load(known) for known in PROBES.names()].index(True)]
    prompt = probe.prompt(context, 101, 0)
    ids = np.array(prompt.ids)
    assert ids[0] == 1
    assert (ids[1:51] == ids[51:]).all()
    assert prompt.answers == [(52, 101)]
    assert not set(ids[1:].tolist()) & {0, 1, 2}
    assert probe(context).metrics[f"{name}@101"].value > 0.9
    assert probe(context_of(model, tokenizer)).metrics[f"{name}@101"].value < 0.1
    # One token's memory is not enough for text that repeats itself.
    if name == "copying":
        assert probe(context_of(CopyingModel(longest=1), tokenizer)).metrics["copying@101"].value < 0.9


def test_induction_draws_anew_for_each_prompt_and_copies_text(model, tokenizer):
    context = context_of(model, tokenizer)
    first, second = (Induction().prompt(context, 101, index).ids for index in (0, 1))
    assert first != second
    text = toy_text(tokenizer).ids.tolist()
    passage = Copying().prompt(context, 101, 0).ids[1:51]
    assert any(text[start : start + 50] == passage for start in range(len(text)))


def test_the_bundled_model_copies_and_recalls(monkeypatch):
    """A real model is far above chance, and at chance where the answers are to other questions."""
    folder = Path(hybridize.__file__).parent / "demo" / "model"
    context = context_of(load_model(folder, torch.float32), load_tokenizer(folder))

    def measured():
        results = (Induction(lengths_tokens=[128], samples=4)(context), Recall(pairs=[4], samples=8)(context))
        return {name: metric.value for result in results for name, metric in result.metrics.items()}

    found = measured()
    assert found["induction@128"] > 0.2
    assert found["recall@4"] > 0.8
    assert found["recall_nll@4"] < 1
    own = Induction.prompt
    monkeypatch.setattr(Induction, "prompt", lambda *a: Prompt(own(*a).ids[:64] + own(*a).ids[:63:-1], own(*a).answers))
    monkeypatch.setattr("hybridize.eval.probes.recall.ask", lambda template, facts: ask(template, rotated(facts)))
    wrong = measured()
    assert wrong["induction@128"] < 0.05
    assert wrong["recall@4"] < 0.2
    assert wrong["recall_nll@4"] > 2 * found["recall_nll@4"]


def rotated(facts):
    """Each key with the value of the next."""
    values = [value for _, value in facts]
    return [(key, value) for (key, _), value in zip(facts, values[1:] + values[:1], strict=True)]


def test_scores_at_are_those_of_the_whole_logits(model, tokenizer):
    ids = torch.from_numpy(toy_text(tokenizer).ids[: 3 * 40].astype(np.int64)).view(3, 40)
    places = torch.tensor([(0, 1), (2, 39), (1, 7), (2, 8)])
    nll, choice = scores_at(model, ids, places)
    with torch.no_grad():
        logits = copy.deepcopy(model).double()(ids).logits
    before = logits[places[:, 0], places[:, 1] - 1]
    assert torch.equal(choice, before.argmax(-1))
    tokens = ids[places[:, 0], places[:, 1]]
    assert_close(nll, torch.nn.functional.cross_entropy(before, tokens, reduction="none"), "fp32")
    late = torch.nn.functional.cross_entropy(logits[places[:, 0], places[:, 1]], tokens, reduction="none")
    with pytest.raises(AssertionError):
        assert_close(nll, late, "fp32")


def test_the_mean_is_over_each_prompts_own_tokens(model, tokenizer):
    """Prompts of different lengths, answers of different lengths: each prompt alone gives what it gives among others."""
    text = toy_text(tokenizer).ids.tolist()
    prompts = [Prompt(text[:30], [(3, 5), (9, 10)]), Prompt(text[5:60], [(50, 55)]), Prompt(text[:7], [(1, 2)])]
    context = context_of(model, tokenizer)
    together = score(context, "x", 1, prompts, 4096).samples["x_nll@1"]
    for prompt, got in zip(prompts, together, strict=True):
        with torch.no_grad():
            row = torch.log_softmax(model(torch.tensor([prompt.ids])).logits[0], -1)
        want = [-row[at - 1, prompt.ids[at]].item() for span in prompt.answers for at in range(*span)]
        assert_close(torch.tensor(got), torch.tensor(sum(want) / len(want)), "fp32")


@pytest.mark.parametrize("name", ["recall", "needle", "passkey", "copying", "induction", "procedure", "shared_context"])
def test_small_batches_change_nothing_and_items_can_be_read(name, model, tokenizer):
    lengths = {"pairs": [3]} if name == "recall" else {"lengths_tokens": [160]}
    kinds = {"kinds": list(KINDS)} if name == "needle" else {}
    few = {"name": name, "samples": 2, **lengths, **kinds} | ({"depths": [0.5]} if name in ("needle", "passkey") else {})
    context = context_of(model, tokenizer)
    result = PROBES.build(few)(context)
    assert {head.replace("_nll", "") for head in result.metrics} == {head for head in result.metrics if "_nll" not in head}
    for head, metric in result.metrics.items():
        assert metric.higher_is_better == ("_nll" not in head)
        assert (metric.samples, len(result.samples[head]), len(result.items[head])) == (2, 2, 2)
        assert all(0 < len(item.prompt) <= 400 and 0 < len(item.expected) <= 400 for item in result.items[head])
        assert result.item_hashes[head] == result.item_hashes[head.replace("_nll", "")]
    if name != "shared_context":
        small = PROBES.build({**few, "batch_tokens": 8})(context)
        assert small.item_hashes == result.item_hashes
        for head, scores in result.samples.items():
            assert_close(torch.tensor(small.samples[head]), torch.tensor(scores), "fp32")


def test_lengths_follow_the_model_where_none_are_named(model, tokenizer, caplog):
    context = context_of(model, tokenizer)
    probe = Needle(kinds=["single", "threading"], samples=1, depths=[0.5])
    names = {name for name in probe(context).metrics if "nll" not in name}
    # A thread and another one take more than 64 tokens.
    assert names == {"needle@64", "needle@128", "needle@256", "threading@256"} | ({"threading@128"} & names)
    model.config.rope_parameters = {**model.config.rope_parameters, "original_max_position_embeddings": 128}
    assert context.trained_tokens == 128
    assert set(Copying(samples=1)(context).metrics) >= {"copying@32", "copying@64", "copying@128"}
    assert {name for name in Recall(pairs=None, samples=1)(context).metrics if "nll" not in name} == {"recall@4"}
    model.config.max_position_embeddings = 16
    with pytest.raises(ConfigError, match="leaves no room"):
        probe(context)
    model.config.max_position_embeddings = 256
    del model.config.rope_parameters["original_max_position_embeddings"]


@pytest.mark.data
@pytest.mark.parametrize("name", MODELS)
def test_tokenizers_of_real_models_spell_every_prompt(name, shared_data):
    """One puts spaces into the word before, one knows no newline, one spells '=' as a byte."""
    tokenizer = load_tokenizer(shared_data / "models" / name)
    assert spelled(None, tokenizer) == TEMPLATES[name != "stories260K"]
    context = context_of(CopyingModel(), tokenizer)
    needle, passkey = Needle(samples=1), Passkey()
    for kind in KINDS:
        for index in range(8):
            prompt = needle.prompt(context, kind, 512, 2, index)
            words = [tokenizer.decode(prompt.ids[first:stop]).strip() for first, stop in prompt.answers]
            assert all(re.fullmatch(r"\w+", word) for word in words), words
            assert len(prompt.ids) == 512
    prompt = passkey.prompt(context, 256, 1, 0)
    assert re.fullmatch(r"\d{5}", tokenizer.decode(prompt.ids[slice(*prompt.answers[0])]).strip())
