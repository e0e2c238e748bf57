"""The protocol between the trainer and what it trains for.

A task reads its data when it is made, resolves the configuration (`config`: vocabulary, steps ...), and gives the
trainer a model on the meta device, batches, a loss per micro-batch and an evaluation. It knows nothing of the loop, of
checkpoints' layout or of how the model is spread.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from gptdist import ops
from gptdist.checkpoint import layout
from gptdist.checkpoint.restore import load_weights, read_config
from gptdist.config import Config
from gptdist.data.loader import Batch, StepBatch
from gptdist.data.tokenizer import Tokenizer
from gptdist.errors import UserError
from gptdist.generate import Generator
from gptdist.model import GPT, Dropout, build
from gptdist.parallel.strategies import Strategy
from gptdist.parallel.world import World

SAME_MODEL = "use the model the checkpoint was trained with"  # advice


class Source(Protocol):
    """The batches of a run: a pure function of the step's first sample number."""

    n_samples: int  # of an epoch

    def step(self, step: int, next_sample: int) -> StepBatch:
        """This rank's share of the step that begins at sample number `next_sample`. Thread-safe."""

    def advance(self, next_sample: int) -> int:
        """`next_sample` of the following step."""


class Task:
    """What the trainer asks of a task, and what most tasks answer."""

    unit = "windows"  # what a sample is, in the plural
    # section.key that a resumed run has to keep
    fixed: Sequence[str] = ("task.name", "run.seed", "optim.name", "lora.rank", "lora.alpha", "lora.dropout",
                            "lora.targets", "lora.split_qkv")

    config: Config  # resolved: what the run's checkpoints store
    tokenizer: Tokenizer
    dataset_id: str  # identifies the training samples: a resumed run has to have the same
    source: Source
    step = 0  # optimizer steps done, kept by the trainer for `started` and `evaluate`

    def __init__(self, config: Config, world: World):
        self.config, self.world = config, world

    @property
    def data_name(self) -> str:
        """The training data, for messages."""
        return self.config.task.train_data or "the embedded examples"

    def dataset_at(self, next_sample: int) -> str:
        """`dataset_id` of the samples before this number, for data that may change from some step on."""
        return self.dataset_id

    def other_data(self, dataset: str, next_sample: int) -> str:
        """What a checkpoint that was trained on `dataset` up to this sample did, for a message that refuses it."""
        return f"was trained on other data than {self.data_name}"

    # Model

    def build(self) -> GPT:
        """The model on the meta device, its frozen parameters marked."""
        return build(self.config)

    def check_base(self, checkpoint: Path) -> None:
        """Raise UserError where checkpoint.init_from is no start for this run."""

    def load_base(self, checkpoint: Path, tensors: Mapping[str, Tensor]) -> None:
        """Fill `model.<name>` tensors from checkpoint.init_from; a collective call."""
        load_weights(checkpoint, tensors)

    # Steps

    def dropout_key(self, step: int) -> Tensor | None:
        """Key of the step's dropout masks; None: no dropout."""
        drops = self.config.model.dropout > 0 or (self.config.lora.rank > 0 and self.config.lora.dropout > 0)
        return ops.dropout_key(self.config.run.seed, step, self.world.device) if drops else None

    def dropout(self, batch: Batch, key: Tensor | None) -> Dropout | None:
        """The model's dropout for a batch."""
        if key is None:
            return None
        return Dropout(self.config.model.dropout, key, batch.sample_ids.to(self.world.device))

    def loss(self, strategy: Strategy, batch: Batch, key: Tensor | None) -> Tensor:
        """Sum of the losses of the micro-batch's targets, () fp32; the trainer divides by all ranks' `n_targets`."""
        raise NotImplementedError

    def measured(self) -> dict[str, float]:
        """What else was measured in the losses of the step just done, over all ranks, for its line in the metrics."""
        return {}

    def evaluate(self, strategy: Strategy) -> dict[str, Any] | None:
        """{"val_loss": mean validation loss, other metrics}, the same on all ranks; None: there is no such data."""
        raise NotImplementedError

    def generator(self, strategy: Strategy) -> Generator:
        """Continues texts with the weights as they are, inside strategy.evaluating(). Every rank generates all of them,
        as the weights may be spread over all ranks; not under tensor parallelism, which divides a sequence."""
        bf16 = strategy.config.train.precision == "bf16"
        return Generator(strategy.model, self.tokenizer, call=strategy, device=self.world.device,
                         dtype=torch.bfloat16 if bf16 else torch.float32, agree=self.world.agree)

    # Beside the steps

    def files(self) -> dict[str, bytes]:
        """Further files of every checkpoint: name -> content."""
        return {}

    def resumed(self, checkpoint: Path) -> None:
        """Called when a run goes on from `checkpoint`, whose tensors are loaded; to read what files() put there."""

    def rewound(self, step: int) -> None:
        """Called when the run has gone back to `step` because of a later step; to drop what was written since."""

    def started(self, strategy: Strategy) -> None:
        """Called once the weights are there, before the first step."""

    def finished(self, strategy: Strategy) -> None:
        """Called when the last step of the run is done and saved."""


def resolve_steps(config: Config, n_samples: int) -> Config:
    """The configuration with train.steps as train.epochs of `n_samples` say."""
    if config.train.epochs == 0:
        return config
    steps = math.ceil(config.train.epochs * n_samples / config.sequences_per_step)
    if config.schedule.warmup_steps > steps:
        raise UserError(f"schedule.warmup_steps={config.schedule.warmup_steps} exceeds the {steps} steps of "
                        f"train.epochs={config.train.epochs:g}")
    return dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps))


def check_resumed(task: Task, checkpoint: Path, dataset: str | None, next_sample: int) -> None:
    """Raise UserError where a run cannot go on from this checkpoint, whose train_state.json has the last two."""
    saved, config = read_config(checkpoint), task.config
    advice = "a run keeps its data and task; for another one start anew from these weights with checkpoint.init_from"
    for name in task.fixed[:1]:  # another task first: the rest follows from it
        check_equal(checkpoint, saved, config, name, advice)
    check_tokenizer(checkpoint, task.tokenizer, task.data_name)
    for field in dataclasses.fields(config.model):
        if field.name != "dropout":
            check_equal(checkpoint, saved, config, f"model.{field.name}", SAME_MODEL)
    for name in task.fixed[1:]:
        check_equal(checkpoint, saved, config, name, advice)
    if not dataset:
        raise UserError(f"{checkpoint} was imported, not trained here: use checkpoint.init_from")
    if dataset != task.dataset_at(next_sample):
        raise UserError(f"{checkpoint} {task.other_data(dataset, next_sample)}: {advice}")


def check_equal(checkpoint: Path, saved: Config, wanted: Config, name: str, advice: str) -> None:
    """Raise UserError if the field section.key of the checkpoint's configuration is not this run's."""
    section, _, key = name.partition(".")
    theirs, ours = (getattr(getattr(config, section), key) for config in (saved, wanted))
    if ours != theirs:
        raise UserError(f"{checkpoint} has {name}={theirs}, this run {name}={ours}: {advice}")


def check_tokenizer(checkpoint: Path, tokenizer: Tokenizer, data_name: str) -> None:
    """Raise UserError if the checkpoint's tokenizer is not that of the data."""
    saved = str(layout.read_table(checkpoint, "tokenizer/tokenizer.json").get("hash"))
    if saved != tokenizer.hash:
        raise UserError(f"{checkpoint} was trained with tokenizer {saved[:12]}, but {data_name} was prepared with "
                        f"{tokenizer.hash[:12]}: prepare the data with --tokenizer {checkpoint / 'tokenizer'}")
