"""Prepares a dataset: read, clean, drop duplicates, hold out a split, tokenize, write shards; streamed and parallel.

The calling thread reads, cleans and writes; worker threads tokenize (tiktoken releases the GIL). At most
`2 * workers + 2` batches are in flight, so memory does not grow with the input.
"""

import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from gptdist.config import DataConfig
from gptdist.data.clean import Cleaner, SeenDigests
from gptdist.data.corpus import embedded_documents
from gptdist.data.format import TOKEN_DTYPES, token_dtype
from gptdist.data.read import DocumentReader, ReadSettings, find_files
from gptdist.data.split import Splitter
from gptdist.data.tokenizer import Tokenizer, build_tokenizer
from gptdist.data.writer import DEFAULT_SHARD_TOKENS, DatasetWriter, atomic_directory
from gptdist.errors import UserError

EMBEDDED = "embedded"
_BATCH_CHARS = 1 << 18  # of text for one task of a worker: large beside a task's cost, small beside memory
_BATCH_DOCUMENTS = 1024
_TOKENIZER_TRAINING_CHARS = 200_000_000  # BPE training counts words in memory; more text hardly changes the merges


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Settings of `prepare`."""

    inputs: list[str]
    """Files, globs, or the word `embedded` (the corpus that comes with Python)."""
    output: str
    """Directory to create: train/, val/, tokenizer/, report.json."""
    tokenizer: str = "gpt2"
    """bytes, char, gpt2, bpe:VOCAB, or a path; see `gptdist.data.tokenizer_build`."""
    text_field: str = "text"
    """Field of JSONL objects that has the text."""
    document_separator: str | None = None
    """Plain text: None (a file is one document), `blank-line`, or a string such as <|endoftext|>."""
    max_document_chars: int = 100_000
    """Longer plain-text documents are cut in several at the next end of a paragraph."""
    val_fraction: float = 0.05
    """Share held out for validation, [0, 1); 0 makes no val/."""
    split: Literal["documents", "tail"] = "documents"
    """documents: as data/split.py holds them out. tail: the input is one text, in memory, with nothing between
    documents and no <|endoftext|>; its first int((1 - val_fraction) n) of n characters train, the rest is held out."""
    min_chars: int = 1
    """Shorter documents are dropped."""
    dedup: bool = True
    """Drop documents whose cleaned text was seen before."""
    normalize: bool = True
    """Apply Unicode NFC."""
    workers: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    """Threads that tokenize."""
    shard_tokens: int = DEFAULT_SHARD_TOKENS
    """Tokens of a shard file."""
    overwrite: bool = False
    """Replace an existing dataset."""
    seed: int = 0
    """Key of the held-out split."""


@dataclass
class Progress:
    """What `prepare` tells its `progress` callback."""

    bytes_total: int
    bytes_read: int = 0
    documents: int = 0
    characters: int = 0
    tokens: int = 0


ProgressCallback = Callable[[Progress], None]


def prepare(config: PrepareConfig, progress: ProgressCallback | None = None) -> dict:
    """Write the dataset `config.output` and return its report, which is also written as report.json.

    progress: called after every batch. Raises UserError for bad settings or input; the output then does not exist.
    """
    _check(config)
    files = find_files([name for name in config.inputs if name != EMBEDDED])
    started = time.perf_counter()
    with atomic_directory(config.output, config.overwrite) as directory:
        tokenizer = build_tokenizer(config.tokenizer, _training_texts(config, files))
        tokenizer.save(directory / "tokenizer")
        run = _Run(config, files, tokenizer, directory, progress)
        run.execute()
        report = run.report(time.perf_counter() - started)
        (directory / "report.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    return report


def prepare_input(config: DataConfig) -> None:
    """Make data.path of the text data.input, where it is not there. Raises UserError where it is, of something else."""
    path = Path(config.path)
    wanted = PrepareConfig(inputs=[config.input], output=config.path, tokenizer=config.tokenizer, split="tail",
                           val_fraction=config.val_fraction)
    if not path.exists():
        prepare(wanted)
        return
    try:
        settings = json.loads((path / "report.json").read_text(encoding="utf-8"))["settings"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"data.path={path} is there, but no dataset of `gptdist prepare` ({error}): choose another "
                        f"path for what data.input={config.input} becomes") from error
    for name in ("inputs", "tokenizer", "split", "val_fraction"):
        if settings.get(name) != getattr(wanted, name):
            raise UserError(f"data.path={path} was prepared with {name}={settings.get(name)}, data.input asks for "
                            f"{getattr(wanted, name)}: remove it, or choose another data.path")


class _Run:
    """One run of `prepare`: the pipeline and its counts."""

    def __init__(
        self,
        config: PrepareConfig,
        files: list[Path],
        tokenizer: Tokenizer,
        directory: Path,
        callback: ProgressCallback | None,
    ):
        self._config = config
        self._files = files
        self._tokenizer = tokenizer
        self._directory = directory
        self._callback = callback or (lambda progress: None)
        self._seen = SeenDigests(directory) if config.dedup and config.split != "tail" else None
        self._cleaner = Cleaner(normalize=config.normalize, min_chars=config.min_chars, seen=self._seen)
        self._progress = Progress(bytes_total=sum(path.stat().st_size for path in files))
        self._dtype = TOKEN_DTYPES[token_dtype(tokenizer.vocab_size)]
        self._writers: dict[str, DatasetWriter] = {}
        self._reader: DocumentReader | None = None
        self._done_bytes = 0
        self._split_method = "none"
        self._seconds = 0.0

    def execute(self) -> None:
        started = time.perf_counter()
        with ExitStack() as stack:
            if self._seen is not None:
                stack.callback(self._seen.close)
            splits = ["train", "val"] if self._config.val_fraction > 0 else ["train"]
            self._writers = {split: stack.enter_context(self._writer(split)) for split in splits}
            if self._config.split == "tail":
                self._write_one_text()
                self._check_splits()
                self._seconds = time.perf_counter() - started
                return
            splitter = Splitter(
                self._writers["train"],
                self._writers.get("val"),
                val_fraction=self._config.val_fraction,
                seed=self._config.seed,
                eot=self._tokenizer.eot,
            )
            pool = stack.enter_context(ThreadPoolExecutor(self._config.workers, thread_name_prefix="tokenize"))
            self._pump(pool, splitter)
            splitter.finish()
            self._split_method = splitter.method
            self._check_splits()
        self._seconds = time.perf_counter() - started

    def _write_one_text(self) -> None:
        text = "".join(text for texts, _ in self._batches() for text in texts)
        cut = int((1 - self._config.val_fraction) * len(text))
        for split, part in (("train", text[:cut]), ("val", text[cut:])):
            if part:
                self._writers[split].add(self._tokenizer.encode_array(part).astype(self._dtype))
        self._split_method = "last characters"
        self._progress.documents, self._progress.characters = len(self._writers), len(text)
        self._progress.tokens = sum(writer.n_tokens for writer in self._writers.values())
        self._progress.bytes_read = self._done_bytes
        self._callback(self._progress)

    def _pump(self, pool: ThreadPoolExecutor, splitter: Splitter) -> None:
        """Keep the workers busy with batches and write their results in order."""
        in_flight: deque[tuple[list[bytes], int, Future]] = deque()
        for texts, digests in self._batches():
            n_chars = sum(map(len, texts))
            in_flight.append((digests, n_chars, pool.submit(self._encode, texts)))
            if len(in_flight) > 2 * self._config.workers + 1:
                self._write(splitter, *in_flight.popleft())
        while in_flight:
            self._write(splitter, *in_flight.popleft())

    def _batches(self) -> Iterator[tuple[list[str], list[bytes]]]:
        """Yield (cleaned texts, their digests) of about _BATCH_CHARS characters."""
        texts, digests, n_chars = [], [], 0
        for text in self._documents():
            cleaned = self._cleaner.clean(text)
            if cleaned is None:
                continue
            texts.append(cleaned[0])
            digests.append(cleaned[1])
            n_chars += len(cleaned[0])
            if n_chars >= _BATCH_CHARS or len(texts) >= _BATCH_DOCUMENTS:
                yield texts, digests
                texts, digests, n_chars = [], [], 0
        if texts:
            yield texts, digests

    def _documents(self) -> Iterator[str]:
        if EMBEDDED in self._config.inputs:
            yield from embedded_documents()
        for path in self._files:
            self._reader = DocumentReader(path, _read_settings(self._config))
            yield from self._reader
            self._done_bytes += self._reader.bytes_read
            self._reader = None

    def _encode(self, texts: list[str]) -> list[np.ndarray]:
        """Return each text's ids, with eot appended, in the dataset's dtype. Runs in a worker."""
        documents = []
        for text in texts:
            ids = self._tokenizer.encode_array(text)
            document = np.empty(len(ids) + 1, self._dtype)
            document[:-1] = ids
            document[-1] = self._tokenizer.eot
            documents.append(document)
        return documents

    def _write(self, splitter: Splitter, digests: list[bytes], n_chars: int, encoded: Future) -> None:
        for digest, tokens in zip(digests, encoded.result(), strict=True):
            splitter.add(digest, tokens)
            self._progress.tokens += len(tokens)
        self._progress.documents += len(digests)
        self._progress.characters += n_chars
        self._progress.bytes_read = self._done_bytes + (self._reader.bytes_read if self._reader else 0)
        self._callback(self._progress)

    def _writer(self, split: str) -> DatasetWriter:
        return DatasetWriter(
            self._directory / split,
            tokenizer_hash=self._tokenizer.hash,
            vocab_size=self._tokenizer.vocab_size,
            eot=self._tokenizer.eot,
            shard_tokens=self._config.shard_tokens,
        )

    def _check_splits(self) -> None:
        counts = "; ".join(
            f"{name}: {count.documents_in} -> {count.documents_out} documents"
            for name, count in self._cleaner.counts.items()
        )
        if self._progress.documents == 0:
            raise UserError(f"no documents are left after cleaning ({counts}); check --input and --min-chars")
        for split, writer in self._writers.items():
            if writer.n_documents == 0:
                raise UserError(
                    f"no document fell into {split} (--val-fraction {self._config.val_fraction}, "
                    f"{self._progress.documents} documents); change --val-fraction or --max-document-chars"
                )
        val = self._writers.get("val")
        if val is not None and val.n_tokens < 2:  # a token and the one that follows it
            raise UserError(
                f"val has {val.n_tokens} token (--val-fraction {self._config.val_fraction}), expected at least 2 to "
                "evaluate on; give more text, a larger --val-fraction, or 0 for no val"
            )

    def report(self, total_seconds: float) -> dict:
        progress = self._progress
        return {
            "format": 1,
            "settings": asdict(self._config),
            "tokenizer": {
                "name": self._tokenizer.name,
                "vocab_size": self._tokenizer.vocab_size,
                "hash": self._tokenizer.hash,
            },
            "filters": self._cleaner.report(),
            "split": {
                "method": self._split_method,
                **{
                    split: {"documents": writer.n_documents, "tokens": writer.n_tokens}
                    for split, writer in self._writers.items()
                },
            },
            "documents": progress.documents,
            "characters": progress.characters,
            "tokens": sum(writer.n_tokens for writer in self._writers.values()),
            "characters_per_token": progress.characters / progress.tokens,
            "long_documents": f"plain text is cut at a paragraph after {self._config.max_document_chars} characters",
            "speed": {
                "seconds": total_seconds,
                "pipeline_seconds": self._seconds,  # without building the tokenizer
                "tokens_per_s": progress.tokens / self._seconds,
                "characters_per_s": progress.characters / self._seconds,
            },
        }


def _training_texts(config: PrepareConfig, files: list[Path]) -> Iterator[str]:
    """Yield cleaned documents for training a tokenizer, up to _TOKENIZER_TRAINING_CHARS characters."""
    cleaner = Cleaner(normalize=config.normalize, min_chars=config.min_chars, seen=None)
    left = _TOKENIZER_TRAINING_CHARS
    readers = [DocumentReader(path, _read_settings(config)) for path in files]
    for source in [embedded_documents()] * (EMBEDDED in config.inputs) + readers:
        for text in source:
            cleaned = cleaner.clean(text)
            if cleaned is not None:
                yield cleaned[0]
                left -= len(cleaned[0])
            if left <= 0:
                return


def _read_settings(config: PrepareConfig) -> ReadSettings:
    longest = sys.maxsize if config.split == "tail" else config.max_document_chars
    return ReadSettings(config.text_field, config.document_separator, longest)


def _check(config: PrepareConfig) -> None:
    """Raise UserError for settings that cannot work."""
    if not config.inputs:
        raise UserError("--input is empty; give text or JSONL files, globs, or the word embedded")
    if not 0 <= config.val_fraction < 1:
        raise UserError(f"--val-fraction is {config.val_fraction}, expected at least 0 and below 1")
    if config.split == "tail" and config.document_separator is not None:
        raise UserError(f"--split tail with --document-separator {config.document_separator!r}: the input is one text "
                        f"there; leave one of them out")
    if config.document_separator == "":
        raise UserError("--document-separator is empty; expected blank-line or a string such as <|endoftext|>")
    for name in ("workers", "shard_tokens", "max_document_chars"):
        if getattr(config, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(config, name)}, expected at least 1")
    if not 0 <= config.seed < 1 << 63:
        raise UserError(f"--seed is {config.seed}, expected 0 to 2^63 - 1")
