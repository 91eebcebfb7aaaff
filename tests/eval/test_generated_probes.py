"""Probes that generate, through real caches: against the same question asked from the start, and text judged row by row."""

import copy

import pytest
import torch
from transformers import GenerationConfig

from hybridize.checkpoint import load_model
from hybridize.eval.context import mean_metric
from hybridize.eval.probes.greedy_agreement import GreedyAgreement, first_difference
from hybridize.eval.probes.nll_by_position import NllByPosition, buckets
from hybridize.eval.probes.procedure import Procedure, rows_of, share_of_rows
from hybridize.eval.probes.shared_context import SharedContext, answers
from hybridize.eval.prompts import TEMPLATES
from hybridize.eval.scoring import generate, token_nll
from tests.eval.toys import CopyingModel, Parrot, context_of, toy_hybrid
from tests.tolerances import assert_close

MIXERS = [{"name": "mamba2"}, {"name": "attention"}, {"name": "streaming", "sink_tokens": 1, "window_tokens": 5}]


@pytest.fixture(scope="module")
def model(base):
    return load_model(base, torch.float32)


@pytest.fixture(scope="module")
def hybrid(base, tmp_path_factory):
    found = load_model(toy_hybrid(base, tmp_path_factory.mktemp("hybrid"), MIXERS), torch.float32)
    # Freshly initialised, it would say nearly the same to everything.
    with torch.no_grad():
        for parameter in found.parameters():
            if parameter.dim() == 2:
                parameter.mul_(5)
    return found


def slow_greedy(model, ids, count):
    """Greedy tokens by reading everything anew for each."""
    for _ in range(count):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids[:, -count:]


def test_questions_on_a_shared_cache_are_as_asked_from_the_start(hybrid, tokenizer):
    prefix, questions = SharedContext(questions=3).prompt(context_of(hybrid, tokenizer), 160, 0)
    given, nlls = answers(hybrid, prefix, questions)
    for question, ours, nll in zip(questions, given, nlls, strict=True):
        ((first, stop),) = question.answers
        alone = torch.tensor([prefix + question.ids])
        expected = token_nll(hybrid, alone)[0, len(prefix) + first - 1 :]
        assert expected.std() > 0.2
        assert_close(nll, expected, "fp32")
        assert torch.equal(ours[None], slow_greedy(hybrid, alone[:, : len(prefix) + first], stop - first))


def test_a_cache_that_is_not_copied_answers_another_question(hybrid, tokenizer, monkeypatch):
    prefix, questions = SharedContext(questions=2).prompt(context_of(hybrid, tokenizer), 160, 0)
    right = answers(hybrid, prefix, questions[:1])[1][0]
    monkeypatch.setattr(copy, "deepcopy", lambda cache: cache)
    monkeypatch.setattr("hybridize.eval.probes.shared_context.generate", lambda *_: torch.zeros(1, 1))
    assert_close(answers(hybrid, prefix, questions[:1])[1][0], right, "fp32")
    wrong = answers(hybrid, prefix, [questions[1], questions[0]])[1][1]
    with pytest.raises(AssertionError):
        assert_close(wrong, right, "fp32")


def test_shared_context_of_models_that_know_and_do_not(model, tokenizer):
    probe = SharedContext(lengths_tokens=[160], samples=2, template=TEMPLATES[0])
    context = context_of(CopyingModel(), tokenizer)
    found = probe(context)
    assert found.metrics["shared_context@160"].value == 1
    assert probe(context_of(model, tokenizer)).metrics["shared_context@160"].value < 0.2
    prefix, questions = probe.prompt(context, 160, 0)
    lines = tokenizer.decode(prefix[1:]).split("\n")
    facts = dict(line.split(" = ") for line in lines if " = " in line)
    asked = [tokenizer.decode(question.ids).strip().split(" = ") for question in questions]
    assert facts == dict(asked)
    assert len(prefix) + max(len(question.ids) for question in questions) == 160
    assert found.items["shared_context@160"][0].expected == ", ".join(value for _, value in asked)


def test_a_procedure_is_its_path(tokenizer):
    context = context_of(CopyingModel(), tokenizer)
    probe = Procedure(most_rows=6)
    for index in range(3):
        path = probe.path(context, TEMPLATES[0], 256, index)
        shuffled, ordered, facts = (block.split("\n") for block in path.head.strip().split("\n\n"))
        assert sorted(shuffled) == sorted(ordered) != ordered
        assert [line.split(" = ")[1] for line in ordered[:-1]] == [line.split(" = ")[0] for line in ordered[1:]]
        links = dict(line.split(" = ") for line in facts)
        at = next(iter(set(links) - set(links.values())))
        for row in path.rows:
            assert row == f"{at} = {links[at]}"
            at = links[at]
        assert len(path.rows) == 6 < len(links)
        assert facts[:6] != path.rows
        assert 200 < len(path.ids) <= 255
        # Of the first row the model is shown the key, and nothing of its value.
        assert tokenizer.decode(path.ids[: path.first]).endswith("\n" + path.rows[0].split(" = ")[0] + " =")
        assert tokenizer.decode(path.ids[path.first :]).strip() == "\n".join(path.rows).split(" = ", 1)[1]


@pytest.mark.parametrize("template", TEMPLATES)
def test_procedure_of_models_that_know_and_that_slip(template, tokenizer):
    probe = Procedure(lengths_tokens=[176], samples=2, most_rows=3, template=template)
    heard = []
    original = Parrot.known
    Parrot.known = lambda self, seen: heard.append(seen) or original(self, seen)
    try:
        probe(context_of(Parrot([]), tokenizer))
    finally:
        Parrot.known = original
    # What the teacher-forced pass was shown last of each row is the whole row, padding aside.
    whole = sorted({tuple(row) for row in heard if len(row) == max(map(len, heard))})
    rows = [list(row) for row in whole if row[0] == 1]
    found = probe(context_of(Parrot(rows), tokenizer))
    assert found.metrics["procedure@176"].value == 1
    item = found.items["procedure@176"][0]
    assert item.given == item.expected
    slipped = [[*row[:-9], 5, *row[-8:]] for row in rows]
    assert 0 < probe(context_of(Parrot(slipped), tokenizer)).metrics["procedure@176"].value < 1
    assert probe(context_of(CopyingModel(), tokenizer)).metrics["procedure@176"].value < 1


def test_procedures_of_different_sizes_fit_together(model, tokenizer, monkeypatch):
    asked = []

    def written(model, ids, new_tokens):
        asked.append(ids.shape[1] + new_tokens)
        return torch.zeros(len(ids), new_tokens, dtype=torch.long)

    monkeypatch.setattr("hybridize.eval.probes.procedure.generate", written)
    Procedure(lengths_tokens=[200, 230, 256], samples=6)(context_of(model, tokenizer))
    for length, tokens in zip((200, 230, 256), asked, strict=True):
        assert length - 25 < tokens <= length


def test_rows_are_judged_in_their_places():
    rows = ["a = b", "b = c", "c = d"]
    assert rows_of("{key} = {value}\n", "a = b\nb = c\nc = dog\nd = e", 3) == ["a = b", "b = c", "c = dog"]
    assert rows_of("{key} is {value}; ", "a is b; b is c", 3) == ["a is b;", "b is c;"]
    assert share_of_rows(["a = b", "b = c", "c = dog"], rows) == pytest.approx(2 / 3)
    assert share_of_rows(["b = c", "c = d"], rows) == 0
    assert share_of_rows([], rows) == 0


def test_generate_is_greedy_whatever_the_checkpoint_asks_for(hybrid, tokenizer):
    ids = torch.tensor(context_of(hybrid, tokenizer).text.ids[:60].astype("int64")).view(2, 30)
    expected = slow_greedy(hybrid, ids, 10)
    kept = hybrid.generation_config
    eos = expected[0, 2].item()
    hybrid.generation_config = GenerationConfig(eos_token_id=eos, repetition_penalty=5.0, pad_token_id=0, max_new_tokens=3)
    try:
        assert torch.equal(generate(hybrid, ids, 10), expected)
        # As the checkpoint asks, it is another text.
        assert hybrid.generate(ids).shape != (2, 40)
    finally:
        hybrid.generation_config = kept


def test_greedy_agreement_is_the_share_before_the_first_difference(base, hybrid, model, tokenizer):
    probe = GreedyAgreement(new_tokens=[4, 8], prompt_tokens=16, samples=4)
    same = probe(context_of(model, tokenizer, load_base=lambda: load_model(base, torch.float32)))
    assert {metric.value for metric in same.metrics.values()} == {1.0}
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight[::3] *= 1.2
    found = probe(context_of(other, tokenizer, load_base=lambda: model))
    assert found.item_hashes == same.item_hashes
    assert 0 < found.metrics["greedy_agreement@8"].value < 1
    small = GreedyAgreement(new_tokens=[4, 8], prompt_tokens=16, samples=4, batch_tokens=1)
    assert small(context_of(other, tokenizer, load_base=lambda: model)).samples == found.samples
    text = context_of(model, tokenizer).text.ids
    starts = 15 * torch.linspace(0, len(text) // 15 - 1, 4).long()
    prompts = torch.tensor([[1, *text[start : start + 15].tolist()] for start in starts.tolist()])
    differs = slow_greedy(other, prompts, 8) != slow_greedy(model, prompts, 8)
    for row, share in enumerate(found.samples["greedy_agreement@8"]):
        agreed = next((at for at in range(8) if differs[row, at]), 8)
        assert share == agreed / 8
        assert found.samples["greedy_agreement@4"][row] == min(agreed, 4) / 4


def test_first_difference():
    assert first_difference(torch.tensor([1, 2, 3]), torch.tensor([1, 2, 3])) == 3
    assert first_difference(torch.tensor([1, 2, 3]), torch.tensor([1, 9, 3])) == 1


def test_loss_by_position_is_that_of_each_position(model, tokenizer):
    assert buckets(100) == [(0, 25), (25, 50), (50, 100)]
    assert buckets(31) == [(0, 31)]
    probe = NllByPosition(context=70, tokens=70 * 5)
    context = context_of(model, tokenizer)
    found = probe(context)
    assert list(found.metrics) == ["nll_at@17", "nll_at@35", "nll_at@70"]
    exact = copy.deepcopy(model).double()
    blocks = torch.tensor(context.text.ids[: 5 * 69].astype("int64")).view(5, 69)
    for row, block in enumerate(blocks):
        ids = torch.cat([torch.tensor([1]), block])[None]
        with torch.no_grad():
            scores = torch.log_softmax(exact(ids).logits[0], -1)
        by_position = {at + 1: -scores[at - 1, ids[0, at]] for at in range(1, 70)}
        for name, places in (("nll_at@17", range(2, 18)), ("nll_at@35", range(18, 36)), ("nll_at@70", range(36, 71))):
            mean = torch.stack([by_position[place] for place in places]).mean()
            assert_close(torch.tensor(found.samples[name][row]).double(), mean, "fp32")
            late = torch.stack([by_position[min(place + 1, 70)] for place in places]).mean()
            with pytest.raises(AssertionError):
                assert_close(torch.tensor(found.samples[name][row]).double(), late, "fp32")
    assert found.metrics["nll_at@35"] == mean_metric(found.samples["nll_at@35"], "nats per token", False)
    # Without a length: what the model is trained for, 256, halved until there are 32 blocks.
    assert 32 * 63 <= len(context.text.ids) < 32 * 127
    assert list(NllByPosition()(context).metrics)[-1] == "nll_at@64"
    assert list(NllByPosition(tokens=32 * 31)(context).metrics)[-1] == "nll_at@32"


def test_a_short_batch_of_positions_is_the_same(model, tokenizer):
    context = context_of(model, tokenizer)
    whole, small = (NllByPosition(context=64, tokens=640, batch_tokens=count)(context) for count in (4096, 64))
    for name, values in whole.samples.items():
        assert_close(torch.tensor(small.samples[name]), torch.tensor(values), "fp32")
