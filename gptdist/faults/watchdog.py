"""A run that stands still: found, told, and ended so that it can start again.

Every rank has a watchdog thread. A rank whose heart has not beaten for half the timeout looks at the others' files; if
none of them has changed either when the whole timeout is over, the run stands still, and not just this rank, which may
be waiting for a long save. Then each rank that still can writes down its stacks; the lowest of them puts these, the
others' last beats and what the kernel says of their processes together as RUN_DIR/hang-report-START.txt and .json, says
one line on stderr, and kills what does not run on its host; all of them end with EXIT_REQUEUE.

Time is counted by polls on each rank's own clock: one that was suspended, alone or with all the others, has not waited.
"""

import contextlib
import faulthandler
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

import torch
import torch.distributed as dist

from gptdist.errors import EXIT_REQUEUE
from gptdist.faults import ExitRecord
from gptdist.faults.heartbeat import FOLDER, Beat, Heartbeat, born, read_beats
from gptdist.files import replace_text

LONGEST_POLL_S = 10.0
POLLS = 20  # in a timeout, where that makes them shorter
STATES = {"R": "running", "S": "waiting", "D": "waiting in the kernel, for a disk or a file system perhaps",
          "T": "stopped by a signal", "t": "stopped by a debugger", "Z": "dead", "I": "idle"}


class Watchdog:
    """Ends this process when the whole run has stood still for `timeout_s`; for `start_up_s` before its first step.

    `with` it is on guard: a process that ends in another way just leaves. timeout_s=0: there is none.
    """

    def __init__(self, beat: Heartbeat, run_dir: str | Path, size: int, record: ExitRecord, *, timeout_s: float,
                 start_up_s: float, command: str = "train"):
        self.beat, self.run_dir, self.size, self.record, self.command = beat, Path(run_dir), size, record, command
        self.timeout_s, self.start_up_s = timeout_s, max(start_up_s, timeout_s)
        self.interval_s = min(LONGEST_POLL_S, timeout_s / POLLS)
        self._main = threading.current_thread()
        self._locked: TextIO | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self.timeout_s > 0:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()
            if self._locked is not None:
                self._path("locked", "txt").unlink(missing_ok=True)

    def _watch(self) -> None:
        seen, still_s, last = None, 0.0, time.monotonic()
        others = _Others(self.run_dir, self.size, self.beat)
        while True:
            limit_s = self.timeout_s if self.beat.stepped else self.start_up_s
            self._arm(limit_s)
            if self._over.wait(self.interval_s):
                return
            now = time.monotonic()
            passed_s, last = min(now - last, 2 * self.interval_s), now
            still_s, seen = (still_s + passed_s if self.beat.count == seen else 0.0), self.beat.count
            if still_s < limit_s / 2:
                others.forget()
                continue
            others.look(passed_s)
            if self._parts() or (still_s >= limit_s and others.still_s >= limit_s / 2 - self.interval_s):
                self._end(still_s, others)

    def _arm(self, limit_s: float) -> None:
        """Where a thread never lets go of the interpreter's lock, a C thread writes the stacks instead."""
        if self._locked is None and self.beat.is_open:
            with contextlib.suppress(OSError):
                self._locked = self._path("locked", "txt").open("w")
        if self._locked is not None:
            faulthandler.dump_traceback_later(0.8 * limit_s, file=self._locked)

    def _end(self, still_s: float, others: "_Others") -> None:
        faulthandler.cancel_dump_traceback_later()
        try:
            self._write_part(still_s, others)
            parts = self._wait_for_parts()
            if min(parts, default=self.beat.rank) == self.beat.rank:
                self._report(parts)
                self._kill_here(parts, others)
            elif not self._wait_for(self._report_path("txt").exists):
                self._report(self._parts())
        except Exception:  # the run has to end, told or not
            traceback.print_exc()
            self.record.write(EXIT_REQUEUE, f"the run stood still for {still_s:.0f} s")
        sys.stderr.flush()
        os._exit(EXIT_REQUEUE)

    # A rank's part of the report

    def _path(self, kind: str, suffix: str) -> Path:
        return self.run_dir / FOLDER / f"{kind}-{self.beat.start}-{self.beat.rank}.{suffix}"

    def _write_part(self, still_s: float, others: "_Others") -> None:
        beat = self.beat
        part = {"rank": beat.rank, "host": beat.host, "pid": os.getpid(), "step": beat.step, "phase": beat.phase,
                "phases": beat.phases, "saving": beat.saving, "still_s": round(still_s, 1),
                "collectives": sequence_numbers(), "stacks": stacks(self._main), "last": last_collectives(),
                "processes": {rank: process_state(other.pid, other.born) for rank, other in others.here().items()}}
        replace_text(self._path("part", "json"), json.dumps(part))

    def _parts(self) -> dict[int, dict[str, Any]]:
        found = {}
        for path in (self.run_dir / FOLDER).glob(f"part-{self.beat.start}-*.json"):
            with contextlib.suppress(OSError, ValueError):
                part = json.loads(path.read_text())
                found[part["rank"]] = part
        return found

    def _wait_for_parts(self) -> dict[int, dict[str, Any]]:
        """Those of all ranks, or of as many as come to the same conclusion in a few polls."""
        self._wait_for(lambda: len(self._parts()) == self.size)
        return self._parts()

    def _wait_for(self, done: Any) -> bool:
        deadline = time.monotonic() + 3 * self.interval_s + 1
        while not done():
            if time.monotonic() > deadline:
                return False
            time.sleep(min(0.1, self.interval_s))
        return True

    # The report

    def _report_path(self, suffix: str) -> Path:
        return self.run_dir / f"hang-report-{self.beat.start}.{suffix}"

    def _report(self, parts: Mapping[int, dict[str, Any]]) -> None:
        beats = read_beats(self.run_dir, self.size, self.beat.start)
        processes = {int(rank): state for part in parts.values() for rank, state in part["processes"].items()}
        why = verdict(self.size, parts, beats, processes)
        head = f"the run stood still for {parts[self.beat.rank]['still_s']:.0f} s: {why}"
        locked = {rank: text for rank in range(self.size) if rank not in parts and (text := self._locked_stacks(rank))}
        replace_text(self._report_path("json"), json.dumps({
            "why": why, "ranks": self.size, "parts": parts, "beats": {r: asdict(b) for r, b in beats.items()},
            "processes": processes, "locked": locked}, indent=1))
        replace_text(self._report_path("txt"), _text(head, self.size, parts, beats, processes, locked))
        message = f"{head}; stacks and positions of all ranks: {self._report_path('txt')}"
        self.record.write(EXIT_REQUEUE, message)
        print(f"gptdist {self.command} [rank {self.beat.rank}]: {message}; start again to go on from the last "
              f"checkpoint", file=sys.stderr, flush=True)

    def _locked_stacks(self, rank: int) -> str:
        path = self.run_dir / FOLDER / f"locked-{self.beat.start}-{rank}.txt"
        try:
            return path.read_text()
        except OSError:
            return ""

    def _kill_here(self, parts: Mapping[int, dict[str, Any]], others: "_Others") -> None:
        """Kill the ranks of this host that cannot end by themselves, so that launchers need not wait for them."""
        for rank, beat in others.here().items():
            if rank not in parts and born(beat.pid) == beat.born:
                with contextlib.suppress(OSError):
                    os.kill(beat.pid, signal.SIGKILL)


class _Others:
    """The other ranks' beats as this rank sees them, and for how long they have not changed."""

    def __init__(self, run_dir: Path, size: int, beat: Heartbeat):
        self._run_dir, self._size, self._own = run_dir, size, beat
        self.forget()

    def forget(self) -> None:
        self._beats: dict[int, Beat] = {}
        self.still_s = 0.0

    def look(self, passed_s: float) -> None:
        beats = read_beats(self._run_dir, self._size, self._own.start)
        beats.pop(self._own.rank, None)
        self.still_s = self.still_s + passed_s if beats == self._beats else 0.0
        self._beats = beats

    def here(self) -> dict[int, Beat]:
        """Those on this rank's host, of this start."""
        beats = read_beats(self._run_dir, self._size, self._own.start)
        return {rank: beat for rank, beat in beats.items()
                if beat.host == self._own.host and rank != self._own.rank}


def positions(run_dir: str | Path, size: int, start: str | None) -> str:
    """Where the ranks are by their last beats, in a line: those at the same point together, those behind first."""
    beats = read_beats(run_dir, size, start)
    missing = [rank for rank in range(size) if rank not in beats]
    groups: dict[tuple[int, str, str], list[int]] = {}
    for rank, beat in beats.items():
        groups.setdefault((beat.step, beat.phase, beat.saving), []).append(rank)
    behind = {where: min(beats[rank].phases for rank in ranks) for where, ranks in groups.items()}
    order = sorted(groups, key=lambda where: (len(groups[where]), behind[where]))
    told = [f"{_ranks(groups[where], beats)} after {where[0]} steps in {where[1]}"
            + (f" (a save at {where[2]})" if where[2] else "") for where in order]
    return "; ".join([*told, *([f"{_ranks(missing, beats)} without a heartbeat"] if missing else [])])


def verdict(size: int, parts: Mapping[int, dict[str, Any]], beats: Mapping[int, Beat],
            processes: Mapping[int, str]) -> str:
    """Which ranks stand out, in one line: those that do not run, else those that are elsewhere, else none."""
    silent = [rank for rank in range(size) if rank not in parts]
    told = []
    for rank in silent[:8]:
        beat = beats.get(rank)
        if beat is None:
            told.append(f"rank {rank} has no heartbeat in this start")
        else:
            state = processes.get(rank, "no watchdog on its host could look at its process")
            told.append(f"rank {rank} (host {beat.host}, pid {beat.pid}) does not answer after {beat.step} steps in "
                        f"{beat.phase}: {state}")
    if len(silent) > 8:
        told.append(f"{len(silent) - 8} more ranks do not answer")
    groups: dict[tuple[int, str, str], list[int]] = {}
    for rank, part in parts.items():
        groups.setdefault((part["step"], part["phase"], part["saving"]), []).append(rank)
    order = sorted(groups, key=lambda where: (len(groups[where]), min(parts[rank]["phases"] for rank in groups[where])))
    for where in order[:4]:
        told.append(f"{_ranks(groups[where], parts)} after {where[0]} steps in {where[1]}"
                    + (f", a save at {where[2]}" if where[2] else ""))
    return "; ".join(told)


def _ranks(ranks: Sequence[int], known: Mapping[int, Any]) -> str:
    """"rank 1 (host b)", or "ranks 0-2, 5 (hosts a, c)"."""
    hosts = sorted({getattr(known[rank], "host", None) or known[rank]["host"] for rank in ranks if rank in known})
    shown = ", ".join(hosts[:3]) + (", ..." if len(hosts) > 3 else "")
    where = f" (host{'s' * (len(hosts) > 1)} {shown})" if hosts else ""
    return f"rank{'s' * (len(ranks) > 1)} {_spans(sorted(ranks))}{where}"


def _spans(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] -> "0-2, 5"."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)


def _text(head: str, size: int, parts: Mapping[int, dict[str, Any]], beats: Mapping[int, Beat],
          processes: Mapping[int, str], locked: Mapping[int, str]) -> str:
    lines = [head, "", "Where each rank was, by its last beat (phases: how many it has entered; fewer is behind):"]
    for rank in range(size):
        beat = beats.get(rank)
        where = "no heartbeat" if beat is None else (
            f"host {beat.host}, pid {beat.pid}, after {beat.step} steps in {beat.phase}, phases {beat.phases}, beat "
            f"{beat.beat}" + (f", a save at {beat.saving}" if beat.saving else ""))
        answer = "answers" if rank in parts else "does not answer"
        lines.append(f"  rank {rank}: {where}; {answer}; process: {processes.get(rank, 'not looked at')}")
    for rank in sorted(parts):
        part = parts[rank]
        lines += ["", f"rank {rank}, still for {part['still_s']} s; collectives begun, by group: "
                      f"{part['collectives'] or 'not counted'}"]
        lines += [f"  among the last: {one}" for one in part["last"]]
        lines += [part["stacks"]]
    for rank in sorted(locked):
        lines += ["", f"rank {rank}, which does not answer but wrote its stacks:", locked[rank]]
    return "\n".join(lines) + "\n"


# What a process can say of itself and of others

def stacks(main: threading.Thread) -> str:
    """The Python stack of every thread but this one, the main thread's first; the innermost call last."""
    threads = {thread.ident: thread for thread in threading.enumerate()}
    frames = sys._current_frames()
    frames.pop(threading.get_ident(), None)

    def told(ident: int, frame: FrameType) -> str:
        name = threads[ident].name if ident in threads else str(ident)
        return f"  thread {name}, the innermost call last:\n" + "".join(traceback.format_stack(frame))

    order = sorted(frames, key=lambda ident: ident != main.ident)
    return "".join(told(ident, frames[ident]) for ident in order)


def process_state(pid: int, since: int) -> str:
    """What the kernel says of a process of this host that began at tick `since`."""
    if born(pid) != since:
        return "gone"
    try:
        letter = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        waits_in = Path(f"/proc/{pid}/wchan").read_text()
    except OSError:
        return "gone"
    waits = f", in {waits_in}" if waits_in not in ("", "0") else ""
    return f"{STATES.get(letter, 'unknown')} ({letter}{waits})"


def sequence_numbers() -> dict[str, int]:
    """Process group -> collectives that this rank has begun in it, where its backend counts them."""
    if not dist.is_initialized():
        return {}
    found = {}
    for group, name in dist.distributed_c10d._world.pg_names.items():
        with contextlib.suppress(RuntimeError):
            if number := group._get_sequence_number_for_group():
                found[f"{name} {group.group_desc}"] = number
    return found


def last_collectives(longest: int = 8) -> list[str]:
    """What torch's flight recorder has (TORCH_FR_BUFFER_SIZE): of NCCL those that have not ended; gloo's never end."""
    dump = getattr(torch._C._distributed_c10d, "_dump_fr_trace_json", None) if dist.is_available() else None
    dump = dump or (getattr(torch._C._distributed_c10d, "_dump_nccl_trace_json", None) if dist.is_available() else None)
    if dump is None or not dist.is_initialized():
        return []
    try:
        entries = json.loads(dump(True, True)).get("entries", [])
    except (RuntimeError, TypeError, ValueError) as error:
        return [f"the flight recorder gave nothing: {error}"]
    return [f"{one.get('profiling_name')} number {one.get('collective_seq_id')} of group {one.get('process_group')}, "
            f"input {one.get('input_sizes')}: {one.get('state')}" for one in entries[-longest:]]
