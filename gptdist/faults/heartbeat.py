"""Where each rank is: RUN_DIR/heartbeat/rank-K.json, rewritten in place at every phase of a step, a save, a start.

A beat is one pwrite of RECORD_BYTES into a file of that size: no fsync, no rename, nothing that another rank waits for.
Nobody reads the files while the run moves; the watchdog does when it stands still, and so can a person: after a kill a
rank's file says where it was. Readers compare beats with beats, never one host's clock with another's.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

RECORD_BYTES = 512
FOLDER = "heartbeat"
TICK_S = 0.1  # between two ticks that are written


@dataclass(frozen=True)
class Beat:
    """What a rank's file says."""

    rank: int
    host: str
    pid: int
    born: int  # when the process began, in the kernel's ticks: tells it from another with its pid
    start: str  # id of the start (ExitRecord.agree)
    beat: int  # grows with every record
    phases: int  # phases entered so far: of two ranks the one with fewer is behind
    step: int  # optimizer steps done
    phase: str  # of the main thread
    saving: str  # of the checkpoint being saved, perhaps in the background; "": none is


class Heartbeat:
    """This rank's. It only counts until `open` gives it a file."""

    def __init__(self, rank: int = 0):
        self.rank, self.host, self.start = rank, socket.gethostname(), ""
        self.step, self.phase, self.saving = 0, "start-up", ""
        self.stepped = False  # whether this start has done a step
        self.count, self.phases = 0, 0
        self._fd: int | None = None
        self._head = b""
        self._written_at = 0.0
        self._lock = threading.Lock()  # the checkpoint's thread beats too

    def open(self, run_dir: str | Path) -> None:
        """Beat into the run's directory from now on. A file that cannot be made is told, and done without."""
        path = Path(run_dir) / FOLDER / f"rank-{self.rank}.json"
        fields = {"rank": self.rank, "host": self.host, "pid": os.getpid(), "born": born(os.getpid()),
                  "start": self.start}
        self._head = json.dumps(fields).removesuffix("}").encode()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
            os.ftruncate(self._fd, RECORD_BYTES)
        except OSError as error:
            self._give_up(error)
        self._beat()

    @property
    def is_open(self) -> bool:
        return self._fd is not None

    def close(self) -> None:
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    def enter(self, phase: str) -> None:
        """The main thread begins a phase."""
        self.phase = phase
        self.phases += 1
        self._beat()

    def stepped_to(self, step: int) -> None:
        """A step of this start is done; the next record tells it."""
        self.step, self.stepped = step, True

    def save_phase(self, phase: str) -> None:
        """A save, perhaps on another thread, begins a phase or goes on in it; "": it is over."""
        if phase == self.saving:
            self.tick()
            return
        self.saving = phase
        self._beat()

    def tick(self) -> None:
        """Something is done inside a phase that may be long."""
        self.count += 1
        if time.monotonic() - self._written_at >= TICK_S:
            self._beat()

    def _beat(self) -> None:
        with self._lock:
            self.count += 1
            if self._fd is None:
                return
            tail = b', "beat": %d, "phases": %d, "step": %d, "phase": "%s", "saving": "%s"}' % (
                self.count, self.phases, self.step, self.phase.encode(), self.saving.encode())
            self._written_at = time.monotonic()
            try:
                os.pwrite(self._fd, (self._head + tail).ljust(RECORD_BYTES - 1) + b"\n", 0)
            except OSError as error:
                self.close()
                self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        print(f"gptdist [rank {self.rank}]: no heartbeat in run.dir: {error.strerror}; if the run stands still, the "
              f"report will not say where this rank is", file=sys.stderr, flush=True)


def clear(run_dir: str | Path, start: str) -> None:
    """Remove what other starts than `start` left. Before any rank of this one beats."""
    for path in (Path(run_dir) / FOLDER).glob("*"):
        if start not in path.name:
            with contextlib.suppress(OSError):
                path.unlink()


def read_beats(run_dir: str | Path, size: int, start: str | None = None) -> dict[int, Beat]:
    """rank -> its last beat, of the ranks below `size` that have one (of this start)."""
    found = {}
    for rank in range(size):
        beat = read_beat(Path(run_dir) / FOLDER / f"rank-{rank}.json")
        if beat is not None and (start is None or beat.start == start):
            found[rank] = beat
    return found


def read_beat(path: Path) -> Beat | None:
    """None: no file, or one caught while it was being written."""
    try:
        return Beat(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def born(pid: int) -> int:
    """When a process began, in ticks since the host did; 0: there is none."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0
