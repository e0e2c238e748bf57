"""A job of two processes (conftest.Workers): bad steps, replicas that differ, a disk that is full for one rank. Faults
are put in from here: the package has no hooks for them."""

import math
from collections.abc import Callable
from pathlib import Path

import torch

from gptdist import config as config_module
from gptdist.errors import ReplicaError
from gptdist.parallel.world import init_world
from gptdist.trainer import Trainer
from tests.test_checkpoint_ranks import disk_full
from tests.training import run_tiny, tiny_config

STRATEGIES = ("ddp", "fsdp", "zero1", "zero2", "zero3")
RESUMED = ("fsdp", "zero3")
REPLICAS = {"ddp": "optim.blocks.1.mlp.fc.weight.exp_avg", "hsdp": "model.blocks.0.ln_1.weight",
            "zero1": "model.wpe.weight"}
BAD_SAMPLE = 75  # of 11 in a step: step 7 has it, on rank 1 of two
REWIND = ["--train.on_nonfinite=rewind", "--checkpoint.every=5", "--train.steps=12", "--eval.every=0",
          "--model.dropout=0.1", "--train.micro_batch=6"]
SPIKES = ["--train.spike_norm=5", "--train.spike_window=4", "--train.steps=9", "--eval.every=0",
          "--train.micro_batch=6"]


def poisoned(config: config_module.Config, sample: int, factor: float = math.nan) -> Trainer:
    """A trainer in whose run the loss of a micro-batch with this sample is `factor` times what it is."""
    trainer = Trainer(config, init_world(config.parallel))
    loss = trainer.task.loss

    def spoilt(strategy, batch, key):
        value = loss(strategy, batch, key)
        return value * factor if (batch.sample_ids == sample).any() else value

    trainer.task.loss = spoilt
    return trainer


def run_poisoned(data: Path, run: Path, *overrides: str, sample: int = BAD_SAMPLE, factor: float = math.nan) -> None:
    assert poisoned(tiny_config(data, run, *overrides), sample, factor).run() == 0


def before_evaluating(trainer: Trainer, at_step: int, do: Callable[[], None]) -> None:
    usual = trainer._evaluate_and_save

    def patched(stopping: bool) -> None:
        if trainer.state.step == at_step:
            do()
        usual(stopping)

    trainer._evaluate_and_save = patched


def flip_a_bit(trainer: Trainer, key: str) -> None:
    """Of one element, the lowest."""
    tensors = next(tensors for _, tensors in trainer.strategy.replicas() if key in tensors)
    bits = tensors[key].detach().view(torch.int32)
    bits.view(-1)[3] ^= 1


def check_replica(data: Path, out: Path, strategy: str, key: str) -> None:
    config = tiny_config(data, out / f"replica-{strategy}", f"--parallel.strategy={strategy}", "--train.steps=6",
                         "--train.replica_check_every=2", "--checkpoint.every=3", "--eval.every=0",
                         *(["--parallel.replicas=2"] if strategy == "hsdp" else []))
    trainer = Trainer(config, init_world(config.parallel))
    if trainer.world.rank == 1:
        before_evaluating(trainer, 6, lambda: flip_a_bit(trainer, key))
    try:
        trainer.run()
        message = "no difference was found"
    except ReplicaError as error:
        message = str(error)
    (out / f"replica-{strategy}-{trainer.world.rank}.txt").write_text(message)


def disk_full_on_rank_1(data: Path, out: Path) -> None:
    """The save at step 5 fails on rank 1; from step 7 on there is room again."""
    config = tiny_config(data, out / "disk", "--parallel.strategy=fsdp", "--checkpoint.every=5", "--eval.every=0",
                         "--train.steps=12")
    trainer = Trainer(config, init_world(config.parallel))
    full, step = disk_full(trainer.world.rank == 1), trainer._step

    def counted(batch):
        if batch.step == 6:
            if trainer.saver._thread is not None:
                trainer.saver._thread.join()
            full.__exit__(None, None, None)
        return step(batch)

    trainer._step = counted
    full.__enter__()
    assert trainer.run() == 0


def main(data: Path, out: Path) -> None:
    for strategy in STRATEGIES:
        run_poisoned(data, out / f"rewind-{strategy}", f"--parallel.strategy={strategy}", *REWIND)
    for strategy in RESUMED:
        # The first ends with the checkpoint that the second goes back to, the third goes on after all that.
        run = out / f"resumed-{strategy}"
        run_tiny(data, run, f"--parallel.strategy={strategy}", *REWIND, "--train.stop_at=5")
        run_poisoned(data, run, f"--parallel.strategy={strategy}", *REWIND, "--train.stop_at=9")
        run_poisoned(data, run, f"--parallel.strategy={strategy}", *REWIND)
    run_poisoned(data, out / "spike", "--parallel.strategy=fsdp", *SPIKES, factor=100.0)
    for strategy, key in REPLICAS.items():
        check_replica(data, out, strategy, key)
    disk_full_on_rank_1(data, out)
