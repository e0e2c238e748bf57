"""A process that this one starts, waits for, and takes with it when it ends."""

import ctypes
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


class Child:
    """A command whose output goes to the end of a file. To be used on the main thread, which has the signals.

    It gets every stop signal of this process as SIGTERM, for which a training run saves; a session of its own keeps a
    terminal from interrupting it besides. Where this process is killed, Linux sends it SIGTERM, too; other systems let
    it go on.
    """

    def __init__(self, command: Sequence[str], log: Path):
        self.command, self.log = command, log
        self.stopped = False  # whether this process was asked to stop meanwhile
        self._process: subprocess.Popen | None = None

    def run(self) -> int:
        """Start it and wait for its end; its exit code, below 0 for a signal."""
        before = {number: signal.signal(number, self._stop) for number in STOP_SIGNALS}
        try:
            with self.log.open("ab") as file:
                self._process = subprocess.Popen(
                    self.command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
                    start_new_session=True, preexec_fn=_ends_with_parent())
            if self.stopped:  # before there was one to tell
                self._process.terminate()
            return self._process.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self, number: int, frame: object) -> None:
        self.stopped = True
        if self._process is not None:
            self._process.terminate()


def _ends_with_parent() -> Callable[[], object] | None:
    """What the child does between fork and exec: it asks for a signal when its parent dies, however that is."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl  # loaded before the fork
    return lambda: prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
