"""Prepares a dataset: read, clean, drop duplicates, hold out a split, tokenize, write shards; streamed and parallel.

The calling thread reads, cleans and writes; worker threads tokenize (tiktoken releases the GIL). At most
`2 * workers + 2` batches are in flight, so memory does not grow with the input.

Every _SAVE_CHARS characters all is flushed to disk and the state written, as one file by one rename: the position in
the input, counts, shards, and the lengths of the logs from which the filters of duplicates are filled again. What a
kill leaves is OUTPUT.partial; the same command goes on from its state, and makes the same dataset, byte for byte.
Where `split` is tail, all is one text in memory, and no state is written.
"""

import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gptdist.config import DataConfig, expand_variables
from gptdist.data.clean import (
    Cleaner,
    Duplicates,
    Each,
    Filter,
    SeenDigests,
    long_enough,
    normalize_nfc,
    remove_control,
    text_digest,
)
from gptdist.data.format import TOKEN_DTYPES, token_dtype
from gptdist.data.near_duplicates import NearDuplicates
from gptdist.data.prepare_config import PrepareConfig, check, fingerprint
from gptdist.data.quality import QualityRules, parse_rules
from gptdist.data.report_page import report_page
from gptdist.data.row_log import RowLog
from gptdist.data.scrub import Scrub
from gptdist.data.source import BadRecords, Position, Source, SourceReader, files_digest, find_sources, text_sha256
from gptdist.data.source_stats import COMPARED_BYTES, SourceStats, TokenizerUse
from gptdist.data.split import Splitter
from gptdist.data.tokenizer import Tokenizer, add_tokens, build_tokenizer
from gptdist.data.writer import DatasetWriter, resumable_directory
from gptdist.errors import UserError

_BATCH_CHARS = 1 << 18  # of text for one task of a worker: large beside a task's cost, small beside memory
_BATCH_DOCUMENTS = 1024
_SAVE_CHARS = 200_000_000  # of input between two states: about a minute of one core
_STATE = "state.json"
_TOKENIZER_TRAINING_CHARS = 200_000_000  # BPE training counts words in memory; more text hardly changes the merges


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
    """Write the dataset `config.output` and return its report, which is also written as report.json and report.html.

    progress: called after every batch. Raises UserError for bad settings or input; the output then does not exist.
    """
    check(config)
    sources = find_sources(config.inputs)
    started = time.perf_counter()
    identity = {"settings": fingerprint(config), "files": files_digest(sources)}
    with resumable_directory(config.output, config.overwrite, _STATE,
                             lambda directory: _check_unfinished(directory, identity, config.overwrite)) as directory:
        resumed = (directory / _STATE).exists()
        if resumed:
            tokenizer = Tokenizer.load(directory / "tokenizer")
        else:
            tokenizer = build_tokenizer(config.tokenizer, _training_texts(config, sources))
            tokenizer = add_tokens(tokenizer, config.add_tokens) if config.add_tokens else tokenizer
            tokenizer.save(directory / "tokenizer")
        run = _Run(config, sources, tokenizer, directory, identity, progress)
        run.execute()
        report = run.report(time.perf_counter() - started)
        (directory / "report.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n",
                                               encoding="utf-8")
        (directory / "report.html").write_text(report_page(report), encoding="utf-8")
        (directory / _STATE).unlink(missing_ok=True)
    return report


def _check_unfinished(directory: Path, identity: dict[str, Any], overwrite: bool) -> None:
    """Raise UserError where what a killed run left is of another run; remove its state if it may be overwritten."""
    path = directory / _STATE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["identity"]
        changed = [name for name in identity["settings"] if found["settings"].get(name) != identity["settings"][name]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        changed = ["its state cannot be read"]
    else:
        changed += ["the input files"] * (found.get("files") != identity["files"])
    if not changed:
        return
    if not overwrite:
        raise UserError(f"{directory} has an unfinished dataset of other settings or input ({', '.join(changed)}): run "
                        f"its command again to finish it, remove the directory, or pass --overwrite to begin anew")
    path.unlink()


def prepare_input(config: DataConfig) -> None:
    """Make data.path of the text data.input, where it is not there.

    What is there has to be of that text, wherever the text lies now; where it lies nowhere its name is compared. Raises
    UserError for what is of another text or of other settings, and for a text that is needed and not there.
    """
    path, text = Path(config.path), expand_variables(config.input)
    wanted = PrepareConfig(inputs=[text], output=config.path, tokenizer=config.tokenizer, split="tail",
                           val_fraction=config.val_fraction)
    if not path.exists():
        if "$" in text and not Path(text).exists():
            raise UserError(f"data.input={config.input}: the environment lacks that variable; set it, or give "
                            f"--data.input=FILE")
        prepare(wanted)
        return
    try:
        report = json.loads((path / "report.json").read_text(encoding="utf-8"))
        settings = report["settings"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"data.path={path} is there, but no dataset of `gptdist prepare` ({error}): choose another "
                        f"path for what data.input={text} becomes") from error
    for name in ("tokenizer", "split", "val_fraction"):
        if settings.get(name) != getattr(wanted, name):
            raise UserError(f"data.path={path} was prepared with {name}={settings.get(name)}, data.input asks for "
                            f"{getattr(wanted, name)}: remove it, or choose another data.path")
    if not _is_made_of(report, text):
        raise UserError(f"data.path={path} was prepared from {' '.join(settings['inputs'])}, whose text is not that of "
                        f"data.input={text}: remove it, or choose another data.path")


def _is_made_of(report: dict[str, Any], text: str) -> bool:
    """Whether a dataset of one text is of this file; of one that is not there, by its name alone."""
    inputs = report["settings"]["inputs"]
    try:
        sources = find_sources([text])
    except UserError:
        return [Path(name).name for name in inputs] == [Path(text).name]
    if "text_sha256" not in report:  # as earlier versions left it
        return [os.path.realpath(name) for name in inputs] == [os.path.realpath(text)]
    return report["text_sha256"] == text_sha256(sources)


class _Run:
    """One run of `prepare`: the pipeline and its counts."""

    def __init__(
        self,
        config: PrepareConfig,
        sources: list[Source],
        tokenizer: Tokenizer,
        directory: Path,
        identity: dict[str, Any],
        callback: ProgressCallback | None,
    ):
        self._config = config
        self._sources = sources
        self._tokenizer = tokenizer
        self._compared = build_tokenizer(config.compare_tokenizer) if config.compare_tokenizer else None
        self._directory = directory
        self._identity = identity
        self._callback = callback or (lambda progress: None)
        self._progress = Progress(bytes_total=sum(path.stat().st_size for one in sources for path in one.files))
        self._dtype = TOKEN_DTYPES[token_dtype(tokenizer.vocab_size)]
        self._writers: dict[str, DatasetWriter] = {}
        self._stats = [self._new_stats(source) for source in _counted_apart(config, sources)]
        self._position = Position()
        self._bad = BadRecords()
        self._reader: SourceReader | None = None
        self._done_bytes = 0
        self._unsaved_chars = 0
        self._resumed = 0
        self._split_method = "none"
        self._seconds = 0.0

    def execute(self) -> None:
        started = time.perf_counter()
        with ExitStack() as stack:
            self._open_filters(stack)
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
            if (self._directory / _STATE).exists():
                self._restore(splitter)
            pool = stack.enter_context(ThreadPoolExecutor(self._config.workers, thread_name_prefix="tokenize"))
            self._pump(pool, splitter)
            splitter.finish()
            self._split_method = splitter.method
            self._check_splits()
            self._near_report = self._near.report() if self._near else None  # before its table is closed
        self._seconds += time.perf_counter() - started

    def _open_filters(self, stack: ExitStack) -> None:
        config = self._config
        filters = _stateless_filters(config)
        self._scrub = next((one for one in filters if isinstance(one, Scrub)), None)
        self._duplicates = self._digests = self._near = self._near_report = None
        if config.dedup and config.split != "tail":
            seen = SeenDigests(self._directory)
            stack.callback(seen.close)
            self._digests = RowLog(self._directory / "digests.log", "u1", 16)
            stack.callback(self._digests.close)
            self._duplicates = Duplicates(seen)
            self._duplicates.log = self._digests.append
            filters.append(self._duplicates)
        if config.near_dedup:
            self._near = NearDuplicates(self._directory, config.near_dedup, seed=config.seed,
                                        memory_bytes=config.near_dedup_memory_mb << 20)
            stack.callback(self._near.close)
            filters.append(self._near)
        self._cleaner = Cleaner(filters, samples=config.samples)

    def _write_one_text(self) -> None:
        text = "".join(text for _, texts in self._batches() for text in texts)
        cut = int((1 - self._config.val_fraction) * len(text))
        for split, part in (("train", text[:cut]), ("val", text[cut:])):
            if part:
                ids = self._tokenizer.encode_array(part)
                self._writers[split].add(ids.astype(self._dtype))
                self._stats[0].use.add(ids, len(part.encode()))
        self._split_method = "last characters"
        self._progress.documents = self._stats[0].documents = len(self._writers)
        self._progress.characters = len(text)
        self._progress.tokens = sum(writer.n_tokens for writer in self._writers.values())
        self._progress.bytes_read = self._done_bytes
        self._callback(self._progress)
        if self._compared is not None:
            sample = text[:COMPARED_BYTES]
            for use, tokenizer in ((self._stats[0].compared, self._compared),
                                   (self._stats[0].same_sample, self._tokenizer)):
                use.add(tokenizer.encode_array(sample), len(sample.encode()))

    def _pump(self, pool: ThreadPoolExecutor, splitter: Splitter) -> None:
        """Keep the workers busy with batches and write their results in order."""
        in_flight: deque[tuple[int, int, Future]] = deque()
        for source, texts in self._batches():
            in_flight.append((source, sum(map(len, texts)), pool.submit(self._encode, source, texts)))
            saving = self._unsaved_chars >= _SAVE_CHARS and splitter.has_decided
            while len(in_flight) > (0 if saving else 2 * self._config.workers + 1):
                self._write(splitter, *in_flight.popleft())
            if saving:
                self._save()
        while in_flight:
            self._write(splitter, *in_flight.popleft())

    def _batches(self) -> Iterator[tuple[int, list[str]]]:
        """Yield (source, cleaned texts) of about _BATCH_CHARS characters of input. Batches may be empty."""
        for number in range(self._position.source, len(self._sources)):
            self._reader = SourceReader(self._sources[number], self._config, self._position, self._bad)
            texts, where, n_chars = [], [], 0
            for place, text in self._reader:
                texts.append(text)
                where.append(place)
                n_chars += len(text)
                if n_chars >= _BATCH_CHARS or len(texts) >= _BATCH_DOCUMENTS:
                    self._unsaved_chars += n_chars
                    yield number, self._cleaner.clean(texts, where)[0]
                    texts, where, n_chars = [], [], 0
            if texts:
                self._unsaved_chars += n_chars
                yield number, self._cleaner.clean(texts, where)[0]
            self._done_bytes += self._reader.bytes_read
            self._reader = None
            self._position.source, self._position.file, self._position.row = number + 1, 0, 0

    def _encode(self, source: int, texts: list[str]) -> tuple[list[bytes], list[np.ndarray], list[int], np.ndarray]:
        """Return each text's digest, its ids with eot appended, in the dataset's dtype, its UTF-8 bytes; and the ids of
        all texts by the tokenizer that is compared. Runs in a worker."""
        documents, sizes = [], []
        for text in texts:
            ids = self._tokenizer.encode_array(text)
            document = np.empty(len(ids) + 1, self._dtype)
            document[:-1] = ids
            document[-1] = self._tokenizer.eot
            documents.append(document)
            sizes.append(len(text) if text.isascii() else len(text.encode()))
        other = np.zeros(0, np.uint32)
        # A worker may see this count late: what it then encodes for nothing is left out where it is counted.
        if self._compared is not None and texts and self._stats[source].compared.bytes < COMPARED_BYTES:
            other = np.concatenate([self._compared.encode_array(text) for text in texts])
        return [text_digest(text) for text in texts], documents, sizes, other

    def _write(self, splitter: Splitter, source: int, n_chars: int, encoded: Future) -> None:
        digests, documents, sizes, other = encoded.result()
        stats = self._stats[source]
        stats.documents += len(documents)
        if documents:
            ids = np.concatenate([document[:-1] for document in documents])
            stats.use.add(ids, sum(sizes))
            if stats.compared is not None and stats.compared.bytes < COMPARED_BYTES:
                stats.compared.add(other, sum(sizes))
                stats.same_sample.add(ids, sum(sizes))
        for digest, tokens in zip(digests, documents, strict=True):
            splitter.add(digest, tokens)
            self._progress.tokens += len(tokens)
        self._progress.documents += len(digests)
        self._progress.characters += n_chars
        self._progress.bytes_read = self._done_bytes + (self._reader.bytes_read if self._reader else 0)
        self._callback(self._progress)

    # Going on after a kill

    def _save(self) -> None:
        """Write the state. Nothing is in flight, and the generator of batches stands at the end of one."""
        if self._digests is not None:
            self._digests.sync()
        state = {
            "identity": self._identity,
            "position": asdict(self._position),
            "bad": asdict(self._bad),
            "cleaner": self._cleaner.state(),
            "scrubbed": self._scrub.replaced if self._scrub else {},
            "near": self._near.state() if self._near else None,
            "digests": self._cleaner.counts["duplicates"].documents_out if self._digests is not None else 0,
            "writers": {split: writer.state() for split, writer in self._writers.items()},
            "stats": [stats.state() for stats in self._stats],
            "progress": asdict(self._progress),
            "done_bytes": self._done_bytes,
            "resumed": self._resumed,
        }
        temporary = self._directory / f"{_STATE}.new"
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(state, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self._directory / _STATE)
        self._unsaved_chars = 0

    def _restore(self, splitter: Splitter) -> None:
        state = json.loads((self._directory / _STATE).read_text(encoding="utf-8"))
        self._position = Position(**state["position"])
        self._bad = BadRecords(**state["bad"])
        self._cleaner.restore(state["cleaner"])
        if self._scrub is not None:
            self._scrub.replaced.update(state["scrubbed"])
        if self._near is not None:
            self._near.restore(state["near"])
        if self._digests is not None:
            self._digests.truncate(state["digests"])
            for start in range(0, state["digests"], 1 << 16):
                self._duplicates.restore(self._digests.read(start, min(state["digests"], start + (1 << 16))).tobytes())
        for split, writer in self._writers.items():
            writer.restore(state["writers"][split])
        for stats, saved in zip(self._stats, state["stats"], strict=True):
            stats.restore(saved)
        splitter.restore()
        self._progress = Progress(**state["progress"])
        self._done_bytes, self._resumed = state["done_bytes"], state["resumed"] + 1

    def _new_stats(self, source: Source) -> SourceStats:
        if self._compared is None:
            return SourceStats(source.name, len(source.files), TokenizerUse(self._tokenizer), None)
        return SourceStats(source.name, len(source.files), TokenizerUse(self._tokenizer),
                           TokenizerUse(self._compared), same_sample=TokenizerUse(self._tokenizer))

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
        ) + (f"; {self._bad.count} bad records, the first: {self._bad.examples[0]}" if self._bad.count else "")
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
            **({"text_sha256": text_sha256(self._sources)} if self._config.split == "tail" else {}),
            "tokenizer": {
                "name": self._tokenizer.name,
                "vocab_size": self._tokenizer.vocab_size,
                "hash": self._tokenizer.hash,
            },
            "sources": [stats.report() for stats in self._stats],
            "bad": asdict(self._bad),
            "filters": self._cleaner.report(),
            "scrubbed": self._scrub.replaced if self._scrub else {},
            "near_duplicates": self._near_report,
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
            "resumed": self._resumed,
            "samples": self._cleaner.samples(),
            "long_documents": "plain text is not cut" if self._config.split == "tail" else
                              f"plain text is cut at a paragraph after {self._config.max_document_chars} characters",
            "speed": {
                "seconds": total_seconds,
                "pipeline_seconds": self._seconds,  # without building the tokenizer
                "tokens_per_s": progress.tokens / self._seconds,
                "characters_per_s": progress.characters / self._seconds,
            },
        }


def _counted_apart(config: PrepareConfig, sources: list[Source]) -> list[Source]:
    """The sources that the report has: all as one where they are one text."""
    if config.split != "tail":
        return sources
    return [Source(", ".join(source.name for source in sources), [path for source in sources for path in source.files])]


def _stateless_filters(config: PrepareConfig) -> list[Filter]:
    """All filters but those of duplicates, in their order."""
    filters: list[Filter] = [Each("control", remove_control)]
    if config.normalize:
        filters.append(Each("nfc", normalize_nfc))
    filters.append(Each("min_chars", lambda text: text if long_enough(text, config.min_chars) else None))
    if config.max_chars:
        filters.append(Each("max_chars", lambda text: text if len(text) <= config.max_chars else None))
    if config.rules:
        filters.append(QualityRules(parse_rules(config.rules)))
    if config.languages:
        from gptdist.data.language import LanguageFilter

        filters.append(LanguageFilter(config.languages, config.language_min))
    if config.scrub:
        filters.append(Scrub(config.scrub))
    return filters


def _training_texts(config: PrepareConfig, sources: list[Source]) -> Iterator[str]:
    """Yield cleaned documents for training a tokenizer, up to _TOKENIZER_TRAINING_CHARS characters."""
    cleaner = Cleaner(_stateless_filters(config))
    left = _TOKENIZER_TRAINING_CHARS
    for source in sources:
        for _, text in SourceReader(source, config, Position(), BadRecords()):
            for cleaned in cleaner.clean([text])[0]:
                yield cleaned
                left -= len(cleaned)
            if left <= 0:
                return
