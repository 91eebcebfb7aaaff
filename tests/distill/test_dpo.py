"""Stage `dpo`: log-probabilities and loss against dense forms in fp64, and variants that must fail."""

import pytest
import torch
import torch.nn.functional as F

from hybridize.checkpoint import load_model
from hybridize.distill.chat import read_pairs
from hybridize.distill.dpo import Dpo, dpo_loss
from hybridize.distill.losses.token_nll import linear_token_nll
from hybridize.distill.rows import ChatBatch, ChatBlocks
from hybridize.distill.run import load_pair
from hybridize.distill.stages import STAGES
from hybridize.errors import ConfigError
from tests.distill.chats import chat_pair, tiny_tokenizer, write_pairs
from tests.tolerances import assert_close

SMALL = {"tokens": 4096, "seq_tokens": 32, "rows": 4, "beta": 0.5}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return chat_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def batch(tmp_path_factory):
    examples = read_pairs(tiny_tokenizer(), write_pairs(tmp_path_factory.mktemp("pairs") / "p.jsonl"), 32)
    return ChatBlocks(examples, 32, 4, 0, False).batch(0)


def moved(folders, options, **kwargs):
    """A student that has left its reference, as after some steps."""
    student, reference, trained = load_pair(folders[1], kwargs.get("reference", folders[1]), options, "dpo", {}, CPU)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in trained.values():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator) * parameter.std(correction=0)
    return student, reference, trained


def widened(*models):
    out = []
    for model in models:
        wide = load_model(model.config._name_or_path, torch.float64)
        wide.load_state_dict({name: weight.double() for name, weight in model.state_dict().items()})
        out.append(wide)
    return out


def dense(models, batch, beta, smoothing=0.0, normalised=False, prompts=False, swapped=False):
    """Mean loss of (student, reference) in fp64; every answer is read alone, unpadded."""
    losses = []
    for pair in range(len(batch)):
        r = []
        for lane in range(2):
            last = int(batch.learnt[pair, lane].nonzero().max()) + 1
            ids, learnt = batch.ids[pair, lane, :last], batch.learnt[pair, lane, 1:last]
            learnt = torch.ones_like(learnt) if prompts else learnt
            both = []
            for model in models:
                logp = model(ids[None]).logits[0, :-1].log_softmax(-1)
                both.append(logp[torch.arange(last - 1), ids[1:]][learnt].sum())
            ratio = both[1] - both[0] if swapped else both[0] - both[1]
            r.append(ratio / learnt.sum() if normalised else ratio)
        p = torch.sigmoid(beta * (r[0] - r[1]))
        losses.append(-(1 - smoothing) * p.log() - smoothing * (1 - p).log())
    return torch.stack(losses).mean()


def taken(student, reference, trained, options, batch):
    for p in trained.values():
        p.grad = None
    parts = options.start(student, reference, None)(batch, 1.0)
    return parts, torch.cat([p.grad.flatten() for p in trained.values()])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("normalised", [False, True])
def test_the_loss_and_its_gradient_are_the_papers(folders, batch, smoothing, normalised):
    options = Dpo(**SMALL, label_smoothing=smoothing, length_normalised=normalised, chunk_tokens=7)
    student, reference, trained = moved(folders, options)
    parts, slope = taken(student, reference, trained, options, batch)
    models = widened(student, reference)
    loss = dense(models, batch, 0.5, smoothing, normalised)
    loss.backward()
    assert_close(parts["loss"], loss, "fp32")
    assert_close(slope, torch.cat([p.grad.flatten() for p in models[0].parameters()]), "fp32", grad=True)
    for wrong in ({"prompts": True}, {"swapped": True}, {"normalised": not normalised}, {"beta": 0.4}, {"smoothing": 0.2}):
        other = {"beta": 0.5, "smoothing": smoothing, "normalised": normalised, **wrong}
        if wrong == {"prompts": True} and not normalised:
            # Both answers share their prompt: its log-probabilities cancel, and only the reading of lengths could tell.
            continue
        with pytest.raises(AssertionError), torch.no_grad():
            assert_close(parts["loss"], dense(models, batch, **other), "fp32")


def test_prompts_have_no_part_in_the_log_probabilities(folders, batch):
    options = Dpo(**SMALL)
    student, reference, _ = moved(folders, options)
    step = options.start(student, reference, None)
    with torch.no_grad():
        found = step.log_probs(student, batch)
        logp = student(input_ids=batch.ids.flatten(0, 1)).logits.double()[:, :-1].log_softmax(-1)
    by_token = logp.gather(-1, batch.ids.flatten(0, 1)[:, 1:, None]).squeeze(-1)
    learnt = batch.learnt.flatten(0, 1)[:, 1:]
    assert_close(found.flatten(), (by_token * learnt).sum(-1), "fp32")
    with pytest.raises(AssertionError):
        assert_close(found.flatten(), by_token.sum(-1), "fp32")


def test_at_the_start_nothing_is_preferred(folders, batch):
    options = Dpo(**SMALL)
    student, reference, trained = load_pair(folders[1], folders[1], options, "dpo", {}, CPU)
    parts, slope = taken(student, reference, trained, options, batch)
    assert parts["loss"].item() == pytest.approx(0.6931472, abs=1e-6)
    assert (parts["margin"].item(), parts["reward_chosen"].item(), parts["accuracy"].item()) == (0, 0, 0)
    assert bool(slope.any())


def test_rewards_say_what_the_student_learnt(folders, batch):
    options = Dpo(**SMALL)
    student, reference, trained = moved(folders, options)
    parts, _ = taken(student, reference, trained, options, batch)
    step = options.start(student, reference, None)
    with torch.no_grad():
        rewards = 0.5 * (step.log_probs(student, batch) - step.log_probs(reference, batch))
    assert_close(parts["reward_chosen"], rewards[:, 0].mean(), "fp32")
    assert_close(parts["reward_rejected"], rewards[:, 1].mean(), "fp32")
    assert_close(parts["margin"], (rewards[:, 0] - rewards[:, 1]).mean(), "fp32")
    assert parts["accuracy"].item() == (rewards[:, 0] > rewards[:, 1]).float().mean().item()


def test_a_step_may_be_divided_anyhow(folders, batch):
    options = Dpo(**SMALL)
    student, reference, trained = moved(folders, options)
    _, whole = taken(student, reference, trained, options, batch)
    for p in trained.values():
        p.grad = None
    step = options.start(student, reference, None)
    for part in batch.split(3):
        step(part, options.weight(part) / options.weight(batch))
    assert_close(torch.cat([p.grad.flatten() for p in trained.values()]), whole, "fp32", grad=True)


def test_padding_and_the_side_it_is_read_on_do_not_count(folders, batch):
    options = Dpo(**SMALL)
    student, reference, trained = moved(folders, options)
    parts, slope = taken(student, reference, trained, options, batch)
    wide = ChatBatch(**{
        name: torch.cat([getattr(batch, name), torch.zeros(4, 2, 5, dtype=getattr(batch, name).dtype)], -1)
        for name in ("ids", "learnt", "positions")
    })  # fmt: skip
    again, other = taken(student, reference, trained, options, wide)
    assert_close(again["loss"], parts["loss"], "fp32")
    assert_close(other, slope, "fp32", grad=True)


def test_the_reference_may_be_the_teacher(folders):
    assert Dpo(**SMALL).follows_itself
    options = Dpo(**SMALL, reference="teacher")
    assert not options.follows_itself
    assert options.step_tokens == 2 * 4 * 32


def test_a_large_margin_overflows_nowhere():
    far = torch.tensor([[400.0, -400.0], [-400.0, 400.0]], requires_grad=True)
    loss = dpo_loss(far, 1.0, 0.0)
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(far.grad).all()
    assert loss.tolist() == [0.0, 800.0]


@pytest.mark.parametrize("chunk", [1, 5, 100])
@pytest.mark.parametrize(("dtype", "row"), [(torch.float64, "fp64"), (torch.float32, "fp32")])
def test_token_nll_is_torchs(chunk, dtype, row):
    g = torch.Generator().manual_seed(0)
    exact = [torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((13, 8), (31, 8), (13,))]
    labels = torch.randint(31, (13,), generator=g)
    own = [tensor.to(dtype, copy=True).requires_grad_() for tensor in exact[:2]]
    wide = [tensor.clone().requires_grad_() for tensor in exact[:2]]
    found, expected = linear_token_nll(*own, labels, chunk), F.cross_entropy(wide[0] @ wide[1].T, labels, reduction="none")
    assert_close(found, expected, row)
    # Each token has a weight of its own in what follows.
    found.backward(exact[2].to(dtype))
    expected.backward(exact[2])
    for a, e in zip(own, wide, strict=True):
        assert_close(a.grad, e.grad, row, grad=True)
    assert not torch.allclose(own[0].grad[0] / exact[2][0], own[0].grad[0])
    with pytest.raises(AssertionError):
        assert_close(found, F.cross_entropy(wide[0] @ wide[1].T, labels.roll(1), reduction="none"), row)


def test_token_nll_of_a_frozen_head_nothing_and_half_precision():
    g = torch.Generator().manual_seed(0)
    x, head, labels = torch.randn(9, 8, generator=g), torch.randn(31, 8, generator=g), torch.arange(9)
    x.requires_grad_()
    linear_token_nll(x, head, labels).sum().backward()
    assert head.grad is None
    assert linear_token_nll(x[:0], head, labels[:0]).shape == (0,)
    low = linear_token_nll(x.bfloat16(), head.bfloat16(), labels)
    assert low.dtype == torch.float32
    exact = F.cross_entropy(x.bfloat16().double() @ head.bfloat16().double().T, labels, reduction="none")
    assert_close(low, exact, "fp32")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(linear_token_nll(x, head, labels), linear_token_nll(x.detach(), head, labels))
        assert_close(
            linear_token_nll(x, head, labels), F.cross_entropy(x.double() @ head.double().T, labels, reduction="none"), "fp32"
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0}, "beta is 0"),
        ({"label_smoothing": 0.5}, "label_smoothing 0.5"),
        ({"reference": "base"}, "expected one of 'student', 'teacher'"),
        ({"packed": True}, "unknown option 'packed'"),
        ({"tokens": 255}, "expected at least one step of 256"),
    ],
)
def test_impossible_options_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        STAGES.build({"name": "dpo", **SMALL, **options})
