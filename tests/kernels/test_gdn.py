"""`gdn` and `gdn_step` against the float64 recurrence, and the properties the recurrence has."""

import pytest
import torch
import torch.nn.functional as F

from hybridize.errors import ConfigError
from hybridize.kernels.gdn import gdn, gdn_step
from hybridize.kernels.gdn.reference import gdn_reference
from tests.kernels.calls import as_fp64, grads_of, run
from tests.tolerances import assert_close, rms_ratio

NAMES = ("q", "k", "v", "g", "beta", "state")
HEADS = [(4, 4, 4), (1, 1, 4), (4, 2, 2), (4, 1, 2), (2, 4, 1)]
N, P = 6, 5
BOTH = pytest.mark.parametrize("channels", [False, True], ids=["head", "channel"])


def make_inputs(tokens, heads=(4, 2, 2), dtype=torch.float64, channels=False, batch=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    (Q, G, X), H = heads, max(heads)
    small = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape, dtype=dtype):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    return {
        "q": normal(batch, tokens, Q, N),
        "k": F.normalize(normal(batch, tokens, G, N), dim=-1),
        "v": normal(batch, tokens, X, P),
        "g": -F.softplus(normal(batch, tokens, H, *([N] if channels else []), dtype=small) - 2),
        "beta": 2 * torch.sigmoid(normal(batch, tokens, H, dtype=small)),
        "state": normal(batch, H, N, P, dtype=small),
    }


def assert_all(inputs, row, options=None, reference_options=None):
    """Forward, final state and every gradient against the float64 recurrence on the same inputs."""
    options, reference_options = options or {}, reference_options or {}
    y, state = run(gdn, inputs, **options)
    y_ref, state_ref = run(gdn_reference, as_fp64(inputs), **reference_options)
    assert y.dtype == inputs["v"].dtype
    assert_close(y, y_ref, row)
    assert_close(state, state_ref, row)
    dy = torch.randn(y.shape, dtype=torch.float64).to(y.dtype)
    dstate = torch.randn_like(state)
    grads = grads_of(gdn, inputs, dy, dstate, **options)
    expected = grads_of(gdn_reference, as_fp64(inputs), dy, dstate, **reference_options)
    for name in NAMES:
        assert_close(grads[name], expected[name], row, grad=True)


def fails(actual, expected, row="fp64", grad=False):
    with pytest.raises(AssertionError, match="RMS ratio"):
        assert_close(actual, expected, row, grad)


@BOTH
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("row", ["fp64", "fp32", "bf16"])
def test_forward_and_gradients_match_the_recurrence(heads, row, channels):
    dtype = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}[row]
    assert_all(make_inputs(37, heads, dtype, channels), row, {"chunk": 16})


@BOTH
@pytest.mark.parametrize("tokens", [1, 2, 3, 31, 32, 33])
def test_every_length_with_the_default_chunks(tokens, channels):
    assert_all(make_inputs(tokens, dtype=torch.float32, channels=channels), "fp32")


@BOTH
@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("heads", [(2, 1, 1), (1, 2, 2)], ids=str)
def test_gradcheck(heads, segmented, channels):
    inputs = make_inputs(5, heads, channels=channels, batch=1)
    inputs["v"], inputs["state"] = inputs["v"][..., :2], inputs["state"][:, :, :3, :2]
    inputs["q"], inputs["k"] = inputs["q"][..., :3], inputs["k"][..., :3]
    if channels:
        inputs["g"] = inputs["g"][..., :3]
    segments = torch.tensor([[0, 0, 1, 1, 2]]) if segmented else None
    leaves = [inputs[name].contiguous().requires_grad_() for name in NAMES]
    assert torch.autograd.gradcheck(lambda *t: gdn(*t, segments, 2), leaves)


@BOTH
@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("keys", ["equal", "alternating"])
def test_repeated_keys(keys, beta, channels):
    """Where a token's key was seen before, the triangular system is as full as it can be."""
    inputs = make_inputs(70, dtype=torch.float32, channels=channels)
    inputs["k"] = inputs["k"][:, :1].expand(-1, 70, -1, -1).contiguous()
    if keys == "alternating":
        inputs["k"][:, 1::2] *= -1
    inputs["beta"] = torch.full_like(inputs["beta"], beta)
    inputs["g"] = 0.01 * inputs["g"]
    y, state = run(gdn, inputs)
    y_ref, state_ref = run(gdn_reference, as_fp64(inputs))
    assert_close(y, y_ref, "fp32")
    assert_close(state, state_ref, "fp32")


def test_the_inverse_by_doubling_would_blow_up():
    """The usual product (1 - A)(1 + A^2)(1 + A^4)... on equal keys with beta 1, against forward substitution."""
    A = torch.ones(64, 64).tril(-1)
    inverse, power = torch.eye(64) - A, A @ A
    while power.abs().max() > 0:
        inverse, power = inverse + inverse @ power, power @ power
    exact = torch.linalg.inv(torch.eye(64).double() + A.double())
    substituted = torch.linalg.solve_triangular(A + torch.eye(64), torch.eye(64), upper=False, unitriangular=True)
    assert_close(substituted, exact, "fp32")
    assert rms_ratio(inverse, exact) > 1e3


@BOTH
def test_extreme_decays_in_fp32(channels):
    inputs = make_inputs(100, dtype=torch.float32, channels=channels)
    choices = -torch.tensor([50.0, 1e-4, 0.0, 1.0])
    inputs["g"] = choices[torch.randint(0, 4, inputs["g"].shape)]
    assert_all(inputs, "fp32")


def test_equal_channels_are_one_decay():
    inputs = make_inputs(70)
    wide = inputs | {"g": inputs["g"][..., None].expand(-1, -1, -1, N)}
    assert_close(run(gdn, wide)[0], run(gdn, inputs)[0], "fp64")


def test_a_wrong_head_pairing_is_caught():
    inputs = make_inputs(40, heads=(8, 2, 2))
    y, _ = run(gdn, inputs)
    fails(y, run(gdn_reference, inputs | {name: inputs[name].repeat(1, 1, 4, 1) for name in ("k", "v")})[0])
    side_by_side = {name: inputs[name].repeat_interleave(4, dim=2) for name in ("k", "v")}
    assert_close(y, run(gdn_reference, inputs | side_by_side)[0], "fp64")


def test_without_the_delta_it_would_be_plain_linear_attention():
    inputs = make_inputs(40, heads=(2, 2, 2))
    y, _ = run(gdn, inputs)
    state, plain = inputs["state"], []
    for t in range(40):
        state = state * inputs["g"][:, t].exp()[..., None, None]
        state = state + (inputs["beta"][:, t, :, None] * inputs["k"][:, t])[..., None] * inputs["v"][:, t][:, :, None]
        plain.append((inputs["q"][:, t][..., None] * state).sum(-2))
    fails(y, torch.stack(plain, dim=1))
    assert_close(run(gdn, inputs)[0], run(gdn_reference, inputs)[0], "fp64")


@BOTH
def test_a_missing_decay_and_a_missing_gradient_are_caught(channels):
    inputs = make_inputs(40, channels=channels)
    y, state = run(gdn_reference, inputs)
    fails(run(gdn, inputs | {"g": 0 * inputs["g"]})[0], y)
    dy, dstate = torch.randn_like(y), torch.randn_like(state)
    right = grads_of(gdn_reference, inputs, dy, dstate)
    for name, grad in grads_of(gdn, inputs, dy, 0 * dstate).items():
        if name != "q":
            fails(grad, right[name], grad=True)


@BOTH
@pytest.mark.parametrize("chunk", [1, 2, 7, 1000])
def test_the_chunk_size_does_not_matter(chunk, channels):
    inputs = make_inputs(50, channels=channels)
    y, state = run(gdn, inputs, chunk=chunk)
    y_ref, state_ref = run(gdn, inputs, chunk=32)
    assert_close(y, y_ref, "fp64")
    assert_close(state, state_ref, "fp64")


@BOTH
def test_many_blocks_give_the_result_of_one(monkeypatch, channels):
    inputs = make_inputs(60, channels=channels)
    ids = (torch.arange(60) // 23).expand(2, -1)
    monkeypatch.setattr("hybridize.kernels.gdn.torch_impl.BLOCK_NUMBERS", 1500)
    assert_all(inputs, "fp64", {"chunk": 8})
    assert_all(inputs, "fp64", {"chunk": 8, "segments_BT": ids}, {"segments_BT": ids})


def cut(inputs, start, stop, state):
    per_token = {name: inputs[name][:, start:stop] for name in ("q", "k", "v", "g", "beta")}
    return inputs | per_token | {"state": state}


@BOTH
@pytest.mark.parametrize("first", [0, 1, 33, 64])
def test_two_prefills_equal_one(first, channels):
    inputs = make_inputs(90, channels=channels)
    y_ref, state_ref = run(gdn, inputs)
    y_a, state = run(gdn, cut(inputs, 0, first, inputs["state"]))
    y_b, state = run(gdn, cut(inputs, first, 90, state))
    assert_close(torch.cat([y_a, y_b], dim=1), y_ref, "fp64")
    assert_close(state, state_ref, "fp64")
    if first:
        fails(run(gdn, cut(inputs, first, 90, inputs["state"]))[0], y_ref[:, first:])


@BOTH
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("row", ["fp64", "bf16"])
def test_steps_equal_prefill_in_place(heads, row, channels):
    inputs = make_inputs(12, heads, torch.float64 if row == "fp64" else torch.bfloat16, channels)
    y_ref, state_ref = run(gdn, inputs)
    state = inputs["state"].clone()
    steps = zip(*(inputs[name].unbind(1) for name in ("q", "k", "v", "g", "beta")), strict=True)
    y = [gdn_step(*parts, state) for parts in steps]
    assert_close(torch.stack(y, dim=1), y_ref, row)
    assert_close(state, state_ref, row)


@BOTH
@pytest.mark.parametrize("boundaries", [(1,), (32,), (5, 6, 40), (31, 33, 64, 65)], ids=str)
def test_segments_equal_separate_runs(boundaries, channels):
    inputs = make_inputs(80, channels=channels)
    cuts = (0, *boundaries, 80)
    ids = torch.bucketize(torch.arange(80), torch.tensor(boundaries), right=True).expand(2, -1)
    y, state = run(gdn, inputs, segments_BT=ids * 3 + 7, chunk=16)
    before, parts, last = inputs["state"], [], None
    for start, stop in zip(cuts[:-1], cuts[1:], strict=True):
        y_part, last = run(gdn, cut(inputs, start, stop, before))
        parts.append(y_part)
        before = None
    assert_close(y, torch.cat(parts, dim=1), "fp64")
    assert_close(state, last, "fp64")
    fails(run(gdn, inputs)[0], y)


@BOTH
def test_gradients_with_segments_that_differ_per_row(channels):
    inputs = make_inputs(50, channels=channels)
    ids = torch.stack([torch.arange(50) // 11, torch.arange(50) // 32])
    assert_all(inputs, "fp64", {"segments_BT": ids, "chunk": 16}, {"segments_BT": ids})


@BOTH
def test_padding_leaves_no_trace(channels):
    inputs = make_inputs(60, channels=channels)
    y_ref, state_ref = run(gdn, cut(inputs, 0, 45, inputs["state"]))
    padded = inputs | {name: inputs[name].clone() for name in ("g", "beta")}
    padded["g"][:, 45:], padded["beta"][:, 45:] = 0, 0
    y, state = run(gdn, padded)
    assert_close(y[:, :45], y_ref, "fp64")
    assert_close(state, state_ref, "fp64")
    fails(run(gdn, inputs)[1], state_ref)
    grads = grads_of(gdn, padded, torch.zeros_like(y), torch.ones_like(state))
    assert grads["k"][:, 45:].abs().max() == 0


def test_no_tokens_and_no_state():
    inputs = make_inputs(0)
    y, state = run(gdn, inputs)
    assert y.shape == (2, 0, 4, P)
    assert torch.equal(state, inputs["state"])
    assert state is not inputs["state"]
    assert run(gdn, inputs | {"state": None})[1].abs().max() == 0
    some = make_inputs(20) | {"state": None}
    assert_close(run(gdn, some)[0], run(gdn_reference, some)[0], "fp64")


def test_strided_inputs_autocast_and_untouched_arguments():
    inputs = make_inputs(40, heads=(4, 4, 4), dtype=torch.float32)
    fused = torch.cat([inputs["q"], inputs["k"], inputs["v"]], dim=-1)
    before, state = fused.clone(), inputs["state"].clone()
    q, k, v = fused.split([N, N, P], dim=-1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, _ = run(gdn, inputs | {"q": q, "k": k, "v": v})
        step = gdn_step(*(inputs[n][:, 0] for n in NAMES[:5]), inputs["state"].clone())
    assert torch.equal(fused, before)
    assert torch.equal(inputs["state"], state)
    y_ref = run(gdn_reference, as_fp64(inputs))[0]
    assert_close(y, y_ref, "fp32")
    assert_close(step, y_ref[:, 0], "fp32")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"v": torch.zeros(2, 9, 3, P)}, "heads"),
        ({"q": torch.zeros(2, 9, 4, N + 1)}, "key dim"),
        ({"k": torch.zeros(2, 8, 2, N)}, "k: got shape"),
        ({"k": torch.zeros(2, 9, 2, N).bfloat16()}, "k: got torch.bfloat16"),
        ({"beta": torch.zeros(2, 9, 4, 1)}, "beta"),
        ({"g": torch.zeros(2, 9, 2)}, "g: got"),
        ({"g": torch.zeros(2, 9, 4, P)}, "g: got"),
        ({"state": torch.zeros(2, 4, P, N)}, "state_BHNP"),
        ({"state": torch.zeros(2, 4, N, P).bfloat16()}, "state_BHNP"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_inputs_are_named(change, words):
    with pytest.raises(ConfigError, match=words) as caught:
        run(gdn, make_inputs(9, dtype=torch.float32) | change)
    assert "\n" not in str(caught.value)


def test_bad_options_are_named():
    inputs = make_inputs(9)
    with pytest.raises(ConfigError, match="chunk"):
        run(gdn, inputs, chunk=0)
    with pytest.raises(ConfigError, match="segments_BT"):
        run(gdn, inputs, segments_BT=torch.zeros(2, 8, dtype=torch.long))
    with pytest.raises(ConfigError, match="got None"):
        gdn_step(*(inputs[n][:, 0] for n in NAMES[:5]), None)
