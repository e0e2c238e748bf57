"""What can go wrong while a run is up, and how it ends: stop signals, the exit record that launchers read, the lock.

heartbeat.py: where each rank is. watchdog.py: a run that stands still. bad_steps.py: steps that are not to be taken.
child.py: a process that ends with this one.
"""

import contextlib
import fcntl
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from gptdist.errors import EXIT_REQUEUE, LockedError
from gptdist.files import replace_text

INTERRUPTED = b"\ngptdist: stopping after this step, with a checkpoint; Ctrl-C again stops now, without one\n"
STOPPED = "stopped by a signal, checkpoint saved"  # the message of exit.json that launchers know a stop by
LOCK_WAIT_S = 180  # for what is left of the same job: NFS keeps the locks of a vanished node for its lease, often 90 s


class StopSignal:
    """SIGTERM, SIGUSR1 (SLURM's warning before the time limit) and Ctrl-C ask for a checkpoint and a clean end.

    A second Ctrl-C interrupts at once; announce: whether this process says so at the first.
    """

    def __init__(self, announce: bool = True) -> None:
        self.received, self.announce = False, announce

    def install(self) -> None:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._note)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where the parent has it ignored
            signal.signal(signal.SIGINT, self._interrupted)

    def restore_interrupt(self) -> None:
        """Ctrl-C raises KeyboardInterrupt again. The others stay: their default would end a run that has saved."""
        if signal.getsignal(signal.SIGINT) == self._interrupted:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _note(self, number: int, frame: object) -> None:
        self.received = True

    def _interrupted(self, number: int, frame: object) -> None:
        self.received = True
        self.restore_interrupt()
        if self.announce:
            os.write(2, INTERRUPTED)  # sys.stderr may be in the middle of a write


class ExitRecord:
    """RUN_DIR/exit.json: how the run ended. Launchers flatten exit codes to 1; this one survives.

    The first failure of a start stands: what follows on other ranks is its consequence. What another start left is
    neither read nor kept. A start knows its records by an id once its ranks have met, before that by their time.
    """

    def __init__(self, run_dir: str | Path, rank: int):
        self.path, self.rank = Path(run_dir) / "exit.json", rank
        self.began, self.start = time.time(), None

    def agree(self, start: str) -> None:
        """start: the id of this start, the same on every rank."""
        self.start = start

    def failure(self) -> dict | None:
        """The failure that this start has recorded, if any: {code, rank, message, start, time}."""
        try:
            record = json.loads(self.path.read_text())
            ours = record["time"] >= self.began if self.start is None else record["start"] == self.start
            return record if ours and record["code"] != 0 else None
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def write(self, code: int, message: str) -> None:
        if self.failure() is not None:
            return
        told = message or (STOPPED if code == EXIT_REQUEUE else "")
        record = {"code": code, "rank": self.rank, "message": told, "start": self.start, "time": time.time()}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            replace_text(self.path, json.dumps(record) + "\n")
        except OSError as error:
            if not message:  # a failure has been reported, and this is likely its consequence
                print(f"gptdist: cannot write {self.path}: {error.strerror}", file=sys.stderr)


def clear_exit_record(run_dir: str | Path) -> None:
    (Path(run_dir) / "exit.json").unlink(missing_ok=True)


@contextlib.contextmanager
def lock_run_dir(run_dir: str | Path) -> Iterator[None]:
    """Hold RUN_DIR/.lock while a run is up; the kernel lets go of it however the process ends.

    Raises LockedError if another process holds it; one of the same job, which a launcher started before this, is waited
    for. A file system without locks is used unlocked, with a warning.
    """
    job = _job()
    with (Path(run_dir) / ".lock").open("a+") as file:
        try:
            _lock(file, job)
            file.truncate(0)
            file.write(job)
            file.flush()
        except BlockingIOError:
            raise LockedError(f"another process is training in run.dir={run_dir}: wait for it, or choose another "
                              f"run.dir") from None
        except OSError as error:
            print(f"gptdist: {run_dir} cannot be locked ({error.strerror}): start no second run in it", file=sys.stderr)
        yield


def _job() -> str:
    """The job that a launcher says this process belongs to; "": unknown."""
    job = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return "" if job == "none" else job  # torchrun's default


def _lock(file: TextIO, job: str) -> None:
    """Raises BlockingIOError if a process of another job holds the lock, or one of this job for LOCK_WAIT_S."""
    deadline = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            if not job or file.read() != job or time.monotonic() > deadline:
                raise
            time.sleep(0.5)
