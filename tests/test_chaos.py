"""Ranks killed with -9 in every phase: the job restarts, and ends as if nothing had happened."""

import math

import pytest

from benchmarks import chaos
from tests.chaos_worker import KILLS, ForkedTorchrun
from tests.training import run_tiny


def assert_survived(outcome: chaos.Outcome, kills: int) -> None:
    assert outcome.faults == []
    hits = [kill.hit for kill in outcome.kills]
    assert len(hits) >= kills
    for phase in chaos.PHASES:
        assert hits.count(phase) >= kills // len(chaos.PHASES), f"{phase} was not hit: {hits}"
    assert outcome.restarts == len(outcome.kills)
    # A save begins when the one before it is complete, so that at most two intervals are lost.
    assert max(kill.lost for kill in outcome.kills) <= 2 * chaos.SAVE_EVERY


@pytest.fixture(scope="module")
def undisturbed(two_processes, dataset, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    two_processes.run("tests.chaos_worker", dataset, out)
    return out


@pytest.mark.parametrize("strategy", chaos.STRATEGIES)
def test_kills_in_each_phase_change_nothing(strategy, undisturbed, dataset, tmp_path):
    """20 in all."""
    outcome = chaos.run(strategy, dataset, tmp_path, kills=KILLS, seed=chaos.STRATEGIES.index(strategy),
                        reference=undisturbed / f"{strategy}-undisturbed", launcher=ForkedTorchrun)
    print(chaos.table([outcome]))
    assert_survived(outcome, KILLS)
    assert all(kill.resume_s > 0 or math.isnan(kill.resume_s) for kill in outcome.kills)


@pytest.mark.long
@pytest.mark.parametrize("strategy", chaos.STRATEGIES)
def test_twenty_kills_change_nothing(strategy, dataset, tmp_path):
    pytest.importorskip("deepspeed", reason="pip install --no-build-isolation deepspeed")
    assert_survived(chaos.run(strategy, dataset, tmp_path, kills=20, seed=1), 20)


def test_what_differs_is_found(dataset, tmp_path):
    """The comparison can fail: with a run that ended earlier, and with another one."""
    for name, options in {"run": [], "short": ["--train.stop_at=1"], "other": ["--optim.lr=2e-3"]}.items():
        run_tiny(dataset, tmp_path / name, "--train.stop_at=2", *options)
    found = list(chaos.differences(tmp_path / "run", tmp_path / "short"))
    assert len(found) == 1
    assert "the last checkpoint is" in found[0]
    found = list(chaos.differences(tmp_path / "run", tmp_path / "other"))
    assert any("differs by" in one for one in found)
    assert "the rows of metrics.jsonl differ" in found
    assert list(chaos.differences(tmp_path / "run", tmp_path / "run")) == []
