"""One rank of `gptdist train` in which something goes wrong on rank 1 in the sixth step.

Usage: python tests/hang_process.py leave | stuck | locked | nothing CONFIG
"""

import ctypes
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from gptdist import train_command  # noqa: E402
from gptdist.config import TrainConfig  # noqa: E402
from gptdist.data.loader import PretrainSource  # noqa: E402

AT_STEP = 5


def leave() -> None:
    """This rank takes step 5 for the last one, as if its share of the data were shorter."""
    TrainConfig.last_step = property(lambda self: AT_STEP)


def stuck() -> None:
    """Reading the data takes for ever."""
    _in_step(lambda: time.sleep(1000))


def locked() -> None:
    """Reading the data never gives the interpreter's lock back."""
    _in_step(lambda: ctypes.PyDLL(None).sleep(1000))


def _in_step(do) -> None:
    usual = PretrainSource.step

    def step(self, number, next_sample):
        if number == AT_STEP:
            do()
        return usual(self, number, next_sample)

    PretrainSource.step = step


if __name__ == "__main__":
    if os.environ["RANK"] == "1" and sys.argv[1] != "nothing":
        {"leave": leave, "stuck": stuck, "locked": locked}[sys.argv[1]]()
    sys.exit(train_command.train(sys.argv[2], []))
