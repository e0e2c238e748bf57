"""Log-likelihoods and greedy continuations from a model under any strategy: what all evaluation tasks are made of.

Requests are sorted by length and cut into batches of about `batch_tokens` positions; batch i is rank i mod W's. The
results stand in the requests' order on every rank. A batch's shape changes a score by rounding alone.

A context that several requests have, such as a question with its choices, is computed once for them, in whole pages of
the key/value cache; each of them goes on from its pages, as rows of generate.py do.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gptdist.checkpoint import layout
from gptdist.checkpoint.ranks import Ranks
from gptdist.checkpoint.restore import load_weights, read_config, refuse_classifier
from gptdist.config import Config, LoRAConfig, OptimConfig, ParallelConfig
from gptdist.data.examples import WIDTH_MULTIPLE
from gptdist.data.loader import IGNORED
from gptdist.data.tokenizer import Tokenizer
from gptdist.errors import UserError
from gptdist.generate import PAGE, Generator, PagedCache, Sampling
from gptdist.model import build_meta
from gptdist.optim.adamw import build_adamw
from gptdist.parallel.host import set_up_process
from gptdist.parallel.strategies import Strategy, make_strategy
from gptdist.parallel.world import World, env_world_size, init_world

BATCH_TOKENS = 8192
MAX_LOGITS = 1 << 26  # values of the logits of one batch: 256 MB in fp32
MAX_CACHE = 1 << 26  # of the keys and values of one batch, likewise
LEAST_SAVED = 0.2  # share of the positions of a context's requests for which it is computed apart from them


@dataclass(frozen=True)
class Request:
    """A continuation whose log-likelihood is wanted. An empty context stands for the end of another document."""

    context: Sequence[int]
    continuation: Sequence[int]  # at least one token, at most the model's context


@dataclass
class Row:
    """A request as the model reads it. The first `shared` tokens, whole pages, are computed once for several rows."""

    tokens: list[int]  # the context's length at most, and one target more
    n: int  # how many of the last ones are the continuation
    shared: int = 0

    @property
    def context(self) -> tuple[int, ...]:
        return tuple(self.tokens[:-self.n])

    @property
    def positions(self) -> int:
        """What is computed of this row alone."""
        return len(self.tokens) - 1 - self.shared


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
        rows = [self._row(request) for request in requests]
        share_contexts(rows)
        results = torch.zeros(len(rows), 2, dtype=torch.float64)
        rank, size = self.world.dp_rank, self.world.dp_size
        with self.strategy.evaluating():
            for shared in (False, True):  # apart: ranks run the model equally often
                batches = list(self._batches(rows, shared, greedy))
                for first in range(0, len(batches), size):
                    mine = first + rank < len(batches)
                    batch = batches[first + rank if mine else first]  # a rank without one takes part all the same
                    values = self._score_batch([rows[i] for i in batch], greedy)
                    if mine:
                        results[batch] = values
        logprobs, matches = self.world.sum(results).T.tolist()
        return [Score(logprob, bool(match) if greedy else None)
                for logprob, match in zip(logprobs, matches, strict=True)]

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

    def _row(self, request: Request) -> Row:
        context, n = list(request.context) or [self.tokenizer.eot], len(request.continuation)
        assert 0 < n <= self.model.context, f"a continuation of {n} tokens, the context has {self.model.context}"
        return Row([*context, *request.continuation][-(self.model.context + 1):], n)

    def _batches(self, rows: Sequence[Row], shared: bool, greedy: bool) -> Iterator[list[int]]:
        """Numbers of the rows of each batch, the longest first, those of one context beside each other; of the rows
        that share their context's beginning, or of the others."""
        numbers = [i for i, row in enumerate(rows) if bool(row.shared) == shared]
        batch, width, longest = [], 0, 0  # of the batch: most positions, longest continuation
        for i in sorted(numbers, key=lambda i: (-rows[i].shared, rows[i].context if shared else (),
                                                -rows[i].positions, i)):
            row = rows[i]
            width, longest = max(width, row.positions), max(longest, row.n)
            if batch and not self._fits(len(batch) + 1, width, rows[batch[0]].shared, longest if greedy else 0):
                yield batch
                batch, width, longest = [], row.positions, row.n
            batch.append(i)
        if batch:
            yield batch

    def _fits(self, n_rows: int, width: int, shared: int, longest: int) -> bool:
        """Whether rows of such a width, beside `shared` positions, and with so many logits each make one batch."""
        model, padded = self.model, self._width(width, shared)
        cached = 2 * model.n_layers * model.kv_heads * model.head_dim * (shared + padded) if shared else 0
        return (n_rows * padded <= self.batch_tokens and n_rows * longest * model.vocab_size <= MAX_LOGITS
                and n_rows * cached <= MAX_CACHE
                and shared + width <= model.context)  # the padding of the row that shares most ends there

    def _width(self, width: int, shared: int) -> int:
        return min(-(-width // WIDTH_MULTIPLE) * WIDTH_MULTIPLE, self.model.context - shared)

    def _score_batch(self, rows: Sequence[Row], greedy: bool) -> Tensor:
        """(rows, 2) fp64 on the CPU: log-likelihood, and 1 where all tokens are the likeliest ones (if asked for)."""
        width = self._width(max(row.positions for row in rows), rows[0].shared)
        inputs = torch.zeros(len(rows), width, dtype=torch.int64)
        targets = torch.full_like(inputs, IGNORED)
        for i, row in enumerate(rows):
            inputs[i, :row.positions] = torch.tensor(row.tokens[row.shared:-1])
            targets[i, row.positions - row.n:row.positions] = torch.tensor(row.tokens[-row.n:])
        device = self.world.device
        cache = self._cache(rows, width) if rows[0].shared else None
        if not greedy:
            losses = self.strategy(inputs.to(device), targets.to(device), cache=cache)
            return torch.stack([-losses.double().sum(1).cpu(), torch.zeros(len(rows), dtype=torch.float64)], 1)
        offsets = torch.arange(max(row.n for row in rows))  # (K,)
        first = torch.tensor([row.positions - row.n for row in rows])[:, None]
        real = offsets < torch.tensor([row.n for row in rows])[:, None]  # (B, K)
        at = torch.where(real, first + offsets, 0)
        wanted = targets.gather(1, at).clamp(min=0).to(device)
        logits = self.strategy(inputs.to(device), at=at.to(device), cache=cache)  # (B, K, V)
        chosen = logits.gather(-1, wanted[..., None]).squeeze(-1).double() - logits.double().logsumexp(-1)
        matches = (logits.argmax(-1) == wanted).cpu() | ~real
        return torch.stack([(chosen.cpu() * real).sum(1), matches.all(1).double()], 1)

    def _cache(self, rows: Sequence[Row], width: int) -> PagedCache:
        """A cache whose rows hold what these rows share, with room for `width` tokens after it."""
        numbers: dict[tuple[int, ...], int] = {}
        parents = [numbers.setdefault(tuple(row.tokens[:row.shared]), len(numbers)) for row in rows]
        counts = torch.tensor([len(tokens) for tokens in numbers])
        inputs = torch.zeros(len(numbers), rows[0].shared, dtype=torch.int64)
        for i, tokens in enumerate(numbers):
            inputs[i, :len(tokens)] = torch.tensor(tokens)
        device = self.world.device
        cache = PagedCache(self.model, len(rows), rows[0].shared + width, device=device, dtype=self.dtype)
        cache.keep(list(range(len(numbers))))
        cache.reserve(inputs.shape[1])
        self.strategy(inputs.to(device), cache=cache, at=torch.zeros_like(counts).to(device))
        cache.advance(counts.to(device))
        cache.fork(parents)
        cache.reserve(width)
        return cache


def share_contexts(rows: Sequence[Row]) -> None:
    """Set `shared` of the rows whose context several have, where that saves LEAST_SAVED of their positions."""
    groups = defaultdict(list)
    for row in rows:
        groups[row.context].append(row)
    for context, group in groups.items():
        pages = (len(context) - 1) // PAGE * PAGE  # the last token says what follows: each row has its own
        saved = pages * (len(group) - 1)
        if 0 < saved >= LEAST_SAVED * sum(row.positions for row in group):
            for row in group:
                row.shared = pages


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
