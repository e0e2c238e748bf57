"""What the processes do that several test modules use (conftest.Workers): one job after another in one process group.

FOLDER/N.json is job N: a module, and the paths that its main() takes; each rank leaves FOLDER/N.RANK when it is done.
They end with an empty job, or when the process of the tests is gone.
"""

import importlib
import itertools
import json
import os
import time
from pathlib import Path


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
