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
from gptdist.plan.allocations import RUNS
from gptdist.plan.devices import Device
from gptdist.plan.shapes import Layout, Step
from gptdist.plan.sizes import Sizes

PROCESS_BYTES = {"cuda": 0.0, "cpu": 45e6}  # fitted to single-fp32; CUDA's context: see devices.py
FRAGMENTATION = 0.05  # of what a GPU's step allocates and frees
PARTS = ("weights", "optimizer", "gradients", "activations", "logits", "gathered", "buffers", "process",
         "fragmentation")
MEASURED = "single and fsdp on a CPU, fp32, no recomputation: one run of each, 2 and 6% off"
NOT_MEASURED = "ddp, hsdp, zero1 to zero3, tensor parallelism, bf16, recomputation, offload, Muon, any GPU"


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
    found = RUNS[sizes.strategy](sizes).play().parts | {"process": PROCESS_BYTES[device.kind]}
    if not sizes.on_cpu:
        stay = ("weights", "optimizer", "process")
        found["fragmentation"] = FRAGMENTATION * sum(size for part, size in found.items() if part not in stay)
    return Memory({part: found.get(part, 0.0) for part in PARTS}, device.memory, _measured(sizes))


def _measured(s: Sizes) -> bool:
    plain = not s.bf16 and s.layout.tensor == 1 and not s.config.train.checkpoint_every_block
    usual = s.config.optim.name == "adamw" and not s.config.lora.rank and s.config.task.freeze == "none"
    return s.on_cpu and s.strategy in ("single", "fsdp") and plain and usual
