"""`ssd` and `ssd_step` against the float64 recurrence, and the properties the recurrence has."""

import pytest
import torch
import torch.nn.functional as F

from hybridize.errors import ConfigError
from hybridize.kernels.ssd import ssd, ssd_step
from hybridize.kernels.ssd.reference import ssd_reference, ssd_step_reference
from tests.kernels.calls import as_fp64, grads_of, run
from tests.tolerances import assert_close

NAMES = ("x", "dt", "A", "B", "C", "D", "state")
HEADS = [(4, 4, 4), (4, 1, 1), (2, 2, 8), (1, 2, 4), (8, 2, 4), (4, 6, 12), (2, 8, 4)]
TOKENS = [1, 31, 63, 65, 100]
P, N = 6, 10


def make_inputs(tokens, heads=(2, 2, 4), dtype=torch.float64, batch=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    (X, G, M), H = heads, max(heads)
    small = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape, dtype=dtype):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    return {
        "x": normal(batch, tokens, X, P),
        "dt": F.softplus(normal(batch, tokens, H, dtype=small) - 1),
        "A": -torch.exp(normal(H, dtype=small)),
        "B": normal(batch, tokens, G, N) / N**0.5,
        "C": normal(batch, tokens, M, N),
        "D": normal(H, dtype=small),
        "state": normal(batch, H, P, N, dtype=small),
    }


def fails(actual, expected, row="fp64", grad=False):
    with pytest.raises(AssertionError, match="RMS ratio"):
        assert_close(actual, expected, row, grad)


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("row", ["fp64", "fp32", "bf16"])
def test_forward_and_gradients_match_the_recurrence(heads, row):
    dtype = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}[row]
    inputs = make_inputs(45, heads, dtype)
    y, state = run(ssd, inputs, chunk=16)
    y_ref, state_ref = run(ssd_reference, as_fp64(inputs))
    assert y.dtype == dtype
    assert_close(y, y_ref, row)
    assert_close(state, state_ref, row)
    dy = torch.randn(y.shape, dtype=torch.float64).to(dtype)
    dstate = torch.randn_like(state)
    grads = grads_of(ssd, inputs, dy, dstate, chunk=16)
    expected = grads_of(ssd_reference, as_fp64(inputs), dy, dstate)
    for name in NAMES:
        assert_close(grads[name], expected[name], row, grad=True)


@pytest.mark.parametrize("tokens", TOKENS)
def test_every_length_with_the_default_chunks(tokens):
    inputs = make_inputs(tokens, dtype=torch.float32)
    y_ref, state_ref = run(ssd_reference, as_fp64(inputs))
    y, state = run(ssd, inputs)
    assert_close(y, y_ref, "fp32")
    assert_close(state, state_ref, "fp32")
    dy, dstate = torch.randn_like(y), torch.randn_like(state)
    grads = grads_of(ssd, inputs, dy, dstate)
    expected = grads_of(ssd_reference, as_fp64(inputs), dy, dstate)
    for name in NAMES:
        assert_close(grads[name], expected[name], "fp32", grad=True)


@pytest.mark.parametrize("heads", [(1, 1, 2), (2, 1, 1), (2, 2, 1)], ids=str)
@pytest.mark.parametrize("segmented", [False, True])
def test_gradcheck(heads, segmented):
    inputs = make_inputs(5, heads, batch=1)
    inputs["x"], inputs["state"] = inputs["x"][..., :2], inputs["state"][:, :, :2, :2]
    inputs["B"], inputs["C"] = inputs["B"][..., :2], inputs["C"][..., :2]
    segments = torch.tensor([[0, 0, 1, 1, 2]]) if segmented else None
    leaves = [inputs[name].contiguous().requires_grad_() for name in NAMES]
    assert torch.autograd.gradcheck(lambda *t: ssd(*t, segments, 2), leaves)


def test_the_state_and_the_skip_are_optional():
    inputs = make_inputs(20) | {"D": None, "state": None}
    leaves = {n: None if t is None else t.clone().requires_grad_() for n, t in inputs.items()}
    y_ref, state_ref = run(ssd_reference, inputs)
    y, state = run(ssd, leaves, chunk=8)
    assert_close(y, y_ref, "fp64")
    assert_close(state, state_ref, "fp64")
    y.sum().backward()
    assert leaves["x"].grad is not None


def test_a_wrong_head_pairing_is_caught():
    inputs = make_inputs(40, heads=(2, 2, 8))
    y, _ = run(ssd, inputs)
    modulo = inputs | {name: inputs[name].repeat(1, 1, 4, 1) for name in ("x", "B")}
    fails(y, run(ssd_reference, modulo)[0])
    contiguous = {name: inputs[name].repeat_interleave(4, dim=2) for name in ("x", "B")}
    assert_close(y, run(ssd_reference, inputs | contiguous)[0], "fp64")


def test_a_missing_decay_is_caught():
    inputs = make_inputs(40)
    fails(run(ssd, inputs | {"A": torch.zeros(4).double()})[0], run(ssd_reference, inputs)[0])


def test_a_wrong_gradient_is_caught():
    inputs = make_inputs(40)
    dy, dstate = torch.randn(2, 40, 4, P).double(), torch.randn(2, 4, P, N).double()
    right = grads_of(ssd_reference, inputs, dy, dstate)
    without_final_state = grads_of(ssd, inputs, dy, 0 * dstate)
    for name in ("x", "dt", "A", "B", "state"):
        fails(without_final_state[name], right[name], grad=True)


@pytest.mark.parametrize("chunk", [1, 2, 7, 16, 64, 1000])
def test_the_chunk_size_does_not_matter(chunk):
    inputs = make_inputs(70)
    y, state = run(ssd, inputs, chunk=chunk)
    y_ref, state_ref = run(ssd, inputs, chunk=32)
    assert_close(y, y_ref, "fp64")
    assert_close(state, state_ref, "fp64")


def test_many_blocks_give_the_result_of_one(monkeypatch):
    inputs = make_inputs(100)
    dy, dstate = torch.randn(2, 100, 4, P).double(), torch.randn(2, 4, P, N).double()
    y, state = run(ssd, inputs, chunk=8)
    grads = grads_of(ssd, inputs, dy, dstate, chunk=8)
    monkeypatch.setattr("hybridize.kernels.ssd.torch_impl.BLOCK_NUMBERS", 1500)
    y_small, state_small = run(ssd, inputs, chunk=8)
    assert_close(y_small, y, "fp64")
    assert_close(state_small, state, "fp64")
    for name, grad in grads_of(ssd, inputs, dy, dstate, chunk=8).items():
        assert_close(grad, grads[name], "fp64", grad=True)


def cut(inputs, start, stop, state):
    per_token = {name: inputs[name][:, start:stop] for name in ("x", "dt", "B", "C")}
    return inputs | per_token | {"state": state}


@pytest.mark.parametrize("first", [0, 1, 33, 64])
def test_two_prefills_equal_one(first):
    inputs = make_inputs(90)
    y_ref, state_ref = run(ssd, inputs)
    y_a, state = run(ssd, cut(inputs, 0, first, inputs["state"]))
    y_b, state = run(ssd, cut(inputs, first, 90, state))
    assert_close(torch.cat([y_a, y_b], dim=1), y_ref, "fp64")
    assert_close(state, state_ref, "fp64")
    if first:
        fails(run(ssd, cut(inputs, first, 90, inputs["state"]))[0], y_ref[:, first:])


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("row", ["fp64", "bf16"])
def test_steps_equal_prefill(heads, row):
    inputs = make_inputs(12, heads, torch.float64 if row == "fp64" else torch.bfloat16)
    y_ref, state_ref = run(ssd, inputs)
    state = inputs["state"].clone()
    steps = zip(*(inputs[name].unbind(1) for name in ("x", "dt", "B", "C")), strict=True)
    y = [ssd_step(x, dt, inputs["A"], B, C, inputs["D"], state) for x, dt, B, C in steps]
    assert_close(torch.stack(y, dim=1), y_ref, row)
    assert_close(state, state_ref, row)


def step_inputs(rows, states):
    """One token for each of `rows`, and more states than rows."""
    inputs = make_inputs(1, heads=(2, 2, 8), batch=len(rows))
    state = torch.randn(states, 8, P, N, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    one = {name: inputs[name][:, 0] for name in ("x", "dt", "B", "C")}
    return [one["x"], one["dt"], inputs["A"], one["B"], one["C"], inputs["D"], state, torch.tensor(rows)]


def test_steps_go_on_with_the_rows_they_are_given():
    inputs = step_inputs((4, -1, 0), states=6)
    y_ref = ssd_step_reference(*inputs[:6], state_ref := inputs[6].clone(), inputs[7])
    before, state = inputs[6].clone(), inputs[6]
    y = ssd_step(*inputs)
    assert_close(y, y_ref, "fp64")
    assert_close(state, state_ref, "fp64")
    assert torch.equal(state[[1, 2, 3, 5]], before[[1, 2, 3, 5]])
    assert y[1].abs().max() == 0
    fails(ssd_step(*inputs[:6], before, torch.tensor([0, -1, 4])), y_ref)


@pytest.mark.parametrize("rows", [(0, 0), (0, 3), (-2, 1)], ids=str)
def test_rows_that_there_are_not_or_twice_are_named(rows):
    with pytest.raises(ConfigError, match="rows_B"):
        ssd_step(*step_inputs(rows, states=3))


@pytest.mark.parametrize("rows", [torch.tensor([0.0, 1.0]), torch.tensor([0]), torch.tensor([[0, 1]])], ids=str)
def test_rows_of_another_kind_are_named(rows):
    with pytest.raises(ConfigError, match="rows_B"):
        ssd_step(*step_inputs((0, 1), states=3)[:7], rows)


@pytest.mark.parametrize("boundaries", [(1,), (32,), (5, 6, 40), (31, 33, 64, 65)], ids=str)
def test_segments_equal_separate_runs(boundaries):
    inputs = make_inputs(80)
    cuts = (0, *boundaries, 80)
    ids = torch.bucketize(torch.arange(80), torch.tensor(boundaries), right=True).expand(2, -1)
    y, state = run(ssd, inputs, segments_BT=ids * 3 + 7, chunk=16)
    before, parts = inputs["state"], []
    for start, stop in zip(cuts[:-1], cuts[1:], strict=True):
        y_part, last = run(ssd, cut(inputs, start, stop, before))
        parts.append(y_part)
        before = None
    assert_close(y, torch.cat(parts, dim=1), "fp64")
    assert_close(state, last, "fp64")
    fails(run(ssd, inputs)[0], y)


def test_gradients_with_segments_that_differ_per_row():
    inputs = make_inputs(50, heads=(2, 2, 4))
    ids = torch.stack([torch.arange(50) // 11, torch.arange(50) // 32])
    dy, dstate = torch.randn(2, 50, 4, P).double(), torch.randn(2, 4, P, N).double()
    grads = grads_of(ssd, inputs, dy, dstate, segments_BT=ids, chunk=16)
    expected = grads_of(ssd_reference, inputs, dy, dstate, segments_BT=ids)
    unpacked = grads_of(ssd, inputs, dy, dstate, chunk=16)
    for name in NAMES:
        assert_close(grads[name], expected[name], "fp64", grad=True)
        if name != "D":
            fails(unpacked[name], expected[name], grad=True)


def test_padding_with_dt_zero_leaves_the_state():
    inputs = make_inputs(60)
    y_ref, state_ref = run(ssd, cut(inputs, 0, 45, inputs["state"]))
    padded = inputs | {"dt": inputs["dt"].clone()}
    padded["dt"][:, 45:] = 0
    y, state = run(ssd, padded)
    assert_close(y[:, :45], y_ref, "fp64")
    assert_close(state, state_ref, "fp64")
    fails(run(ssd, inputs)[1], state_ref)
    dy, dstate = torch.zeros_like(y), torch.ones_like(state)
    assert grads_of(ssd, padded, dy, dstate)["x"][:, 45:].abs().max() == 0


@pytest.mark.parametrize("log_decay", ["-50", "-1e-4", "0", "mixed"])
def test_extreme_decays_in_fp32(log_decay):
    inputs = make_inputs(100, dtype=torch.float32)
    if log_decay == "mixed":
        choices = torch.tensor([50.0, 1e-4, 0.0, 1.0])
        inputs["dt"] = choices[torch.randint(0, 4, inputs["dt"].shape)]
        inputs["A"] = torch.full((4,), -1.0)
    else:
        inputs["dt"] = torch.ones_like(inputs["dt"])
        inputs["A"] = torch.full((4,), float(log_decay))
    for chunk in (16, 64):
        y, state = run(ssd, inputs, chunk=chunk)
        y_ref, state_ref = run(ssd_reference, as_fp64(inputs))
        assert_close(y, y_ref, "fp32")
        assert_close(state, state_ref, "fp32")
        dy, dstate = torch.randn_like(y), torch.randn_like(state)
        grads = grads_of(ssd, inputs, dy, dstate, chunk=chunk)
        expected = grads_of(ssd_reference, as_fp64(inputs), dy, dstate)
        for name in NAMES:
            assert_close(grads[name], expected[name], "fp32", grad=True)


def test_no_tokens():
    inputs = make_inputs(0)
    y, state = run(ssd, inputs)
    assert y.shape == (2, 0, 4, P)
    assert torch.equal(state, inputs["state"])
    assert state is not inputs["state"]
    assert run(ssd, inputs | {"state": None})[1].abs().max() == 0


def test_inputs_may_be_strided_and_are_not_changed():
    inputs = make_inputs(40, heads=(4, 4, 4))
    fused = torch.cat([inputs["x"], inputs["B"], inputs["C"]], dim=-1)
    x, B, C = fused.split([P, N, N], dim=-1)
    before = fused.clone()
    y, _ = run(ssd, inputs | {"x": x, "B": B, "C": C})
    assert torch.equal(fused, before)
    assert_close(y, run(ssd, inputs)[0], "fp64")


def test_autocast_does_not_reach_the_products():
    inputs = make_inputs(40, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, _ = run(ssd, inputs)
        step = ssd_step(
            *(inputs[n][:, 0] for n in ("x", "dt")), inputs["A"],
            *(inputs[n][:, 0] for n in ("B", "C")), inputs["D"], inputs["state"].clone(),
        )  # fmt: skip
    y_ref = run(ssd_reference, as_fp64(inputs))[0]
    assert_close(y, y_ref, "fp32")
    assert_close(step, y_ref[:, 0], "fp32")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.zeros(2, 9, 3, P)}, "heads"),
        ({"C": torch.zeros(2, 9, 4, N + 1)}, "state dim"),
        ({"B": torch.zeros(2, 8, 2, N)}, "B: got shape"),
        ({"B": torch.zeros(2, 9, 2, N).bfloat16()}, "B: got torch.bfloat16"),
        ({"dt": torch.zeros(2, 9, 2)}, "dt"),
        ({"A": torch.zeros(2)}, "A_H"),
        ({"D": torch.zeros(4, 1)}, "D_H"),
        ({"state": torch.zeros(2, 4, N, P)}, "state_BHPN"),
        ({"state": torch.zeros(2, 4, P, N).bfloat16()}, "state_BHPN"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_inputs_are_named(change, words):
    with pytest.raises(ConfigError, match=words):
        run(ssd, make_inputs(9, dtype=torch.float32) | change)


def test_bad_options_are_named():
    inputs = make_inputs(9)
    with pytest.raises(ConfigError, match="chunk"):
        run(ssd, inputs, chunk=0)
    with pytest.raises(ConfigError, match="segments_BT"):
        run(ssd, inputs, segments_BT=torch.zeros(2, 8, dtype=torch.long))
