"""Continuous batching: all requests are rows of one batch, which they join and leave between two tokens.

A step computes one chunk of the new rows' prompts and one token of every other row. So a new request waits for no other
to end, and a long prompt delays the others by one chunk at a time. A row gets all the pages that it may need when it
joins: it never has to be stopped for want of memory. Rows draw from generators of their own: what a seed says does not
depend on what else runs, but for the rounding of matrix products, which may differ with the number of rows.
Sources: Yu et al., "Orca" (2022); Agrawal et al., "Sarathi" (2023), chunked prompts.
"""

import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from gptdist.data.tokenizer import StreamDecoder, Tokenizer
from gptdist.errors import UserError
from gptdist.generate import Generator, Row, Sampling, pages_for
from gptdist.model import LanguageModel
from gptdist.serve.pages import SharedPool


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the engine holds at once."""

    rows: int = 32  # computed together
    cache_tokens: int = 0  # of all rows; 0: 16 times the context
    queue: int = 128  # rows that may wait
    chunk: int = 256  # prompt tokens of one step
    timeout_s: float = 300.0  # of one request, from its arrival

    def __post_init__(self) -> None:
        for name in ("rows", "queue", "chunk", "timeout_s"):
            if not getattr(self, name) > 0:
                raise UserError(f"the server's limit of {name} is {getattr(self, name)}, expected more than 0")


class BusyError(Exception):
    """The queue is full."""


@dataclass(frozen=True)
class TokenScore:
    """A chosen token: its log probability under the model itself, and the likeliest tokens at its place."""

    token: int
    logprob: float
    top: list[tuple[int, float]]
    offset: int  # characters of the text before it


@dataclass(frozen=True)
class Event:
    """News of one choice of a job."""

    job: "Job"
    choice: int
    text: str = ""
    scores: Sequence[TokenScore] = ()
    finish: str | None = None  # "stop", "end" or "length", as Row's
    error: str | None = None  # "timeout" or "failed": there will be no more


@dataclass(eq=False)
class Job:
    """A request: `n_choices` rows, of one prompt or several."""

    n_choices: int
    n_prompt_tokens: int
    top_logprobs: int | None
    deadline: float
    submitted: float = field(default_factory=time.monotonic)
    first_token: float | None = None
    n_tokens: int = 0  # generated
    n_cached: int = 0  # of the prompts, found in the cache
    cancelled: bool = False

    def cancel(self) -> None:
        """Its rows leave before the next token. From any thread."""
        self.cancelled = True


@dataclass(eq=False, kw_only=True)
class BatchRow(Row):
    """A choice that is being computed, or waits to be."""

    job: Job
    sampling: Sampling
    leader: "BatchRow | None"  # an earlier choice of the same prompt, whose pages this one shares
    pages: list[int] = field(default_factory=list)
    written: int = 0  # tokens in the cache
    served: int = 0  # the step of its last chunk
    scores: list[TokenScore] = field(default_factory=list)  # of tokens whose text is held back

    @property
    def in_prompt(self) -> bool:
        return self.written < self.n_prompt


class Engine(Generator):
    """Computes jobs. `deliver` gets the events of each step, on the engine's thread."""

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer, limits: Limits,
                 deliver: Callable[[list[Event]], None]):
        """Raises UserError where the cache could not hold a single text as long as the context."""
        super().__init__(model, tokenizer)
        self.limits, self.deliver = limits, deliver
        n_pages = pages_for(limits.cache_tokens or 16 * self.context)
        if n_pages < pages_for(self.context):
            raise UserError(f"a cache of {limits.cache_tokens} tokens is too small for one text: the model's context "
                            f"is {self.context}")
        self.pool = SharedPool(model.config, n_pages, device=self.device, dtype=self.dtype)
        self.rows: list[BatchRow] = []
        self.waiting: deque[BatchRow] = deque()
        self.steps = self.failures = 0
        self._wake = threading.Condition()
        self._events: list[Event] = []  # of the step under way
        self._closing = False
        self._thread: threading.Thread | None = None

    # from any thread

    def submit(self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, n: int = 1,
               top_logprobs: int | None = None) -> Job:
        """A job of n choices for each prompt; choice i of prompt p has the number p n + i, and stream i of the seed.

        An answer ends at the context's end. Raises UserError for a prompt that leaves no room for one, BusyError where
        the queue has no place for them.
        """
        prompts = [list(prompt) or [self.tokenizer.eot] for prompt in prompts]
        for prompt in prompts:
            if len(prompt) >= self.context:
                raise UserError(f"the prompt has {len(prompt)} tokens, the model's context is {self.context}, and an "
                                f"answer needs at least one: shorten the prompt")
        deadline = time.monotonic() + self.limits.timeout_s
        job = Job(n * len(prompts), sum(map(len, prompts)), top_logprobs, deadline)
        rows = []
        for p, prompt in enumerate(prompts):
            leader, room = None, min(sampling.max_new_tokens, self.context - len(prompt))
            for i in range(n):
                generator = torch.Generator().manual_seed(sampling.seed * 1_000_003 + i)
                row = BatchRow(p * n + i, prompt.copy(), len(prompt), StreamDecoder(self.tokenizer), generator, job=job,
                               sampling=replace(sampling, max_new_tokens=room), leader=leader)
                leader = leader or row
                rows.append(row)
        with self._wake:
            if self._closing or (self.waiting and len(self.waiting) + len(rows) > self.limits.queue):
                raise BusyError
            self.waiting.extend(rows)
            self._wake.notify()
        return job

    def start(self) -> None:
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread after its step; jobs that are not done get no more events."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join()

    # on the engine's thread

    def _loop(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._closing or self.rows or self.waiting)
                if self._closing:
                    return
            try:
                self.step()
            except Exception:  # whatever it is, it must not end what comes later
                traceback.print_exc()
                self._fail()
            if self._events:
                self.deliver(self._events)
                self._events = []

    @torch.inference_mode()
    def step(self) -> None:
        """Let rows leave and join, then compute a chunk of the prompts and a token of every other row."""
        self.steps += 1
        self._dismiss()
        self._admit()
        going_on = [row for row in self.rows if not row.in_prompt]
        if prompts := [row for row in self.rows if row.in_prompt]:
            self._compute_prompts(prompts)
        if going_on:
            tokens = torch.tensor([[row.tokens[-1]] for row in going_on])
            logits = self._compute(going_on, tokens, [1] * len(going_on))
            for row, scores in zip(going_on, logits, strict=True):
                self._try_next(row, scores)

    def _dismiss(self) -> None:
        """Rows of jobs that were cancelled, or took too long, leave."""
        now = time.monotonic()

        def stays(row: BatchRow) -> bool:
            late = now > row.job.deadline
            if late and not row.job.cancelled:
                self._events.append(Event(row.job, row.index, error="timeout"))
            return not (late or row.job.cancelled)

        for row in [row for row in self.rows if not stays(row)]:
            self._leave(row)
        with self._wake:
            self.waiting = deque(row for row in self.waiting if stays(row))

    def _admit(self) -> None:
        """Rows join in the order of their arrival, while there are pages for them."""
        with self._wake:
            for row in list(self.waiting):
                if len(self.rows) == self.limits.rows:
                    return
                if row.leader in self.rows and row.leader.in_prompt:
                    continue  # what it shares is not written yet
                joined = self.pool.join(row.tokens, row.n_prompt + row.sampling.max_new_tokens)
                if joined is None:
                    return
                row.pages, row.written = joined
                row.job.n_cached += row.written
                self.waiting.remove(row)
                self.rows.append(row)

    def _compute_prompts(self, rows: list[BatchRow]) -> None:
        """A chunk of the prompts: of those that have waited longest, as many as fit."""
        chunk, width, chosen = self.limits.chunk, 0, []
        for row in sorted(rows, key=lambda row: row.served):
            wider = max(width, min(row.n_prompt - row.written, chunk))
            if chosen and wider * (len(chosen) + 1) > chunk:
                break
            width = wider
            chosen.append(row)
        width = min(width, *(self.context - row.written for row in chosen))  # padding has positions, too
        counts = [min(row.n_prompt - row.written, width) for row in chosen]
        tokens = torch.zeros((len(chosen), width), dtype=torch.int64)
        for i, (row, count) in enumerate(zip(chosen, counts, strict=True)):
            tokens[i, :count] = torch.tensor(row.tokens[row.written:row.written + count])
            row.served = self.steps
        for row, logits in zip(chosen, self._compute(chosen, tokens, counts), strict=True):
            if not row.in_prompt:
                self.pool.remember(row.tokens, row.pages)
                self._try_next(row, logits)

    def _compute(self, rows: list[BatchRow], tokens: Tensor, counts: list[int]) -> Tensor:
        """tokens (B, T), of which the first counts[b] are real -> logits (B, V) after each row's last real token."""
        self.pool.select([(row.pages, row.written) for row in rows], tokens.shape[1])
        logits = self._forward(self.pool, tokens, torch.tensor(counts)).float().cpu()
        for row, count in zip(rows, counts, strict=True):
            row.written += count
        return logits

    def _try_next(self, row: BatchRow, logits: Tensor) -> None:
        """_next, whose failure is that of one row."""
        try:
            self._next(row, logits)
        except Exception:
            traceback.print_exc()
            self.failures += 1
            if row in self.rows:
                self._leave(row)
            self._events.append(Event(row.job, row.index, error="failed"))

    def _next(self, row: BatchRow, logits: Tensor) -> None:
        """Choose a row's next token from its logits (V,); an event tells what can be shown of it."""
        job = row.job
        token = self._choose(row, logits, row.sampling)
        if job.top_logprobs is not None and token != self.tokenizer.eot:
            row.scores.append(_score(logits, token, job.top_logprobs, len(row.text)))
        text = self._accept(row, token, row.sampling)
        job.n_tokens += 1
        job.first_token = job.first_token or time.monotonic()
        if not text and row.finish is None:
            return
        scores = [score for score in row.scores if score.offset < max(len(row.text), 1) or row.finish != "stop"]
        row.scores = []
        if row.finish is not None:
            self._leave(row)
        self._events.append(Event(job, row.index, text, scores, row.finish))

    def _leave(self, row: BatchRow) -> None:
        self.pool.remember(row.tokens[:row.written], row.pages)
        self.pool.leave(row.pages)
        self.rows.remove(row)

    def _fail(self) -> None:
        """A step has failed: its rows get no answer."""
        self.failures += 1
        rows, self.rows = self.rows, []
        for row in rows:
            self.pool.leave(row.pages)
            self._events.append(Event(row.job, row.index, error="failed"))

    @property
    def n_pages_used(self) -> int:
        return self.pool.n_pages - self.pool.available


def _score(logits: Tensor, token: int, n_top: int, offset: int) -> TokenScore:
    logprobs = logits.log_softmax(-1)
    top = logprobs.topk(min(n_top, len(logprobs)))
    return TokenScore(token, float(logprobs[token]), list(zip(top.indices.tolist(), top.values.tolist(), strict=True)),
                      offset)


def cache_bytes(engine: Engine) -> int:
    """Memory of the pool."""
    return sum(t.numel() * t.element_size() for t in (*engine.pool.k, *engine.pool.v))
