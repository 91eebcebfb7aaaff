"""Sink + window attention where its OpSpec cannot say it: the PyTorch path, flex's blocks, bad inputs, mixers on kernels."""

import types

import pytest
import torch

from hybridize.errors import ConfigError
from hybridize.kernels._core import dispatch
from hybridize.kernels._core.launch import INTERPRETED, overridden
from hybridize.kernels.stream_attn import stream_attn, stream_attn_step
from hybridize.kernels.stream_attn.flex_impl import BLOCK, block_mask
from hybridize.kernels.stream_attn.spec import STREAM_ATTN, STREAM_ATTN_STEP, TINY
from hybridize.kernels.stream_attn.torch_impl import document_starts
from tests.kernels.suite import check_case
from tests.mixers.test_contract import build, in_chunks, logits
from tests.tiny import tiny_base
from tests.tolerances import TOLERANCES, assert_close, rms_ratio


@pytest.mark.parametrize("case", STREAM_ATTN.cases, ids=lambda case: case.name)
def test_the_pytorch_path_is_the_definition(case):
    """Values and gradients, fp64."""
    check_case(STREAM_ATTN, case, torch.float64, "torch", row="fp64")


def test_blocks_of_the_pytorch_path():
    """A text of several blocks of queries against the same rows one block at a time."""
    inputs = STREAM_ATTN.make_inputs(TINY | {"T": 200, "window": 70}, torch.float64, "cpu", 0)
    whole = stream_attn(**inputs, impl="torch")
    assert_close(whole, STREAM_ATTN.reference(**inputs), "fp64")
    assert rms_ratio(stream_attn(**inputs | {"window": 71}, impl="torch"), whole) > 1e-3
    assert rms_ratio(stream_attn(**inputs | {"sink": 2}, impl="torch"), whole) > 1e-3


@pytest.mark.parametrize(("sink", "window", "borders"), [(4, 400, None), (0, 128, None), (3, 300, (20, 21, 290)), (3, 5, (130,))])
def test_blocks_of_flex(sink, window, borders):
    """Whole blocks are seen whole, blocks that are left out are not seen, and what is between is asked pair by pair."""
    tokens = 5 * BLOCK - 17
    index = torch.arange(tokens)
    starts = torch.zeros(1, tokens, dtype=torch.int64)
    if borders is not None:
        starts = document_starts(torch.bucketize(index, torch.tensor(borders), right=True)[None])
    mask = block_mask(tokens, sink, window, None if borders is None else starts, "cpu")
    ahead = index[:, None] - index
    seen = (ahead >= 0) & (index >= starts[0][:, None]) & ((ahead < window) | (index - starts[0][:, None] < sink))
    zero = torch.tensor(0)
    assert torch.equal(mask.mask_mod(zero, zero, index[:, None], index[None]), seen)
    whole, part = torch.zeros(5, 5), torch.zeros(5, 5)
    for row in range(5):
        whole[row, mask.full_kv_indices[0, 0, row, : mask.full_kv_num_blocks[0, 0, row]].long()] = 1
        part[row, mask.kv_indices[0, 0, row, : mask.kv_num_blocks[0, 0, row]].long()] = 1
        for col in range(5):
            pairs = seen[row * BLOCK : (row + 1) * BLOCK, col * BLOCK : (col + 1) * BLOCK]
            assert bool(pairs.any()) <= bool(part[row, col] + whole[row, col])
            assert bool(whole[row, col]) <= bool(pairs.all())
    assert not (whole * part).any()
    assert whole.any() == (window > 2 * BLOCK)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q_BHTD": torch.zeros(1, 4, 16)}, "q_BHTD: got"),
        ({"k_BGTD": torch.zeros(1, 3, 5, 16)}, "k_BGTD: got shape .* heads that divide 4"),
        ({"k_BGTD": torch.zeros(1, 2, 6, 16), "v_BGTD": torch.zeros(1, 2, 6, 16)}, "got 6 tokens, expected the 5"),
        ({"v_BGTD": torch.zeros(2, 2, 5, 16)}, "v_BGTD: got 2 rows"),
        ({"window": 0}, "got 3 and 0, expected >= 0 and >= 1"),
        ({"segments_BT": torch.zeros(1, 4, dtype=torch.long)}, "segments_BT: got"),
        ({"impl": "flex"}, "got tensors on cpu, expected cuda"),
    ],
    ids=str,
)
def test_bad_inputs_are_named(change, words):
    inputs = STREAM_ATTN.make_inputs(TINY | {"T": 5}, torch.float32, "cpu", 0)
    with pytest.raises(ConfigError, match=words):
        stream_attn(**inputs | change)


def test_bad_inputs_of_a_step_are_named():
    q, keys = torch.zeros(2, 4, 16), torch.zeros(2, 2, 3, 16)
    with pytest.raises(ConfigError, match="keys_BGSD: got 0 slots"):
        stream_attn_step(q, keys[:, :, :0], keys[:, :, :0])
    with pytest.raises(ConfigError, match="counts_B: got"):
        stream_attn_step(q, keys, keys, torch.ones(3, dtype=torch.long))


@pytest.mark.skipif(not INTERPRETED, reason="the interpreter is for machines without a GPU")
def test_a_model_on_the_kernels(tmp_path, monkeypatch):
    """Logits of padded rows and of a ring that goes round are those of the PyTorch path."""
    real = pytest.importorskip("hybridize.kernels.stream_attn.triton_impl")
    bases = {"llama": tiny_base("llama", tmp_path, num_hidden_layers=1)}
    model = build(bases, "llama", "streaming", keep=(), sink_tokens=2, window_tokens=6)
    ids = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0

    def padded():
        return logits(model, ids, attention_mask=mask) * mask[..., None]

    def decoded():
        return in_chunks(model, ids[:1], (9, 1, 1, 1))[0]

    want = padded(), decoded()
    called, wider = [], 0

    def counted(name):
        def call(*arguments):
            called.append(name)
            if name == "stream_attn":
                arguments = (*arguments[:4], arguments[4] + wider, *arguments[5:])
            return getattr(real, name)(*arguments)

        return call

    names = ("stream_attn", "stream_attn_step")
    refusals = {f"refuses_{name}": getattr(real, f"refuses_{name}") for name in names}
    replaced = types.SimpleNamespace(DEVICES=real.DEVICES, **{name: counted(name) for name in names}, **refusals)
    monkeypatch.setitem(dispatch.MODULES, ("stream_attn", "triton"), replaced)
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    with overridden({**STREAM_ATTN.tiles, **STREAM_ATTN_STEP.tiles}):
        assert_close(padded(), want[0], "fp32")
        assert_close(decoded(), want[1], "fp32")
        assert called == 2 * ["stream_attn"] + 3 * ["stream_attn_step"]
        wider = 1
        assert rms_ratio(padded(), want[0]) > 100 * TOLERANCES["fp32"][0]


@pytest.mark.parametrize("packed", [0, 1])
def test_gradcheck(packed):
    inputs = STREAM_ATTN.make_inputs(
        {"B": 1, "T": 8, "H": 2, "G": 1, "D": 2, "sink": 1, "window": 3, "packed": packed}, torch.float64, "cpu", 0
    )
    leaves = [inputs[name].clone().requires_grad_() for name in STREAM_ATTN.grads]

    def out(*leaves):
        return stream_attn(**inputs | dict(zip(STREAM_ATTN.grads, leaves, strict=True)), impl="torch")

    assert torch.autograd.gradcheck(out, leaves)
