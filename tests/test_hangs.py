"""A run that stands still ends by itself, and says which rank was where; a heartbeat is cheap and never in the way."""

import json
import os
import signal
import time

import pytest

from gptdist import config as config_module
from gptdist.errors import EXIT_REQUEUE
from gptdist.faults import ExitRecord
from gptdist.faults.heartbeat import FOLDER, RECORD_BYTES, Beat, Heartbeat, born, clear, read_beat, read_beats
from gptdist.faults.watchdog import Watchdog, _spans, positions, process_state, verdict
from tests.conftest import start_ranks
from tests.training import tiny_config, train_rows


def hang(dataset, tmp_path, mode, *overrides, strategy="fsdp"):
    """(processes, run directory) of two ranks, with a fault on rank 1."""
    path = tmp_path / "run.yaml"
    path.write_text(config_module.to_yaml(tiny_config(
        dataset, tmp_path / "run", "--train.steps=100000", "--run.hang_timeout_s=3", "--data.workers=0",
        f"--parallel.strategy={strategy}", "--checkpoint.every=3", *overrides)))
    return start_ranks("tests/hang_process.py", mode, str(path)), tmp_path / "run"


def report_of(run):
    [text] = run.glob("hang-report-*.txt")
    return text.read_text(), json.loads(text.with_suffix(".json").read_text())


def test_a_stopped_rank_is_named_and_ended(dataset, tmp_path):
    processes, run = hang(dataset, tmp_path, "nothing")
    deadline = time.monotonic() + 120
    while not ((run / "metrics.jsonl").exists() and len(train_rows(run)) >= 3):
        assert processes[0].poll() is None, processes[0].stderr.read()
        assert time.monotonic() < deadline, "the run makes no progress"
        time.sleep(0.02)
    processes[1].send_signal(signal.SIGSTOP)
    _, err = processes[0].communicate(timeout=60)
    assert processes[0].returncode == EXIT_REQUEUE, err
    assert processes[1].wait(timeout=10) == -signal.SIGKILL, "its host's watchdog ends it"
    text, values = report_of(run)
    assert len([line for line in err.splitlines() if "stood still" in line]) == 1
    for said in (err, text):
        assert f"rank 1 (host {values['beats']['1']['host']}, pid {processes[1].pid}) does not answer after " in said
        assert ": stopped by a signal (T" in said
    assert "thread MainThread, the innermost call last:" in text
    assert list(values["parts"]) == ["0"]
    record = json.loads((run / "exit.json").read_text())
    assert (record["code"], record["rank"]) == (EXIT_REQUEUE, 0)
    assert "the run stood still for 3 s: rank 1" in record["message"]


def test_a_rank_that_is_stuck_in_its_own_code_shows_where(dataset, tmp_path):
    processes, run = hang(dataset, tmp_path, "stuck")
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [EXIT_REQUEUE] * 2, errors
    _, values = report_of(run)
    assert set(values["parts"]) == {"0", "1"}
    assert "time.sleep(1000)" in values["parts"]["1"]["stacks"]
    assert "world.sum(counts)" in values["parts"]["0"]["stacks"]
    assert values["why"].startswith("rank 1 (host ")
    assert ") after 5 steps in data; rank 0 (host " in values["why"]
    assert values["why"].endswith(") after 5 steps in counts")
    assert values["parts"]["0"]["collectives"], "the process groups' counts"
    assert sum("stood still" in error for error in errors) == 1


def test_a_rank_that_leaves_early_is_found(dataset, tmp_path):
    processes, _ = hang(dataset, tmp_path, "leave")
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert all(process.returncode not in (0, None) for process in processes), errors
    told = "\n".join(errors)
    assert "rank 1 (host " in told
    assert "after 5 steps in report" in told  # where the ranks' times are gathered
    assert "rank 0 (host " in told


@pytest.mark.long
def test_a_rank_that_holds_the_interpreters_lock_leaves_its_stacks(dataset, tmp_path):
    processes, run = hang(dataset, tmp_path, "locked")
    _, err = processes[0].communicate(timeout=120)
    assert processes[0].returncode == EXIT_REQUEUE, err
    assert processes[1].wait(timeout=10) == -signal.SIGKILL
    text, values = report_of(run)
    assert "rank 1, which does not answer but wrote its stacks:" in text
    assert "hang_process.py" in values["locked"]["1"]


# In this process

class Clock:
    """Polls that take as long as they should, at once."""

    def __init__(self, monkeypatch, on_poll):
        self.now, self.polls, self.on_poll = 0.0, 0, on_poll
        monkeypatch.setattr("gptdist.faults.watchdog.time.monotonic", lambda: self.now)

    def wait(self, seconds):
        self.now += seconds
        self.polls += 1
        assert self.polls < 1000
        return self.on_poll(self) is False

    is_set = set = staticmethod(lambda: None)


def ended_after(monkeypatch, tmp_path, on_poll, size=2):
    """Seconds on its clock after which a watchdog with a timeout of 100 s ends the process; None: it was over."""
    beat = Heartbeat()
    beat.start = "s"
    beat.open(tmp_path)
    beat.stepped_to(1)
    dog = Watchdog(beat, tmp_path, size, ExitRecord(tmp_path, 0), timeout_s=100, start_up_s=1000)
    dog._over = clock = Clock(monkeypatch, lambda clock: on_poll(clock, beat))
    monkeypatch.setattr(dog, "_arm", lambda limit_s: None)
    found = []

    class Ended(Exception):
        pass

    def end(still_s, others):
        found.append(clock.now)
        raise Ended

    monkeypatch.setattr(dog, "_end", end)
    try:
        dog._watch()
    except Ended:
        return found[0]
    return None


def other_rank(tmp_path, rank=1):
    beat = Heartbeat(rank)
    beat.start = "s"
    beat.open(tmp_path)
    return beat


def test_standing_still_is_told_after_the_timeout(monkeypatch, tmp_path):
    other_rank(tmp_path)
    assert 100 <= ended_after(monkeypatch, tmp_path, lambda clock, beat: None) <= 115


def test_a_rank_that_waits_for_one_that_works_is_no_hang(monkeypatch, tmp_path):
    other = other_rank(tmp_path)

    def save_for_long(clock, beat):
        other.save_phase("write")
        return clock.now < 1000

    assert ended_after(monkeypatch, tmp_path, save_for_long) is None


def test_own_progress_is_no_hang(monkeypatch, tmp_path):
    def ticks(clock, beat):
        if clock.polls % 10 == 0:
            beat.tick()
        return clock.now < 1000

    other_rank(tmp_path)
    assert ended_after(monkeypatch, tmp_path, ticks) is None


def test_time_in_which_the_process_was_suspended_does_not_count(monkeypatch, tmp_path):
    def suspended(clock, beat):
        if clock.polls == 3:
            clock.now += 100_000
        return clock.now < 100_080

    other_rank(tmp_path)
    assert ended_after(monkeypatch, tmp_path, suspended) is None


def test_before_the_first_step_the_start_up_limit_holds(monkeypatch, tmp_path):
    def not_stepped(clock, beat):
        beat.stepped = False

    other_rank(tmp_path)
    assert 1000 <= ended_after(monkeypatch, tmp_path, not_stepped) <= 1115


def test_what_another_rank_concluded_is_enough(monkeypatch, tmp_path):
    def told(clock, beat):
        if clock.polls == 2:
            (tmp_path / FOLDER / "part-s-1.json").write_text('{"rank": 1}')

    other_rank(tmp_path)
    assert 50 <= ended_after(monkeypatch, tmp_path, told) <= 65


def test_the_verdict_names_who_stands_out():
    def beat(rank, step, phase):
        return Beat(rank, "h", 10 + rank, 1, "s", 5, 5, step, phase, "")

    def part(rank, step, phase, phases):
        return {"rank": rank, "host": "h", "step": step, "phase": phase, "phases": phases, "saving": ""}

    beats = {rank: beat(rank, 12, "counts") for rank in range(4)} | {2: beat(2, 11, "data")}
    parts = {rank: part(rank, 12, "counts", 90) for rank in (0, 1, 3)}
    assert verdict(4, parts, beats, {2: "stopped by a signal (T)"}) == (
        "rank 2 (host h, pid 12) does not answer after 11 steps in data: stopped by a signal (T); ranks 0-1, 3 "
        "(host h) after 12 steps in counts")
    parts[2] = part(2, 11, "data", 80)
    assert verdict(4, parts, beats, {}).startswith("rank 2 (host h) after 11 steps in data; ranks 0-1, 3 (host h)")
    assert "rank 5 has no heartbeat" in verdict(6, parts, beats, {})
    assert _spans([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"


def test_heartbeats_are_read_back(tmp_path):
    beat = Heartbeat(3)
    beat.start = "abc"
    beat.step = 7
    beat.open(tmp_path)
    beat.enter("forward")
    beat.save_phase("write")
    path = tmp_path / FOLDER / "rank-3.json"
    assert path.stat().st_size == RECORD_BYTES
    read = read_beat(path)
    assert (read.rank, read.pid, read.start, read.step) == (3, os.getpid(), "abc", 7)
    assert (read.phase, read.saving) == ("forward", "write")
    assert read.born == born(os.getpid()) > 0
    assert set(read_beats(tmp_path, 4)) == {3}
    assert read_beats(tmp_path, 4, start="another") == {}
    beat.enter("x")
    beat.close()
    beat.enter("backward")  # it only counts
    assert (read_beat(path).phase, beat.count) == ("x", read_beat(path).beat + 1)
    (tmp_path / FOLDER / "locked-abc-0.txt").write_text("")
    clear(tmp_path, "abc")
    assert [path.name for path in (tmp_path / FOLDER).iterdir()] == ["locked-abc-0.txt"]


def test_a_heartbeat_that_cannot_be_written_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    (tmp_path / FOLDER).write_text("in the way")
    beat = Heartbeat()
    beat.open(tmp_path)
    beat.enter("forward")
    assert "no heartbeat in run.dir: " in capsys.readouterr().err
    (tmp_path / FOLDER).unlink()
    beat.open(tmp_path)
    monkeypatch.setattr(os, "pwrite", lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    beat.enter("forward")
    beat.enter("backward")
    assert capsys.readouterr().err.count("no heartbeat in run.dir: No space left on device") == 1


def test_positions_and_processes(tmp_path):
    for rank, phase in enumerate(["counts", "counts", "evaluate"]):
        beat = other_rank(tmp_path, rank)
        beat.step = 5
        beat.enter(phase)
    host = beat.host
    assert positions(tmp_path, 4, "s") == (f"rank 2 (host {host}) after 5 steps in evaluate; ranks 0-1 (host {host}) "
                                           f"after 5 steps in counts; rank 3 without a heartbeat")
    assert process_state(os.getpid(), born(os.getpid())).startswith("running (R")
    assert process_state(os.getpid(), 1) == "gone"
