"""Alignment with one layer in memory: the teacher's stream of all tokens lies in files between layers.

From the bottom up, each layer is loaded alone, runs over all rows of the stage, and trains the student's mixer of it for all
its steps before the next one comes. A row is met in one step only, so that what a step reads and leaves is a row of a file:
the stream below the layer, the stream above it, and the memory that later layers read, as the weights of that very step made
it. Steps, batches and gradients are those of the memory engine, and so are the weights, bit for bit on a CPU.

In the stage's own folder lie: stream-<layer>, what the layer reads (two at a time); memory-<layer>, until its last reader is
done; layer-<layer>.safetensors, trained; and states of the layer at work. A stream has its name once it is whole.
"""

import copy
import gc
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hybridize.capture import LayerSignals, visit_layers
from hybridize.checkpoint import open_checkpoint
from hybridize.data import Batch
from hybridize.distill.align import Align, AlignStep, aligned_layers
from hybridize.distill.guards import StopSignals
from hybridize.distill.job import Job, blocks_of, check_sizes, with_weights
from hybridize.distill.loop import Run, seed_of, train
from hybridize.distill.options import autocast
from hybridize.distill.saves import Position, State, read_latest_state, weights_in, write_tensors
from hybridize.distill.sharding import empty_model, fill
from hybridize.distill.streams import Rows, disk_folder, readers_of, scratch_bytes
from hybridize.errors import ConfigError
from hybridize.shards import OnDemand, TensorInfo
from hybridize.storage import rename, require_space

log = logging.getLogger(__name__)


class Through(nn.Module):
    """In the place of a layer that is not in memory: its input, as it is."""

    def forward(self, hidden_states: Tensor, **about: Any) -> Tensor:
        """Give back [B, T, D]."""
        return hidden_states


class DiskStep(AlignStep):
    """A micro-batch of one layer, its input read from and its output written to files.

    Args:
        options: the stage's.
        student: with this one layer of its own in it.
        teacher: the same.
        first: the micro-batch that scales are measured on.
        layer: index.
        stage: whose files are read and written.
        row: which row of the stage the next call begins with.
    """

    def __init__(
        self, options: Align, student: Any, teacher: Any, first: Batch, layer: int, stage: "DiskStage", row: int
    ):  # fmt: skip
        self.layer, self.stage, self.row = layer, stage, 0
        super().__init__(options, student, teacher, first, [layer])
        self.row = row

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        hidden = self.stage.below.read(self.row, len(batch)).to(batch.ids.device)
        return {**batch.inputs(), "input_ids": None, "inputs_embeds": hidden}

    def _extra(self, batch: Batch) -> dict[str, Any]:
        extra = super()._extra(batch)
        if (read := getattr(self.student.model.mixer_options[self.layer], "reads", None)) is not None:
            memory = self.stage.memory(read).read(self.row, len(batch))
            extra["memories"].leave(read, memory.to(batch.ids.device))
        return extra

    def _finish(self, signals: LayerSignals, extra: dict[str, Any]) -> None:
        super()._finish(signals, extra)
        if self.layer in self.student.model.read_layers:
            memory = extra["memories"].take(self.layer)
            self.stage.memory(self.layer, memory.dtype).write(self.row, memory)
        if self.stage.above is not None:
            self.stage.above.write(self.row, signals.output)

    def __call__(self, batch: Batch, share: float) -> dict[str, Tensor]:
        """As of AlignStep, on the rows that come next."""
        parts = super().__call__(batch, share)
        self.row += len(batch)
        return parts


class DiskStage:
    """One stage of alignment from disk.

    Args:
        run: what the stages share.
        job: the call.
        index: the stage's number, from 0.
        before: weights that earlier stages trained, in files.

    Raises:
        CheckpointError: student or teacher cannot be read.
        ConfigError: they do not fit each other or this engine, a glob matches nothing, or the disk is too small.
    """

    below: Rows
    """The stream that the layer at work reads."""
    above: Rows | None
    """The stream that it makes; None above the last layer that learns."""

    def __init__(self, run: Run, job: Job, index: int, before: OnDemand):
        self.run, self.index, self.before = run, index, before
        self.name, self.options = job.stages[index]
        self.device = run.accelerator.device
        self.folder = disk_folder(run.scratch, index)
        opened = open_checkpoint(job.student), open_checkpoint(job.teacher)
        self.opened = [replace(found, config=own) for found, own in zip(opened, job.configs[index], strict=True)]
        check_sizes(self.name, self.opened[0].config, self.opened[1].config, (job.student, job.teacher))
        self.dtype = torch.float32 if self.options.dtype == "fp32" else self.opened[1].dtype
        for found in self.opened:
            if found.config.attention_dropout:
                raise ConfigError(
                    f"{found.path}: attention_dropout is {found.config.attention_dropout}, expected 0: layers one after the "
                    "other would draw other random numbers; use engine: memory"
                )
        if self.dtype == torch.float16:
            raise ConfigError(
                f"{job.teacher}: is stored in float16, whose stream would change its dtype on the way; use dtype: fp32 or "
                "engine: memory"
            )
        dtype = torch.float32 if self.options.dtype == "fp32" else None
        self.student, self.teacher = (empty_model(found, dtype) for found in self.opened)
        if getattr(self.teacher.model, "read_layers", None):
            raise ConfigError(
                f"{job.teacher}: its layers read other layers' memories, expected a teacher without; use engine: memory"
            )
        trained = self.options.choose(self.options.candidates(self.student), self.name)
        self.options.check_rates(trained, self.name)
        for parameter in trained.values():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        self.learning = [i for i in aligned_layers(self.student) if any(name.startswith(_prefix(i)) for name in trained)]
        self.blanks = {id(model): list(model.model.layers) for model in (self.student, self.teacher)}
        self.blocks = blocks_of(job, index, seed_of(run.seed, index), self.student.config)
        self.rows = self.options.steps * self.options.step_rows
        self.until = readers_of(self.student.model.mixer_options)
        self.memories: dict[int, Rows] = {}
        self.folder.mkdir(exist_ok=True)
        held = sum(path.stat().st_blocks * 512 for path in self.folder.iterdir())
        counts = {i: sum(p.numel() for name, p in trained.items() if name.startswith(_prefix(i))) for i in self.learning}
        mixers = self.student.model.mixer_options
        needed = scratch_bytes(self.options, self.student.config, mixers, counts, self.dtype.itemsize)
        require_space(self.folder, max(0, int(needed) - held))

    def _stream(self, layer: int) -> Path:
        return self.folder / f"stream-{layer:05d}"

    def _layer(self, layer: int) -> Path:
        return self.folder / f"layer-{layer:05d}.safetensors"

    def _open(self, path: Path) -> Rows:
        return Rows(path, self.options.seq_tokens, self.student.config.hidden_size, self.dtype)

    def memory(self, layer: int, dtype: torch.dtype | None = None) -> Rows:
        """The file of what a layer leaves, of a dtype that its first row had."""
        if layer not in self.memories:
            if dtype is None:
                known = [path.suffix for path in self.folder.glob(f"memory-{layer:05d}.*")]
                dtype = torch.bfloat16 if known == [".bfloat16"] else torch.float32
            path = self.folder / f"memory-{layer:05d}.{str(dtype).removeprefix('torch.')}"
            width = self.student.model.mixer_options[layer].memory_width(self.student.config)
            self.memories[layer] = Rows(path, self.options.seq_tokens, width, dtype)
        return self.memories[layer]

    def sync(self) -> None:
        """Put on disk what a state counts on."""
        for rows in (self.above, *self.memories.values()):
            if rows is not None:
                rows.sync()

    def train(self) -> OnDemand:
        """Train what is left; every weight trained so far, in files.

        Raises:
            TrainingError, StoppedError: as the loop does.
            ConfigError: the disk is full, or a file of the folder was changed.
        """
        last = max(self.learning)
        whole = [int(path.name[-5:]) for path in self.folder.glob("stream-?????")]
        if not whole:
            self._embed()
        for passed in sorted(whole)[:-1]:
            self._stream(passed).unlink()
        for layer in range(max(whole, default=0), last + 1):
            log.info("distill: stage %d (%s): layer %d of %d", self.index + 1, self.name, layer, last)
            self._work(layer, last)
        places: dict[str, TensorInfo] = dict(self.before.places)
        for layer in self.learning:
            places |= weights_in(self._layer(layer))
        return OnDemand(places)

    def _embed(self) -> None:
        """The stream below the first layer. Of the table, which can be larger than a layer, the rows that are met are read."""
        teacher, name = self.opened[1], "model.embed_tokens.weight"
        with closing(self._open(self._partial(0))) as rows:
            for row, part in self._parts():
                ids, places = part.ids.unique(return_inverse=True)
                table = torch.cat([teacher.read_rows(name, token, token + 1) for token in ids.tolist()])
                rows.write(row, table[places].to(self.dtype))
            self._publish(rows, 0)

    def _partial(self, layer: int) -> Path:
        return self._stream(layer).with_suffix(".partial")

    def _publish(self, rows: Rows, layer: int) -> None:
        rows.require(self.rows)
        rows.sync()
        rename(rows.path, self._stream(layer))

    def _parts(self) -> Iterator[tuple[int, Batch]]:
        """All micro-batches of the stage, with the number of the first row of each."""
        row = 0
        with StopSignals() as signals:
            for step in range(self.options.steps):
                for part in self.blocks.batch(step).split(self.options.rows):
                    yield row, part
                    row += len(part)
                    if signals.asked:
                        signals.leave(signals.asked, f"stage {self.index + 1} ({self.name}), between two layers' steps")

    def _work(self, layer: int, last: int) -> None:
        """Run one layer over all rows, training it where it learns; its stream is there afterwards, the one below is not."""
        with ExitStack() as stack:
            self.below = stack.enter_context(closing(self._open(self._stream(layer))))
            self.below.require(self.rows)
            self.above = None
            if layer < last:
                self.above = stack.enter_context(closing(self._open(self._partial(layer + 1))))
            if layer in self.learning:
                if not self._layer(layer).exists():
                    self._train(layer)
            elif layer in self.until:
                step = self._step(layer, 0)
                self._pass(lambda row, part: step(part, 1.0))
                self.sync()
            else:
                self._load(self.teacher, layer)
                self._pass(self._follow(layer))
            for rows in self.memories.values():
                rows.close()
            self.memories.clear()
            if self.above is not None:
                self._publish(self.above, layer + 1)
        self._let_go()
        if layer < last:
            self._stream(layer).unlink()
        for read in (read for read, until in self.until.items() if until <= layer):
            for path in self.folder.glob(f"memory-{read:05d}.*"):
                path.unlink()

    def _pass(self, visit: Callable[[int, Batch], Any]) -> None:
        for row, part in self._parts():
            visit(row, part.to(self.device))

    def _follow(self, layer: int) -> Callable[[int, Batch], None]:
        """Takes a micro-batch through the teacher's layer."""
        above = self.above
        assert above is not None

        def follow(row: int, part: Batch) -> None:
            inputs = {**part.inputs(), "input_ids": None, "inputs_embeds": self.below.read(row, len(part)).to(self.device)}
            with autocast(self.device, self.options):
                visit_layers(self.teacher, layers=[layer], visit=lambda signals: above.write(row, signals.output), **inputs)

        return follow

    def _load(self, model: Any, layer: int, twins: Mapping[str, Tensor] | None = None) -> None:
        """Put one layer's weights into a model, and none of another layer."""
        blanks = self.blanks[id(model)]
        model.model.layers = nn.ModuleList(copy.deepcopy(b) if i == layer else Through() for i, b in enumerate(blanks))
        found = self.opened[model is self.teacher]
        fill(model, found, None, self.device, lambda name: name.startswith(_prefix(layer)), set(), dict(twins or {}))
        model.train(model is self.student)

    def _let_go(self) -> None:
        """Free a layer before the next one comes: modules and optimizers lie in cycles, which would wait for their time."""
        for model in (self.student, self.teacher):
            model.model.layers = nn.ModuleList()
        gc.collect()

    def _step(self, layer: int, row: int) -> DiskStep:
        """Load both models' layer and make its step."""
        self._load(self.teacher, layer)
        self._load(self.student, layer, dict(self.teacher.named_parameters()))
        with_weights(self.student, {name: self.before[name] for name in self.before if name.startswith(_prefix(layer))})
        first = self.blocks.batch(0)[: self.options.rows].to(self.device)
        return DiskStep(self.options, self.student, self.teacher, first, layer, self, row)

    def _train(self, layer: int) -> None:
        """Train a layer from its last state, or its start, to its end."""
        number, steps = self.learning.index(layer), self.options.steps
        position = Position(stage=self.index, step=number * steps)
        state = read_latest_state(self.folder)
        if state is None or state.position.step <= position.step:
            state = State(position=position, weights={}, moments={})
        done = (state.position.step - position.step) * self.options.step_rows
        step = self._step(layer, done)
        with_weights(self.student, dict(state.weights))
        trained = {name: p for name, p in self.student.named_parameters() if p.requires_grad and name.startswith(_prefix(layer))}
        if done:
            for rows in (self.above, *([self.memory(layer)] if layer in self.until else [])):
                if rows is not None:
                    rows.require(done)
        run = replace(self.run, scratch=self.folder, before_save=self.sync)
        passes = (number, len(self.learning))
        train(run, self.index, self.name, self.options, step, trained, {}, self.blocks, state, passes=passes)
        self.sync()
        weights = {name: p.detach() for name, p in trained.items()}
        write_tensors(self._layer(layer), weights, {}, f"stage {self.index + 1}, layer {layer}")


def _prefix(layer: int) -> str:
    return f"model.layers.{layer}."
