"""A run of one process with DeepSpeed's ZeRO, told as its allocations: see allocations.py."""

from collections.abc import Hashable, Iterable

from gptdist.plan.allocations import Run
from gptdist.plan.shapes import OUTSIDE, Weight
from gptdist.plan.sizes import Sizes

# Elements of a reduction (parallel/deepspeed_config.py); DeepSpeed's defaults for what ZeRO-3 gathers in advance, and
# for how far ahead a parameter's next use may be for it to stay gathered.
REDUCE_BUCKET, PREFETCH, REUSE_DISTANCE = 50_000_000, 50_000_000, 1_000_000_000


class ZeRO(Run):
    """Stages 1 and 2: deepspeed/runtime/zero/stage_1_and_2.py. Groups are the weights that decay and those that do not.

    A gradient is copied into a bucket as it comes (stage 1: at the end of a step's last backward), and the bucket is
    all-reduced. What an offload keeps on a GPU's host is not counted.
    """

    def __init__(self, sizes: Sizes, seed: int = 0):
        super().__init__(sizes, seed)
        self.stage = int(sizes.strategy[-1])
        by_group = [[w for w in self.trained if w.matrix is matrix] for matrix in (True, False)]
        self.groups = [(i, sum(w.size for w in group)) for i, group in enumerate(by_group) if group]
        self.offloads = sizes.config.parallel.offload_optimizer
        self.bucketed = 0  # elements

    def hold(self, part: str, name: Hashable, size: float) -> None:
        """Take what an offload leaves to the host."""
        if self.s.on_cpu or not self.offloads:
            self.p.take(part, name, size)

    def prepare(self) -> None:
        s, p = self.s, self.p
        for w in self.weights:
            p.take("weights", w, s.a * w.size)
        for i, size in self.groups:
            p.take("weights", ("working", i), s.a * size)
            p.drop(*(w for w in self.trained if w.matrix is (i == 0)))
            if s.bf16:
                p.take("weights", "part", s.a * size / s.shards)
            self.hold("weights", ("master", i), 4 * size / s.shards)
            self.release("part")
            if self.offloads:
                self.hold("weights", ("copy", i), s.a * size / s.shards)
        if self.offloads:
            self.hold("buffers", "temporary", s.a * s.largest_weight)
            p.take("buffers", "temporary on the device", s.a * s.largest_weight)
        for i, size in self.groups:
            self.hold("gradients", ("own", i), 4 * size / s.shards)
        if not self.offloads:
            p.drop(*(("own", i) for i, _ in self.groups))
        self.initial_values(size / s.shards for _, size in self.groups)
        self.gather_working()

    def gather_working(self) -> None:
        for _, size in self.groups:
            self.p.gloo(self.s.a * size)

    def make_moments(self) -> None:
        for i, size in self.groups:
            self.make_group_moments(i, size)

    def make_group_moments(self, i: int, size: int) -> None:
        for slot in (0, 1):
            if not self.p.holds((slot, i)):
                self.hold("optimizer", (slot, i), 4 * size / self.s.shards)

    # Gradients

    def arrived(self, w: Weight) -> None:
        if not self.p.holds("bucket"):
            self.p.take("buffers", "bucket", self.s.a * REDUCE_BUCKET, touched=False)
        if self.stage == 2:
            self.into_bucket(w, ("new", w))
        elif self.p.holds(("gradient", w)):
            self.p.drop(("new", w))
        else:
            self.p.rename(("new", w), ("gradient", w), "gradients")

    def backward(self) -> None:
        super().backward()
        if self.stage == 1 and self.is_last:
            for w in self.trained:
                self.into_bucket(w, ("gradient", w))
        if self.stage == 2 or self.is_last:
            self.reduce_bucket()
            self.end_of_backward()
            self.p.drop("bucket")

    def into_bucket(self, w: Weight, name: Hashable) -> None:
        if self.bucketed + w.size > REDUCE_BUCKET:
            self.reduce_bucket()
        self.bucketed += w.size
        if w.size > REDUCE_BUCKET:
            self.p.rename(name, "oversized", "buffers")
        else:
            self.p.touch("bucket", self.bucket_width * self.bucketed)
            self.p.drop(name)

    @property
    def bucket_width(self) -> int:
        return self.s.a

    def reduce_bucket(self) -> None:
        """All-reduce a flat copy of the bucket in fp32, and keep this rank's part of it."""
        s, p = self.s, self.p
        if self.bucketed:
            for i, size in self.groups if s.bf16 else ():
                if not p.holds(("flat gradient", i)):
                    p.take("gradients", ("flat gradient", i), 4 * size / s.shards)
            p.take("buffers", "flat", s.a * self.bucketed, brief=True)
            if s.bf16:
                p.take("buffers", "flat in fp32", 4 * self.bucketed, brief=True)
            self.release("flat in fp32", "flat", "oversized")
            self.keep_part()
            self.bucketed = 0

    def keep_part(self) -> None:
        """With bf16 it went into a flat buffer in fp32 that is there for a whole step. Else it goes into a new one for
        each backward; with an offload into the host's, and for more micro-batches than one into another there.
        """
        s, p = self.s, self.p
        if s.bf16:
            return
        if not self.offloads and not p.holds("new part"):
            p.take("gradients", "new part", 4 * s.largest_part)
        elif self.offloads and s.step.count > 1 and not p.holds("accumulated"):
            self.hold("gradients", "accumulated", 4 * s.largest_part)

    def end_of_backward(self) -> None:
        if self.p.holds("new part"):
            if self.p.holds("part"):
                self.p.drop("new part")
            else:
                self.p.rename("new part", "part", "gradients")

    def update(self) -> None:
        s, p = self.s, self.p
        p.take("buffers", "norm", 8 * s.largest_slice, brief=True)  # DeepSpeed's own, in fp64
        p.drop("norm")
        for i, size in self.groups:
            if not s.bf16 and not self.offloads:
                p.take("gradients", ("flat gradient", i), 4 * size / s.shards)
            if i == self.groups[-1][0]:
                self.release("part")
            self.make_group_moments(i, size)
            self.release(("flat gradient", i))
        self.gather_working()


class ZeRO3(ZeRO):
    """deepspeed/runtime/zero/stage3.py and partitioned_param_coordinator.py.

    In a run's first micro-batch weights are gathered one by one, for the backward again: autograd still holds what was
    gathered for the forward. From then on the modules' order is known: up to PREFETCH elements are gathered in advance,
    and what is needed again within REUSE_DISTANCE stays. Vectors are small enough to stay for good.
    """

    def prepare(self) -> None:
        s, p, d = self.s, self.p, self.s.shards
        self.known = False
        for unit in (*self.blocks, OUTSIDE):
            for w in s.units[unit]:
                p.take("weights", ("whole", w), s.a * w.size)
            for w in s.units[unit]:
                p.take("weights", w, s.a * w.size / d)
                p.drop(("whole", w))
        if s.on_cpu or not s.config.parallel.offload_parameters:
            p.take("weights", "partitions", s.a * sum(w.size for w in self.weights) / d)
        p.drop(*self.weights)
        for i, size in self.groups:
            if s.bf16:
                self.hold("weights", "converted", 4 * size / d)
            self.hold("weights", ("master", i), 4 * size / d)  # in fp32 too
            self.release("converted")
        self.hold("buffers", "gradient", 4 * max(size for _, size in self.groups) / d)
        for i, size in self.groups if self.offloads else ():
            self.hold("gradients", ("own", i), 4 * size / d)
        self.release("gradient")
        p.take("buffers", "bucket", 4 * REDUCE_BUCKET, touched=False)
        self.hold("gradients", "part", 4 * sum(size for _, size in self.groups) / d)
        for unit in (OUTSIDE, *self.blocks):
            for w in self.missing(unit):
                self.gather([w])
                p.drop(("whole", w))
        self.initial_values(size / d for _, size in self.groups)
        self.in_bucket = 0

    # Gathering

    def missing(self, unit: int) -> list[Weight]:
        return [w for w in self.s.units[unit] if w.matrix and not self.p.holds(("whole", w))]

    def gather(self, weights: list[Weight]) -> None:
        """One weight in place, several through a flat buffer."""
        p, a = self.p, self.s.a
        size = a * sum(w.size for w in weights)
        if len(weights) > 1:
            p.take("buffers", "flat", size)
            p.gloo(size)
        for w in weights:
            p.take("gathered", ("whole", w), a * w.size)
        self.release("flat")
        if len(weights) == 1:
            p.gloo(size)

    def fetch(self, unit: int, following: Iterable[int]) -> None:
        for w in self.missing(unit):
            self.gather([w])
        if self.known:
            room = REUSE_DISTANCE - sum(w.size for w in self.weights if self.p.holds(("whole", w)))
            ahead: list[Weight] = []
            for w in (w for other in following for w in self.missing(other)):
                if sum(x.size for x in ahead) >= min(PREFETCH, room):
                    break
                ahead.append(w)
            self.gather(ahead)

    def release_unit(self, unit: int) -> None:
        self.release(*(("whole", w) for w in self.s.units[unit]))

    def gather_root(self) -> None:
        self.fetch(OUTSIDE, self.blocks)

    def gather_forward(self, block: int) -> None:
        self.fetch(block, self.blocks[block + 1:])

    def release_forward(self, block: int) -> None:
        between = sum(w.size for later in self.blocks[block + 1:] for w in self.s.units[later])
        if 2 * between >= REUSE_DISTANCE:
            self.release_unit(block)

    def gather_backward(self, block: int) -> None:
        self.fetch(block, self.blocks[:block][::-1])

    def reduce(self, unit: int) -> None:
        self.release_unit(unit)

    # Gradients

    @property
    def bucket_width(self) -> int:
        return 4

    def gradient(self, w: Weight) -> None:
        if self.known or not w.matrix:
            super().gradient(w)
            return
        self.p.take("gathered", "again", self.s.a * w.size)
        self.p.gloo(self.s.a * w.size)
        super().gradient(w)
        self.p.drop("again", ("whole", w))

    def arrived(self, w: Weight) -> None:
        self.into_bucket(w, ("new", w))
        self.in_bucket += 1

    def backward(self) -> None:
        Run.backward(self)
        self.reduce_bucket()
        self.known = True

    def reduce_bucket(self) -> None:
        """Reduce-scatter a flat copy of the bucket, if more than one weight is in it; gloo copies it once more."""
        size = 4 * self.bucketed
        if size:
            if self.in_bucket > 1:
                self.p.take("buffers", "flat", size)
            if self.s.on_cpu:
                self.p.take("buffers", "gloo's copy", size)
                self.p.drop("gloo's copy")
            self.release("flat", "oversized")
            self.bucketed = self.in_bucket = 0

    def update(self) -> None:
        for unit in self.s.units:
            self.release_unit(unit)
        self.p.take("buffers", "norm", 8 * self.s.largest_weight / self.s.shards)
        self.p.drop("norm")
        for i, size in self.groups:
            if not self.offloads:
                self.p.take("gradients", ("flat gradient", i), 4 * size / self.s.shards)
            self.make_group_moments(i, size)
            self.release(("flat gradient", i))
