"""How a start ends: its exit code, what it prints, and exit.json, whatever other starts left there."""

import json
import signal
import time

import pytest

from gptdist import config as config_module
from gptdist import train_command
from gptdist.checkpoint.store import _cause
from gptdist.errors import EXIT_REQUEUE, LockedError, UserError
from gptdist.faults import ExitRecord, lock_run_dir
from gptdist.parallel.world import init_world
from tests.conftest import start_ranks
from tests.training import tiny_config, train_rows


def read(run):
    return json.loads((run / "exit.json").read_text())


def train(run, *overrides, data="nowhere"):
    """The exit code of `gptdist train` in this process."""
    path = run.parent / "run.yaml"
    path.write_text(config_module.to_yaml(tiny_config(data, run)))
    with pytest.raises(SystemExit) as ended:
        train_command.train(str(path), list(overrides))
    return ended.value.code


def test_the_first_failure_of_a_start_stands(tmp_path):
    ranks = [ExitRecord(tmp_path, rank) for rank in range(3)]
    ranks[2].write(3, "no GPU here")  # before the ranks have met: known by its time
    assert ranks[0].failure()["rank"] == 2
    for rank in ranks:
        rank.agree("a")
    assert ranks[0].failure() is None
    ranks[1].write(2, "bad token")
    ranks[0].write(1, "connection closed")
    assert (read(tmp_path)["code"], read(tmp_path)["rank"]) == (2, 1)


def test_what_other_starts_left_is_neither_read_nor_kept(tmp_path):
    ExitRecord(tmp_path, 0).write(2, "an earlier failure")
    run = ExitRecord(tmp_path, 0)
    assert run.failure() is None
    run.agree("a")
    ExitRecord(tmp_path, 0).write(2, "of a start beside it")
    assert run.failure() is None
    run.write(0, "")
    assert read(tmp_path)["code"] == 0
    (tmp_path / "exit.json").write_text("[]")
    assert run.failure() is None


def test_a_record_that_cannot_be_written_is_told_only_if_nothing_else_was(tmp_path, capsys):
    (tmp_path / "run").write_text("a file in the way")
    ExitRecord(tmp_path / "run", 0).write(2, "cannot write to run.dir")
    assert capsys.readouterr().err == ""
    ExitRecord(tmp_path / "run", 0).write(0, "")
    assert "exit.json: File exists" in capsys.readouterr().err


def test_a_stale_record_hides_no_new_failure(tmp_path, monkeypatch, capsys):
    assert train(tmp_path / "run") == 2
    assert read(tmp_path / "run")["code"] == 2

    def bug(config):
        raise KeyError("a bug before the run directory is opened")

    monkeypatch.setattr(train_command, "init_world", bug)
    capsys.readouterr()
    assert train(tmp_path / "run") == 1
    assert "KeyError: 'a bug before" in capsys.readouterr().err
    assert (read(tmp_path / "run")["code"], "a bug" in read(tmp_path / "run")["message"]) == (1, True)


def test_a_refused_second_start_leaves_the_record_alone(dataset, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    with lock_run_dir(run):
        assert train(run, data=dataset) == 2
    assert "another process is training in run.dir" in capsys.readouterr().err
    assert not (run / "exit.json").exists()


def test_a_file_in_place_of_the_run_directory(dataset, tmp_path, capsys):
    (tmp_path / "run").write_text("a file in the way")
    assert train(tmp_path / "run", data=dataset) == 2
    assert "it is a file" in capsys.readouterr().err


def test_the_cause_on_another_rank_is_named(tmp_path, monkeypatch, capsys):
    def lost(config, world, beat):
        other = ExitRecord(tmp_path / "run", 1)
        other.agree("a")
        other.write(2, "bad token")
        raise RuntimeError("gloo: Connection closed by peer")

    monkeypatch.setattr(train_command, "Trainer", lost)
    monkeypatch.setattr(train_command.secrets, "token_hex", lambda n: "a")
    assert train(tmp_path / "run") == 2
    assert capsys.readouterr().err == "gptdist train: stopped, because rank 1 failed: bad token\n"


def test_errors_that_all_ranks_share_are_agreed(tmp_path, monkeypatch):
    from torch.distributed.checkpoint.api import CheckpointException

    monkeypatch.setenv("WORLD_SIZE", "3")
    for overrides in (["--parallel.strategy=single"], ["--parallel.strategy=fsdp", "--parallel.tensor=2"]):
        with pytest.raises(UserError) as caught:
            init_world(tiny_config(tmp_path, tmp_path, *overrides).parallel)
        assert caught.value.agreed
    failures = {0: (UserError("No space left"), None)}
    assert _cause(CheckpointException("write", failures)).agreed


def test_the_lock_says_which_kind_of_error_it_is(tmp_path):
    with lock_run_dir(tmp_path), pytest.raises(LockedError), lock_run_dir(tmp_path):
        pass


def test_a_killed_rank_asks_for_a_new_start(dataset, tmp_path):
    """Rank 1 is killed with -9; rank 0 says so in one line, and that the run can go on."""
    path = tmp_path / "run.yaml"
    path.write_text(config_module.to_yaml(tiny_config(dataset, tmp_path / "run", "--train.steps=100000")))
    processes = start_ranks("-m", "gptdist", "train", str(path))
    metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and len(train_rows(tmp_path / "run")) >= 3):
        assert processes[0].poll() is None, processes[0].stderr.read()
        assert time.monotonic() < deadline, "the run makes no progress"
        time.sleep(0.02)
    processes[1].kill()
    _, err = processes[0].communicate(timeout=60)
    assert processes[1].wait() == -signal.SIGKILL
    assert processes[0].returncode == EXIT_REQUEUE, err
    assert err.endswith(f"gptdist train [rank 0]: {train_command.LOST_RANK}\n"), err
    assert "Traceback" not in err
    assert read(tmp_path / "run")["code"] == EXIT_REQUEUE
