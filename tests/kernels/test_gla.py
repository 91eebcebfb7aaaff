"""`gla` and `gla_step` against the float64 recurrence, and the properties the recurrence has."""

import pytest
import torch
import torch.nn.functional as F

from hybridize.errors import ConfigError
from hybridize.kernels.gla import gla, gla_step
from hybridize.kernels.gla.reference import gla_reference
from hybridize.kernels.pairs import ChannelPairs, HeadPairs
from tests.kernels.calls import as_fp64, grads_of, run
from tests.tolerances import assert_close, rms_ratio

NAMES = ("q", "k", "v", "decay", "state")
HEADS = [(4, 4), (4, 1), (4, 2)]
TOKENS = [1, 2, 3, 31, 64, 65, 100]
N, P = 6, 5


def make_inputs(tokens, heads=(4, 2), dtype=torch.float64, channels=N, batch=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    H, S = heads
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape, dtype=dtype):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    return {
        "q": normal(batch, tokens, H, N) / N**0.5,
        "k": normal(batch, tokens, S, N),
        "v": normal(batch, tokens, S, P),
        "decay": F.logsigmoid(normal(batch, tokens, S, channels, dtype=wide) * 3),
        "state": normal(batch, S, N, P, dtype=wide),
    }


def fails(actual, expected, row="fp64", grad=False):
    with pytest.raises(AssertionError, match="RMS ratio"):
        assert_close(actual, expected, row, grad)


@pytest.mark.parametrize("channels", [1, N])
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("row", ["fp64", "fp32", "bf16"])
def test_forward_and_gradients_match_the_recurrence(heads, row, channels):
    dtype = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}[row]
    inputs = make_inputs(45, heads, dtype, channels)
    y, state = run(gla, inputs, chunk=16)
    y_ref, state_ref = run(gla_reference, as_fp64(inputs))
    assert y.dtype == dtype
    assert_close(y, y_ref, row)
    assert_close(state, state_ref, row)
    dy = torch.randn(y.shape, dtype=torch.float64).to(dtype)
    dstate = torch.randn_like(state)
    grads = grads_of(gla, inputs, dy, dstate, chunk=16)
    expected = grads_of(gla_reference, as_fp64(inputs), dy, dstate)
    for name in NAMES:
        assert_close(grads[name], expected[name], row, grad=True)


@pytest.mark.parametrize("channels", [1, N])
@pytest.mark.parametrize("tokens", TOKENS)
def test_every_length_with_the_default_chunk(tokens, channels):
    inputs = make_inputs(tokens, dtype=torch.float32, channels=channels)
    y_ref, state_ref = run(gla_reference, as_fp64(inputs))
    y, state = run(gla, inputs)
    assert_close(y, y_ref, "fp32")
    assert_close(state, state_ref, "fp32")


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("segmented", [False, True])
def test_gradcheck(channels, segmented):
    inputs = make_inputs(7, (2, 1), channels=2, batch=1)
    inputs = {n: t[..., :2] for n, t in inputs.items()} | {"state": inputs["state"][:, :, :2, :2]}
    inputs["decay"] = inputs["decay"][..., :channels]
    segments = torch.tensor([[0, 0, 1, 1, 2, 2, 2]]) if segmented else None
    leaves = [inputs[name].contiguous().requires_grad_() for name in NAMES]
    assert torch.autograd.gradcheck(lambda *t: gla(*t, segments, 4), leaves)


def test_wrong_variants_are_caught():
    inputs = make_inputs(40)
    expected = run(gla_reference, inputs)[0]
    assert_close(run(gla, inputs)[0], expected, "fp64")
    modulo = inputs | {name: inputs[name].repeat(1, 1, 2, 1) for name in ("k", "v", "decay")}
    modulo["state"] = inputs["state"].repeat(1, 2, 1, 1)
    fails(run(gla, modulo)[0], expected)
    contiguous = inputs | {name: inputs[name].repeat_interleave(2, dim=2) for name in ("k", "v", "decay")}
    contiguous["state"] = inputs["state"].repeat_interleave(2, dim=1)
    assert_close(run(gla, contiguous)[0], expected, "fp64")
    fails(run(gla, inputs | {"decay": 0 * inputs["decay"]})[0], expected)
    mean = inputs["decay"].mean(-1, keepdim=True)
    fails(run(gla, inputs | {"decay": mean})[0], expected)
    same = run(gla, inputs | {"decay": mean.expand(-1, -1, -1, N)})[0]
    assert_close(run(gla, inputs | {"decay": mean})[0], same, "fp64")


@pytest.mark.parametrize("channels", [1, N])
@pytest.mark.parametrize("chunk", [1, 2, 7, 16, 1024])
def test_the_chunk_size_does_not_matter(chunk, channels):
    inputs = make_inputs(70, channels=channels)
    ids = torch.bucketize(torch.arange(70), torch.tensor([9, 33]), right=True).expand(2, -1)
    for segments in (None, ids):
        y, state = run(gla, inputs, chunk=chunk, segments_BT=segments)
        y_ref, state_ref = run(gla, inputs, chunk=32, segments_BT=segments)
        assert_close(y, y_ref, "fp64")
        assert_close(state, state_ref, "fp64")


def cut(inputs, start, stop, state):
    return {name: inputs[name][:, start:stop] for name in NAMES[:-1]} | {"state": state}


@pytest.mark.parametrize("channels", [1, N])
@pytest.mark.parametrize("first", [0, 1, 33, 64])
def test_two_prefills_equal_one(first, channels):
    inputs = make_inputs(90, channels=channels)
    y_ref, state_ref = run(gla, inputs)
    y_a, state = run(gla, cut(inputs, 0, first, inputs["state"]))
    y_b, state = run(gla, cut(inputs, first, 90, state))
    assert_close(torch.cat([y_a, y_b], dim=1), y_ref, "fp64")
    assert_close(state, state_ref, "fp64")
    if first:
        fails(run(gla, cut(inputs, first, 90, inputs["state"]))[0], y_ref[:, first:])


@pytest.mark.parametrize("channels", [1, N])
@pytest.mark.parametrize("row", ["fp64", "bf16"])
def test_steps_equal_prefill(row, channels):
    inputs = make_inputs(12, dtype=torch.float64 if row == "fp64" else torch.bfloat16, channels=channels)
    y_ref, state_ref = run(gla, inputs)
    state = inputs["state"].clone()
    steps = zip(*(inputs[name].unbind(1) for name in NAMES[:-1]), strict=True)
    y = [gla_step(*step, state) for step in steps]
    assert_close(torch.stack(y, dim=1), y_ref, row)
    assert_close(state, state_ref, row)


@pytest.mark.parametrize("channels", [1, N])
@pytest.mark.parametrize("boundaries", [(1,), (16,), (5, 6, 40), (15, 17, 32, 33)], ids=str)
def test_segments_equal_separate_runs(boundaries, channels):
    inputs = make_inputs(70, channels=channels)
    cuts = (0, *boundaries, 70)
    ids = torch.bucketize(torch.arange(70), torch.tensor(boundaries), right=True).expand(2, -1)
    y, state = run(gla, inputs, segments_BT=ids * 3 + 7, chunk=16)
    before, parts = inputs["state"], []
    for start, stop in zip(cuts[:-1], cuts[1:], strict=True):
        y_part, last = run(gla, cut(inputs, start, stop, before))
        parts.append(y_part)
        before = None
    assert_close(y, torch.cat(parts, dim=1), "fp64")
    assert_close(state, last, "fp64")
    fails(run(gla, inputs)[0], y)


@pytest.mark.parametrize("channels", [1, N])
def test_gradients_with_segments_that_differ_per_row(channels):
    inputs = make_inputs(50, channels=channels)
    ids = torch.stack([torch.arange(50) // 11, torch.arange(50) // 32])
    dy, dstate = torch.randn(2, 50, 4, P).double(), torch.randn(2, 2, N, P).double()
    grads = grads_of(gla, inputs, dy, dstate, segments_BT=ids, chunk=16)
    expected = grads_of(gla_reference, inputs, dy, dstate, segments_BT=ids)
    unpacked = grads_of(gla, inputs, dy, dstate, chunk=16)
    for name in NAMES:
        assert_close(grads[name], expected[name], "fp64", grad=True)
        fails(unpacked[name], expected[name], grad=True)


def test_padding_leaves_the_state():
    inputs = make_inputs(60)
    y_ref, state_ref = run(gla, cut(inputs, 0, 45, inputs["state"]))
    padded = {name: t.clone() for name, t in inputs.items()}
    padded["k"][:, 45:], padded["decay"][:, 45:] = 0, 0
    y, state = run(gla, padded)
    assert_close(y[:, :45], y_ref, "fp64")
    assert_close(state, state_ref, "fp64")
    fails(run(gla, inputs)[1], state_ref)


@pytest.mark.parametrize("channels", [1, N])
@pytest.mark.parametrize("log_decay", ["-50", "-1e-4", "0", "mixed"])
def test_extreme_decays_in_fp32(log_decay, channels):
    inputs = make_inputs(100, dtype=torch.float32, channels=channels)
    if log_decay == "mixed":
        choices = torch.tensor([-50.0, -1e-4, 0.0, -1.0])
        inputs["decay"] = choices[torch.randint(0, 4, inputs["decay"].shape, generator=torch.Generator().manual_seed(1))]
    else:
        inputs["decay"] = torch.full_like(inputs["decay"], float(log_decay))
    y, state = run(gla, inputs)
    y_ref, state_ref = run(gla_reference, as_fp64(inputs))
    assert_close(y, y_ref, "fp32")
    assert_close(state, state_ref, "fp32")
    dy, dstate = torch.randn_like(y), torch.randn_like(state)
    grads = grads_of(gla, inputs, dy, dstate)
    expected = grads_of(gla_reference, as_fp64(inputs), dy, dstate)
    for name in NAMES:
        assert_close(grads[name], expected[name], "fp32", grad=True)


def test_no_tokens_and_no_state():
    inputs = make_inputs(0)
    y, state = run(gla, inputs)
    assert y.shape == (2, 0, 4, P)
    assert torch.equal(state, inputs["state"])
    assert state is not inputs["state"]
    assert run(gla, inputs | {"state": None})[1].abs().max() == 0
    some = make_inputs(9) | {"state": None}
    assert_close(run(gla, some)[0], run(gla_reference, some)[0], "fp64")


def test_autocast_does_not_reach_the_products():
    inputs = make_inputs(40, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, _ = run(gla, inputs)
        step = gla_step(*(inputs[n][:, 0] for n in NAMES[:-1]), inputs["state"].clone())
    y_ref = run(gla_reference, as_fp64(inputs))[0]
    assert_close(y, y_ref, "fp32")
    assert_close(step, y_ref[:, 0], "fp32")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"k": torch.zeros(2, 9, 3, N)}, "heads"),
        ({"v": torch.zeros(2, 9, 1, P)}, "heads"),
        ({"q": torch.zeros(2, 9, 4, N + 1)}, "key dim"),
        ({"decay": torch.zeros(2, 9, 2, 2)}, "key dim"),
        ({"k": torch.zeros(2, 8, 2, N)}, "k: got shape"),
        ({"q": torch.zeros(2, 9, 4, N).double()}, "q: got torch.float64"),
        ({"state": torch.zeros(2, 2, P, N)}, "state_BSNP"),
        ({"state": torch.zeros(2, 2, N, P).bfloat16()}, "state_BSNP"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_inputs_are_named(change, words):
    with pytest.raises(ConfigError, match=words):
        run(gla, make_inputs(9, dtype=torch.float32) | change)


def test_bad_options_are_named():
    inputs = make_inputs(9)
    with pytest.raises(ConfigError, match="chunk"):
        run(gla, inputs, chunk=0)
    with pytest.raises(ConfigError, match="segments_BT"):
        run(gla, inputs, segments_BT=torch.zeros(2, 8, dtype=torch.long))


@pytest.mark.parametrize("channels", [1, N])
@pytest.mark.parametrize("segmented", [False, True])
def test_many_blocks_give_the_result_of_one(monkeypatch, channels, segmented):
    inputs = make_inputs(61, channels=channels)
    segments = (torch.arange(61) // 23).expand(2, -1) if segmented else None
    dy, dstate = torch.randn(2, 61, 4, P).double(), torch.randn(2, 2, N, P).double()
    y, state = run(gla_reference, inputs, segments_BT=segments)
    right = grads_of(gla_reference, inputs, dy, dstate, segments_BT=segments)
    monkeypatch.setattr("hybridize.kernels.gla.torch_impl.BLOCK_NUMBERS", 1500)
    for chunk in (7, 8):
        y_small, state_small = run(gla, inputs, chunk=chunk, segments_BT=segments)
        assert_close(y_small, y, "fp64")
        assert_close(state_small, state, "fp64")
        for name, grad in grads_of(gla, inputs, dy, dstate, chunk=chunk, segments_BT=segments).items():
            assert_close(grad, right[name], "fp64", grad=True)


@pytest.mark.parametrize("channels", [1, N])
def test_wrong_gradients_are_caught(monkeypatch, channels):
    """Without the final state's gradient, and without that of the decay between pairs, what depends on them is wrong."""
    inputs = make_inputs(40, channels=channels)
    inputs["decay"] = 0.05 * inputs["decay"]
    dy, dstate = torch.randn(2, 40, 4, P).double(), torch.randn(2, 2, N, P).double()
    right = grads_of(gla_reference, inputs, dy, dstate)
    without = grads_of(gla, inputs, dy, 0 * dstate)
    for name in ("k", "v", "decay", "state"):
        fails(without[name], right[name], grad=True)
    kind = HeadPairs if channels == 1 else ChannelPairs
    grads = kind.grads

    def pairs_left_out(self, dw, *others):
        return *grads(self, dw, *others)[:2], grads(self, 0 * dw, *others)[2]

    monkeypatch.setattr(kind, "grads", pairs_left_out)
    found = grads_of(gla, inputs, dy, dstate)
    fails(found.pop("decay"), right.pop("decay"), grad=True)
    for name, grad in found.items():
        assert_close(grad, right[name], "fp64", grad=True)


@pytest.mark.parametrize("channels", [1, N])
def test_the_gradient_of_a_decay_beside_a_strong_one_is_no_rounding_noise(channels):
    """Row sums minus column sums, the usual form, leave the rounding of large numbers where the gradient is small."""
    inputs = make_inputs(64, dtype=torch.float32, channels=channels)
    inputs["decay"] = torch.full_like(inputs["decay"], -1e-4)
    inputs["decay"][:, 32] = -20.0
    dy, dstate = torch.randn(2, 64, 4, P), torch.randn(2, 2, N, P)
    expected = grads_of(gla_reference, as_fp64(inputs), dy, dstate)["decay"]

    def both(inputs):
        """The gradient as it is, and in the usual form: of each channel, what reads and ends later less what was written."""
        grads = grads_of(gla, inputs, dy, dstate, chunk=64)
        read, written = (inputs[name] * grads[name] for name in ("q", "k"))
        usual = (read.unflatten(2, (2, 2)).sum(3) - written).flip(1).cumsum(1).flip(1)
        usual = usual + (run(gla, inputs)[1] * dstate).sum(-1)[:, None]
        return grads["decay"][:, 32], (usual.sum(-1, keepdim=True) if channels == 1 else usual)[:, 32]

    own, usual = both(inputs)
    assert_close(own, expected[:, 32], "fp32", grad=True)
    fails(usual, expected[:, 32], "fp32", grad=True)
    for exact in both(as_fp64(inputs)):
        assert rms_ratio(exact, expected[:, 32]) < 1e-6


@pytest.mark.parametrize("channels", [1, N])
def test_the_backward_keeps_inputs_and_boundary_states_alone(channels):
    inputs = {name: t.requires_grad_() for name, t in make_inputs(256, dtype=torch.float32, channels=channels).items()}
    held = {}

    def pack(tensor):
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y, _ = run(gla, inputs, chunk=64)
    assert y.requires_grad
    own = [inputs[name] for name in NAMES[:-1]]
    assert sum(held.values()) == 4 * (sum(t.numel() for t in own) + (256 // 64 + 1) * inputs["state"].numel())
