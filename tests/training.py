"""A tiny run that the training tests share, in this process or in torchrun's workers."""

import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from gptdist import config as config_module
from gptdist.config import Config
from gptdist.metrics import read_rows
from gptdist.parallel.host import set_up_process
from gptdist.parallel.world import end_process, init_world
from gptdist.trainer import Trainer

# 11 sequences a step: no world size but 1 divides it, so every share is uneven.
TINY = {
    "model": {"context": 32, "width": 32, "n_layers": 2, "n_heads": 4},
    "train": {"steps": 20, "tokens_per_step": 11 * 32, "micro_batch": 2, "grad_clip": 0.5, "precision": "fp32"},
    "optim": {"lr": 3e-3},
    "schedule": {"warmup_steps": 4},
    "eval": {"every": 10, "tokens": 1000},
    "checkpoint": {"every": 0},
    "run": {"tensorboard": False},
    "parallel": {"threads": 1},
}


def tiny_config(data: Path, run_dir: Path, *overrides: str) -> Config:
    values = TINY | {"data": {"path": str(data)}, "run": TINY["run"] | {"dir": str(run_dir)}}
    return config_module.from_dict(values, "the tests' configuration", list(overrides))


def run_tiny(data: Path, run_dir: Path, *overrides: str) -> list[dict]:
    """Train; returns the training rows of metrics.jsonl on the main rank (others: an empty list)."""
    config = tiny_config(data, run_dir, *overrides)
    world = init_world(config.parallel)
    set_up_process(world.device)
    assert Trainer(config, world).run() == 0
    return train_rows(run_dir) if world.is_main else []


def train_rows(run_dir: Path) -> list[dict]:
    return [row for row in read_rows(run_dir / "metrics.jsonl") if row["kind"] == "train"]


def eval_losses(run_dir: Path) -> list[float]:
    return [row["val_loss"] for row in read_rows(run_dir / "metrics.jsonl") if row["kind"] == "eval"]


def assert_same_curve(rows: list[dict], reference: list[dict], *, loss: float = 1e-5, norm: float = 1e-4) -> None:
    """The promise: same steps, same tokens, losses within `loss`, gradient norms within `norm`."""
    assert [r["step"] for r in rows] == [r["step"] for r in reference]
    assert [r["data_hash"] for r in rows] == [r["data_hash"] for r in reference], "other tokens were seen"
    assert [r["tokens"] for r in rows] == [r["tokens"] for r in reference]
    worst = max(abs(a["loss"] - b["loss"]) for a, b in zip(rows, reference, strict=True))
    assert worst <= loss, f"losses differ by {worst}"
    worst = max(abs(a["grad_norm"] - b["grad_norm"]) for a, b in zip(rows, reference, strict=True))
    assert worst <= norm, f"gradient norms differ by {worst}"


def run_worker(work: Callable[..., None], *arguments: object) -> None:
    """`work` as the whole of a process that torchrun started: 0 if it returns and ran in a process group, else 1."""
    try:
        work(*arguments)
        assert dist.is_initialized()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        end_process(1)
    end_process(0)
