"""A run of one process, told as its allocations in their order: what parallel/ and torch below it hold, and when.

Each class follows the strategy of its name: preparation, micro-batches, the optimizer's step, an evaluation. Tensors of
a matrix's size each come on their own, so that a heap's holes are as large as in the run; biases and norms are counted
with their block. Sources are named at what is not this project's own.

    weights      masters or their shards; working copies in the compute precision
    gradients    what accumulates over a step's micro-batches
    optimizer    AdamW's two moments, Muon's momentum
    activations  what the backward needs, with the configuration's recomputation, and a block's own gradients
    logits       one chunk of them, the gradients of hidden states and of the head's weight (ops/cross_entropy.py)
    gathered     weights that FSDP or ZeRO-3 has put together
    buffers      gradients before they are reduced or added; flat copies that collectives send
"""

from collections.abc import Hashable, Iterable

from gptdist.plan.heap import Process
from gptdist.plan.shapes import OUTSIDE, Weight
from gptdist.plan.sizes import Sizes

STEPS = {True: 2, False: 1}  # on a CPU: the moments come with the first step, and the second meets the holes of it
MICRO_BATCHES = 2  # those after the second are as it
INITIAL_VALUES = 1 << 22  # drawn at a time: parallel/init.py
# torch's reducer and _broadcast_coalesced: bytes of the first bucket, of the others, of a broadcast.
FIRST_BUCKET, BUCKET, BROADCAST = 1 << 20, 25 << 20, 250 << 20


class Run:
    """What all strategies do."""

    def __init__(self, sizes: Sizes, seed: int = 0):
        self.s, self.p = sizes, Process(sizes.on_cpu, seed)
        self.weights = sizes.weights
        self.trained = [w for w in self.weights if w.trained]
        self.blocks = range(sizes.config.model.n_layers)
        self.head = next(w for w in self.weights if w.name in ("head", "tied"))
        self.is_last = False  # of a step's micro-batches

    def play(self) -> Process:
        self.prepare()
        if not self.s.on_cpu:
            self.make_moments()
        count = min(self.s.step.count, MICRO_BATCHES)
        for _ in range(STEPS[self.s.on_cpu]):
            for i in range(count):
                self.is_last = i == count - 1
                self.forward()
                self.backward()
            self.update()
        self.evaluate()
        return self.p

    # Preparation and the optimizer

    def prepare(self) -> None:
        raise NotImplementedError

    def initial_values(self, sizes: Iterable[float]) -> None:
        """Drawn a buffer at a time: the pieces, joined, then scaled (model.initial_values)."""
        if self.s.on_cpu:
            size = 4 * min(INITIAL_VALUES, max(sizes))
            self.p.take("buffers", "pieces", size)
            self.p.take("buffers", "values", size)
            self.p.drop("pieces", "values")

    def make_moments(self) -> None:
        """The optimizer's slots, which a run's first step makes."""
        for w in self.trained:
            for slot in range(self.s.slots(w)):
                if not self.p.holds((slot, w)):
                    self.p.take("optimizer", (slot, w), 4 * w.size / self.s.shards)

    def update(self) -> None:
        """The optimizer's step, after which the gradients go."""
        raise NotImplementedError

    def evaluate(self) -> None:
        self.forward(training=False)

    # A micro-batch

    def forward(self, training: bool = True) -> None:
        self.gather_root()
        for i in self.blocks:
            self.gather_forward(i)
            self.block_forward(i, training)
            self.release_forward(i)
        self.head_forward(training)

    def block_forward(self, block: int, training: bool) -> None:
        s, p = self.s, self.p
        learns = training and s.learns(block)
        for name, size in s.saved(block):
            p.take("activations", (name, block), size)
        if s.recomputes(block) or not learns:
            p.drop(*((name, block) for name, _ in s.saved(block)))
        if s.recomputes(block) and learns:
            p.take("activations", ("input", block), s.block_input)

    def head_forward(self, training: bool) -> None:
        self.p.take("activations", "last hidden", self.s.last_hidden)
        if not training:
            self.p.take("logits", "chunk", self.s.chunk)
            self.p.drop("chunk", "last hidden")
        elif self.s.head_in_forward:
            self.head_products()

    def head_products(self) -> None:
        """Logits chunk by chunk, and the products of their gradients."""
        s, p = self.s, self.p
        p.take("logits", "hidden gradient", s.hidden)
        if self.head.trained:
            p.take("logits", "product", s.product)
            p.take("logits", "total", s.total)
        p.take("logits", "chunk", s.chunk)
        p.drop("chunk")

    def backward(self) -> None:
        self.head_backward()
        for i in reversed(self.blocks):
            if self.s.learns(i):
                self.gather_backward(i)
                self.block_backward(i)
                self.reduce(i)
        for w in reversed(self.s.units[OUTSIDE]):
            if w.trained and w is not self.head:
                self.gradient(w)
        if self.head.trained:
            self.p.rename("head gradient", ("new", self.head), "buffers")
            self.arrived(self.head)
        self.p.drop("flow")
        self.reduce(OUTSIDE)

    def head_backward(self) -> None:
        """The scaled gradients of the hidden states and of the head's weight. The embedding's is added to that at the
        end, if they are tied.
        """
        s, p = self.s, self.p
        if not s.head_in_forward:
            self.head_products()
        p.take("activations", "flow", s.hidden)
        if self.head.trained:
            if s.head_result == "fresh":
                p.take("logits", "fresh", 4 * self.head.size)
            p.rename(s.head_result, "head gradient", "logits")
            if s.bf16 and not s.autocast and s.head_result != "product":
                p.take("logits", "rounded", s.a * self.head.size)
                p.drop("head gradient")
                p.rename("rounded", "head gradient", "logits")
            self.release("product", "total")
        p.drop("hidden gradient", "last hidden")

    def block_backward(self, block: int) -> None:
        s, p = self.s, self.p
        if s.recomputes(block):
            for name, size in s.saved(block):
                p.take("activations", (name, block), size)
        for w in reversed(s.units[block]):
            p.take("activations", ("flow", w), s.input_gradient(w))
            if w.trained:
                self.gradient(w)
            p.drop(("flow", w))
        p.drop(*((name, block) for name, _ in s.saved(block)))
        self.release(("input", block))

    def gradient(self, w: Weight) -> None:
        self.p.take("buffers", ("new", w), self.s.weight_gradient(w) * w.size)
        self.arrived(w)

    def arrived(self, w: Weight) -> None:
        """The gradient ("new", w) is whole: keep it, add it or copy it on."""
        raise NotImplementedError

    def release(self, *names: Hashable) -> None:
        """Drop those that are held."""
        self.p.drop(*(name for name in names if self.p.holds(name)))

    # What strategies that shard do in between

    def gather_root(self) -> None: ...

    def gather_forward(self, block: int) -> None: ...

    def release_forward(self, block: int) -> None: ...

    def gather_backward(self, block: int) -> None: ...

    def reduce(self, unit: int) -> None: ...


class Single(Run):
    """The gradients of bf16 products are bf16 until another micro-batch's is to be added."""

    def prepare(self) -> None:
        for w in self.weights:
            self.p.take("weights", w, 4 * w.size)
        self.initial_values(w.size for w in self.weights)
        for w in self.weights:
            if w.product and self.s.bf16:
                self.p.take("weights", ("shadow", w), 2 * w.size)
        self.summed: set[Weight] = set()

    def arrived(self, w: Weight) -> None:
        if not self.p.holds(("gradient", w)):
            self.p.rename(("new", w), ("gradient", w), "gradients")
            return
        if self.s.weight_gradient(w) == 2:
            self.p.take("buffers", "cast", 4 * w.size)
            self.p.drop("cast")
        self.p.drop(("new", w))

    def backward(self) -> None:
        super().backward()
        for w in () if self.is_last else self.trained:
            if self.s.weight_gradient(w) == 2 and w not in self.summed:
                self.p.take("gradients", "summed", 4 * w.size)
                self.p.drop(("gradient", w))
                self.p.rename("summed", ("gradient", w), "gradients")
                self.summed.add(w)

    def update(self) -> None:
        self.make_moments()
        self.summed.clear()
        self.p.drop(*(("gradient", w) for w in self.trained))


class DDP(Single):
    """Gradients lie in buckets, until a step's last micro-batch outside of them. Source: torch's c10d/reducer.cpp."""

    def prepare(self) -> None:
        super().prepare()
        self.p.take("buffers", "broadcast", min(BROADCAST, 4 * sum(w.size for w in self.weights)))
        self.p.drop("broadcast")
        self.make_buckets(self.trained)
        self.steps = 0

    def make_buckets(self, order: list[Weight]) -> None:
        buckets: list[list[Weight]] = [[]]
        for w in order:
            buckets[-1].append(w)
            if 4 * sum(x.size for x in buckets[-1]) >= (BUCKET if len(buckets) > 1 else FIRST_BUCKET):
                buckets.append([])
        self.bucket_of = {w: i for i, bucket in enumerate(buckets) for w in bucket}
        self.bucket_bytes = [4 * sum(w.size for w in bucket) for bucket in buckets]
        for i, size in enumerate(self.bucket_bytes):
            self.p.take("gradients", ("bucket", i), size, touched=False)

    def forward(self, training: bool = True) -> None:
        if training and self.is_last and self.steps == 1:  # the order in which gradients come is known now
            self.p.drop(*(("bucket", i) for i in range(len(self.bucket_bytes))))
            self.make_buckets(self.trained[::-1])
        super().forward(training)

    def arrived(self, w: Weight) -> None:
        if self.s.weight_gradient(w) == 2:  # autograd casts it to the weight's precision
            self.p.take("buffers", "cast", 4 * w.size)
            self.p.drop(("new", w))
            self.p.rename("cast", ("new", w), "buffers")
        if self.p.holds(("gradient", w)):
            self.p.drop(("new", w))
        else:
            self.p.rename(("new", w), ("gradient", w), "gradients")
        if self.is_last:
            i = self.bucket_of[w]
            self.p.touch(("bucket", i), self.bucket_bytes[i])
            self.p.drop(("gradient", w))

    def backward(self) -> None:
        Run.backward(self)

    def update(self) -> None:
        self.make_moments()
        self.steps += 1


class FSDP(Run):
    """FSDP2's units are the blocks and, at the root, the rest, which stays gathered until the backward ends.

    A unit is gathered into a flat buffer and copied out of it; the buffer stays until the next unit's is there, in a
    backward until it is copied out. There the next one is on its way too. Gradients go into a flat buffer in fp32 that
    stays until the next unit's are there. Source: torch/distributed/fsdp/_fully_shard.
    """

    def __init__(self, sizes: Sizes, seed: int = 0):
        super().__init__(sizes, seed)
        self.reshards = sizes.config.parallel.reshard_after_forward
        self.previous: int | None = None  # the unit whose flat buffer is still there
        self.sent: int | None = None  # that whose gradients' is

    def prepare(self) -> None:
        for w in self.weights:
            self.p.take("weights", w, 4 * w.size / self.s.shards)
        self.initial_values(w.size / self.s.shards for w in self.weights)

    def flat(self, unit: int) -> None:
        """Gather a unit into its flat buffer."""
        size = self.s.a * sum(w.size for w in self.s.units[unit])
        if self.s.shards > 1:
            if self.s.bf16:
                self.p.take("buffers", "cast", size / self.s.shards)
            self.p.take("buffers", ("flat", unit), size)
            self.p.gloo(size)
            self.release("cast")

    def copy_out(self, unit: int) -> None:
        for w in self.s.units[unit]:
            self.p.take("gathered", ("whole", w), self.s.a * w.size)

    def reshard(self, unit: int) -> None:
        self.release(*(("whole", w) for w in self.s.units[unit]))

    def gather_root(self) -> None:
        self.gather_forward(OUTSIDE)

    def gather_forward(self, block: int) -> None:
        self.flat(block)
        self.release(("flat", self.previous))
        self.copy_out(block)
        self.previous = block

    def release_forward(self, block: int) -> None:
        if self.reshards:
            self.reshard(block)

    def head_forward(self, training: bool) -> None:
        super().head_forward(training)
        self.release(("flat", self.previous))
        self.previous = None

    def backward(self) -> None:
        if self.reshards:
            self.flat(self.blocks[-1])
        super().backward()
        self.release(("sent", self.sent))
        self.sent = None

    def gather_backward(self, block: int) -> None:
        if self.reshards:
            self.copy_out(block)
            self.release(("flat", block))
            if block > 0:
                self.flat(block - 1)

    def arrived(self, w: Weight) -> None:
        """It waits for the rest of its unit."""

    def reduce(self, unit: int) -> None:
        s, p = self.s, self.p
        trained = [w for w in s.units[unit] if w.trained]
        size = 4 * sum(w.size for w in trained)
        self.reshard(unit)
        self.release(("sent", self.sent))
        self.sent = unit
        p.take("buffers", ("sent", unit), size)
        p.drop(*(("new", w) for w in trained))
        p.take("buffers", "own", size / s.shards)
        if s.shards > 1 and s.on_cpu:
            p.take("buffers", "gloo's copy", size)
            p.drop("gloo's copy")
        if p.holds(("gradient", unit)):
            p.drop("own")
        else:
            p.rename("own", ("gradient", unit), "gradients")

    def update(self) -> None:
        self.make_moments()
        self.release(*(("gradient", unit) for unit in self.s.units))

    def evaluate(self) -> None:
        super().evaluate()
        for unit in self.s.units:
            self.reshard(unit)
