"""What requests have the model compute, and in which batches.

A request is the tokens that the model reads and the targets after the last of them. Tokens that several requests begin
with are a node of their own, which is computed once and which they go on from:

    examples before all questions -> question -> each of its choices

Requests that share nothing are packed behind each other in one row, as documents, without padding. The others go over
the key/value cache as rows of one batch, padded to the longest, so those of like length come together.
"""

import heapq
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from gptdist.generate import PAGE, pages_for

LEAST_SAVED = 0.2  # share of the positions of requests for which what they begin with is computed apart from them
# Positions that a forward pass of its own takes as long as: padding beyond that starts a new batch. Where the lengths
# are spread evenly, batches whose padding is as dear as their pass cost least.
CALL = 128


@dataclass(eq=False)
class Node:
    """Tokens that are computed once, after those of its parents."""

    text: Sequence[int]  # from the beginning on, at most the model's context; begins with the parent's
    targets: Sequence[int] = ()  # ids after the last ones of the text: a request's
    request: int = 0  # its number
    parent: "Node | None" = None
    pages: list[int] = field(default_factory=list)  # of the cache, of the whole text

    @property
    def start(self) -> int:
        return len(self.parent.text) if self.parent else 0

    @property
    def positions(self) -> int:
        """What is computed of it."""
        return len(self.text) - self.start

    def path(self) -> list["Node"]:
        """From the first of its parents to itself."""
        return [*(self.parent.path() if self.parent else ()), self]


def share_contexts(requests: Sequence[Node]) -> None:
    """Give those that have a context in common a parent which holds it, but for its last token: that one says what
    follows, so each has its own."""
    groups = defaultdict(list)
    for request in requests:
        groups[tuple(request.text[:len(request.text) + 1 - len(request.targets)])].append(request)
    for context, group in groups.items():
        _join(group, len(context) - 1)


def share_beginnings(requests: Sequence[Node]) -> None:
    """Give those whose contexts begin alike, by a page or more, a parent above them: examples before each question."""
    groups = defaultdict(list)
    for node in dict.fromkeys(request.path()[0] for request in requests):
        if len(node.text) > PAGE:
            groups[tuple(node.text[:PAGE])].append(node)
    for group in groups.values():
        first, last = min(node.text for node in group), max(node.text for node in group)
        alike = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
        _join(group, min(alike, *(len(node.text) - max(len(node.targets), 1) for node in group)))


def _join(nodes: Sequence[Node], length: int) -> None:
    """One parent of so many tokens, where that saves enough."""
    saved = length * (len(nodes) - 1)
    if 0 < saved >= LEAST_SAVED * sum(node.positions for node in nodes):
        parent = Node(nodes[0].text[:length])
        for node in nodes:
            node.parent = parent


def divide(requests: Sequence[Node], ranks: int) -> list[list[Node]]:
    """Requests of each rank, for about as many positions; those of one parent stay together."""
    families = defaultdict(list)
    for request in requests:
        families[request.path()[0]].append(request)
    sizes = {node: (0 if node.targets else node.positions) + sum(request.positions for request in family)
             for node, family in families.items()}
    loads = [(0, rank) for rank in range(ranks)]
    found = [[] for _ in loads]
    for node in sorted(families, key=lambda node: -sizes[node]):
        load, rank = loads[0]
        heapq.heapreplace(loads, (load + sizes[node], rank))
        found[rank] += families[node]
    return found


@dataclass(frozen=True)
class Limits:
    """What one forward pass may hold."""

    positions: int  # padding included
    packed: int  # positions of requests packed in one row
    targets: int  # padding included
    pages: int  # of the cache, for the rows of a batch; and for what they go on from
    context: int  # of the model

    def packed_batches(self, requests: Sequence[Node]) -> Iterator[list[Node]]:
        """Requests without parents in batches of one row each, the longest first."""
        batch, length, targets = [], 0, 0
        for node in sorted(requests, key=lambda node: -node.positions):
            length, targets = length + node.positions, targets + len(node.targets)
            if batch and (length > self.packed or targets > self.targets):
                yield batch
                batch, length, targets = [], node.positions, len(node.targets)
            batch.append(node)
        if batch:
            yield batch

    def padded_batches(self, nodes: Sequence[Node]) -> Iterator[list[Node]]:
        """Nodes in batches of a row for each, the longest first."""
        batch, padding, targets, pages = [], 0, 0, 0
        for node in sorted(nodes, key=lambda node: -node.positions):
            width = batch[0].positions if batch else node.positions
            padding += width - node.positions
            targets, pages = max(targets, len(node.targets)), pages + self.own_pages(node, width)
            rows = len(batch) + 1
            if batch and (padding > CALL or rows * width > self.positions or rows * targets > self.targets
                          or pages > self.pages):
                yield batch
                batch, padding, targets = [], 0, len(node.targets)
                pages = self.own_pages(node, node.positions)
            batch.append(node)
        if batch:
            yield batch

    def begin(self, node: Node, width: int) -> int:
        """The first position that is computed of a row of such a width: padding after it would leave the context."""
        return min(node.start, self.context - width)

    def own_pages(self, node: Node, width: int) -> int:
        """Pages of a row that it does not share with its parent: one that begins within a page has a copy of that."""
        return pages_for(len(node.text)) - self.begin(node, width) // PAGE

    def chunks(self, requests: Sequence[Node]) -> Iterator[list[Node]]:
        """Requests with parents, as many at a time as the cache holds the parents of."""
        chunk, pages, held = [], 0, set()
        for request in requests:
            new = [node for node in request.path()[:-1] if node not in held]
            pages += sum(self.own_pages(node, node.positions) for node in new)
            if chunk and new and pages > self.pages:
                yield chunk
                chunk, held = [], set()
                new = request.path()[:-1]
                pages = sum(self.own_pages(node, node.positions) for node in new)
            chunk.append(request)
            held.update(new)
        if chunk:
            yield chunk

    def levels(self, chunk: Sequence[Node]) -> Iterator[list[Node]]:
        """The batches of a chunk, parents first."""
        levels = defaultdict(dict)
        for request in chunk:
            for depth, node in enumerate(request.path()):
                levels[depth][node] = None
        for depth in sorted(levels):
            yield from self.padded_batches(list(levels[depth]))

    def pages_of(self, batches: Sequence[list[Node]]) -> int:
        """Pages that a chunk needs: parents' stay to its end, requests' to the end of their batch."""
        parents, requests = 0, [0]
        for batch in batches:
            own = [self.own_pages(node, batch[0].positions) for node in batch]
            parents += sum(n for node, n in zip(batch, own, strict=True) if not node.targets)
            requests.append(sum(n for node, n in zip(batch, own, strict=True) if node.targets))
        return parents + max(requests)
