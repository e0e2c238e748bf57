"""What can go wrong while a run is up, and how it ends: stop signals, and the exit record that launchers read."""

import contextlib
import fcntl
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from gptdist.errors import UserError


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
    """RUN_DIR/exit.json: how the run ended. Launchers flatten exit codes to 1; this one survives.

    The first failure stands until the next start clears it: what follows on other ranks is its consequence.
    """
    path = Path(run_dir) / "exit.json"
    if read_exit_record(run_dir) is not None:
        return
    record = {"code": code, "rank": rank, "message": message, "time": time.time()}
    temporary = path.with_name(f".exit.json.{rank}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(record) + "\n")
        os.replace(temporary, path)
    except OSError as error:
        print(f"gptdist: cannot write {path}: {error.strerror}", file=sys.stderr)
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def read_exit_record(run_dir: str | Path) -> dict | None:
    """The failure that RUN_DIR/exit.json records, if any: {code, rank, message, time}."""
    try:
        record = json.loads((Path(run_dir) / "exit.json").read_text())
    except (OSError, ValueError):
        return None
    return record if record["code"] != 0 else None


def clear_exit_record(run_dir: str | Path) -> None:
    (Path(run_dir) / "exit.json").unlink(missing_ok=True)


@contextlib.contextmanager
def lock_run_dir(run_dir: str | Path) -> Iterator[None]:
    """Hold RUN_DIR/.lock while a run is up; the kernel lets go of it however the process ends.

    Raises UserError if another process holds it. A file system without locks is used unlocked, with a warning.
    """
    with (Path(run_dir) / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is training in run.dir={run_dir}: wait for it, or choose another run.dir"
                            ) from None
        except OSError as error:
            print(f"gptdist: {run_dir} cannot be locked ({error.strerror}): start no second run in it", file=sys.stderr)
        yield
