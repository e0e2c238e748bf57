"""Every distributed case of classification at a world size: a job of conftest.Workers, or of ranks of its own.

data: labelled texts, base: a pretrained run, out: where the runs go.
"""

from pathlib import Path

from gptdist import config as config_module
from gptdist.config import Config
from gptdist.parallel.world import env_world_size, init_world
from gptdist.trainer import Trainer
from tests.training import train_rows

# 11 texts a step in micro-batches of 2: no world size but 1 divides it, so every share is uneven.
CLASSIFY = {
    "task": {"name": "classify"},
    "classify": {"baselines": False},
    "model": {"context": 48, "width": 32, "n_layers": 2, "n_heads": 4, "dropout": 0.1},
    "train": {"steps": 6, "batch": 11, "micro_batch": 2, "grad_clip": 0.5, "precision": "fp32"},
    "optim": {"lr": 3e-3},
    "eval": {"every": 3, "micro_batch": 4},
    "checkpoint": {"every": 0},
    "run": {"tensorboard": False},
    "parallel": {"threads": 1},
}
FROZEN = ["--task.freeze=last:1", "--classify.pool=mean", "--classify.balance=weights"]
# Name -> overrides. `frozen` in a name: compared with the frozen single run. {base}: a pretrained checkpoint.
REFERENCES = {"plain": [], "frozen": [*FROZEN, "--checkpoint.init_from={base}"]}
CASES = {
    2: {"plain-ddp": ["--parallel.strategy=ddp"],
        "plain-fsdp": ["--parallel.strategy=fsdp"],
        "plain-hsdp": ["--parallel.strategy=hsdp", "--parallel.replicas=2"],
        "plain-tensor": ["--parallel.strategy=fsdp", "--parallel.tensor=2"],
        "plain-zero1": ["--parallel.strategy=zero1"],
        "plain-zero2": ["--parallel.strategy=zero2"],
        "plain-zero3": ["--parallel.strategy=zero3"],
        "frozen-tensor": ["--parallel.strategy=fsdp", "--parallel.tensor=2"],
        "frozen-zero2": ["--parallel.strategy=zero2"],
        "frozen-zero3": ["--parallel.strategy=zero3"]},
    4: {"plain-fsdp": ["--parallel.strategy=fsdp"],
        "frozen-fsdp": ["--parallel.strategy=fsdp"],
        "plain-tensor": ["--parallel.strategy=fsdp", "--parallel.tensor=2"],
        "frozen-zero3": ["--parallel.strategy=zero3"]},
}
CHAIN = {2: [(3, "--parallel.strategy=zero3"), (4, "--parallel.tensor=2")], 4: [(5, "--parallel.strategy=hsdp")]}


def classify_config(data: Path, run_dir: Path, *overrides: str) -> Config:
    values = CLASSIFY | {"task": CLASSIFY["task"] | {"train_data": str(data)},
                         "run": CLASSIFY["run"] | {"dir": str(run_dir)}}
    if any("init_from" in word for word in overrides):
        values["model"] = {"dropout": 0.1}
    return config_module.from_dict(values, "the tests' configuration", list(overrides))


def run_classify(data: Path, run_dir: Path, *overrides: str) -> list[dict]:
    """Fine-tune; returns the training rows of metrics.jsonl on the main rank (others: an empty list)."""
    config = classify_config(data, run_dir, *overrides)
    world = init_world(config.parallel)
    assert Trainer(config, world).run() == 0
    return train_rows(run_dir) if world.is_main else []


def options(name: str, base: Path) -> list[str]:
    return [word.format(base=base) for word in REFERENCES[name.partition("-")[0]]]


def main(data: Path, base: Path, out: Path) -> None:
    world = env_world_size()
    for name, overrides in CASES[world].items():
        run_classify(data, out / f"{name}-{world}", *overrides, *options(name, base))
    for stop, strategy in CHAIN[world]:
        run_classify(data, out / "chain", strategy, f"--train.stop_at={stop}")
