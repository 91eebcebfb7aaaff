"""Stage `long`: end-to-end distillation on rows that grow, and the rotary embedding stretched to carry them."""

import copy
import dataclasses
import logging
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from hybridize.data import Mixture, Tokens
from hybridize.distill.kl import KLStage
from hybridize.distill.options import StageOptions
from hybridize.errors import ConfigError

log = logging.getLogger(__name__)

Rope = Literal["yarn", "keep"]

# Rotary embeddings whose angles do not depend on max_position_embeddings, so that it may grow and nothing else changes.
BY_POSITION_ALONE = ("default", "linear", "llama3")
# What each kind that YaRN goes on from may hold; another key would be read in another way.
KNOWN = {
    "default": {"rope_type", "rope_theta"},
    "yarn": {
        "rope_type", "rope_theta", "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow",
        "mscale", "mscale_all_dim", "truncate",
    },
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Long(KLStage):
    """End-to-end distillation on rows of one length after the other, the student's context being stretched to the longest.

    Every step has the same number of tokens: `rows` and `accumulate` are those of the longest rows, and of rows a k-th as long
    there are k times as many. The learning rate has one schedule over the whole stage, and moments go on from length to length.

    Where the longest rows are beyond the student's context, its config has the new one from the first step and in what is
    written: every layer that turns queries and keys reads it. Its loss is that of stage kl, the teacher reading the same rows;
    with cross_entropy alone there is no teacher.

    Source: lengths, kl on long rows and YaRN: Zebra-HyLo (AMD, 2026); the third stage of RADLADS (arXiv 2505.03005) and HALO is
    cross_entropy on rows of 16,384. Documents apart: Llama 3 (arXiv 2407.21783, section 3.2) and ProLong (arXiv 2410.02660),
    which found it better on long and on short texts.
    """

    contexts: list[int]
    """Lengths of rows in their order, BOS counted; rising, and each divides the longest."""
    shares: list[float] | None = None
    """Of the steps, by context, up to a common factor; None is the same for all."""
    rope: Rope = "yarn"
    """Beyond the student's context: `yarn` stretches the rotary embedding (arXiv 2309.00071), factor = longest / original;
    `keep` leaves every angle as it is. Within it nothing changes either way."""
    teacher_rope: Rope = "keep"
    """The same for the teacher while the stage runs; with `keep`, rows must fit its context."""
    seq_tokens: int = 0
    """Settled: the longest of `contexts`."""
    documents: Literal["joined", "reset"] = "reset"
    rows: int = 1
    """Most of the longest rows that a process takes through the model at once."""
    accumulate: int = 8

    NAME: ClassVar[str] = "long"

    def __post_init__(self) -> None:
        self._check_contexts()
        if self.seq_tokens not in (0, self.contexts[-1]):
            raise ConfigError(f"seq_tokens is {self.seq_tokens}, expected none beside contexts, whose longest it is")
        object.__setattr__(self, "seq_tokens", self.contexts[-1])
        super().__post_init__()
        if 0 in self._part_steps():
            raise ConfigError(
                f"tokens is {self.tokens}, which are {self.steps} steps of {self.step_tokens}; expected one at least for each of "
                f"the {len(self.contexts)} contexts. Give more tokens, or fewer rows * accumulate"
            )

    @property
    def cacheable(self) -> bool:
        """A cache's rows have one length."""
        return False

    def _check_contexts(self) -> None:
        lengths, shares = self.contexts, self.shares
        if not lengths or lengths[0] < 1 or any(a >= b for a, b in zip(lengths[:-1], lengths[1:], strict=True)):
            raise ConfigError(f"contexts is {lengths}, expected rising numbers of tokens such as [2048, 8192, 65536]")
        if odd := [length for length in lengths if lengths[-1] % length]:
            raise ConfigError(
                f"contexts has {odd[0]}, expected a divisor of the longest ({lengths[-1]}), so that all steps have as many tokens"
            )
        if shares is not None and (len(shares) != len(lengths) or any(not 0 < share < math.inf for share in shares)):
            raise ConfigError(f"shares is {shares}, expected {len(lengths)} numbers above 0, one for each of contexts")

    def _part_steps(self) -> list[int]:
        """Steps of each context; together the stage's."""
        shares = self.shares or [1.0] * len(self.contexts)
        edges = [round(self.steps * sum(shares[:count]) / sum(shares)) for count in range(len(shares) + 1)]
        return [stop - start for start, stop in zip(edges[:-1], edges[1:], strict=True)]

    @property
    def parts(self) -> list[StageOptions]:
        """One stage of a single length for each of `contexts`."""
        if len(self.contexts) == 1:
            return [self]
        return [
            dataclasses.replace(
                self, contexts=[length], shares=None, seq_tokens=length, rows=self.rows * (self.seq_tokens // length),
                tokens=steps * self.step_tokens,
            )
            for length, steps in zip(self.contexts, self._part_steps(), strict=True)
        ]  # fmt: skip

    def student_config(self, config: Any) -> Any:
        """With the longest of `contexts` as its context."""
        return stretched(config, self.seq_tokens, self.rope, "student")

    def teacher_config(self, config: Any) -> Any:
        """As it is, or stretched like the student's."""
        if self.needs_teacher and self.teacher_rope == "yarn":
            return stretched(config, self.seq_tokens, "yarn", "teacher")
        if self.needs_teacher:
            self.check_context(config, "teacher", "set teacher_rope to yarn, or losses to [{name: cross_entropy}], or ")
        return config

    def check_text(self, text: Tokens | Mixture) -> None:
        """Raise ConfigError where documents apart are too short for the longest rows to teach more; warn where none fills one."""
        if self.documents == "joined":
            return
        longest = max(longest_document(part) for part in (text.parts if isinstance(text, Mixture) else [text]))
        if len(self.contexts) > 1 and longest <= self.contexts[-2]:
            raise ConfigError(
                f"contexts ends with {self.seq_tokens}, but the longest document has {longest} tokens and is apart from others: "
                f"no row would teach more than one of {self.contexts[-2]}. Give longer documents, or set documents to joined"
            )
        if longest < self.seq_tokens:
            log.warning(
                "stage long: the longest document has %d tokens and is apart from others, rows have %d: nothing is learnt of "
                "what lies further apart. Give longer documents, or set documents to joined", longest, self.seq_tokens,
            )  # fmt: skip


def longest_document(text: Tokens) -> int:
    """Tokens of the longest document of a text, BOS counted."""
    return int(np.diff(text.starts, append=len(text.ids)).max()) + (text.bos_id is not None)


def stretched(config: Any, tokens: int, rope: Rope, whose: str) -> Any:
    """A config whose context is at least `tokens`; the config itself where that is so already.

    Args:
        config: of a base or a hybrid.
        tokens: the context that is wanted.
        rope: as in Long.
        whose: for messages, "student" or "teacher".

    Returns:
        With yarn: rope_type yarn, factor = tokens / original, original_max_position_embeddings, attention_factor as transformers
        computes it for the factor; frequencies and everything else as before. Of one that is yarn already the factor grows from
        the same original; where it is for more than `tokens` already, the context becomes what it is for.

    Raises:
        ConfigError: the rotary embedding is of a kind that cannot be stretched so.
    """
    known = config.max_position_embeddings
    if tokens <= known:
        return config
    found = dict(config.rope_parameters)
    kind = found["rope_type"]
    out = copy.deepcopy(config)
    out.max_position_embeddings = tokens
    where = f"the {whose}'s context is {known} tokens, rows have {tokens}, and its rotary embedding is of type {kind}"
    if rope == "keep":
        if kind not in BY_POSITION_ALONE:
            raise ConfigError(f"{where}, whose angles depend on the context; set rope to yarn, or contexts to at most {known}")
        return out
    if kind not in KNOWN:
        keep = "set rope to keep, which leaves its angles as they are, or " if kind in BY_POSITION_ALONE else ""
        if whose == "teacher":
            keep = "set losses to [{name: cross_entropy}], which needs no teacher, or "
        raise ConfigError(f"{where}, which yarn does not go on from; {keep}set contexts to at most {known}")
    if odd := sorted(set(found) - KNOWN[kind]):
        raise ConfigError(f"{where} with {odd[0]}, which yarn would read in another way; set contexts to at most {known}")
    original = found.get("original_max_position_embeddings", known)
    before = found.get("factor") or known / original
    if before >= tokens / original and kind == "yarn":
        out.max_position_embeddings = round(before * original)
        return out
    said = found.pop("attention_factor", None)
    if said is not None and abs(said - _attention_factor(config, found)) > 1e-6:
        raise ConfigError(
            f"{where} with an attention_factor of {said}, which was chosen for a factor of {before:g}; "
            f"set contexts to at most {known}"
        )
    found |= {"rope_type": "yarn", "factor": tokens / original, "original_max_position_embeddings": original}
    out.rope_parameters = {**found, "attention_factor": _attention_factor(out, found)}
    return out


def _attention_factor(config: Any, parameters: dict[str, Any]) -> float:
    """What transformers multiplies cos and sin by, for the parameters of a yarn embedding without such a factor."""
    config = copy.deepcopy(config)
    config.rope_parameters = dict(parameters)
    return float(ROPE_INIT_FUNCTIONS["yarn"](config)[1])
