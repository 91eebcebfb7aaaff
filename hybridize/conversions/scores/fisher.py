"""How much the loss feels each layer's keys and values: Fisher information of k_proj and v_proj.

    F = E_n[(d loss_n / d W)^2], element by element, loss_n the mean cross-entropy of sample n; the score is mean(sqrt(F))

The square is taken of each sample's own gradient. The base goes forward one layer at a time, every layer's input is kept, and
back again from the top, each layer once more with gradients.
Source: Palu (Chang et al., arXiv 2407.21118), section 3.3; repository shadowpa0327/Palu, palu/rank_search.py, 2,048 samples of
1,024 tokens there (and labels shifted twice, which is not followed).

Letters: N samples, T tokens, D width, V vocabulary.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hybridize.checkpoint import Checkpoint
from hybridize.conversions.calibrate import decoder_layer
from hybridize.core import LayerScore
from hybridize.data import Tokens, eval_blocks
from hybridize.errors import ConfigError
from hybridize.families import family_of

PARTS = ("k_proj", "v_proj")
# Of the layers' inputs kept at a time; samples that do not fit take another turn through the layers.
KEPT_BYTES = 4 << 30
# Tokens whose logits exist at a time.
CHUNK = 256
# For the standard error: groups of samples to leave out in turn, and elements of a matrix that are looked at.
FOLDS, ELEMENTS = 8, 1 << 16


@dataclass(frozen=True, kw_only=True)
class Fisher:
    """Mean square root of the Fisher information of each layer's k_proj and v_proj."""

    samples: int = 256
    """Rows of text, spread evenly over it; all there are where there are fewer. Palu takes 2,048."""
    tokens: int = 1024
    """Tokens of a row, cut to the base's context."""

    needs_text = True

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ConfigError(f"samples is {self.samples}, expected 1 or more")
        if self.tokens < 2:
            raise ConfigError(f"tokens is {self.tokens}, expected 2 or more")

    def __call__(
        self, base: Checkpoint, text: Tokens, candidates: Any, progress: Callable[[int, int], None]
    ) -> tuple[LayerScore, ...]:
        """One row for each layer, values by k_proj and v_proj.

        Args:
            base: the validated base.
            text: tokens of the base's tokenizer.
            candidates: not used; the score is of the base's own layers.
            progress: called with (steps done, steps).

        Raises:
            ConfigError: token ids that the base's vocabulary does not have.
            DataError: less text than one row.

        Memory: the embedding; one decoder layer in fp32, or the head; KEPT_BYTES of inputs (one sample's at least); and k_proj
        and v_proj of all layers in fp32, where squares are summed.
        """
        context = min(self.tokens, getattr(base.config, "max_position_embeddings", None) or self.tokens)
        blocks = eval_blocks(text, context, text.bos_id)
        chosen = torch.linspace(0, len(blocks) - 1, min(self.samples, len(blocks))).long()
        sums = squared_gradients(base, blocks[chosen], progress)
        return tuple(
            LayerScore(
                layer=index, candidate=None, values={name: s.value() for name, s in layer.items()},
                stderr={name: s.stderr() for name, s in layer.items()} if len(chosen) > 1 else {},
            )
            for index, layer in enumerate(sums)
        )  # fmt: skip

    def shown(self, row: LayerScore) -> dict[str, str]:
        """Values and standard errors."""
        return {name: f"{value:.3e} ± {row.stderr.get(name, math.nan):.0e}" for name, value in row.values.items()}


class Squares:
    """Sums of squared gradients of one matrix, over samples; a part of it once more for each fold of them."""

    def __init__(self, weight: Tensor):
        self.total = torch.zeros_like(weight)
        self.step = -(-weight.numel() // ELEMENTS)
        self.folds = torch.zeros(FOLDS, len(self.total.flatten()[:: self.step]))
        self.counts = torch.zeros(FOLDS)

    def add(self, gradient: Tensor, sample: int) -> None:
        square = gradient.square()
        self.total += square
        self.folds[sample % FOLDS] += square.flatten()[:: self.step]
        self.counts[sample % FOLDS] += 1

    def value(self) -> float:
        """mean(sqrt(F))."""
        return float((self.total / self.counts.sum()).sqrt().double().mean())

    def stderr(self) -> float:
        """By the jackknife over folds of samples."""
        used = self.counts > 0
        rest = (self.folds.sum(0) - self.folds[used]).clamp(min=0) / (self.counts.sum() - self.counts[used])[:, None]
        left_out = rest.sqrt().double().mean(dim=1)
        return float(((len(left_out) - 1) * left_out.var(correction=0)).sqrt())


def squared_gradients(
    base: Checkpoint, sequences: Tensor, progress: Callable[[int, int], None] | None = None
) -> list[dict[str, Squares]]:
    """Sums of per-sample squared gradients of k_proj and v_proj, by layer.

    Args:
        base: the validated base.
        sequences: token ids, [N, T], int64.
        progress: called with (steps done, steps); a step is one layer, forward or back, of what is kept at a time.

    Raises:
        ConfigError: token ids that the base's vocabulary does not have.
    """
    config, family = base.config, family_of(base.config)
    config._attn_implementation = "sdpa"
    if int(sequences.max()) >= config.vocab_size or int(sequences.min()) < 0:
        raise ConfigError(
            f"text has token {int(sequences.max())}, expected 0 to {config.vocab_size - 1}: the tokenizer is not the base's"
        )
    layers, tokens = config.num_hidden_layers, sequences.shape[1]
    embedding = base.read("model.embed_tokens.weight")
    positions = torch.arange(tokens)[None]
    angles = family.rotary(config)(embedding[sequences[:1]].float(), positions)
    fit = max(1, KEPT_BYTES // ((layers + 1) * tokens * config.hidden_size * 4))
    parts = sequences.split(fit)
    done, steps = 0, 2 * layers * len(parts)
    sums: list[dict[str, Squares]] = [{} for _ in range(layers)]

    def advance() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, steps)

    for turn, ids in enumerate(parts):
        kept = [embedding[ids].float()]
        with torch.no_grad():
            for index in range(layers):
                layer = decoder_layer(base, index)
                rows = [layer(row[None], attention_mask=None, position_embeddings=angles) for row in kept[-1]]
                kept.append(torch.cat(rows))
                # Before the next one is read: one layer in memory.
                del layer
                advance()
        flow = _head_gradient(base, kept.pop(), ids)
        for index in reversed(range(layers)):
            layer = decoder_layer(base, index)
            _back(layer, kept.pop(), flow, angles, sums[index], turn * fit)
            del layer
            advance()
    return sums


def _head_gradient(base: Checkpoint, final: Tensor, ids: Tensor) -> Tensor:
    """d loss_n / d what the last layer leaves, [n, T, D]; the loss is the mean over T - 1 next tokens."""
    norm = family_of(base.config).norm(base.config)
    norm.weight = torch.nn.Parameter(base.read("model.norm.weight").float(), requires_grad=False)
    head = base.read("lm_head.weight").float()
    flow = torch.zeros_like(final)
    for place, (row, targets) in enumerate(zip(final, ids[:, 1:], strict=True)):
        leaf = row[:-1].detach().requires_grad_()
        normed = norm(leaf)
        slope = torch.empty_like(normed)
        for start in range(0, len(targets), CHUNK):
            part = slice(start, start + CHUNK)
            error = (normed.detach()[part] @ head.T).softmax(dim=-1)
            error[torch.arange(len(error)), targets[part]] -= 1
            slope[part] = error @ head / len(targets)
        (flow[place, :-1],) = torch.autograd.grad(normed, leaf, slope)
    return flow


def _back(layer: Any, inputs: Tensor, flow: Tensor, angles: Any, sums: dict[str, Squares], first: int) -> None:
    """One layer backwards, a sample at a time: adds its squares, and turns `flow` [n, T, D] into the layer's below.

    Args:
        layer: with its weights, fp32.
        inputs: what it read, [n, T, D].
        flow: gradient of each sample's loss in what it left, changed in place.
        angles: cos and sin, [1, T, d].
        sums: by part, filled in.
        first: number of the first sample.
    """
    layer.requires_grad_(False)
    weights = {name: getattr(layer.self_attn, name).weight.requires_grad_() for name in PARTS}
    for place, row in enumerate(inputs):
        leaf = row[None].detach().requires_grad_()
        after = layer(leaf, attention_mask=None, position_embeddings=angles)
        below, *gradients = torch.autograd.grad(after, [leaf, *weights.values()], flow[place][None])
        flow[place] = below[0]
        for name, gradient in zip(weights, gradients, strict=True):
            if name not in sums:
                sums[name] = Squares(gradient)
            sums[name].add(gradient, first + place)
