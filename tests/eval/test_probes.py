"""Probes against values known from elsewhere."""

import json
import math
import os
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from hybridize.checkpoint import load_model
from hybridize.data import eval_blocks
from hybridize.errors import CheckpointError, ConfigError, DataError
from hybridize.eval import evaluate
from hybridize.eval.probes.kl_to_base import KlToBase
from hybridize.eval.probes.needle import Needle
from hybridize.eval.probes.perplexity import Perplexity
from hybridize.eval.probes.recall import Recall
from hybridize.eval.prompts import encode
from hybridize.eval.scoring import divergence
from tests.eval.toys import VOCAB, CopyingModel, context_of, toy_hybrid, toy_text
from tests.tolerances import assert_close

DATA = Path(os.environ.get("HYBRIDIZE_DATA", Path(__file__).parents[3] / "shared" / "data"))


@pytest.fixture
def model(base):
    return load_model(base, torch.float32)


def test_perplexity_of_a_uniform_model_is_its_vocabulary(model, tokenizer):
    context = context_of(model, tokenizer)
    assert Perplexity(context=64)(context).metrics["perplexity"].value != pytest.approx(VOCAB, rel=1e-3)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    result = Perplexity(context=64)(context)
    assert result.metrics["perplexity"].value == pytest.approx(VOCAB, rel=1e-6)
    assert result.metrics["perplexity"].stderr == pytest.approx(0, abs=1e-4)
    per_byte = len(context.text.ids) / context.text.text_bytes
    assert result.metrics["bits_per_byte"].value == pytest.approx(math.log2(VOCAB) * per_byte, rel=1e-6)


def test_perplexity_equals_the_loss_of_transformers(model, tokenizer):
    text = toy_text(tokenizer)
    result = Perplexity(contexts=[32, 64], tokens=640)(context_of(model, tokenizer))
    for length in (32, 64):
        blocks = eval_blocks(text, length, 1, 640)
        with torch.no_grad():
            expected = torch.stack([model(row[None], labels=row[None]).loss for row in blocks])
        got = torch.tensor(result.samples[f"perplexity@{length}"])
        assert_close(got, expected, "fp32")
        assert result.metrics[f"perplexity@{length}"].value == pytest.approx(expected.mean().exp().item(), rel=1e-5)
        # Scored one place off, the same logits are another number.
        with torch.no_grad():
            logits = model(blocks).logits
        wrong = torch.stack([torch.nn.functional.cross_entropy(a[1:], b[:-1]) for a, b in zip(logits, blocks, strict=True)])
        with pytest.raises(AssertionError):
            assert_close(got, wrong, "fp32")


def test_perplexity_stderr_is_that_of_blocks(model, tokenizer):
    result = Perplexity(context=32)(context_of(model, tokenizer))
    values = torch.tensor(result.samples["perplexity"], dtype=torch.float64)
    expected = values.std().item() / len(values) ** 0.5 * values.mean().exp().item()
    assert result.metrics["perplexity"].stderr == pytest.approx(expected)
    assert result.metrics["perplexity"].samples == len(values) > 30


def test_a_broken_model_is_refused(model, tokenizer):
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(CheckpointError, match="broken or its training diverged"):
        Perplexity(context=32)(context_of(model, tokenizer))


def test_kl_to_itself_is_zero(model, tokenizer):
    result = KlToBase(context=32, tokens=320)(context_of(model, tokenizer, load_base=lambda: model))
    assert result.metrics["kl_to_base"].value == 0
    assert result.metrics["top1_agreement"].value == 1


def test_kl_is_from_the_base_to_the_model(base, model, tokenizer):
    other = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        other.lm_head.weight.mul_(1.7)
    ids = eval_blocks(toy_text(tokenizer), 32, 1, 320)
    with torch.no_grad():
        p = torch.distributions.Categorical(logits=model(ids).logits)
        q = torch.distributions.Categorical(logits=other(ids).logits)
    got, wanted, given = divergence(model, other, ids)
    assert_close(got, torch.distributions.kl_divergence(p, q), "fp32", grad=True)
    with torch.no_grad():
        assert torch.equal(wanted, model(ids).logits.argmax(-1))
        assert torch.equal(given, other(ids).logits.argmax(-1))
    with pytest.raises(AssertionError):
        assert_close(got, torch.distributions.kl_divergence(q, p), "fp32", grad=True)


def test_logits_in_small_pieces_change_nothing(base, model, tokenizer, monkeypatch):
    context = context_of(model, tokenizer)
    whole = Perplexity(context=32, tokens=320)(context)
    monkeypatch.setattr("hybridize.eval.scoring.LOGIT_BYTES", 4 * VOCAB * 7)
    pieces = Perplexity(context=32, tokens=320, batch_tokens=32)(context)
    assert_close(torch.tensor(pieces.samples["perplexity"]), torch.tensor(whole.samples["perplexity"]), "fp32")


def test_recall_of_a_model_that_knows_and_of_ones_that_do_not(model, tokenizer):
    probe = Recall(pairs=[2, 4], samples=6, queries=4)
    result = probe(context_of(CopyingModel(), tokenizer))
    values = {name: metric.value for name, metric in result.metrics.items()}
    certain = math.log(1 + (VOCAB - 1) / math.e)
    assert values == pytest.approx({"recall@2": 1, "recall@4": 1, "recall_nll@2": certain, "recall_nll@4": certain})
    # One that remembers "=" but not whose it was answers with the last value it saw.
    assert probe(context_of(CopyingModel(longest=1), tokenizer)).metrics["recall@4"].value < 0.5
    assert probe(context_of(model, tokenizer)).metrics["recall@4"].value < 0.1


def test_recall_asks_every_key_once_and_values_differ():
    text, spans = Recall(pairs=[8]).prompt(seed=0, count=8, index=0)
    facts = dict(line.split(" = ") for line in text.splitlines()[:8])
    asked = dict(line.split(" = ") for line in text.splitlines()[8:])
    assert asked == facts
    assert list(asked) != list(facts)
    assert len(set(facts.values())) == 8
    assert [text[start:stop] for start, stop in spans] == list(asked.values())


def test_recall_beyond_the_context_is_refused(model, tokenizer):
    with pytest.raises(ConfigError, match="max_position_embeddings 256"):
        Recall(pairs=[64], queries=64, samples=1)(context_of(model, tokenizer))


def test_needle_of_a_model_that_knows_and_of_one_that_does_not(model, tokenizer):
    probe = Needle(lengths_tokens=[128], samples=2)
    knows = probe(context_of(CopyingModel(), tokenizer))
    assert knows.metrics["needle@128"].value == 1
    assert len(knows.samples["needle@128"]) == 10
    assert probe(context_of(model, tokenizer)).metrics["needle@128"].value < 0.2
    assert knows.item_hashes == probe(context_of(CopyingModel(), tokenizer)).item_hashes
    assert knows.item_hashes != probe(context_of(CopyingModel(), tokenizer, seed=1)).item_hashes


def test_needle_beyond_context_or_text_is_refused(model, tokenizer):
    with pytest.raises(ConfigError, match="'needle' asks for 512 tokens"):
        Needle(lengths_tokens=[512])(context_of(model, tokenizer))
    context = context_of(model, tokenizer)
    context.model.config.max_position_embeddings = 1 << 20
    with pytest.raises(DataError, match="give more text"):
        Needle(lengths_tokens=[1 << 16])(context)


def test_a_tokenizer_that_cannot_spell_the_prompt_is_refused():
    words = Tokenizer(models.WordLevel({"<unk>": 0, "apple": 1, "=": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    assert encode(tokenizer, "apple = apple", [(8, 13)]) == ([1, 2, 1], [(2, 3)])
    with pytest.raises(ConfigError, match="choose a template"):
        encode(tokenizer, "apple = 12", [(8, 10)])


@pytest.mark.parametrize("template", ["{value} is {key}", "{key} = ", "{key} {key} {value}", "{key} {value} {other}"])
def test_a_wrong_template_is_refused(template):
    with pytest.raises(ConfigError, match="template"):
        Recall(template=template)


def test_a_hybrid_is_scored_as_its_own_forward_pass_says(base, tokenizer, tmp_path):
    mixers = [{"name": "mamba2"}, {"name": "attention"}, {"name": "streaming", "sink_tokens": 1, "window_tokens": 5}]
    path = toy_hybrid(base, tmp_path, mixers)
    text = toy_text(tokenizer)
    probes = [
        {"name": "perplexity", "context": 32, "tokens": 320},
        {"name": "kl_to_base", "context": 32, "tokens": 320},
    ]
    report = evaluate(path, [*probes, {"name": "recall", "pairs": [2], "samples": 3}], text=text, base=base)
    hybrid, blocks = load_model(path, torch.float32), eval_blocks(text, 32, 1, 320)
    with torch.no_grad():
        expected = torch.stack([hybrid(row[None], labels=row[None], use_cache=True).loss for row in blocks])
    assert_close(torch.tensor(report.samples["perplexity"]), expected, "fp32")
    assert report.metrics["kl_to_base"].value > 0.01
    assert report.metrics["top1_agreement"].value < 0.9
    assert 0 <= report.metrics["recall@2"].value <= 1


def test_evaluate_writes_what_it_returns(base, tmp_path):
    text = tmp_path / "held-out.txt"
    text.write_text("The fox saw the moon.\n<|endoftext|>\n" * 60)
    seen = []
    report = evaluate(
        base, [{"name": "perplexity", "context": 32}, {"name": "kl_to_base", "context": 32}], text=text, base=base,
        out=tmp_path / "report.json", limit=4, progress=lambda *call: seen.append(call),
    )  # fmt: skip
    assert json.loads((tmp_path / "report.json").read_text()) == report.to_dict()
    assert report.metrics["perplexity"].samples == 4
    lines = [json.loads(line) for line in (tmp_path / "report.items.jsonl").read_text().splitlines()]
    assert [line["metric"] for line in lines] == ["perplexity"] * 4 + ["kl_to_base"] * 4 + ["top1_agreement"] * 4
    assert all("The fox saw" in line["prompt"] for line in lines[:4])
    assert all(line["expected"] == line["given"] for line in lines)
    assert report.metrics["kl_to_base"].value == 0
    assert {"torch", "dtype", "device"} <= set(report.versions)
    assert seen[-2:] == [("kl_to_base", 4, 4), ("all probes", 2, 2)]


@pytest.mark.parametrize(
    ("probes", "message"),
    [
        ([{"name": "perplexty"}], "Did you mean 'perplexity'"),
        ([{"name": "perplexity", "windows": 3}], "unknown option 'windows'"),
        ([{"name": "perplexity"}], "--data"),
        ([{"name": "state_bytes"}, {"name": "state_bytes"}], "a second time"),
        ([], "no probes"),
    ],
)
def test_what_cannot_be_measured_is_one_line(base, probes, message):
    with pytest.raises(ConfigError, match=message) as caught:
        evaluate(base, probes)
    assert "\n" not in str(caught.value)


def test_a_comparison_needs_a_base(base, model, tokenizer):
    with pytest.raises(ConfigError, match="--base"):
        KlToBase(context=32)(context_of(model, tokenizer))


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.skipif(not DATA.is_dir(), reason=f"no real models at {DATA}; set HYBRIDIZE_DATA")
def test_perplexity_of_a_real_model_is_the_recorded_one():
    folder = DATA / "models" / "stories260K"
    recorded = json.loads((folder / "reference.json").read_text())["perplexity"]["text/tinystories/v1_dev.txt"]["ppl"]
    probe = {"name": "perplexity", "context": 512, "tokens": 60_000}
    report = evaluate(folder, [probe], text=DATA / "text" / "tinystories" / "v1_dev.txt")
    assert report.metrics["perplexity"].value == pytest.approx(recorded, rel=1e-4)
