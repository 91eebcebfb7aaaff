"""What the tests of a scan share: its inputs are a dict in the order of its arguments, its results y and a final state."""

import torch


def run(function, inputs, **options):
    return function(*inputs.values(), **options)


def as_fp64(inputs):
    return {name: t.detach().double().clone() for name, t in inputs.items()}


def grads_of(function, inputs, dy, dstate, **options):
    leaves = {name: t.detach().clone().requires_grad_() for name, t in inputs.items()}
    y, state = run(function, leaves, **options)
    torch.autograd.backward((y, state), (dy.to(y.dtype), dstate.to(state.dtype)))
    return {name: leaf.grad for name, leaf in leaves.items()}
