"""`linear_kl`: the PyTorch path against dense logits, what must be exact, what losses call. More in test_ops.py."""

import dataclasses

import pytest
import torch

from hybridize.distill.losses import LOSSES
from hybridize.errors import ConfigError
from hybridize.kernels._core import launch
from hybridize.kernels.linear_kl import KINDS, linear_kl
from hybridize.kernels.linear_kl.spec import LINEAR_KL as SPEC
from tests.distill.test_losses import signals
from tests.kernels.suite import check_case
from tests.tolerances import assert_close, rms_ratio

SIZES = {"N": 5, "D": 8, "E": 12, "V": 20, "chunk": 2}


def inputs_of(dtype=torch.float32, **sizes):
    return SPEC.make_inputs(SIZES | sizes, dtype, "cpu", 0)


def single(seed):
    """One side's signals in fp32, of a few tokens."""
    side = signals(seed)
    weight = side.head.weight.float()
    return dataclasses.replace(side, hidden=side.hidden[:, :4].float(), head=dataclasses.replace(side.head, weight=weight))


def gradients(inputs, **options):
    """(loss, gradient of the states, gradient of the head)."""
    leaves = [inputs[name].detach().clone().requires_grad_() for name in SPEC.grads]
    loss = linear_kl(**inputs | dict(zip(SPEC.grads, leaves, strict=True)) | options)
    return loss.detach(), *torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("case", SPEC.cases, ids=lambda case: case.name)
def test_the_pytorch_path_is_the_reference(case):
    check_case(SPEC, case, torch.float32, "torch")


@pytest.mark.parametrize("kind", range(3), ids=KINDS)
def test_in_fp64_it_is_exact(kind):
    inputs = inputs_of(torch.float64, kind=kind, labels=4, tau=17, cap=3, scaled=1)
    leaves = [inputs[name].clone().requires_grad_() for name in SPEC.grads]
    dense = SPEC.reference(**inputs | dict(zip(SPEC.grads, leaves, strict=True)))
    expected = dense.detach(), *torch.autograd.grad(dense, leaves)
    for row, (found, wanted) in enumerate(zip(gradients(inputs), expected, strict=True)):
        assert_close(found, wanted, "fp64", grad=row > 0)
    # Wrong on purpose: other labels, another weight, temperature, scale or cap.
    turned = inputs["labels_N"].flip(0)
    for change in (
        {"labels_N": turned}, {"label_weight": 0.6}, {"temperature": 1.0}, {"student_scale": 1.0}, {"teacher_cap": None},
    ):  # fmt: skip
        assert rms_ratio(gradients(inputs, **change)[1], expected[1]) > 1e-3


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_perfect_student_has_no_gradient(kind, impl):
    if impl == "triton":
        pytest.importorskip("triton", reason="Triton is not installed")
    inputs = inputs_of(N=2, E=8, tau=17) | {"kind": kind, "impl": impl}
    inputs |= {"teacher_NE": inputs["student_ND"], "teacher_head_VE": inputs["student_head_VD"]}
    with launch.overridden(dict(SPEC.tiles)):
        assert all(not found.any() for found in gradients(inputs))


class TestKernel:
    """What the generic tests do not say of the kernel."""

    @pytest.fixture(autouse=True)
    def needs_triton(self):
        pytest.importorskip("triton", reason="Triton is not installed")

    def test_fp16_slopes_of_unlikely_tokens_are_kept(self, monkeypatch):
        """A student near its teacher, 2000 tokens: slopes of 1e-5 and less."""
        import hybridize.kernels.linear_kl.triton_impl as kernels

        inputs = inputs_of(torch.float16, N=2, E=8, V=2000) | {"impl": "triton"}
        near = inputs["student_ND"] + 2e-3 * torch.randn(2, 8, generator=torch.Generator().manual_seed(1))
        inputs |= {"teacher_NE": near.half(), "teacher_head_VE": inputs["student_head_VD"]}
        wide = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()} | {"impl": "torch"}
        expected = gradients(wide)[1]
        assert_close(gradients(inputs)[1], expected, "fp16", grad=True)
        # Wrong on purpose: divided by the tokens of a step before they are rounded.
        monkeypatch.setattr(kernels, "_factor", lambda *arguments: 1 / 8192)
        assert rms_ratio(gradients(inputs)[1], expected) > 2e-2

    def test_slopes_of_several_chunks_meet_in_one_product(self, monkeypatch):
        """Whatever the group, and a head in several parts: the gradients of one chunk."""
        import hybridize.kernels.linear_kl.triton_impl as kernels

        inputs = inputs_of(torch.float16, N=3, chunk=1) | {"impl": "triton"}
        whole = gradients(inputs, chunk=3)
        monkeypatch.setattr(kernels, "HEAD_ROWS", 7)
        for group in (1, 2):
            monkeypatch.setattr(kernels, "GROUP", group)
            for found, expected in zip(gradients(inputs), whole, strict=True):
                assert_close(found, expected, "fp16", grad=True)
        # Wrong on purpose: each group in place of the ones before.
        monkeypatch.setattr(kernels, "GROUP", 1)
        monkeypatch.setattr(kernels, "_add", lambda head, slopes, states, first: head.copy_(slopes.T.float() @ states.float()))
        assert rms_ratio(gradients(inputs)[2], whole[2]) > 1e-2

    def test_fp64_is_left_to_pytorch(self):
        with pytest.raises(ConfigError, match="run linear_kl with triton: got float64, expected fp16, bf16 or fp32"):
            linear_kl(**inputs_of(torch.float64), impl="triton")

    @pytest.mark.parametrize(
        "spec", [{"name": "kl"}, {"name": "kl", "direction": "reverse"}, {"name": "jsd", "beta": 0.2}], ids=str
    )
    def test_losses_call_it(self, spec, monkeypatch):
        import hybridize.kernels.linear_kl.triton_impl as kernels

        student, teacher = single(0), single(1)
        mask = torch.arange(student.hidden.shape[1]).expand(student.hidden.shape[:2]) < 3
        calls, run = [], kernels.linear_kl
        monkeypatch.setattr(kernels, "linear_kl", lambda *a: calls.append(a) or run(*a))

        def found():
            hidden = student.hidden.detach().requires_grad_()
            own = dataclasses.replace(student, hidden=hidden)
            value = LOSSES.build({**spec, "temperature": 1.5})(own, teacher, mask)
            return value.detach(), torch.autograd.grad(value, hidden)[0]

        expected = found()
        assert not calls
        monkeypatch.setenv("HYBRIDIZE_KERNELS", "triton")
        for one, other in zip(found(), expected, strict=True):
            assert_close(one, other, "fp32", grad=True)
        assert len(calls) == 1
        assert len(calls[0][0]) == mask.sum()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"student_ND": torch.zeros(5)}, "student_ND: got torch.float32 \\(5,\\)"),
        ({"teacher_NE": torch.zeros(4, 12)}, "teacher_NE: got torch.float32 \\(4, 12\\)"),
        ({"student_head_VD": torch.zeros(20, 7)}, "student_head: got torch.float32 \\(20, 7\\), expected floats \\(20, 8\\)"),
        ({"teacher_head_VE": torch.zeros(21, 12)}, "teacher_head: got torch.float32 \\(21, 12\\), expected floats \\(20, 12\\)"),
        ({"labels_N": torch.zeros(5), "label_weight": 0.5}, "labels_N: got torch.float32"),
        ({"kind": "both"}, "kind: got 'both', expected forward, reverse, jsd"),
        ({"kind": "jsd", "beta": 1.0}, "beta: got 1.0, expected between 0 and 1"),
        ({"label_weight": 0.5}, "label_weight: got 0.5, expected above 0 up to 1 with labels, 0 without"),
        ({"temperature": 0.0}, "temperature: got 0.0"),
        ({"teacher_cap": -1.0}, "teacher_cap: got -1.0"),
        ({"chunk": 0}, "chunk: got 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_inputs_are_named(change, words):
    with pytest.raises(ConfigError, match=words):
        linear_kl(**inputs_of() | change)


@pytest.mark.parametrize("kind", range(3), ids=KINDS)
def test_gradients_are_central_differences(kind):
    """In place of gradcheck, which goes through a graph twice: a head's gradient is scaled where it lies."""
    inputs = inputs_of(torch.float64, N=3, D=2, E=3, V=4, kind=kind, labels=4, tau=17, cap=3, scaled=1)
    step = 1e-5
    for name, grad in zip(SPEC.grads, gradients(inputs)[1:], strict=True):
        numerical = torch.empty_like(grad)
        for place in range(grad.numel()):
            shift = torch.zeros(grad.numel(), dtype=torch.float64)
            shift[place] = step
            up, down = (linear_kl(**inputs | {name: inputs[name] + sign * shift.view(grad.shape)}) for sign in (1, -1))
            numerical.view(-1)[place] = (up - down) / (2 * step)
        assert rms_ratio(grad, numerical) < 1e-8
