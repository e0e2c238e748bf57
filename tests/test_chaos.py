"""Ranks killed with -9 in every phase: the job restarts, and ends as if nothing had happened."""

import math

import pytest

from benchmarks import chaos
from tests.faults_worker import KILLS


def assert_survived(outcome: chaos.Outcome, kills: int) -> None:
    assert outcome.faults == []
    hits = [kill.hit for kill in outcome.kills]
    assert len(hits) >= kills
    for phase in chaos.PHASES:
        assert hits.count(phase) >= kills // len(chaos.PHASES), f"{phase} was not hit: {hits}"
    assert outcome.restarts == len(outcome.kills)
    # A save begins when the one before it is complete, so that at most two intervals are lost.
    assert max(kill.lost for kill in outcome.kills) <= 2 * chaos.SAVE_EVERY


def test_a_kill_in_each_phase_changes_nothing(fault_runs, dataset, tmp_path):
    outcome = chaos.run("fsdp", dataset, tmp_path, kills=KILLS, reference=fault_runs / "chaos")
    assert_survived(outcome, KILLS)
    assert all(kill.resume_s > 0 or math.isnan(kill.resume_s) for kill in outcome.kills)


@pytest.mark.long
@pytest.mark.parametrize("strategy", chaos.STRATEGIES)
def test_twenty_kills_change_nothing(strategy, dataset, tmp_path):
    pytest.importorskip("deepspeed", reason="pip install --no-build-isolation deepspeed")
    assert_survived(chaos.run(strategy, dataset, tmp_path, kills=20, seed=1), 20)


def test_what_differs_is_found(fault_runs, tmp_path):
    """The comparison can fail: with another run, and with one that ended earlier."""
    found = list(chaos.differences(fault_runs / "chaos", fault_runs / "rewind-fsdp"))
    assert len(found) == 1
    assert "the last checkpoint is" in found[0]
    found = list(chaos.differences(fault_runs / "rewind-fsdp", fault_runs / "rewind-zero1"))
    assert any("differs by" in one for one in found) or "the rows of metrics.jsonl differ" in found
