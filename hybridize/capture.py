"""What goes into and comes out of a model's layers, one layer at a time.

Nothing is stored here: each layer's signals are handed over while the model runs and can be let go before the next
layer's exist, so that the cost is one layer's memory however deep the model is.

Letters: B batch, T tokens, D width.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerSignals:
    """One layer of one forward pass."""

    index: int
    hidden: Tensor
    """The layer's input, [B, T, D]."""
    normed: Tensor
    """What its mixer reads, [B, T, D]."""
    mixed: Tensor
    """What its mixer gives, before it is added to the input, [B, T, D]."""
    context: Tensor | None
    """What the mixer's last projection reads, [B, T, C]; None where a mixer does not end in a projection."""
    output: Tensor
    """The layer's output, [B, T, D]."""
    position_embeddings: tuple[Tensor, Tensor]
    """cos and sin, [B, T, d]."""
    attention_mask: Any
    """What its mixer masks scores with, in the form that the model's attention takes; None is plain causal."""


class Projection:
    """What the last projection of a mixer (o_proj or out_proj) reads, while the mixer runs. A context manager."""

    def __init__(self, mixer: Any):
        self.last = getattr(mixer, "o_proj", None) or getattr(mixer, "out_proj", None)
        self.read: Tensor | None = None
        self.given: Tensor | None = None
        self.handles: list[Any] = []

    def __enter__(self) -> "Projection":
        if self.last is not None:
            self.handles.append(self.last.register_forward_hook(self._on_last))
        return self

    def _on_last(self, module: Any, args: Any, out: Tensor) -> None:
        self.read, self.given = args[0], out

    def context_of(self, mixed: Tensor) -> Tensor | None:
        """What was read to give `mixed`, which is let go; None where something else had a part in it."""
        read = self.read if self.given is mixed else None
        self.read = self.given = None
        return read

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()


@contextmanager
def layer_outputs(model: Any, layers: Iterable[int]) -> Iterator[dict[int, Tensor]]:
    """Outputs [B, T, D] by index of the given layers of a causal LM, gradients and all, once it has run in this context."""
    outputs: dict[int, Tensor] = {}
    # Gone before any backward, in which gradient checkpointing runs the layers again.
    with ExitStack() as hooks:
        for index in layers:
            hook = partial(_keep_output, outputs, index)
            hooks.callback(model.model.layers[index].register_forward_hook(hook).remove)
        yield outputs


def _keep_output(outputs: dict[int, Tensor], index: int, module: Any, args: Any, out: Tensor) -> None:
    outputs[index] = out


class _LastLayerSeen(Exception):
    """Leaves the forward pass once no more layers are wanted."""


def visit_layers(
    model: Any, input_ids: Tensor | None, layers: Iterable[int], visit: Callable[[LayerSignals], None], **inputs: Any
) -> None:
    """Run the decoder without gradients and hand over each wanted layer's signals, in order; stop after the last one.

    Args:
        model: a causal LM of a supported family, hybrid or not.
        input_ids: [B, T], int64; None where `inputs_embeds` is among the inputs.
        layers: indices of the wanted layers; none does nothing.
        visit: called once for each of them, while the model is on that layer.
        **inputs: further arguments of the decoder, such as attention_mask.
    """
    wanted = sorted(set(layers))
    if not wanted:
        return
    inner: dict[str, Any] = {}

    def on_mixer(projection: Projection) -> Callable[..., None]:
        def hook(module: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
            inner.update(
                normed=kwargs["hidden_states"], mixed=out[0], position_embeddings=kwargs["position_embeddings"],
                attention_mask=kwargs["attention_mask"], context=projection.context_of(out[0]),
            )  # fmt: skip

        return hook

    def on_layer(index: int) -> Callable[..., None]:
        def hook(module: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            visit(LayerSignals(index=index, hidden=hidden, output=out, **inner))
            inner.clear()
            if index == wanted[-1]:
                raise _LastLayerSeen

        return hook

    with ExitStack() as hooks:
        for index in wanted:
            layer = model.model.layers[index]
            projection = hooks.enter_context(Projection(layer.self_attn))
            for module, hook in ((layer.self_attn, on_mixer(projection)), (layer, on_layer(index))):
                hooks.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        with suppress(_LastLayerSeen), torch.no_grad():
            model.model(input_ids=input_ids, use_cache=False, **inputs)
