"""Memory of one process, part by part, at the moment of a run when it holds most.

    weights, gradients, optimizer, activations, logits, gathered, buffers: see allocations.py
    process        CUDA's context and libraries; on a CPU what the process touches first in a run
    fragmentation  freed memory that the next allocation does not fit into: on a CPU by heap.py, on a GPU a share

The moment is found by going through a run's allocations in their order. On a CPU what counts is the resident memory of
the process above that after its imports.

Measured: what MEASURED says, in benchmarks/results/plan.md. Everything else follows by the same reasoning alone.
"""

from dataclasses import dataclass

from gptdist.config import Config
from gptdist.plan.allocations import DDP, FSDP, Single
from gptdist.plan.allocations_zero import ZeRO, ZeRO3
from gptdist.plan.devices import Device
from gptdist.plan.heap import Process
from gptdist.plan.shapes import Layout, Step
from gptdist.plan.sizes import Sizes

RUNS = {"single": Single, "ddp": DDP, "fsdp": FSDP, "hsdp": FSDP, "zero1": ZeRO, "zero2": ZeRO, "zero3": ZeRO3}
PROCESS_BYTES = {"cuda": 0.0, "cpu": 25e6}  # fitted to single-fp32; CUDA's context: see devices.py
SEEDS = 12  # of a heap: heap.py
FRAGMENTATION = 0.05  # of what a GPU's step allocates and frees
PARTS = ("weights", "optimizer", "gradients", "activations", "logits", "gathered", "buffers", "process",
         "fragmentation")
MEASURED = ("on a CPU with AdamW, every strategy in fp32, bf16 of single, fsdp and zero2 with offload, LoRA in one "
            "process: within 10%, but fsdp with more blocks 22% too low")
NOT_MEASURED = "Muon, task.freeze, bf16 of other strategies, any GPU"
# Strategy and precision of the runs on a CPU; with them recomputation in bf16, tensor parallelism and zero3's offload.
MEASURED_KINDS = {*((name, "fp32") for name in RUNS), ("single", "bf16"), ("fsdp", "bf16")}


@dataclass(frozen=True)
class Memory:
    """Bytes by part, and in all, of the process that has most."""

    parts: dict[str, float]
    capacity: float
    measured: bool  # if a run of this kind was measured: see MEASURED

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        return self.total <= self.capacity


def memory_of(config: Config, layout: Layout, step: Step, device: Device) -> Memory:
    """The parts at the moment that needs most; fragmentation is what a process holds beyond them."""
    sizes = Sizes(config, layout, step, device)
    found = _largest(sizes).parts | {"process": PROCESS_BYTES[device.kind]}
    if not sizes.on_cpu:
        stay = ("weights", "optimizer", "process")
        found["fragmentation"] = FRAGMENTATION * sum(size for part, size in found.items() if part not in stay)
    return Memory({part: found.get(part, 0.0) for part in PARTS}, device.memory, _measured(sizes))


def _largest(sizes: Sizes) -> Process:
    """The largest of a run's processes, of which heaps make something else each: of k it is expected at the quantile
    k / (k + 1)."""
    if not sizes.on_cpu:
        return RUNS[sizes.strategy](sizes).play()
    drawn = sorted((RUNS[sizes.strategy](sizes, seed).play() for seed in range(SEEDS)), key=lambda run: run.peak)
    k = sizes.layout.size
    return drawn[round((SEEDS - 1) * k / (k + 1))]


def _measured(s: Sizes) -> bool:
    config, kind = s.config, (s.strategy, s.config.train.precision)
    known = kind in MEASURED_KINDS or (kind == ("zero2", "bf16") and config.parallel.offload_optimizer)
    usual = config.optim.name == "adamw" and config.task.freeze == "none"
    return s.on_cpu and known and usual and (config.lora.rank == 0 or s.strategy == "single")
