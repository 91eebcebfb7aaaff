"""A step of one token as a CUDA graph: captured once over a static cache, then replayed without Python in between."""

from typing import Any

import torch
from torch import Tensor

from hybridize.errors import ConfigError
from hybridize.static_cache import HybridStaticCache

# Steps before the capture, in which libraries take their workspaces and kernels are compiled; what they write is put back.
WARM_UP = 3
# Rotary embeddings whose angles follow from the largest position, which only the host can act on.
ASKS_THE_HOST = ("dynamic", "longrope")


class GraphedDecoder:
    """Decodes token by token behind a prompt that a static cache holds; each step is the replay of one CUDA graph.

    The step is captured at the first call. Ids, positions and logits live in buffers of its own, so that only ids go in and
    logits come out. Whatever is changed in model or cache after that, apart from values in place, needs a new decoder::

        cache = HybridStaticCache(model.config, max_tokens=4096)
        with torch.no_grad():
            logits = model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        decoder = GraphedDecoder(model, cache)
        for _ in range(100):
            logits = decoder.step(logits.argmax(-1, keepdim=True))

    Args:
        model: a hybrid causal LM in eval mode.
        cache: holds the prompt.
        attention_mask: of the prompt, [B, tokens], 0 on left padding; None is no padding.

    Raises:
        ConfigError: another cache, an empty one, a model in training, a rotary embedding that asks for the text's length, or a
            mask that is not the prompt's.
    """

    def __init__(self, model: Any, cache: HybridStaticCache, attention_mask: Tensor | None = None):
        if not isinstance(cache, HybridStaticCache):
            raise ConfigError(
                f"got a {type(cache).__name__}, expected a HybridStaticCache: a graph is bound to memory that stays"
            )
        if cache.taken == 0:
            raise ConfigError("the static cache is empty, expected one that holds the prompt. Call the model with it first")
        if model.training:
            raise ConfigError("the model is in training, expected eval mode. Call model.eval()")
        if (kind := (model.config.rope_parameters or {}).get("rope_type")) in ASKS_THE_HOST:
            raise ConfigError(
                f"rope_type is {kind!r}, expected one whose angles do not follow from the length. Call the model itself"
            )
        self.model, self.cache = model, cache
        batch, device = cache.rows, model.device
        self.ids = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.positions = torch.full((batch, 1), cache.taken, dtype=torch.long, device=device)
        self.mask: Tensor | None = None
        if attention_mask is not None:
            if tuple(attention_mask.shape) != (batch, cache.taken):
                raise ConfigError(
                    f"attention_mask has shape {tuple(attention_mask.shape)}, expected that of the prompt, {(batch, cache.taken)}"
                )
            real = attention_mask.to(device).bool()
            # Whatever is decoded is no padding.
            self.mask = torch.ones(batch, cache.max_tokens, dtype=torch.bool, device=device)
            self.mask[:, : cache.taken] = real
            self.positions -= (~real).sum(dim=1, keepdim=True)
        self.logits: Tensor | None = None
        self.graph: torch.cuda.CUDAGraph | None = None

    @torch.no_grad()
    def run(self) -> Tensor:
        """The step itself on the buffers, which is what is captured: logits [B, V]; positions go on by one."""
        out = self.model(
            input_ids=self.ids, attention_mask=self.mask, position_ids=self.positions, past_key_values=self.cache, use_cache=True
        )
        self.positions += 1
        return out.logits[:, -1]

    def _capture(self) -> Tensor:
        """Capture a step whose token is counted already; tensors are afterwards as before. Returns its logits, not yet filled."""
        state, device = [*self.cache.tensors(), self.positions], self.model.device
        before = [tensor.clone() for tensor in state]
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self.cache.taken -= 1
                self.run()
                for tensor, was in zip(state, before, strict=True):
                    tensor.copy_(was)
        torch.cuda.current_stream(device).wait_stream(stream)
        self.cache.taken -= 1
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self.run()
        self.graph = graph
        return logits

    def step(self, ids: Tensor) -> Tensor:
        """Read one token of each row.

        Args:
            ids: [B, 1].

        Returns:
            Logits of what comes next, [B, V], in a buffer that the next step overwrites.

        Raises:
            ConfigError: ids of another shape, a full cache, or a model that is not on a CUDA device.
        """
        if ids.shape != self.ids.shape:
            raise ConfigError(f"ids have shape {tuple(ids.shape)}, expected {tuple(self.ids.shape)}: one token of each row")
        if self.model.device.type != "cuda":
            raise ConfigError(f"the model is on {self.model.device}, expected a CUDA device. Elsewhere call the model itself")
        self.cache.take(1)
        if self.graph is None:
            self.logits = self._capture()
        assert self.graph is not None
        assert self.logits is not None
        self.ids.copy_(ids)
        self.graph.replay()
        return self.logits
