"""A job of two processes (conftest.Workers): every sharded strategy, a grown vocabulary and sampled answers."""

from pathlib import Path

from tests.test_instruct import CASES, finetune


def main(data: Path, base: Path, out: Path) -> None:
    for name, overrides in CASES.items():
        finetune(data, base, out / name, f"--parallel.strategy={name.split('-')[0]}", *overrides)
