"""What can go wrong while a run is up, and how it ends: stop signals, and the exit record that launchers read."""

import json
import os
import signal
import time
from pathlib import Path


class StopSignal:
    """SIGTERM and SIGUSR1 (SLURM's warning before the time limit) ask for a checkpoint and a clean end."""

    def __init__(self) -> None:
        self.received = False

    def install(self) -> None:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: object) -> None:
        self.received = True


def write_exit_record(run_dir: str | Path, *, code: int, rank: int, message: str) -> None:
    """RUN_DIR/exit.json: how a worker ended. Launchers flatten exit codes to 1; this one survives.

    A failure stands until the next start clears it; success of another rank does not overwrite it.
    """
    path = Path(run_dir) / "exit.json"
    if code == 0 and path.exists():
        return
    record = {"code": code, "rank": rank, "message": message, "time": time.time()}
    temporary = path.with_name(f".exit.json.{rank}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(record) + "\n")
        os.replace(temporary, path)
    except OSError:
        # The run's own error is what matters; a directory that cannot be written has been reported as such.
        return


def clear_exit_record(run_dir: str | Path) -> None:
    (Path(run_dir) / "exit.json").unlink(missing_ok=True)
