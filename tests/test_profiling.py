"""Traces and memory of chosen steps: they are there, and the run computes what it would without them."""

import json

import pytest
import torch

from gptdist.config import ProfileConfig
from gptdist.errors import UserError
from gptdist.profiling import CPU_NOTE, StepProfiler
from tests.training import run_tiny, tiny_config


def figures(rows):
    return [(row["step"], row["loss"], row["grad_norm"], row["data_hash"]) for row in rows]


def test_a_profiled_run_computes_the_same(dataset, tmp_path):
    plain = run_tiny(dataset, tmp_path / "plain", "--train.steps=6")
    profiled = run_tiny(dataset, tmp_path / "profiled", "--train.steps=6", "--profile.steps=[3, 4]",
                        "--profile.memory=true")
    assert figures(profiled) == figures(plain)
    assert not (tmp_path / "plain" / "profile").exists()
    names = sorted(path.name for path in (tmp_path / "profiled" / "profile").iterdir())
    assert names == ["rank00000-steps3-4.memory.txt", "rank00000-steps3-4.trace.json"]
    trace = json.loads((tmp_path / "profiled" / "profile" / names[1]).read_text())
    steps = [event for event in trace["traceEvents"] if event.get("name", "").startswith("Optimizer.step")]
    assert len(steps) == 2
    assert any("Input Dims" in event.get("args", {}) for event in trace["traceEvents"])
    memory = (tmp_path / "profiled" / "profile" / names[0]).read_text()
    assert memory.startswith(CPU_NOTE)
    assert "Self CPU Mem" in memory


def test_a_run_that_ends_first_is_profiled_as_far_as_it_goes(dataset, tmp_path):
    run_tiny(dataset, tmp_path, "--train.steps=4", "--profile.steps=[4, 9]")
    assert [path.name for path in (tmp_path / "profile").iterdir()] == ["rank00000-steps4-4.trace.json"]


def test_other_ranks_and_steps_are_not(tmp_path):
    for config, rank in ((ProfileConfig(steps=[1, 2]), 1), (ProfileConfig(), 0)):
        profiler = StepProfiler(config, tmp_path, rank, torch.device("cpu"))
        for step in (1, 2, 3):
            profiler.before(step)
            assert profiler.after(step) == []
        assert profiler.finish(3) == []
    assert list(tmp_path.iterdir()) == []


def test_cuda_keeps_the_history_of_allocations(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda *args, **kwargs: calls.append(kwargs))
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: calls.append(path))
    profiler = StepProfiler(ProfileConfig(steps=[5, 5], memory=True), tmp_path, 0, torch.device("cuda", 0))
    profiler.before(5)
    files = profiler.after(5)
    snapshot = tmp_path / "profile" / "rank00000-steps5-5.memory.pickle"
    assert files[1] == snapshot
    assert calls == [{"max_entries": 200_000}, str(snapshot), {"enabled": None}]


def test_a_trace_that_cannot_be_written_is_the_users_error(tmp_path):
    (tmp_path / "profile").write_text("in the way")
    profiler = StepProfiler(ProfileConfig(steps=[1, 1]), tmp_path, 0, torch.device("cpu"))
    profiler.before(1)
    with pytest.raises(UserError, match=r"cannot write to .*profile: File exists: make room, or unset profile\.steps"):
        profiler.after(1)


@pytest.mark.parametrize("option", ["--profile.steps=[3]", "--profile.steps=[0, 1]", "--profile.steps=[5, 4]",
                                    "--profile.ranks=[-1]", "--profile.memory=true"])
def test_impossible_values_are_named(option, tmp_path):
    with pytest.raises(UserError, match=r"profile\.(steps|ranks|memory)"):
        tiny_config(tmp_path, tmp_path, option)
