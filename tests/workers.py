"""Started by torchrun for several test modules (conftest.Workers): runs one job after another in one process group.

Usage: torchrun --nproc-per-node W tests/workers.py FOLDER PID
FOLDER/N.json is job N: a module, and the paths that its main() takes; each rank leaves FOLDER/N.RANK when it is done.
They end with an empty job, or when process PID is gone.
"""

import importlib
import itertools
import json
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.training import run_worker  # noqa: E402


def main(folder: Path, parent: Path) -> None:
    for number in itertools.count():
        job = folder / f"{number}.json"
        while not job.exists():
            assert parent.exists(), "the tests are gone"
            time.sleep(0.05)
        words = json.loads(job.read_text())
        if not words:
            return
        importlib.import_module(words[0]).main(*map(Path, words[1:]))
        (folder / f"{number}.{os.environ['RANK']}").touch()


if __name__ == "__main__":
    run_worker(main, Path(sys.argv[1]), Path("/proc", sys.argv[2]))
