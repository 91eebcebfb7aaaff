"""What the stages after distillation share: their data, and the care they take of recall.

Both train on answers, which are short; what a hybrid finds far back in its text suffers from that first ("Attention Amnesia
in Hybrid LLMs", arXiv 2606.11052). So recall is compared before and after, and queries and keys can be put back.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hybridize.checkpoint import Checkpoint
from hybridize.core import read_json
from hybridize.distill.chat import Examples
from hybridize.distill.options import StageOptions, autocast
from hybridize.distill.rows import ChatBatch
from hybridize.distill.saves import State, read_latest_state, write_state
from hybridize.errors import ConfigError
from hybridize.modeling import mixer_options

log = logging.getLogger(__name__)

# (model, numbers of pairs) -> {"recall@N": share of values}
Recall = Callable[[Any, list[int]], dict[str, float]]

# A cache that still grows between these lengths grows with the text for good.
SHORT, LONG = 1 << 20, 1 << 21


@dataclass(frozen=True, kw_only=True)
class PostTraining(StageOptions, ABC):
    """Options of a stage that trains on chats or preferences."""

    data: str | None = None
    """What to train on: .jsonl files. None is the text that the run is given."""
    optional: bool = False
    """Leave the stage out where it has no `data`, instead of asking for it."""
    restore_qk: bool | float = False
    """Put queries and keys of full attention back after the stage: true, or the share of the way back (QK-Restore)."""
    recall_pairs: list[int] = field(default_factory=lambda: [4, 16])
    """Facts in the prompts that recall is compared with, before and after the stage."""
    recall_fall: float | None = 0.05
    """Largest fall of recall, as a share of values, that is no warning; None compares nothing."""
    chunk_tokens: int = 256
    """Tokens whose logits exist at once."""

    divides: ClassVar[bool] = False
    packs: ClassVar[bool] = False
    """Whether a row holds several texts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.losses:
            raise ConfigError(f"losses is {self.losses}, expected none: the loss of this stage is its own")
        if not 0 <= self.restore_qk <= 1:
            raise ConfigError(f"restore_qk is {self.restore_qk}, expected true, false or a share between 0 and 1")
        if self.chunk_tokens < 1 or (self.recall_fall is not None and self.recall_fall < 0):
            raise ConfigError(
                f"chunk_tokens is {self.chunk_tokens} and recall_fall {self.recall_fall}; expected at least 1, and >= 0 or null"
            )

    @property
    def needs_teacher(self) -> bool:
        return False

    def candidates(self, student: Any) -> dict[str, nn.Parameter]:
        """Every parameter."""
        return dict(student.named_parameters())

    @abstractmethod
    def read(self, tokenizer: Any, source: str | Path) -> Examples:
        """The data set in a source, as this stage takes it."""

    @abstractmethod
    def start(self, student: Any, teacher: Any, first: ChatBatch) -> Any:
        """The step of the stage."""

    def hidden_states(self, model: Any, batch: ChatBatch) -> Tensor:
        """What the head reads at each token of [B, L, T] texts, [B, L, T, D]."""
        with autocast(batch.ids.device, self):
            hidden = model.model(
                input_ids=batch.ids.flatten(0, 1), position_ids=batch.positions.flatten(0, 1), use_cache=False
            ).last_hidden_state
        hidden = hidden.to(torch.bfloat16) if self.dtype == "bf16" else hidden
        return hidden.unflatten(0, batch.ids.shape[:2])


def start_weights(scratch: Path, state: State, main: bool, wait: Callable[[], None]) -> dict[str, Tensor]:
    """Every weight trained before the stage that `state` stands in; kept on disk while the stage runs.

    Args:
        scratch: folder of the training states.
        state: where the run begins.
        main: whether this process writes.
        wait: returns when all processes are there.
    """
    folder = scratch / f"start-{state.position.stage:02d}"
    if state.position.step == 0:
        if main and state.weights:
            folder.mkdir(exist_ok=True)
            write_state(folder, state)
        wait()
        return dict(state.weights)
    found = read_latest_state(folder) if folder.exists() else None
    return {} if found is None else dict(found.weights)


def query_key_names(config: Any, names: list[str]) -> list[str]:
    """Of the parameters given, those that make queries and keys in layers that keep every token's key.

    Such a layer's cache grows with the text. Layers whose keys and values come from one projection are left out: nothing of
    theirs can be put back alone.
    """
    kept = []
    for index, options in enumerate(mixer_options(config)):
        prefix = f"model.layers.{index}.self_attn."
        own = {name: name.removeprefix(prefix).split(".")[0] for name in names if name.startswith(prefix)}
        kinds = {part[: part.index("_") + 1] for part in own.values() if "_" in part}
        grows = options.state_bytes(config, LONG) > options.state_bytes(config, SHORT)
        if grows and {"q_", "k_"} <= kinds and "kv_" not in kinds:
            kept += [name for name, part in own.items() if part.startswith(("q_", "k_"))]
    return kept


def restore_qk(
    weights: dict[str, Tensor], before: dict[str, Tensor], student: Checkpoint, share: float, stage: str
) -> dict[str, Tensor]:
    """Weights with queries and keys put back: share * before + (1 - share) * after, in fp32.

    Args:
        weights: every weight trained so far, with this stage.
        before: every weight trained before this stage.
        student: the directory that the run began with, which has all others.
        share: 1 puts them back whole.
        stage: its name, for messages.

    Raises:
        ConfigError: no layer of the student keeps every token's key.

    Source: QK-Restore (Zhou et al., arXiv 2606.11052), which puts them back whole; the share is ours.
    """
    names = query_key_names(student.config, list(student.shapes))
    if not names:
        raise ConfigError(f"stage {stage!r}: restore_qk is {share}, but no layer keeps the keys of its whole text; leave it out")
    out = dict(weights)
    for name in names:
        if name in out:
            old = before[name] if name in before else student.read(name).float()
            out[name] = old.clone() if share == 1 else torch.lerp(out[name].float(), old.float(), share)
    log.info("stage %s: queries and keys of %d parameters put back by %g", stage, len(set(names) & set(weights)), share)
    return out


def compare_recall(before: dict[str, float], after: dict[str, float], options: PostTraining, where: str) -> dict[str, Any]:
    """The record of both, with a warning in the log where recall fell by more than it may."""
    assert options.recall_fall is not None
    fallen = sorted(name for name in before if before[name] - after[name] > options.recall_fall)
    for name in fallen:
        log.warning(
            "%s: %s fell from %.3f to %.3f, by more than %g. Consider restore_qk, a lower lr, or longer texts in the data",
            where, name, before[name], after[name], options.recall_fall,
        )  # fmt: skip
    return {"before": before, "after": after, "largest_fall": options.recall_fall, "fallen": fallen}


def recall_path(scratch: Path, stage: int) -> Path:
    """Where a run keeps what recall was, until its lineage is written."""
    return scratch / f"recall-{stage:02d}.json"


def recall_records(scratch: Path, stages: list[tuple[str, Any]]) -> list[dict[str, Any]]:
    """What was found of each stage that recall was compared for."""
    paths = [(index, name, recall_path(scratch, index)) for index, (name, _) in enumerate(stages)]
    return [{"stage": i + 1, "name": name, **read_json(path, "a record of recall")} for i, name, path in paths if path.exists()]
