"""How long a step takes: work over achieved rates, and communication that the work does not hide.

    products    FLOPs of matrix products / (EFFICIENCY.products x peak)
    attention   FLOPs of the causal triangle / (EFFICIENCY.attention x peak)
    memory      bytes of everything elementwise / (EFFICIENCY.bandwidth x bandwidth), the optimizer's step besides
    a collective of n bytes over g ranks: n (g - 1) / g over the slowest link on its ring (an all-reduce twice), and
                HOP_S for each step between nodes, HOP_NODE_S inside one

Traffic says which of a strategy's collectives run beside which work. The constants of EFFICIENCY are fitted to named
published runs, others are held out: benchmarks/plan_published.py, benchmarks/results/plan.md.
Source of the ring's cost: Thakur, Rabenseifner, Gropp, "Optimization of collective communication operations in MPICH"
(2005), section 4; of what each strategy sends: Rajbhandari et al., "ZeRO" (2020), section 7; Korthikanti et al. (2022).
"""

import math
from dataclasses import dataclass

from gptdist.config import Config
from gptdist.plan.devices import Device
from gptdist.plan.shapes import Layout, Parameters, Step, flops_of, strategy_of

HOP_S, HOP_NODE_S = 4e-6, 1e-6  # latency of a ring's step between nodes and inside one
# Bytes an eager block reads and writes outside its products and attention, forward and backward, in values per token:
# norms, bias and GELU, residual sums, what products read and write. (27 forward, twice that backward.)
ELEMENTWISE_VALUES = 81
LAUNCH_S = 5e-4  # assumed: what it takes to start the hundred or so kernels of an eager block, forward and backward
OPTIMIZER_BYTES = 30  # a step of AdamW: 16 read, 12 written, and the copy in 16 bits


@dataclass(frozen=True)
class Efficiency:
    """Shares of the data sheets' rates that runs reach."""

    products: float
    attention: float
    bandwidth: float
    links: float
    hidden: float = 0.9  # of the shorter of work and communication, where they overlap


# Fitted in benchmarks/plan_published.py. Newer devices reach less of a peak that grew faster than their memory.
EFFICIENCY = {
    "a100": Efficiency(products=0.84, attention=0.30, bandwidth=0.30, links=0.75),
    "h100": Efficiency(products=0.68, attention=0.20, bandwidth=0.30, links=0.75),
}


def efficiency_of(device: Device) -> Efficiency:
    """Of the device's generation; that of the newest which published runs are known for, where there are none."""
    return EFFICIENCY["a100" if device.name.startswith(("a100", "cpu")) else "h100"]


@dataclass(frozen=True)
class Collective:
    """`times` messages of `n_bytes` in all, over `ranks` of which `in_node` are on a node."""

    name: str
    n_bytes: float
    times: int
    ranks: int
    in_node: int
    passes: int = 1  # 2: an all-reduce

    @property
    def sent(self) -> float:
        """Bytes that a rank sends."""
        return self.passes * self.n_bytes * (self.ranks - 1) / self.ranks if self.ranks > 1 else 0.0

    def seconds(self, device: Device, links: float) -> float:
        if self.ranks == 1:
            return 0.0
        nodes = -(-self.ranks // self.in_node)
        # Each device of a node has its own link to the others, and a group uses those of all its ranks at once.
        rate = device.intra if nodes == 1 else min(device.intra, device.inter * self.in_node)
        hops = (nodes - 1) * HOP_S + (self.ranks - nodes) * HOP_NODE_S
        return self.sent / (rate * links) + self.passes * self.times * hops


@dataclass(frozen=True)
class Traffic:
    """A step's collectives, by what they can run beside."""

    beside_micro_batch: list[Collective]  # in every micro-batch, beside its forward and backward
    beside_last_backward: list[Collective]  # once, beside the last backward
    alone: list[Collective]  # once, nothing beside it
    in_micro_batch: list[Collective]  # in every micro-batch, and the work waits: tensor parallelism

    def all(self, count: int) -> list[tuple[Collective, int]]:
        """(collective, how many times a step)."""
        per_micro_batch = [(c, count) for c in (*self.beside_micro_batch, *self.in_micro_batch)]
        return per_micro_batch + [(c, 1) for c in (*self.beside_last_backward, *self.alone)]


def traffic_of(config: Config, layout: Layout, step: Step) -> Traffic:
    """What the strategy's ranks send in a step."""
    strategy, m, t = strategy_of(config, layout.size), config.model, layout.tensor
    n = Parameters(m, t)
    a = 2 if config.train.precision == "bf16" else 4
    blocks = m.n_layers + 1
    per_node = min(layout.per_node, layout.size)

    def over(ranks: int, stride: int) -> int:
        """Of `ranks` that lie `stride` apart, those on a node."""
        return max(1, min(ranks, per_node // stride))

    shards, in_node = layout.shards, over(layout.shards, t)
    gather = Collective("gather weights", a * n.total, blocks, shards, in_node)
    scatter = Collective("reduce-scatter gradients", 4 * n.total, blocks, shards, in_node)
    beside, last, alone, waiting = [], [], [], []
    if strategy == "ddp":
        buckets = max(1, math.ceil(4 * n.total / 25e6))
        last.append(Collective("all-reduce gradients", 4 * n.total, buckets, layout.size, per_node, passes=2))
    elif strategy in ("fsdp", "hsdp"):
        beside = [gather, gather, scatter] if config.parallel.reshard_after_forward else [gather, scatter]
        if strategy == "hsdp":
            beside.append(Collective("all-reduce shards", 4 * n.total / shards, blocks, layout.replicas,
                                     over(layout.replicas, t * shards), passes=2))
    elif strategy == "zero3":
        beside = [gather, gather, scatter]
    elif strategy == "zero2":
        beside, alone = [scatter], [gather]
    elif strategy == "zero1":
        alone = [Collective("all-reduce gradients", 4 * n.total, blocks, shards, in_node, passes=2), gather]
    if t > 1:
        # Into and out of both branches of a block, forward and backward: a gather or a reduce-scatter each.
        passes = 2 + (1 if config.train.checkpoint_every_block else 0)
        waiting.append(Collective("tensor parallel", a * step.tokens * m.width * 4 * passes * m.n_layers,
                                  4 * passes * m.n_layers, t, over(t, 1)))
    return Traffic(beside, last, alone, waiting)


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step, by part; `exposed` is the communication that no work hides."""

    products: float
    attention: float
    memory: float
    optimizer: float
    communication: float
    exposed: float

    @property
    def total(self) -> float:
        return self.products + self.attention + self.memory + self.optimizer + self.exposed


def step_time(config: Config, layout: Layout, step: Step, device: Device) -> StepTime | None:
    """None where the device's rates are not known."""
    peak = device.peak(config.train.precision)
    if peak is None:
        return None
    share, flops, m = efficiency_of(device), flops_of(config), config.model
    bandwidth = device.bandwidth or peak / 20  # a CPU: some 20 FLOPs a byte
    tokens = step.tokens * step.count
    products = tokens * flops.products / layout.tensor / (peak * share.products)
    attention = tokens * flops.attention / layout.tensor / (peak * share.attention)
    memory = tokens * _elementwise_bytes(config, layout.tensor) / (bandwidth * share.bandwidth)
    if device.kind == "cuda":  # a micro-batch so small that the device waits for its kernels to be started
        memory += max(0.0, LAUNCH_S * m.n_layers * step.count - products - attention - memory)
    traffic = traffic_of(config, layout, step)
    n_stepped = Parameters(m, layout.tensor).total / _optimizer_shards(config, layout)
    optimizer = n_stepped * OPTIMIZER_BYTES / (bandwidth * share.bandwidth)
    if config.parallel.offload_optimizer:
        optimizer += n_stepped * 8 / device.host_link + n_stepped * OPTIMIZER_BYTES / 100e9

    def seconds(collectives: list[Collective]) -> float:
        return sum(c.seconds(device, share.links) for c in collectives)

    work = (products + attention + memory) / step.count
    beside, last = seconds(traffic.beside_micro_batch), seconds(traffic.beside_last_backward)
    waiting, alone = seconds(traffic.in_micro_batch), seconds(traffic.alone)
    exposed = step.count * (_exposed(work, beside, share.hidden) + waiting)
    exposed += _exposed(work * 2 / 3, last, share.hidden) + alone
    communication = step.count * (beside + waiting) + last + alone
    return StepTime(products, attention, memory, optimizer, communication, exposed)


def _exposed(work: float, communication: float, hidden: float) -> float:
    return communication - hidden * min(work, communication)


def _optimizer_shards(config: Config, layout: Layout) -> int:
    strategy = strategy_of(config, layout.size)
    return 1 if strategy in ("single", "ddp") else layout.shards


def _elementwise_bytes(config: Config, tensor: int) -> float:
    """Per token of a micro-batch, on one process."""
    m, a = config.model, 2 if config.train.precision == "bf16" else 4
    return ELEMENTWISE_VALUES * m.n_layers * m.width * a * (m.hidden / m.width / 4 + 1) / 2 / tensor
