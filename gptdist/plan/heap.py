"""What a process holds: every allocation by name, what they come to, and on a CPU what the heap grows to for them.

An accelerator's caching allocator gives back what was freed to the next allocation. glibc's heap, as parallel/host.py
sets it up, keeps every page that was touched once: an allocation takes the smallest hole that is large enough, else the
heap grows. Two things keep holes from being used (glibc before 2.38: malloc.c, _int_memalign):

- Memory for a tensor, aligned to 64 bytes, is found by asking for SPARE bytes more than are then kept. A hole that a
  tensor left is too small for another of exactly its size: it serves a smaller one, or together with its neighbour.
- What is not kept, 32 to 96 bytes between a tensor and the next, goes to the next small allocation, of which torch
  makes thousands. While that is in use, the holes on its two sides do not join. JOINS is the share of such places at
  which they do. It is fitted (benchmarks/results/plan.md); which places they are is drawn at random, as they differ
  from run to run.

Threads of gloo allocate from heaps of their own, of THREAD_HEAP bytes at most. What is larger is mapped, and unmapped
when it is freed.
"""

import random
from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Hashable

ALIGNMENT, SPARE = 64, 112  # bytes; 112: 64 for the alignment, 32 for the least chunk, 16 for its header
JOINS = 0.76
THREAD_HEAP = 64 << 20
THREADS = 2  # of a process group (ProcessGroupGloo's default)


class Heap:
    """Addresses from 0 up. `resident`: bytes that were touched at least once."""

    def __init__(self, seed: int = 0, joins: float = JOINS):
        self.resident = 0
        self.top = 0  # what lies above was never given out, or has been freed
        self._random, self._joins = random.Random(seed), joins
        self._holes: dict[int, int] = {}  # start -> stop
        self._starts: dict[int, int] = {}  # stop -> start
        self._by_size: list[tuple[int, int]] = []  # (size, start)
        self._walls: set[int] = set()  # addresses at which holes do not join
        self._touched: list[tuple[int, int]] = []

    def allocate(self, size: int, brief: bool = False) -> int:
        """The address of `size` bytes, a multiple of ALIGNMENT. brief: nothing small is allocated while it is held."""
        smallest = bisect_left(self._by_size, (size + SPARE, 0))
        if smallest < len(self._by_size):
            start = self._by_size[smallest][1]
            stop = self._remove(start)
            self._add(start + size, stop)
        else:
            start = self.top
            self.top += size
        if brief or self._random.random() < self._joins:
            self._walls.discard(start + size)
        else:
            self._walls.add(start + size)
        return start

    def free(self, start: int, size: int) -> None:
        stop = start + size
        if stop in self._holes and stop not in self._walls:
            stop = self._remove(stop)
        if start in self._starts and start not in self._walls:
            start = self._starts[start]
            self._remove(start)
        if stop == self.top and stop not in self._walls:
            self.top = start
        elif stop > start:
            self._add(start, stop)

    def touch(self, start: int, size: int) -> None:
        stop, apart = start + size, []
        for other in self._touched:
            if other[1] < start or other[0] > stop:
                apart.append(other)
            else:
                start, stop = min(start, other[0]), max(stop, other[1])
        self._touched = [*apart, (start, stop)]
        self.resident = sum(stop - start for start, stop in self._touched)

    def _add(self, start: int, stop: int) -> None:
        self._holes[start], self._starts[stop] = stop, start
        insort(self._by_size, (stop - start, start))

    def _remove(self, start: int) -> int:
        stop = self._holes.pop(start)
        del self._starts[stop]
        del self._by_size[bisect_left(self._by_size, (stop - start, start))]
        return stop


class Process:
    """Allocations under names of their own, each of one part of the plan; the parts at the moment that needs most.

    seed: of what is random in the heap.
    """

    def __init__(self, on_cpu: bool, seed: int = 0):
        self.on_cpu = on_cpu
        self.peak = 0.0
        self.parts: dict[str, float] = {}  # at the peak
        self._held: dict[Hashable, tuple[str, int, int, int]] = {}  # name -> part, bytes, address, bytes touched
        self._live, self._by_part = 0, defaultdict(float)
        self._heap = Heap(seed)
        self._threads = 0  # bytes that threads of gloo keep

    def take(self, part: str, name: Hashable, size: float, *, touched: bool = True, brief: bool = False) -> None:
        """Allocate `size` bytes; on a CPU what is not touched takes up addresses only. brief: as Heap.allocate."""
        assert name not in self._held, name
        start = 0
        if self.on_cpu:
            size = -(-int(size) // ALIGNMENT) * ALIGNMENT
            start = self._heap.allocate(size, brief)
        self._held[name] = part, size, start, 0
        self.touch(name, size if touched or not self.on_cpu else 0)

    def touch(self, name: Hashable, size: float) -> None:
        """Write the first bytes of what was not touched when it was taken."""
        part, whole, start, before = self._held[name]
        touched = max(before, min(size, whole))
        self._held[name] = part, whole, start, touched
        self._count(part, touched - before)
        if self.on_cpu and touched:
            self._heap.touch(start, int(touched))
        self._note()

    def drop(self, *names: Hashable) -> None:
        for name in names:
            part, size, start, touched = self._held.pop(name)
            self._count(part, -touched)
            if self.on_cpu:
                self._heap.free(start, size)

    def rename(self, name: Hashable, new: Hashable, part: str) -> None:
        old, *rest, touched = self._held.pop(name)
        self._held[new] = part, *rest, touched
        self._count(old, -touched)
        self._count(part, touched)

    def holds(self, name: Hashable) -> bool:
        return name in self._held

    def gloo(self, size: float) -> None:
        """A gather's buffer, in a thread of gloo; its caller allocates as much before, and does not use it."""
        if self.on_cpu:
            self.take("buffers", "gloo", size, touched=False)
            self.drop("gloo")
            if size > THREAD_HEAP:
                self._note(mapped=size)
            else:
                self._threads = max(self._threads, THREADS * size)
                self._note()

    def _count(self, part: str, size: float) -> None:
        self._live += size
        self._by_part[part] += size

    def _note(self, mapped: float = 0) -> None:
        now = self._heap.resident + self._threads + mapped if self.on_cpu else self._live
        if now > self.peak:
            self.peak = now
            self.parts = dict(self._by_part)
            if self.on_cpu:
                self.parts["buffers"] = self.parts.get("buffers", 0) + mapped + self._threads
                self.parts["fragmentation"] = now - sum(self.parts.values())
