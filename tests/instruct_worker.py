"""Started by torchrun: fine-tunes with every sharded strategy, a grown vocabulary and sampled answers.

Usage: torchrun --nproc-per-node 2 tests/instruct_worker.py DATA BASE OUT
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.test_instruct import CASES, finetune  # noqa: E402
from tests.training import run_worker  # noqa: E402


def main(data: Path, base: Path, out: Path) -> None:
    for name, overrides in CASES.items():
        finetune(data, base, out / name, f"--parallel.strategy={name.split('-')[0]}", *overrides)


if __name__ == "__main__":
    run_worker(main, *map(Path, sys.argv[1:4]))
