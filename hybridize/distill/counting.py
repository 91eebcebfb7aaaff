"""What a layer costs, counted on tensors that hold no numbers: the very modules run, so a new mixer needs nothing.

Products are counted as torch.utils.flop_counter counts them, attention by its own formula: half a square where it is
causal, and without its scores in memory, as fused kernels have it. Long rows are not walked through where the cost of a
layer is found to be a straight line in their length.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from hybridize.mixers.memory import Memories

PROBES = (128, 256, 512)
"""Rows of these lengths tell whether a cost is a straight line."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """Of one row through one module."""

    forward: float
    """FLOP."""
    backward: float
    """FLOP; zero where nothing needs a gradient."""
    saved: float
    """Bytes that a row leaves for the backward pass."""
    casts: float
    """Bytes kept for the backward pass however many rows there are: the casts of weights that autocast makes."""


class _Attention(torch.autograd.Function):
    """A stand-in for fused attention: keeps what it keeps, counts what it counts."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, products: "_Products", flops: float) -> Tensor:
        ctx.products, ctx.flops = products, flops
        products.flops += flops
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        ctx.products.flops += 2 * ctx.flops
        q, k, v, _, _ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None, None


class _Products(TorchFunctionMode):
    """Puts the stand-in where scaled_dot_product_attention is called."""

    flops = 0.0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        q, k, v = args[:3]
        if torch.is_autocast_enabled(q.device.type):
            q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
        batch_heads = q.shape[:-2].numel()
        flops = 2.0 * batch_heads * q.shape[-2] * k.shape[-2] * (q.shape[-1] + v.shape[-1])
        return _Attention.apply(q, k, v, self, flops / 2 if kwargs.get("is_causal") else flops)


Run = Callable[[int, int], Tensor]
"""(rows, tokens of each) -> what a module makes of them."""


def _once(run: Run, weights: set[int], rows: int, tokens: int) -> tuple[float, float, float]:
    """(forward, backward, saved) of one call; `weights` are the storages that are there anyway."""
    seen: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            seen[storage._cdata] = storage
        return tensor

    with FlopCounterMode(display=False) as counter, _Products() as products:
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            out = run(rows, tokens)
        forward = counter.get_total_flops() + products.flops
        saved = sum(storage.nbytes() for storage in seen.values())
        if out.requires_grad:
            out.backward(torch.empty_like(out))
        backward = counter.get_total_flops() + products.flops - forward
    return forward, backward, float(saved)


def count(run: Run, module: nn.Module, tokens: int) -> Work:
    """The work of one row of `tokens` through `module`; under the caller's FakeTensorMode."""
    weights = {tensor.untyped_storage()._cdata for tensor in (*module.parameters(), *module.buffers())}
    short = min(tokens, PROBES[0])
    low = _once(run, weights, 1, short)
    casts = max(0.0, 2 * low[2] - _once(run, weights, 2, short)[2])
    found = None
    if tokens > PROBES[-1]:
        middle, high = (_once(run, weights, 1, probe) for probe in PROBES[1:])
        if all(abs(c - b - 2 * (b - a)) <= 0.002 * c for a, b, c in zip(low, middle, high, strict=True)):
            reach = (tokens - PROBES[1]) / (PROBES[2] - PROBES[1])
            found = [b + (c - b) * reach for b, c in zip(middle, high, strict=True)]
    forward, backward, saved = found or (low if short == tokens else _once(run, weights, 1, tokens))
    return Work(forward=forward, backward=backward, saved=saved - casts, casts=casts)


class Beside(nn.Module):
    """A projection with an adapter beside it, for counting alone: peft's own modules cannot be made of fake tensors."""

    def __init__(self, projection: Any, rank: int):
        super().__init__()
        self.projection = projection
        down = nn.Linear(projection.in_features, rank, bias=False)
        self.adapter = nn.Sequential(down, nn.Linear(rank, projection.out_features, bias=False))

    @property
    def weight(self) -> Tensor:
        """For mixers that read it without a call."""
        return self.projection.weight

    def forward(self, x: Tensor) -> Tensor:
        """As an adapted projection."""
        return self.projection(x) + self.adapter(x.float())


class LayerCounter:
    """Counts the layers of one model; equal layers are counted once. Use within one FakeTensorMode.

    Args:
        model: a causal LM of fake tensors, its requires_grad set.
        tokens: of a row.
        autocast: whether it runs in bf16 autocast.
    """

    def __init__(self, model: Any, tokens: int, autocast: bool):
        self.model, self.tokens, self.autocast = model, tokens, autocast
        self.dtype = model.model.embed_tokens.weight.dtype
        self._known: dict[Any, Work] = {}

    def layer(self, index: int, gradient: bool) -> Work:
        """A whole layer; `gradient`: whether its input needs one."""

        def run(layer: Any, hidden: Tensor, about: dict[str, Any]) -> Tensor:
            return layer(hidden, **about)

        return self._work(index, "layer", run, gradient)

    def mixer(self, index: int, with_mlp: bool) -> Work:
        """A mixer given the teacher's input, perhaps followed by the layer's MLP."""

        def run(layer: Any, hidden: Tensor, about: dict[str, Any]) -> Tensor:
            mixed, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden), **about)
            if not with_mlp:
                return mixed
            hidden = hidden + mixed
            return hidden + layer.mlp(layer.post_attention_layernorm(hidden))

        return self._work(index, f"mixer {with_mlp}", run, False)

    def _work(self, index: int, kind: str, run: Callable[..., Tensor], gradient: bool) -> Work:
        layer, config = self.model.model.layers[index], self.model.config
        spec = repr(config.mixers[index]) if hasattr(config, "mixers") else "attention"
        key = (kind, spec, gradient, tuple(p.requires_grad for p in layer.parameters()))
        if key not in self._known:

            def once(rows: int, tokens: int) -> Tensor:
                hidden = torch.empty(rows, tokens, config.hidden_size, dtype=self.dtype, requires_grad=gradient)
                angles = self.model.model.rotary_emb(hidden, torch.arange(tokens)[None])
                about = {"position_embeddings": angles, "attention_mask": None, **self._memories(rows, tokens)}
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.autocast):
                    return run(layer, hidden, about)

            self._known[key] = count(once, layer, self.tokens)
        return self._known[key]

    def _memories(self, rows: int, tokens: int) -> dict[str, Any]:
        """What the layers that read others find."""
        read = getattr(self.model.model, "read_layers", ())
        if not read:
            return {}
        memories = Memories(read)
        for index in read:
            width = self.model.model.mixer_options[index].memory_width(self.model.config)
            memories.leave(index, torch.empty(rows, tokens, width, dtype=self.dtype))
        return {"memories": memories}


def fake_tensors() -> FakeTensorMode:
    """The mode in which models are built and run without memory."""
    return FakeTensorMode()
