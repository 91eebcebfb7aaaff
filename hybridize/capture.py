"""What goes into and comes out of a model's layers, one layer at a time.

Nothing is stored here: each layer's signals are handed over while the model runs and can be let go before the next
layer's exist, so that the cost is one layer's memory however deep the model is.

Letters: B batch, T tokens, D width.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
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
    output: Tensor
    """The layer's output, [B, T, D]."""
    position_embeddings: tuple[Tensor, Tensor]
    """cos and sin, [B, T, d]."""


class _LastLayerSeen(Exception):
    """Leaves the forward pass once no more layers are wanted."""


def visit_layers(
    model: Any, input_ids: Tensor, layers: Iterable[int], visit: Callable[[LayerSignals], None], **inputs: Any
) -> None:
    """Run the decoder without gradients and hand over each wanted layer's signals, in order; stop after the last one.

    Args:
        model: a causal LM of a supported family, hybrid or not.
        input_ids: [B, T], int64.
        layers: indices of the wanted layers; none does nothing.
        visit: called once for each of them, while the model is on that layer.
        **inputs: further arguments of the decoder, such as attention_mask.
    """
    wanted = sorted(set(layers))
    if not wanted:
        return
    inner: dict[str, Any] = {}

    def on_mixer(module: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        inner.update(normed=kwargs["hidden_states"], mixed=out[0], position_embeddings=kwargs["position_embeddings"])

    def on_layer(index: int) -> Callable[..., None]:
        def hook(module: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            visit(LayerSignals(index=index, hidden=hidden, output=out, **inner))
            inner.clear()
            if index == wanted[-1]:
                raise _LastLayerSeen

        return hook

    handles = []
    for index in wanted:
        layer = model.model.layers[index]
        handles.append(layer.self_attn.register_forward_hook(on_mixer, with_kwargs=True))
        handles.append(layer.register_forward_hook(on_layer(index), with_kwargs=True))
    try:
        with torch.no_grad():
            model.model(input_ids=input_ids, use_cache=False, **inputs)
    except _LastLayerSeen:
        pass
    finally:
        for handle in handles:
            handle.remove()
