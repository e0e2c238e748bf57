"""Memory of one process, part by part, at the moment of a step when it holds most.

    weights       masters or their shards; working copies in the compute precision
    gradients     what accumulates over a step's micro-batches
    optimizer     AdamW's two moments, Muon's momentum
    activations   what the backward needs, with the configuration's recomputation, and a block's own gradients
    logits        one chunk of them, the gradients of hidden states and of the head's weight (ops/cross_entropy.py)
    gathered      weights that FSDP or ZeRO-3 has put together, unsharded gradients
    buffers       flat copies that collectives send: FSDP's, DDP's and DeepSpeed's buckets, gloo's
    process       CUDA's context and libraries; on a CPU what the process touches first in a run
    fragmentation freed memory that the next allocation does not fit into

Moments are the loss (all activations, no block's gradients yet), the backward of a block, and the optimizer's step. An
accelerator's caching allocator gives back what one moment freed to the next. glibc's heap, as parallel/host.py sets it
up, mostly does not where sizes differ: every part's own maximum stays, and that is the prediction for a CPU.

Measured: what MEASURED says, in benchmarks/results/plan.md. Everything else follows by the same reasoning alone.
"""

from dataclasses import dataclass

from gptdist.config import Config
from gptdist.plan.devices import Device
from gptdist.plan.shapes import Layout, Parameters, Step, strategy_of

# As in ops/cross_entropy.py: elements of the buffer of logits on a GPU, bytes on a CPU, and the least rows.
LOGITS_ELEMENTS, CPU_LOGITS_BYTES, LEAST_ROWS = 1 << 24, 1 << 27, 64
REDUCE_BUCKET = 50_000_000  # elements: parallel/deepspeed_config.py
INITIAL_VALUES = 1 << 22  # drawn at a time: parallel/init.py
PROCESS_BYTES = {"cuda": 0.0, "cpu": 45e6}  # CUDA's context: see devices.py
FRAGMENTATION = 0.05  # of what a GPU's step allocates and frees
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


class _Sizes:
    """Bytes of the tensors of a run; `a` a value in the compute precision, `r` in the residual stream."""

    def __init__(self, config: Config, layout: Layout, step: Step, device: Device):
        self.config, self.layout, self.step, self.on_cpu = config, layout, step, device.kind == "cpu"
        self.strategy = strategy_of(config, layout.size)
        self.n = Parameters(config.model, layout.tensor)
        self.bf16 = config.train.precision == "bf16"
        self.a = 2 if self.bf16 else 4
        # Autocast keeps the stream in fp32; FSDP and ZeRO cast every weight, the embedding's too.
        self.r = 4 if self.strategy in ("single", "ddp") else self.a
        self.accumulates = step.count > 1

    # Activations

    def block_activations(self) -> float:
        """Saved for the backward of one block that is not recomputed."""
        m, t, tokens = self.config.model, self.layout.tensor, self.step.tokens
        kv = 2 * m.kv_heads * m.head_dim
        stream = self.r * 2 * m.width / t + 16 / t  # the inputs of both norms, and their statistics
        # inputs of qkv and fc; q, k, v; attention's output; the hidden units before and after GELU; lse
        inner = self.a * (2 * m.width + (m.width + kv) / t + m.width / t + 2 * m.hidden / t) + 4 * m.n_heads / t
        return tokens * (stream + inner)  # dropout's masks are computed again

    def activations(self) -> float:
        """Saved by a whole forward."""
        m, every = self.config.model, self.config.train.checkpoint_every_block
        recomputed = -(-m.n_layers // every) if every else 0
        block_input = self.step.tokens * self.r * m.width / self.layout.tensor
        outer = self.step.tokens * (self.r / self.layout.tensor + self.a) * m.width  # the last norm's input and output
        return (m.n_layers - recomputed) * self.block_activations() + recomputed * block_input + outer

    def block_backward(self) -> float:
        """Gradients in flight inside a block, and what it recomputes."""
        m, t = self.config.model, self.layout.tensor
        gradients = self.step.tokens * (self.a * (2 * m.hidden / t + 2 * m.width) + self.r * m.width)
        return gradients + (self.block_activations() if self.config.train.checkpoint_every_block else 0.0)

    # The head

    def logits_rows(self) -> int:
        vocab = -(-self.config.model.vocab_size // self.layout.tensor)
        if self.on_cpu and self.layout.tensor == 1:
            rows = CPU_LOGITS_BYTES // (vocab * self.a)
        else:
            rows = LOGITS_ELEMENTS // vocab
        return min(self.step.tokens, max(LEAST_ROWS, rows))

    def logits(self) -> float:
        """The chunk's buffer, the gradient of the hidden states, that of the weight in its parts."""
        m, rows = self.config.model, self.logits_rows()
        vocab = m.vocab_size / self.layout.tensor
        hidden = self.a * self.step.tokens * m.width
        product = self.a * self.n.vocabulary
        several = 4 * self.n.vocabulary if self.bf16 and rows < self.step.tokens else 0
        return self.a * rows * vocab + hidden + product + several + 12 * self.step.tokens

    def new_gradient(self) -> float:
        """Of one parameter, while it is added to what micro-batches before have left."""
        m = self.config.model
        return 4.0 * m.width * m.hidden / self.layout.tensor if self.accumulates and not self.gathers else 0.0

    def head_gradient(self) -> float:
        """The gradient of the head's weight as the backward hands it over, beside the parts it comes from."""
        return (self.a if self.gathers else 4) * self.n.vocabulary

    # What strategies hold

    @property
    def gathers(self) -> bool:
        return self.strategy in ("fsdp", "hsdp", "zero3")

    @property
    def shards(self) -> int:
        return self.layout.shards

    def moments(self) -> float:
        """AdamW has two of each parameter, Muon a momentum alone of the blocks' matrices."""
        muon = self.config.optim.name == "muon"
        return 8 * self.n.total - (4 * self.config.model.n_layers * self.n.block_matrices if muon else 0)

    def persistent(self) -> dict[str, float]:
        n, d, parallel = self.n, self.shards, self.config.parallel
        if self.strategy in ("single", "ddp"):
            shadows = 2 * n.products if self.bf16 else 0
            return {"weights": 4 * n.total + shadows, "optimizer": self.moments()}
        if self.strategy in ("fsdp", "hsdp"):
            return {"weights": 4 * n.total / d, "optimizer": self.moments() / d}
        on_device = 0 if parallel.offload_optimizer and not self.on_cpu else 1
        working = self.a * n.total / (d if self.strategy == "zero3" else 1)
        if parallel.offload_parameters and not self.on_cpu:
            working = 0.0
        return {"weights": working + on_device * 4 * n.total / d, "optimizer": on_device * self.moments() / d}

    def gradients(self) -> float:
        """Accumulated over micro-batches, at their most."""
        n, d = self.n, self.shards
        if self.strategy == "single":
            return 2 * n.products + 4 * (n.total - n.products) if self.bf16 and not self.accumulates else 4 * n.total
        if self.strategy == "ddp":
            return 4 * n.total
        if self.strategy in ("fsdp", "hsdp"):
            return 4 * n.total / d
        offloaded = self.config.parallel.offload_optimizer and not self.on_cpu
        own = 0 if offloaded else 4 * n.total / d
        return own + (self.a * n.total if self.strategy == "zero1" else 0.0)


def memory_of(config: Config, layout: Layout, step: Step, device: Device) -> Memory:
    """The parts at the moment that needs most; fragmentation is what a process holds beyond them."""
    sizes = _Sizes(config, layout, step, device)
    moments = _moments(sizes)
    worst = max(moments, key=lambda moment: sum(moment.values()))
    live = sum(worst.values())
    if sizes.on_cpu:
        kept = dict.fromkeys(name for moment in moments for name in moment)
        fragmentation = sum(max(moment.get(name, 0.0) for moment in moments) for name in kept) - live
    else:
        fragmentation = FRAGMENTATION * live
    parts = sizes.persistent()
    for name, size in worst.items():
        part = name.partition("/")[0]
        parts[part] = parts.get(part, 0.0) + size
    parts |= {"process": PROCESS_BYTES[device.kind], "fragmentation": fragmentation}
    return Memory(parts, device.memory, _measured(sizes))


def _measured(s: _Sizes) -> bool:
    plain = not s.bf16 and s.layout.tensor == 1 and not s.config.train.checkpoint_every_block
    # All parameters are taken to be trained: of adapters and frozen blocks this is a bound from above.
    usual = s.config.optim.name == "adamw" and not s.config.lora.rank and s.config.task.freeze == "none"
    return s.on_cpu and s.strategy in ("single", "fsdp") and plain and usual


def _moments(s: _Sizes) -> list[dict[str, float]]:
    """Bytes of what comes and goes, as "part/what": at the start, at the loss, in a block's backward, at the end of a
    backward and in the optimizer's step. What has one name is one allocation, or several of one size."""
    accumulated = {"gradients": s.gradients() if s.accumulates else 0.0}
    all_gradients = {"gradients": s.gradients()}
    loss = {"activations/saved": s.activations(), "logits/in the forward": s.logits(),
            "logits/gradient": s.head_gradient()}
    backward = {"activations/saved": s.activations() / 2, "activations/block": s.block_backward(),
                "logits/gradient": s.head_gradient()}
    end = {"logits/gradient": s.head_gradient(), "buffers/new gradient": s.new_gradient()}
    held = [_initial(s), accumulated | loss, all_gradients | backward, all_gradients | end, all_gradients]
    return [moment | more for moment, more in zip(held, _collectives(s), strict=True)]


def _initial(s: _Sizes) -> dict[str, float]:
    """Initial values are drawn on the CPU, a buffer at a time (parallel/init.py), in three copies."""
    return {"buffers/initial values": 3 * 4 * min(INITIAL_VALUES, s.n.vocabulary)} if s.on_cpu else {}


def _collectives(s: _Sizes) -> list[dict[str, float]]:
    """Gathered weights, unsharded gradients and flat buffers at the same moments."""
    if s.strategy in ("fsdp", "hsdp"):
        return _of_fsdp(s)
    if s.strategy.startswith("zero"):
        return _of_zero(s)
    if s.strategy == "ddp":
        # Buckets are the gradients themselves, but those of the micro-batches before the last lie outside.
        buckets = {"buffers/buckets": 4 * s.n.total if s.accumulates else 0.0}
        return [{}, buckets, buckets, buckets, {}]
    return [{}] * 5


def _of_fsdp(s: _Sizes) -> list[dict[str, float]]:
    """FSDP2's units are the blocks and, at the root, the rest, which stays gathered until the backward ends. A unit is
    gathered into a flat buffer and copied out; in a backward the next one is on its way. Gradients go into a flat
    buffer in fp32, and the last one's stays until its successor's is reduced. gloo copies what it sends."""
    a, d, outer, block = s.a, s.shards, s.n.outer, s.n.block
    blocks = s.config.model.n_layers * block
    root = {"gathered/root": a * outer}
    if not s.config.parallel.reshard_after_forward:
        root["gathered/blocks"] = a * blocks
    start = root | {"buffers/gather root": a * outer}
    backward = root | {"gathered/block": a * block, "buffers/gather block": 2 * a * block,
                       "gathered/gradients": a * block, "buffers/reduce block": 2 * 4 * block,
                       "buffers/reduced block": 4 * block / d}
    end = root | {"buffers/reduce root": 4 * outer, "buffers/reduced root": 4 * outer / d,
                  "buffers/reduce block": 4 * block}
    if s.bf16:
        end["buffers/gradients"] = a * (outer - s.n.vocabulary)
    if s.on_cpu and d > 1:
        start["buffers/gloo gather root"] = a * outer
        backward |= {"buffers/gloo gather block": a * block, "buffers/gloo reduce block": 4 * block}
        end["buffers/gloo reduce root"] = 4 * outer
    return [start, root, backward, end, {}]


def _of_zero(s: _Sizes) -> list[dict[str, float]]:
    """DeepSpeed reduces gradients in buckets, and its step makes a flat copy of this rank's part."""
    a, d, n = s.a, s.shards, s.n
    bucket = 4 * (min(REDUCE_BUCKET, n.total) if s.on_cpu else REDUCE_BUCKET)
    buffers = {"buffers/bucket": bucket}
    step = {"buffers/flat gradient": 4 * n.total / d}
    if s.strategy != "zero3":
        return [{}, buffers, buffers, buffers, step]
    root = {"gathered/root": a * n.outer}
    backward = root | buffers | {"gathered/block": 2 * a * n.block, "gathered/gradients": a * n.block}
    return [root, root | buffers, backward, root | buffers, step]
