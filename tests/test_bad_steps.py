"""Steps that are not taken: skipped, gone back from, or the end; the same under every strategy and after a resume."""

import math

import pytest

from gptdist.checkpoint import layout
from gptdist.config import TrainConfig
from gptdist.errors import UserError
from gptdist.faults.bad_steps import NOT_FINITE, SPIKE, describe_nonfinite, fault_of, remember
from gptdist.metrics import read_rows
from gptdist.parallel.replicas import describe
from tests.faults_worker import (
    BAD_SAMPLE,
    REPLICAS,
    RESUMED,
    REWIND,
    SPIKES,
    STRATEGIES,
    poisoned,
    run_poisoned,
)
from tests.training import assert_same_curve, run_tiny, tiny_config, train_rows


def all_rows(run):
    """What a run did, without what depends on the clock."""
    names = ("kind", "step", "loss", "grad_norm", "data_hash", "skipped", "from_step", "samples_left_out", "reason")
    return [{name: row[name] for name in names if name in row} for row in read_rows(run / "metrics.jsonl")
            if row["kind"] in ("train", "rewind")]


# What a spike is

@pytest.mark.parametrize(("loss", "norm", "fault"), [
    (2.0, 1.0, None), (3.4, 1.0, None), (3.6, 1.0, SPIKE), (2.0, 3.9, None), (2.0, 4.1, SPIKE),
    (math.nan, 1.0, NOT_FINITE), (2.0, math.inf, NOT_FINITE)])
def test_faults(loss, norm, fault):
    config = TrainConfig(spike_loss=1.5, spike_norm=4.0, spike_window=3)
    recent = [[1.0, 0.5], [2.0, 1.0], [9.0, 9.0]]
    assert fault_of(loss, norm, recent, config) == fault
    always = fault if fault == NOT_FINITE else None
    assert fault_of(loss, norm, recent[:2], config) == always, "the window is not full"
    assert fault_of(loss, norm, recent, TrainConfig()) == always, "it is off"


def test_only_the_last_steps_taken_are_remembered():
    config = TrainConfig(spike_loss=1.0, spike_window=2)
    recent = []
    for i in range(4):
        recent = remember(recent, float(i), 1.0, config)
    assert recent == [[2.0, 1.0], [3.0, 1.0]]
    assert remember([], 1.0, 1.0, TrainConfig()) == []


def test_the_message_names_rank_and_parameter():
    everyone = [("a", True, ["fc", "wte"], []), ("b", False, ["fc"], [])]
    assert describe_nonfinite(math.nan, math.nan, everyone, ["wte", "fc", "head"]) == (
        "the gradient is not finite (norm nan, loss nan): the loss of rank 1 (host b) is not; of 3 parameters 2 have "
        "such gradients, the nearest to the loss is fc")
    everyone = [("a", True, ["wte"], ["head", "fc"])]
    assert "every rank's own loss is finite; 2 weights are not, the first is fc" in describe_nonfinite(
        1.0, math.inf, everyone, ["wte", "fc", "head"])


# One process

def test_a_spike_is_skipped_and_a_resumed_run_judges_alike(dataset, tmp_path, capsys):
    run_poisoned(dataset, tmp_path / "straight", *SPIKES, factor=100.0)
    assert "step 7: a spike: loss " in capsys.readouterr().out
    rows = all_rows(tmp_path / "straight")
    assert [row["step"] for row in rows if "skipped" in row] == [7]
    for stop in ("--train.stop_at=6", "--train.stop_at=9"):
        run_poisoned(dataset, tmp_path / "resumed", *SPIKES, stop, factor=100.0)
    assert all_rows(tmp_path / "resumed") == rows
    state = layout.read_train_state(layout.latest(tmp_path / "resumed" / "checkpoints"))
    assert len(state["recent"]) == 4
    plain = run_tiny(dataset, tmp_path / "plain", *SPIKES)
    assert plain[5]["loss"] == rows[5]["loss"]
    assert plain[7]["loss"] != rows[7]["loss"], "the seventh step was taken"


def test_a_run_without_bad_steps_has_the_train_state_it_always_had(dataset, tmp_path):
    run_tiny(dataset, tmp_path / "run", "--train.stop_at=1")
    state = layout.read_train_state(layout.latest(tmp_path / "run" / "checkpoints"))
    assert set(state) == {"step", "next_sample", "tokens", "val_loss", "best_val_loss", "dataset", "format"}


def test_stop_says_where(dataset, tmp_path):
    trainer = poisoned(tiny_config(dataset, tmp_path / "run", "--train.on_nonfinite=stop"), BAD_SAMPLE)
    with pytest.raises(UserError, match=r"step 7: the gradient is not finite \(norm nan, loss nan\): the loss of rank "
                                        r"0 \(host .*\) is not; of 28 parameters 28 have such gradients, the nearest "
                                        r"to the loss is ln_f\.bias; train\.on_nonfinite=stop"):
        trainer.run()


def test_rewinding_without_end_stops(dataset, tmp_path, monkeypatch):
    config = tiny_config(dataset, tmp_path / "run", "--train.on_nonfinite=rewind", "--checkpoint.every=2",
                         "--train.max_bad_steps=3")
    trainer = poisoned(config, BAD_SAMPLE)
    loss = trainer.task.loss
    monkeypatch.setattr(trainer.task, "loss", lambda strategy, batch, key: loss(strategy, batch, key) * (
        1 if batch.sample_ids.max() < BAD_SAMPLE else math.nan))
    with pytest.raises(UserError, match=r"step 7 is no good .* after the run went back to .*step-00000006 3 times"):
        trainer.run()


def test_there_has_to_be_a_checkpoint_to_go_back_to(dataset, tmp_path):
    config = tiny_config(dataset, tmp_path / "run", "--train.on_nonfinite=rewind", "--checkpoint.every=10")
    with pytest.raises(UserError, match=r"step 7 is no good .* there is no checkpoint to go back to"):
        poisoned(config, BAD_SAMPLE).run()


def test_a_damaged_checkpoint_is_not_gone_back_to(dataset, tmp_path, capsys):
    """The newest one is altered after it was saved: the run goes back to the one before it."""
    trainer = poisoned(tiny_config(dataset, tmp_path / "run", "--train.on_nonfinite=rewind", "--checkpoint.every=2",
                                   "--train.steps=9", "--eval.every=0"), BAD_SAMPLE)
    step = trainer._step

    def spoil(batch):
        if batch.step == 6 and not list(trainer.root.glob("damaged-*")):
            trainer.saver.wait()
            shard = trainer.root / "step-00000006" / "shard-00000.safetensors"
            data = bytearray(shard.read_bytes())
            data[-1] ^= 1
            shard.write_bytes(data)
        return step(batch)

    trainer._step = spoil
    assert trainer.run() == 0
    said = capsys.readouterr().out
    assert "damaged checkpoint moved to" in said
    assert "shard-00000.safetensors: its checksum is wrong" in said
    assert "back from step 7 to step-00000004; samples 44 to 76 are left out" in said


@pytest.mark.parametrize(("overrides", "message"), [
    (["--train.on_nonfinite=rewind", "--checkpoint.every=0"], "leaves nothing to go back to"),
    (["--train.spike_norm=0.5"], r"train\.spike_norm is 0\.5, expected 0 \(off\) or more than 1"),
    (["--train.spike_loss=-1"], r"train\.spike_loss is -1\.0, expected 0"),
    (["--train.spike_window=0"], r"train\.spike_window is 0, expected at least 1"),
    (["--run.hang_timeout_s=-1"], r"run\.hang_timeout_s is -1\.0, expected 0"),
])
def test_settings_that_cannot_be(dataset, tmp_path, overrides, message):
    with pytest.raises(UserError, match=message):
        tiny_config(dataset, tmp_path, *overrides)


# Two processes

@pytest.fixture(scope="module")
def fault_runs(dataset, two_processes, tmp_path_factory):
    """The directory with the runs of tests/faults_worker.py."""
    out = tmp_path_factory.mktemp("faults")
    two_processes.run("tests.faults_worker", dataset, out)
    return out


@pytest.fixture(scope="module")
def single(dataset, tmp_path_factory):
    run = tmp_path_factory.mktemp("single") / "run"
    run_poisoned(dataset, run, *REWIND)
    return run


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_goes_back_alike(fault_runs, single, strategy):
    run = fault_runs / f"rewind-{strategy}"
    assert_same_curve(train_rows(run), train_rows(single))
    [back] = [row for row in all_rows(run) if row["kind"] == "rewind"]
    assert (back["step"], back["from_step"], back["samples_left_out"], back["reason"]) == (6, 7, [55, 77], NOT_FINITE)
    assert layout.read_train_state(layout.latest(run / "checkpoints"))["left_out"] == [[55, 77]]


def test_going_back_skips_the_samples_since_the_checkpoint(single, dataset, tmp_path):
    """As a run whose data.skip leaves them out."""
    skipping = run_tiny(dataset, tmp_path / "run", *REWIND, "--data.skip=[[55,77]]")
    assert [row["loss"] for row in train_rows(single)] == [row["loss"] for row in skipping]


@pytest.mark.parametrize("strategy", RESUMED)
def test_a_resumed_run_goes_back_alike(fault_runs, strategy):
    assert all_rows(fault_runs / f"resumed-{strategy}") == all_rows(fault_runs / f"rewind-{strategy}")


def test_a_spike_is_the_same_on_two_processes(fault_runs, dataset, tmp_path):
    run_poisoned(dataset, tmp_path / "run", *SPIKES, factor=100.0)
    runs = fault_runs / "spike", tmp_path / "run"
    taken = [[row for row in train_rows(run) if "skipped" not in row] for run in runs]
    assert [row["step"] for row in taken[0]] == [1, 2, 3, 4, 5, 6, 8, 9]
    assert_same_curve(*taken)


@pytest.mark.parametrize(("strategy", "key"), REPLICAS.items())
def test_replicas_that_differ_are_named(fault_runs, strategy, key):
    """A bit flipped on rank 1 after step 6, of the weights or of a moment: found, and nothing is saved any more."""
    said = [(fault_runs / f"replica-{strategy}-{rank}.txt").read_text() for rank in range(2)]
    assert said[0] == said[1]
    assert "after step 6 rank 0 (host " in said[0]
    assert "), rank 1 (host " in said[0]
    assert f"do not agree in {key} (1 of " in said[0]
    assert [p.name for p in (fault_runs / f"replica-{strategy}" / "checkpoints").iterdir()] == ["step-00000003"]


def test_the_odd_one_out_is_named():
    everyone = [(0, "a", [1, 5]), (1, "a", [1, 6]), (2, "b", [1, 5])]
    assert describe(["w", "v"], everyone) == ("rank 1 (host a) differs from the other ranks in v (1 of 2 tensors are "
                                              "not the same)")


def test_a_disk_full_on_another_rank_costs_one_checkpoint(fault_runs):
    complete, incomplete = layout.scan(fault_runs / "disk" / "checkpoints")
    assert not incomplete
    assert [path.name for path in complete] == ["step-00000010", "step-00000012"]
    assert not list((fault_runs / "disk" / "checkpoints").glob(".tmp-*"))
    for path in complete:
        layout.verify(path)
