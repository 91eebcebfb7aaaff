"""Whether an export computes what the hybrid does: logits of both on the same tokens, one layer of weights in memory.

Both run in fp32 from what is stored, so that what shows is the export's doing and not the arithmetic's.
"""

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from hybridize.checkpoint import Checkpoint, stored_tensors
from hybridize.shards import read_tensor

LIMIT = 1e-5
"""How far two logits may be apart, times the size of the logits (their root mean square) where that is above one.

fp32 rounding of a small trained model makes 5e-6 to 7e-6.
"""
OWN = 4.0
"""Beyond LIMIT, how many times the hybrid's own rounding: what fp32 changes in its logits against fp64, both as root mean
squares. A norm over something small makes that rounding large, in the hybrid and in the export alike."""
LARGEST_OWN = 1e-4
"""A hybrid whose own rounding is beyond this share of its logits proves nothing."""
ROWS, TOKENS, POSITIONS = 2, 320, 256
"""Sequences of each text, tokens of each (more where a window is longer), and places whose logits are compared."""


@dataclasses.dataclass(frozen=True)
class Proof:
    """How far the export's logits are from the hybrid's on one kind of text."""

    text: str
    tokens: int
    max_difference: float
    """The greatest |difference| of two logits."""
    logit_rms: float
    """Root mean square of the hybrid's logits, each position's mean taken off."""
    kl: float
    """Mean KL divergence of the export's next token from the hybrid's, nats."""
    same_top1: float
    """Share of places with the same likeliest token."""
    difference_rms: float
    """Root mean square of the differences."""
    own_rms: float | None = None
    """The same between the hybrid in fp32 and in fp64; measured where max_difference is beyond LIMIT."""

    @property
    def limit(self) -> float:
        """The greatest difference that needs no further look."""
        return LIMIT * max(1.0, self.logit_rms)

    @property
    def exact(self) -> bool:
        """Whether the two differ by rounding alone."""
        if self.max_difference <= self.limit:
            return True
        if self.own_rms is None or not self.own_rms <= LARGEST_OWN * max(1.0, self.logit_rms):
            return False
        return self.difference_rms <= OWN * self.own_rms


PADDED = "left-padded"
"""The row that begins with padding. A class may be exact and not see padding as nothing."""


def refused(proofs: Iterable[Proof]) -> str | None:
    """What is wrong with an export, or None."""
    for proof in proofs:
        if not proof.exact:
            own = "" if proof.own_rms is None else f", {proof.difference_rms / proof.own_rms:.3g} times the hybrid's own rounding"
            return (
                f"on {proof.text} text logits differ by up to {proof.max_difference:.3g} (limit {proof.limit:.3g}{own}), "
                f"KL {proof.kl:.3g} nats, {proof.same_top1:.2%} of the likeliest tokens equal"
            )
    return None


@torch.no_grad()
def prove(
    hybrid: Checkpoint, native: Path, config: Any, texts: dict[str, Tensor], progress: Callable[[str, float, float], None] | None
) -> list[Proof]:
    """Compare logits on random tokens and on each text.

    Args:
        hybrid: the checked directory.
        native: the export's folder.
        config: of the native class.
        texts: as `export` takes them; sequences are cut.
        progress: called with ("prove", layers done, layers).
    """
    length = sequence_tokens(hybrid.config)
    generator = torch.Generator().manual_seed(0)
    rows = {"random": torch.randint(0, hybrid.config.vocab_size, (ROWS, length), generator=generator)}
    rows |= {name: ids[:ROWS, :length] for name, ids in texts.items()}
    pad = length // 4
    rows[PADDED] = rows["random"][:1]
    ids = torch.cat(list(rows.values()))
    mask = torch.ones_like(ids)
    mask[-1, :pad] = 0
    places = torch.linspace(0, length - 1, min(length, POSITIONS)).round().long()
    count, done = 2 * hybrid.config.num_hidden_layers, 0

    def advance() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress("prove", min(done, count), count)

    tensors, _ = stored_tensors(native)
    sizes = [len(part) for part in rows.values()]

    def parts(logits: Tensor) -> list[Tensor]:
        # What is said at padding is of no account.
        *whole, padded = logits.split(sizes)
        return [*whole, padded[:, places >= pad]]

    want = parts(_logits(hybrid.config, hybrid.read, ids, mask, places, advance))
    found = parts(_logits(config, lambda name: read_tensor(tensors[name]), ids, mask, places, advance))
    proofs = [_compare(name, rows[name].numel(), a, b) for name, a, b in zip(rows, want, found, strict=True)]
    if all(proof.exact for proof in proofs):
        return proofs
    truth = parts(_logits(hybrid.config, hybrid.read, ids, mask, places, advance, torch.float64))
    own = [_rms(a - b) for a, b in zip(want, truth, strict=True)]
    return [dataclasses.replace(proof, own_rms=rounding) for proof, rounding in zip(proofs, own, strict=True)]


def _rms(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt())


def sequence_tokens(config: Any) -> int:
    """Tokens of a sequence: enough that windows forget, within the context."""
    windows = [spec["window_tokens"] for spec in config.mixers if spec.get("window_tokens")]
    return min(config.max_position_embeddings, max([TOKENS, *(window + 64 for window in windows)]))


def _compare(name: str, tokens: int, want: Tensor, found: Tensor) -> Proof:
    centred = want - want.mean(-1, keepdim=True)
    log_p, log_q = want.double().log_softmax(-1), found.double().log_softmax(-1)
    return Proof(
        text=name, tokens=tokens, max_difference=float((want - found).abs().max()),
        logit_rms=_rms(centred), kl=float((log_p.exp() * (log_p - log_q)).sum(-1).mean().clamp_min(0)),
        same_top1=float((want.argmax(-1) == found.argmax(-1)).double().mean()), difference_rms=_rms(want - found),
    )  # fmt: skip


def _logits(
    config: Any, read: Callable[[str], Tensor], ids: Tensor, mask: Tensor, places: Tensor, advance: Callable[[], None],
    dtype: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    """Logits [N, places, V] of a causal LM whose layers come from `read` one at a time, in `dtype`."""
    config = type(config).from_dict({**config.to_dict(), "dtype": str(dtype).removeprefix("torch.")})
    # Eager attention takes its softmax in fp32, where fp64's mask is -inf and a row of padding becomes NaN.
    attention = "sdpa" if dtype == torch.float64 else "eager"
    # Buffers that are computed from the config, such as rotary frequencies, are made; parameters are not.
    with init_empty_weights(include_buffers=False):
        model: Any = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)
    model.eval()

    def fill(module: nn.Module, prefix: str) -> None:
        state = {name: read(prefix + name).to(dtype) for name in module.state_dict()}
        module.load_state_dict(state, strict=True, assign=True)

    def empty(module: nn.Module) -> None:
        for part in module.modules():
            for name, parameter in list(part.named_parameters(recurse=False)):
                setattr(part, name, nn.Parameter(parameter.to("meta"), requires_grad=False))
        advance()

    outside = {name for name, _ in model.named_parameters() if not name.startswith("model.layers.")}
    for name in outside:
        owner, _, leaf = name.rpartition(".")
        source = "model.embed_tokens.weight" if name == "lm_head.weight" and config.tie_word_embeddings else name
        setattr(model.get_submodule(owner), leaf, nn.Parameter(read(source).to(dtype), requires_grad=False))
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(lambda module, args, at=f"model.layers.{index}.": fill(module, at))
        layer.register_forward_hook(lambda module, args, out: empty(module))
    return model(ids, attention_mask=mask, use_cache=False, logits_to_keep=places).logits
