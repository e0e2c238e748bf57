"""A trace and the memory of chosen steps (profile.*): what runs when, and what holds memory. It changes no result.

    RUN_DIR/profile/rank00000-steps10-12.trace.json      torch.profiler's, for chrome://tracing or ui.perfetto.dev
    RUN_DIR/profile/rank00000-steps10-12.memory.pickle   CUDA: every allocation, for pytorch.org/memory_viz
    RUN_DIR/profile/rank00000-steps10-12.memory.txt      CPU: the operations by the memory that they allocate
"""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from gptdist.config import ProfileConfig
from gptdist.errors import UserError

MEMORY_ENTRIES = 200_000  # allocations and frees that a CUDA snapshot goes back
CPU_NOTE = ("torch keeps a history of allocations (a memory snapshot) for CUDA alone. This is what the profiler saw "
            "operations allocate on the CPU, less what they freed.")


class StepProfiler:
    """Profiles the steps profile.steps of this rank, if it is one of profile.ranks."""

    def __init__(self, config: ProfileConfig, run_dir: Path, rank: int, device: torch.device):
        self._config, self._device = config, device
        self._folder = run_dir / "profile"
        chosen = config.steps and rank in config.ranks
        self._steps = range(config.steps[0], config.steps[1] + 1) if chosen else range(0)
        self._rank, self._begun = rank, 0
        self._profile: profile | None = None

    def before(self, step: int) -> None:
        """Called before step number `step`, the first being 1."""
        if self._profile is not None or step not in self._steps:
            return
        on_gpu = self._device.type == "cuda"
        if self._config.memory and on_gpu:
            torch.cuda.memory._record_memory_history(max_entries=MEMORY_ENTRIES)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        self._profile = profile(activities=activities, record_shapes=True, profile_memory=self._config.memory)
        self._begun = step
        self._profile.start()

    def after(self, step: int) -> list[Path]:
        """Called after step `step`; the files written, if it was the last to be profiled."""
        if self._profile is None or step != self._steps[-1]:
            return []
        return self.finish(step)

    def finish(self, step: int) -> list[Path]:
        """Write what was profiled up to step `step`, in a run that ends before profile.steps do."""
        if self._profile is None:
            return []
        done, self._profile = self._profile, None
        done.stop()
        stem = self._folder / f"rank{self._rank:05d}-steps{self._begun}-{step}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            files = [stem.with_name(f"{stem.name}.trace.json")]
            done.export_chrome_trace(str(files[0]))
            if self._config.memory:
                files.append(self._write_memory(done, stem))
        except OSError as error:
            raise UserError(f"cannot write to {self._folder}: {error.strerror or error}: make room, or unset "
                            f"profile.steps") from error
        return files

    def _write_memory(self, done: profile, stem: Path) -> Path:
        if self._device.type == "cuda":
            path = stem.with_name(f"{stem.name}.memory.pickle")
            torch.cuda.memory._dump_snapshot(str(path))
            torch.cuda.memory._record_memory_history(enabled=None)
            return path
        path = stem.with_name(f"{stem.name}.memory.txt")
        table = done.key_averages(group_by_input_shape=True).table(sort_by="self_cpu_memory_usage", row_limit=100)
        path.write_text(f"{CPU_NOTE}\n\n{table}\n")
        return path
