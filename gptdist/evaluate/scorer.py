"""Log-likelihoods and greedy continuations from a model under any strategy: what all evaluation tasks are made of.

Requests are divided over the ranks and cut into batches (batches.py); what several begin with, such as a question with
its choices, is computed once for them, and the head where a target is. The results stand in the requests' order on
every rank. A batch's shape changes a score by rounding alone.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from gptdist import ops
from gptdist.checkpoint import layout
from gptdist.checkpoint.ranks import Ranks
from gptdist.checkpoint.restore import load_weights, read_config, refuse_classifier
from gptdist.config import Config, LoRAConfig, OptimConfig, ParallelConfig
from gptdist.data.loader import IGNORED
from gptdist.data.tokenizer import Tokenizer
from gptdist.errors import UserError
from gptdist.evaluate.batches import Limits, Node, divide, share_beginnings, share_contexts
from gptdist.generate import PAGE, Generator, PagePool, Sampling, pages_for
from gptdist.model import build_meta
from gptdist.optim.adamw import build_adamw
from gptdist.parallel.host import set_up_process
from gptdist.parallel.strategies import Strategy, make_strategy
from gptdist.parallel.world import World, env_world_size, init_world

BATCH_TOKENS = 8192
PACKED_CONTEXTS = 16  # of the model, in a packed row: the reference's attention looks at all of it
MAX_LOGITS = 1 << 26  # values of the logits of one batch: 256 MB in fp32
MAX_CACHE = 1 << 27  # of the keys and values of one batch's rows, and of what rows go on from


@dataclass(frozen=True)
class Request:
    """A continuation whose log-likelihood is wanted. An empty context stands for the end of another document."""

    context: Sequence[int]
    continuation: Sequence[int]  # at least one token, at most the model's context


@dataclass(frozen=True)
class Score:
    """logprob: of all tokens of the continuation together, in nats. greedy: each is the likeliest one in its place.

    greedy is None where it was not asked for.
    """

    logprob: float
    greedy: bool | None = None


class Scorer:
    """Scores continuations, and writes some."""

    def __init__(self, strategy: Strategy, tokenizer: Tokenizer, *, batch_tokens: int = BATCH_TOKENS):
        if batch_tokens < 1:
            raise UserError(f"batch tokens is {batch_tokens}, expected at least 1")
        self.strategy, self.tokenizer, self.world = strategy, tokenizer, strategy.world
        self.model = strategy.config.model
        self.batch_tokens = batch_tokens
        self.dtype = torch.bfloat16 if strategy.config.train.precision == "bf16" else torch.float32  # of products

    def is_cut(self, request: Request) -> bool:
        """Whether the context is cut from the left, to fit with its continuation."""
        return len(request.context) + len(request.continuation) > self.model.context + 1

    def room(self, max_new_tokens: int) -> int:
        """Tokens of a prompt that are used before so many new ones."""
        return max(1, self.model.context - max_new_tokens)

    def score(self, requests: Sequence[Request], *, greedy: bool = False) -> list[Score]:
        """The score of each request, the same on all ranks; a collective call."""
        limits = self.limits(greedy)
        packed, chunks = self.plan([self._node(i, request) for i, request in enumerate(requests)], limits)
        # For each request: the log-likelihood, and the number of tokens that are not the likeliest in their place.
        results = torch.zeros(2, len(requests), dtype=torch.float64)
        with self.strategy.evaluating():
            for batch in packed:
                self._score(_packed(batch), greedy, results)
            for batches in chunks:
                self._score_chunk(batches, limits, greedy, results)
            self._keep_pace(len(packed) + sum(map(len, chunks)))
        logprobs, misses = self.world.sum(results).tolist()
        return [Score(logprob, miss == 0 if greedy else None)
                for logprob, miss in zip(logprobs, misses, strict=True)]

    def continue_greedily(self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int,
                          stop: Sequence[str] = ()) -> list[str]:
        """The text after each prompt, up to a stop string. Prompts are cut from the left to `room`.

        Every rank generates all of them, as the weights may be spread over all ranks.
        """
        room = self.room(max_new_tokens)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        generator = Generator(self.strategy.model, self.tokenizer, call=self.strategy, device=self.world.device,
                              dtype=self.dtype, agree=self.world.agree)
        sampling = Sampling(max_new_tokens=max_new_tokens, temperature=0, stop=tuple(stop))
        with self.strategy.evaluating():
            done = generator.generate([list(prompts[i])[-room:] for i in order], sampling,
                                      batch_size=max(1, self.batch_tokens // self.model.context))
        texts = {i: completion.text for i, completion in zip(order, done, strict=True)}
        return [texts[i] for i in range(len(prompts))]

    def limits(self, greedy: bool) -> Limits:
        model = self.model
        page = 2 * model.n_layers * model.kv_heads * model.head_dim * PAGE  # keys and values
        return Limits(positions=self.batch_tokens, packed=min(self.batch_tokens, PACKED_CONTEXTS * model.context),
                      targets=MAX_LOGITS // model.vocab_size if greedy else self.batch_tokens,
                      pages=MAX_CACHE // page, context=model.context)

    def plan(self, nodes: Sequence[Node], limits: Limits) -> tuple[list[list[Node]], list[list[list[Node]]]]:
        """(packed batches, batches of each chunk) of this rank's share of the requests."""
        share_contexts(nodes)
        own = divide(nodes, self.world.dp_size)[self.world.dp_rank]
        share_beginnings(own)
        return (list(limits.packed_batches([node for node in own if node.parent is None])),
                [list(limits.levels(chunk)) for chunk in limits.chunks([node for node in own if node.parent])])

    def _node(self, number: int, request: Request) -> Node:
        context, n = list(request.context) or [self.tokenizer.eot], len(request.continuation)
        assert 0 < n <= self.model.context, f"a continuation of {n} tokens, the context has {self.model.context}"
        tokens = [*context, *request.continuation][-(self.model.context + 1):]
        return Node(tokens[:-1], tokens[-n:], number)

    def _score_chunk(self, batches: Sequence[list[Node]], limits: Limits, greedy: bool, results: Tensor) -> None:
        """Compute the nodes of a chunk over a cache that lasts as long as it."""
        pool = PagePool(self.model, limits.pages_of(batches), device=self.world.device, dtype=self.dtype)
        for batch in batches:
            width = batch[0].positions
            starts = [limits.begin(node, width) for node in batch]
            _find_pages(batch, starts, pool)
            pool.select([(node.pages, start) for node, start in zip(batch, starts, strict=True)], width)
            pool.reserve(width)
            self._score(_padded(batch, starts, width), greedy, results, cache=pool)
            for node, start in zip(batch, starts, strict=True):
                if node.targets:  # nothing goes on from it
                    pool.give_back(node.pages[start // PAGE:])

    def _score(self, batch: "_Batch", greedy: bool, results: Tensor, cache: PagePool | None = None) -> None:
        """Add what a batch's targets say of their requests to `results` (2, requests)."""
        tokens, at, targets = (x.to(self.world.device) for x in (batch.tokens, batch.at, batch.targets))
        options = {"cache": cache}
        if batch.doc_start is not None:
            options = {"doc_start": batch.doc_start.to(self.world.device), "restart_positions": True}
        if greedy:
            logits = self.strategy(tokens, at=at, **options)  # (B, K, V)
            losses = ops.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
            missed = (logits.argmax(-1) != targets) & (targets != IGNORED)
            results[1].index_add_(0, batch.requests.flatten(), missed.flatten().double().cpu())
        else:
            losses = self.strategy(tokens, targets, at=at, **options)  # (B, K)
        results[0].index_add_(0, batch.requests.flatten(), losses.flatten().double().cpu(), alpha=-1)

    def _keep_pace(self, calls: int) -> None:
        """Run the model as often as the rank with the most batches did: it may take all of them to gather weights."""
        of_ranks = torch.zeros(self.world.dp_size, dtype=torch.int64)
        of_ranks[self.world.dp_rank] = calls
        none = torch.zeros(1, 1, dtype=torch.int64, device=self.world.device)
        for _ in range(int(self.world.sum(of_ranks).max()) - calls):
            self.strategy(none, at=none)


class _Batch(NamedTuple):
    """Inputs of one forward pass: B rows of T tokens, K places of targets in each."""

    tokens: Tensor  # (B, T) int64
    at: Tensor  # (B, K) int64: positions after which the targets stand
    targets: Tensor  # (B, K) int64, IGNORED where there is none
    requests: Tensor  # (B, K) int64: whose they are
    doc_start: Tensor | None = None  # (B, T) int32


def _packed(batch: Sequence[Node]) -> _Batch:
    """Requests behind each other in one row, each a document of its own."""
    ends = list(itertools.accumulate(len(node.text) for node in batch))
    at = [range(end - len(node.targets), end) for node, end in zip(batch, ends, strict=True)]
    requests = [[node.request] * len(node.targets) for node in batch]
    doc_start = [[end - len(node.text)] * len(node.text) for node, end in zip(batch, ends, strict=True)]
    chain = itertools.chain.from_iterable
    tokens, at, targets, requests = (torch.tensor([*chain(values)])[None] for values in (
        (node.text for node in batch), at, (node.targets for node in batch), requests))
    return _Batch(tokens, at, targets, requests, torch.tensor([*chain(doc_start)], dtype=torch.int32)[None])


def _padded(batch: Sequence[Node], starts: Sequence[int], width: int) -> _Batch:
    """A row for each node: its tokens from `starts` on."""
    places = (len(batch), max(1, *(len(node.targets) for node in batch)))  # (B, K)
    tokens = torch.zeros(len(batch), width, dtype=torch.int64)
    at, targets = torch.zeros(places, dtype=torch.int64), torch.full(places, IGNORED)
    for i, (node, start) in enumerate(zip(batch, starts, strict=True)):
        end, n = len(node.text) - start, len(node.targets)
        tokens[i, :end] = torch.tensor(node.text[start:])
        if n:
            at[i, :n], targets[i, :n] = torch.arange(end - n, end), torch.tensor(node.targets)
    return _Batch(tokens, at, targets, torch.tensor([[node.request] for node in batch]).expand(places))


def _find_pages(batch: Sequence[Node], starts: Sequence[int], pool: PagePool) -> None:
    """Give the nodes pages: those that their parents have filled up to `starts`, a copy of one that is filled in part,
    and new ones."""
    sources, copies = [], []
    for node, start in zip(batch, starts, strict=True):
        above = node.parent.pages if node.parent else []
        full = start // PAGE
        own = pool.take(pages_for(len(node.text)) - full)
        node.pages = above[:full] + own
        if start % PAGE:
            sources.append(above[full])
            copies.append(own[0])
    if sources:
        pool.copy(sources, copies)


def open_scorer(checkpoint: Path, *, strategy: str = "auto", device: str = "cpu", precision: str = "fp32",
                verify: bool = True, batch_tokens: int = BATCH_TOKENS) -> Scorer:
    """A checkpoint's language model, spread over the processes of this run; a collective call.

    strategy: as parallel.strategy; any of them reads what any other saved. precision: as train.precision.
    Raises UserError for a damaged checkpoint or a classifier.
    """
    prepared, tokenizer = open_strategy(checkpoint, strategy=strategy, device=device, precision=precision,
                                        verify=verify)
    return Scorer(prepared, tokenizer, batch_tokens=batch_tokens)


def open_strategy(checkpoint: Path, *, strategy: str, device: str, precision: str,
                  verify: bool) -> tuple[Strategy, Tokenizer]:
    """(strategy with the checkpoint's weights, its configuration resolved for evaluation; tokenizer)."""
    world = open_world(strategy, device)
    ranks = Ranks(None)
    if verify:
        ranks.on_coordinator(lambda: layout.verify(checkpoint))
    config, tokenizer = ranks.on_all(lambda: _read(checkpoint))
    prepared = ranks.on_all(lambda: make_strategy(world, evaluation_config(config, world.strategy, precision)))
    model = build_meta(config.model).eval()
    # DeepSpeed shards an optimizer, used or not.
    factory = (lambda parameters: build_adamw(parameters, config.optim)) if world.strategy.startswith("zero") else None
    prepared.prepare(model, factory)
    load_weights(checkpoint, prepared.model_state())
    prepared.loaded()
    return prepared, tokenizer


def open_world(strategy: str, device: str) -> World:
    """The processes that evaluate: this one alone, or those that a launcher started."""
    if env_world_size() == 1 and strategy in ("auto", "single"):
        set_up_process(torch.device(device))
        return World(0, 1, torch.device(device), "single", None)
    return init_world(ParallelConfig(strategy=strategy, device=device.partition(":")[0],
                                     threads=torch.get_num_threads() if env_world_size() == 1 else 0))


def evaluation_config(config: Config, strategy: str, precision: str) -> Config:
    """A run's configuration without what matters in training alone; adapters are merged into the weights."""
    train = dataclasses.replace(config.train, precision=precision, compile=False, activation_checkpointing="none")
    return dataclasses.replace(config, train=train, optim=OptimConfig(), lora=LoRAConfig(),
                               parallel=ParallelConfig(strategy=strategy))


def _read(checkpoint: Path) -> tuple[Config, Tokenizer]:
    config = read_config(checkpoint)
    refuse_classifier(checkpoint, config)
    return config, Tokenizer.load(checkpoint / "tokenizer")
