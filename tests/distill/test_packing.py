"""Rows of several documents: what each stage computes on one is what it computes on each document alone."""

import copy

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from hybridize.data import Batch, Tokens, TrainBlocks
from hybridize.distill import align
from hybridize.distill.align import Align
from hybridize.distill.kl import KLStage
from hybridize.distill.losses import LOSSES
from hybridize.distill.signals import Head, Signals
from hybridize.mixers import MIXERS
from tests.mixers.test_contract import build
from tests.tiny import tiny_base
from tests.tolerances import assert_close, rms_ratio

NAMES = [name for name in MIXERS.names() if name != "attention"]
LENGTHS = [9, 1, 16, 5, 30, 12, 7]
SMALL = {"tokens": 4096, "seq_tokens": 24, "rows": 4}


def packed_text(bos_id=1):
    ids = np.random.default_rng(5).integers(3, 64, size=sum(LENGTHS)).astype(np.int32)
    starts = np.cumsum([0, *LENGTHS[:-1]])
    return Tokens(ids=ids, text_bytes=1, sha256="packed", bos_id=bos_id, starts=starts)


def packed(documents="reset", bos_id=1):
    return TrainBlocks(packed_text(bos_id), 24, 4, 0, bos_id, documents).batch(0)


def segments(batch):
    """(row, stretch) of each document of a batch, from the positions."""
    for row, positions in enumerate(batch.positions.tolist()):
        begins = [i for i, position in enumerate(positions) if position == 0]
        yield from ((row, slice(a, b)) for a, b in zip(begins, [*begins[1:], len(positions)], strict=True))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_base("llama", tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def teacher(base):
    return AutoModelForCausalLM.from_pretrained(base).eval().requires_grad_(False)


@pytest.fixture(scope="module", params=NAMES)
def student(request, base):
    return build({"llama": base}, "llama", request.param).train()


def kl_outputs(student, teacher, batch):
    """Logits of teacher and student as stage kl makes them, [B, T, V] each."""
    step = KLStage(**SMALL).start(student, teacher, batch)
    with torch.no_grad():
        return [
            signals.hidden @ signals.head.weight.T for signals in (step._signals(model, batch) for model in (teacher, student))
        ]


def align_outputs(student, teacher, batch):
    """What the mixers of teacher and student give in a step of stage align, [B, T, D] each."""
    step = Align(**SMALL).start(student, teacher, batch)
    seen = []
    handles = [
        model.model.layers[index].self_attn.register_forward_hook(lambda m, a, out: seen.append(out[0].detach()))
        for model in (teacher, student)
        for index in step.layers
    ]
    step(batch, 1.0)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("outputs", [kl_outputs, align_outputs])
def test_a_packed_row_is_its_documents_alone(student, teacher, outputs):
    batch = packed()
    whole = outputs(student, teacher, batch)
    # The wrong variant: positions that are not reset.
    joined = outputs(student, teacher, Batch(batch.ids))
    checked = 0
    for row, stretch in segments(batch):
        alone = outputs(student, teacher, Batch(batch.ids[row : row + 1, stretch]))
        for one, each, wrong in zip(whole, alone, joined, strict=True):
            assert_close(one[row, stretch], each[0], "fp32")
            if stretch.start > 0:
                checked += 1
                assert rms_ratio(wrong[row, stretch], each[0]) > 1e-3
    assert checked >= 8


@pytest.mark.parametrize(("name", "lost"), [("streaming", "segment_ids"), ("mamba2", "segment_ids"), ("mla", "attention_mask")])
def test_align_that_forgets_to_tell_the_students_mixer_would_show(base, teacher, monkeypatch, name, lost):
    student, batch = build({"llama": base}, "llama", name).train(), packed()
    right = align_outputs(student, teacher, batch)
    if lost == "segment_ids":
        monkeypatch.setattr(align, "find_packed_sequence_indices", lambda positions: None)
    else:
        forward = type(student.model.layers[0].self_attn).forward

        def without(self, *args, **kwargs):
            return forward(self, *args, **{**kwargs, "attention_mask": None})

        monkeypatch.setattr(type(student.model.layers[0].self_attn), "forward", without)
    wrong = align_outputs(student, teacher, batch)
    assert max(rms_ratio(a, b) for a, b in zip(wrong, right, strict=True)) > 1e-3


def test_rows_hold_every_document_with_bos_in_front():
    text = packed_text()
    batch = TrainBlocks(text, 24, 4, 0, 1, "reset").batch(0)
    size = len(text.ids) + len(LENGTHS)
    assert batch.ids.shape == batch.positions.shape == (4, 24)
    # All of the text with its BOS tokens: what is there at each place of the ring, found again from a row's first tokens.
    stream = np.insert(text.ids, text.starts, 1)
    documents = np.insert(np.zeros(len(text.ids)), text.starts, 1)
    ring, marks = np.tile(stream, 3), np.tile(documents, 3)
    found = []
    for ids, positions in zip(batch.ids.numpy(), batch.positions.numpy(), strict=True):
        assert (ids[0], positions[0]) == (1, 0)
        (start,) = [s for s in range(size) if (ring[s : s + 23] == ids[1:]).all()]
        assert ((positions[1:] == 0) == (marks[start : start + 23] == 1)).all()
        steps = np.diff(positions)
        assert ((steps == 1) | (positions[1:] == 0)).all()
        found.append(start)
    # An epoch's rows do not overlap.
    assert len({(s + i) % size for s in found[:3] for i in range(23)}) == 3 * 23


def test_without_bos_positions_restart_and_ids_stay():
    text = packed_text(bos_id=None)
    reset = TrainBlocks(text, 20, 4, 0, None, "reset").batch(3)
    joined = TrainBlocks(text, 20, 4, 0, None).batch(3)
    assert joined.positions is None
    assert torch.equal(reset.ids, joined.ids)
    first = {int(i) for i in text.ids[text.starts]}
    inside = reset.positions[:, 1:] == 0
    assert int(inside.sum()) >= 6
    assert {int(i) for i in reset.ids[:, 1:][inside]} <= first


@pytest.mark.parametrize("masked", [False, True])
def test_cross_entropy_does_not_foretell_the_next_document(masked):
    batch = packed()
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 24, 8, generator=g, dtype=torch.float64)
    head = torch.randn(64, 8, generator=g, dtype=torch.float64)
    mask = torch.rand(4, 24, generator=g) < 0.8 if masked else None
    loss = LOSSES.build({"name": "cross_entropy", "chunk_tokens": 7})
    found = loss(Signals(hidden=hidden, head=Head(weight=head), ids=batch.ids, positions=batch.positions), Signals(), mask)
    each = -(hidden[:, :-1] @ head.T).log_softmax(-1).gather(-1, batch.ids[:, 1:, None])[..., 0]
    counted = torch.ones(4, 23, dtype=torch.bool) if mask is None else mask[:, :-1] & mask[:, 1:]
    within = counted & (batch.positions[:, 1:] != 0)
    assert_close(found, each[within].sum() / counted.sum(), "fp64")
    across = loss(Signals(hidden=hidden, head=Head(weight=head), ids=batch.ids), Signals(), mask)
    assert rms_ratio(across, found) > 1e-3


def test_micro_batches_of_packed_rows_add_up(base, teacher):
    """However a step is divided, and whatever the number of documents in a part, the gradient is the same."""
    batch = packed()
    losses = [{"name": "kl"}, {"name": "cross_entropy"}]
    found = []
    for parts in (4, 3, 1):
        student = build({"llama": base}, "llama", "streaming").train()
        step = KLStage(**SMALL, losses=copy.deepcopy(losses)).start(student, teacher, batch)
        for part in batch.split(parts):
            step(part, len(part) / len(batch))
        found.append(torch.cat([p.grad.flatten() for p in student.parameters()]))
    assert_close(found[1], found[0], "fp32", grad=True)
    assert_close(found[2], found[0], "fp32", grad=True)
