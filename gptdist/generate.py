"""Text from a model: paged key/value cache, sampling, stop strings, streaming, batches of prompts.

Every row draws from its own generator, seeded by (seed, row), so a prompt's text does not depend on what is beside it.
Sources: Holtzman et al. 2020 (top-p), Keskar et al. 2019 (repetition penalty), Kwon et al. 2023 (paged cache).
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from gptdist.config import ModelConfig
from gptdist.data.tokenizer import StreamDecoder, Tokenizer
from gptdist.errors import UserError
from gptdist.model import LanguageModel

PAGE = 16  # tokens per cache page: at most 15 unused slots a row
SCRATCH = 0  # the page of a PagePool where padding goes; no row owns it


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen. temperature 0 is greedy; top_k 0, top_p 1 and repetition_penalty 1 are off."""

    max_new_tokens: int = 200
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        checks = (
            (self.max_new_tokens >= 1, f"max new tokens is {self.max_new_tokens}, expected at least 1"),
            (self.temperature == 0 or 1e-3 <= self.temperature < float("inf"),
             f"temperature is {self.temperature}, expected 0 (greedy) or at least 0.001"),
            (self.top_k >= 0, f"top-k is {self.top_k}, expected 0 (off) or more"),
            (0 < self.top_p <= 1, f"top-p is {self.top_p}, expected 0 < p <= 1"),
            (1e-3 <= self.repetition_penalty <= 1e3,
             f"repetition penalty is {self.repetition_penalty}, expected 1 (off), or 0.001 to 1000"),
            (all(self.stop), "a stop string is empty"),
            (0 <= self.seed < 2**40, f"seed is {self.seed}, expected 0 <= seed < 2^40"),
        )
        for ok, message in checks:
            if not ok:
                raise UserError(message)


class PagedCache:
    """Keys and values in pages of PAGE tokens, so that rows of different lengths share one pool.

    k, v per layer: (N pages, PAGE, Hkv, D). block_table (B, P) int32: page of each PAGE tokens of a row.
    lengths (B,) int64: tokens of each row written and advanced over.
    """

    def __init__(self, config: ModelConfig, rows: int, capacity: int, *, device: torch.device, dtype: torch.dtype):
        pages_per_row = -(-capacity // PAGE)
        n_pages = rows * pages_per_row
        shape = (n_pages, PAGE, config.kv_heads, config.head_dim)
        self.k = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layers)]
        self.v = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layers)]
        self.block_table = torch.zeros((rows, pages_per_row), dtype=torch.int32, device=device)
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        self._free = list(range(n_pages - 1, -1, -1))
        self._pages: list[list[int]] = [[] for _ in range(rows)]

    def reserve(self, new_tokens: int) -> None:
        """Give every row pages for `new_tokens` more; the slots the next forward writes."""
        for row, length in enumerate(self.lengths.tolist()):
            pages = self._pages[row]
            while len(pages) * PAGE < length + new_tokens:
                page = self._free.pop()
                self.block_table[row, len(pages)] = page
                pages.append(page)
        positions = self.lengths[:, None] + torch.arange(new_tokens, device=self.lengths.device)  # (B, T)
        page = self.block_table.long().gather(1, positions // PAGE)
        self._slots = (page * PAGE + positions % PAGE).flatten()  # (B*T,)

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, T, Hkv, D) in the reserved slots; returns the layer's pages."""
        for pages, new in ((self.k[layer], k), (self.v[layer], v)):
            pages.view(-1, *pages.shape[2:]).index_copy_(0, self._slots, new.flatten(0, 1).to(pages.dtype))
        return self.k[layer], self.v[layer]

    def advance(self, counts: Tensor) -> None:
        """Count the (B,) tokens of each row that the last forward wrote and that are not padding."""
        self.lengths = self.lengths + counts

    def keep(self, rows: list[int]) -> None:
        """Drop all other rows; their pages are free again."""
        kept = set(rows)
        for row, pages in enumerate(self._pages):
            if row not in kept:
                self._free.extend(pages)
        self._pages = [self._pages[row] for row in rows]
        self.block_table, self.lengths = self.block_table[rows], self.lengths[rows]


def pages_for(n_tokens: int) -> int:
    return -(-n_tokens // PAGE)


class PagePool(PagedCache):
    """A PagedCache of `n_pages` pages, whose rows are those that `select` names before each forward."""

    def __init__(self, config: ModelConfig, n_pages: int, *, device: torch.device, dtype: torch.dtype):
        super().__init__(config, n_pages + 1, PAGE, device=device, dtype=dtype)  # n + 1 pages, the scratch page too
        self.n_pages = n_pages
        self._free.remove(SCRATCH)
        self._pages = []

    def take(self, n_pages: int) -> list[int]:
        return [self._free.pop() for _ in range(n_pages)]

    def give_back(self, pages: Sequence[int]) -> None:
        self._free.extend(pages)

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Whole pages, keys and values of all layers: a row goes on from another that ends within a page."""
        for pages in (*self.k, *self.v):
            pages[torch.tensor(targets, device=pages.device)] = pages[torch.tensor(sources, device=pages.device)]

    def select(self, rows: Sequence[tuple[list[int], int]], new_tokens: int) -> None:
        """The next forward is over rows of (pages, tokens written), each by `new_tokens`; padding may need more pages.
        """
        n = max(max(len(pages), pages_for(written + new_tokens)) for pages, written in rows)
        self._pages = [pages + [SCRATCH] * (n - len(pages)) for pages, _ in rows]
        self.block_table = torch.tensor(self._pages, dtype=torch.int32).to(self.k[0].device)
        self.lengths = torch.tensor([written for _, written in rows]).to(self.k[0].device)


@dataclass
class Row:
    """One prompt being continued."""

    index: int
    tokens: list[int]  # prompt and continuation
    n_prompt: int
    decoder: StreamDecoder
    generator: torch.Generator
    start: int = 0  # first token that still fits in the context
    text: str = ""  # decoded continuation, cut at a stop string
    emitted: int = 0  # characters already streamed
    finish: str | None = None  # "stop", "end" (end-of-text token) or "length"


@dataclass(frozen=True)
class Completion:
    text: str
    tokens: list[int] = field(repr=False)
    finish: str


Prompt = str | Sequence[int]  # a text, or token ids, which may be special ones


class Generator:
    """Continues prompts with one model. `model` is in eval mode on `device`.

    During training the weights may be spread over processes, which then all generate the same: `call` runs the model
    where `model` itself cannot (a strategy in its evaluating() context), `device` and `dtype` are what it computes on
    and in, and `agree` makes the chosen tokens those of one process, so that all of them run the model equally often.
    """

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer, *, call: Callable[..., Tensor] | None = None,
                 device: torch.device | None = None, dtype: torch.dtype | None = None,
                 agree: Callable[[list[int]], list[int]] = list):
        self.model, self.tokenizer = model, tokenizer
        self.context = model.config.context
        weight = model.wte.weight
        self.device, self.dtype = device or weight.device, dtype or weight.dtype
        self._call, self._agree = call or model, agree

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, *, batch_size: int = 16) -> list[Completion]:
        """Continue every prompt, `batch_size` at a time; completions in the prompts' order."""
        if batch_size < 1:
            raise UserError(f"batch size is {batch_size}, expected at least 1")
        rows = self._rows(prompts, sampling)
        for first in range(0, len(rows), batch_size):
            for _ in self._run(rows[first:first + batch_size], sampling):
                pass
        return [Completion(row.text, row.tokens[row.n_prompt:], row.finish or "length") for row in rows]

    def stream(self, prompt: Prompt, sampling: Sampling) -> Iterator[str]:
        """Continue one prompt, yielding text as soon as it cannot be part of a stop string."""
        yield from (text for _, text in self._run(self._rows([prompt], sampling), sampling))

    def _rows(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Row]:
        rows = []
        for index, prompt in enumerate(prompts):
            tokens = (self.tokenizer.encode(prompt) if isinstance(prompt, str) else [*prompt]) or [self.tokenizer.eot]
            generator = torch.Generator().manual_seed(sampling.seed * 1_000_003 + index)
            rows.append(Row(index, tokens, len(tokens), StreamDecoder(self.tokenizer), generator))
        return rows

    @torch.no_grad()  # not inference_mode: weights that a strategy gathers here are trained with later
    def _run(self, rows: list[Row], sampling: Sampling) -> Iterator[tuple[int, str]]:
        """Decode until every row has finished; yields (row index, new text)."""
        active, cache, logits = rows, None, None
        while active:
            if logits is None:
                cache, logits = self._prefill(active)
            chosen = self._agree([self._choose(row, logits[i], sampling) for i, row in enumerate(active)])
            for row, token in zip(active, chosen, strict=True):
                text = self._accept(row, token, sampling)
                if text:
                    yield row.index, text
            going_on = [i for i, row in enumerate(active) if row.finish is None]
            if len(going_on) < len(active):
                active = [active[i] for i in going_on]
                cache.keep(going_on)
            logits = None
            if active and int(cache.lengths.max()) < self.context:
                logits = self._forward(cache, torch.tensor([[row.tokens[-1]] for row in active]),
                                       torch.ones(len(active), dtype=torch.int64))

    def _prefill(self, rows: list[Row]) -> tuple[PagedCache, Tensor]:
        """A new cache with every row's tokens; a row as long as the context goes on from its last half."""
        for row in rows:
            if len(row.tokens) - row.start > self.context:
                row.start = len(row.tokens) - max(1, self.context // 2)
        texts = [row.tokens[row.start:] for row in rows]
        counts = torch.tensor([len(text) for text in texts])
        tokens = torch.zeros((len(rows), int(counts.max())), dtype=torch.int64)
        for i, text in enumerate(texts):
            tokens[i, :len(text)] = torch.tensor(text)  # padded on the right: later tokens overwrite the padding
        cache = PagedCache(self.model.config, len(rows), self.context, device=self.device, dtype=self.dtype)
        return cache, self._forward(cache, tokens, counts)

    def _forward(self, cache: PagedCache, tokens: Tensor, counts: Tensor) -> Tensor:
        """tokens (B, T), of which the first counts[b] are real -> logits of each row's last real token (B, V)."""
        counts = counts.to(self.device)
        cache.reserve(tokens.shape[1])
        logits = self._call(tokens.to(self.device), cache=cache, at=counts - 1)
        cache.advance(counts)
        return logits

    def _choose(self, row: Row, logits: Tensor, sampling: Sampling) -> int:
        """The next token of a row from its logits (V,)."""
        if sampling.temperature == 0 and sampling.repetition_penalty == 1.0:
            return int(logits.argmax())  # which neither top-k nor top-p removes
        scores = filter_logits(logits.float().cpu(), row.tokens, sampling)
        if sampling.temperature == 0:
            return int(scores.argmax())
        return int(torch.multinomial(scores.softmax(-1), 1, generator=row.generator))

    def _accept(self, row: Row, token: int, sampling: Sampling) -> str:
        """Append a token; returns the text that may be shown, and sets row.finish at an end."""
        if token == self.tokenizer.eot:
            row.finish = "end"
        else:
            row.tokens.append(token)
            row.text += row.decoder.push(token)
            if len(row.tokens) - row.n_prompt >= sampling.max_new_tokens:
                row.finish = "length"
        if row.finish is not None:
            row.text += row.decoder.finish()
        cut = min((at for stop in sampling.stop if (at := row.text.find(stop)) >= 0), default=None)
        if cut is not None:
            row.text, row.finish = row.text[:cut], "stop"
        shown = len(row.text) if row.finish else len(row.text) - _held_back(row.text, sampling.stop)
        new, row.emitted = row.text[row.emitted:shown], max(row.emitted, shown)
        return new


def filter_logits(logits: Tensor, previous: Sequence[int], sampling: Sampling) -> Tensor:
    """Apply repetition penalty, temperature, top-k and top-p, in this order, to logits (V,) fp32."""
    logits = logits.clone()
    if sampling.repetition_penalty != 1.0:
        seen = torch.tensor(sorted(set(previous)))
        values, penalty = logits[seen], sampling.repetition_penalty
        logits[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if sampling.temperature > 0:
        logits /= sampling.temperature
    if 0 < sampling.top_k < logits.numel():
        logits[logits < logits.topk(sampling.top_k).values[-1]] = -torch.inf
    if sampling.top_p < 1.0:
        ordered, ids = logits.sort(descending=True)
        mass_before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        removed = mass_before >= sampling.top_p
        removed[0] = False  # the likeliest stays for any top_p, which in fp32 may be 0
        logits[ids[removed]] = -torch.inf
    return logits


def _held_back(text: str, stops: Sequence[str]) -> int:
    """Characters at the end of `text` that may be the beginning of a stop string."""
    longest = max((len(stop) for stop in stops), default=1) - 1
    for n in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-n:]) for stop in stops):
            return n
    return 0


def few_shot_prompt(examples: Sequence[dict[str, str]], query: str, template: str) -> str:
    """Examples and a query in one prompt. `template` has {input} and {output}; the query ends where {output} begins."""
    if "{input}" not in template or "{output}" not in template:
        raise UserError(f"few-shot template {template!r} needs both {{input}} and {{output}}")
    shots = "".join(template.replace("{input}", e["input"]).replace("{output}", e["output"]) for e in examples)
    return shots + template.split("{output}")[0].replace("{input}", query).rstrip(" ")


def read_examples(path: str) -> list[dict[str, str]]:
    """Few-shot examples: JSONL with `input` and `output` in every line."""
    examples = []
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        value = _json_line(path, number, line)
        if not isinstance(value, dict) or not all(isinstance(value.get(k), str) for k in ("input", "output")):
            raise UserError(f"{path} line {number}: expected an object with the strings input and output")
        examples.append(value)
    if not examples:
        raise UserError(f"{path} holds no examples: expected JSONL with input and output")
    return examples


def read_prompts(path: str) -> list[str]:
    """Prompts from a text file, one a line; a .jsonl file has a JSON string or {"prompt": ...} a line."""
    lines = [(number, line) for number, line in enumerate(_read_text(path).split("\n"), 1) if line.strip()]
    if path.endswith(".jsonl"):
        lines = [_json_prompt(path, number, line) for number, line in lines]
    else:
        lines = [line.rstrip("\r") for _, line in lines]
    if not lines:
        raise UserError(f"{path} holds no prompts: expected one a line")
    return lines


def _json_prompt(path: str, number: int, line: str) -> str:
    value = _json_line(path, number, line)
    prompt = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(prompt, str):
        raise UserError(f'{path} line {number}: expected a string or {{"prompt": "..."}}, got {line[:60]!r}')
    return prompt


def _json_line(path: str, number: int, line: str) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:  # ValueError also: a number of thousands of digits
        raise UserError(f"{path} line {number} is not JSON: {getattr(error, 'msg', error)}") from error


def _read_text(path: str) -> str:
    """A UTF-8 file as it is: a lone carriage return inside a line ends no line."""
    try:
        return Path(path).read_bytes().decode()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start})") from error
