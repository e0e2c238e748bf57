"""How much of an evaluation set a model may have read: n-grams of words that the training shards have too.

The items' n-grams are held as 64-bit hashes, the shards are read once, a chunk of tokens at a time: memory grows with
the evaluation sets, and not with the training data. Words are those of text_metrics.words, so that case, punctuation
and spacing hide nothing; the end of a document is a word of its own, which no item has. Source: Brown et al., "Language
models are few-shot learners" (2020), appendix C (13-grams).
"""

import codecs
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from gptdist.data.format import TokenDataset
from gptdist.data.tokenizer import Tokenizer
from gptdist.errors import UserError
from gptdist.evaluate.items import TaskSet, texts_of

NGRAM = 13
CHUNK_TOKENS = 1 << 20
EXAMPLES = 5
_WORD = re.compile(r"[^\W_]+")
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd: multiplying by it loses nothing


def contamination(data: str | Path, tasks: Sequence[TaskSet], *, n: int = NGRAM,
                  chunk_tokens: int = CHUNK_TOKENS) -> list[dict[str, Any]]:
    """For each set {"task", "items", "too_short", "contaminated", "ngrams", "found", "examples"}.

    data: a prepared directory, whose train/ is read, or one of its splits. too_short: items of fewer than n words, of
    which nothing can be said. contaminated: items with an n-gram that the data has. found: how many of all n-grams it
    has. examples: {"where", "words"} of the first ones.
    Raises UserError for a directory that is no dataset, or whose tokenizer is another.
    """
    if n < 1:
        raise UserError(f"n is {n}, expected at least 1 word")
    dataset, tokenizer = _open(Path(data))
    words = [[_words(text) for _, text in texts_of(task.items)] for task in tasks]
    hashes = [[_ngrams(_hashes(item), n) for item in items] for items in words]
    wanted = np.unique(np.concatenate([np.zeros(0, np.uint64), *(h for items in hashes for h in items)]))
    seen = np.zeros(len(wanted), bool)
    for part in _training_words(dataset, tokenizer, n, chunk_tokens):
        seen[_places(wanted, _ngrams(_hashes(part), n))] = True
    found = wanted[seen]
    return [_report(task, items, own, found, n) for task, items, own in zip(tasks, words, hashes, strict=True)]


def _open(path: Path) -> tuple[TokenDataset, Tokenizer]:
    split = path / "train" if (path / "train").is_dir() else path
    dataset, tokenizer = TokenDataset.open(split), Tokenizer.load(split.parent / "tokenizer")
    if dataset.meta.tokenizer_hash not in (None, tokenizer.hash):
        raise UserError(f"{split} was made with tokenizer {dataset.meta.tokenizer_hash[:12]}, {split.parent}/tokenizer "
                        f"is {tokenizer.hash[:12]}: prepare the dataset again")
    return dataset, tokenizer


def _training_words(dataset: TokenDataset, tokenizer: Tokenizer, n: int, chunk_tokens: int) -> Iterator[list[str]]:
    """The words of the data in overlapping lists: every n consecutive words are in just one of them."""
    table = [b""] * tokenizer.vocab_size
    for token, i in (*tokenizer.ranks.items(), *((name.encode(), i) for name, i in tokenizer.specials.items())):
        table[i] = token
    decoder, text = codecs.getincrementaldecoder("utf-8")(errors="replace"), ""
    for start in range(0, len(dataset), chunk_tokens):
        ids = dataset.window(start, min(chunk_tokens, len(dataset) - start)).tolist()
        text += decoder.decode(b"".join(map(table.__getitem__, ids)))
        matches = list(_WORD.finditer(text))
        yield [match.group().lower() for match in matches[:-1]]  # the last one may go on in the next chunk
        text = text[matches[-n].start():] if len(matches) >= n else text
    yield _words(text + decoder.decode(b"", final=True))


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _hashes(words: Sequence[str]) -> np.ndarray:
    """(words,) uint64: Python's own hash, which is the same within a process."""
    return np.fromiter(map(hash, words), np.int64, len(words)).view(np.uint64)


def _ngrams(hashes: np.ndarray, n: int) -> np.ndarray:
    """(words - n + 1,) uint64: a hash of every n consecutive words, their order included."""
    count = max(0, len(hashes) - n + 1)
    result = np.zeros(count, np.uint64)
    for k in range(n):
        result = result * _FACTOR + hashes[k:k + count]
        result ^= result >> np.uint64(29)
    return result


def _places(wanted: np.ndarray, hashes: np.ndarray) -> np.ndarray:
    """Where in the sorted `wanted` those of the hashes stand that are there."""
    if not len(wanted):
        return np.zeros(0, np.int64)
    at = np.minimum(np.searchsorted(wanted, hashes), len(wanted) - 1)
    return at[wanted[at] == hashes]


def _report(task: TaskSet, words: Sequence[Sequence[str]], hashes: Sequence[np.ndarray], found: np.ndarray,
            n: int) -> dict[str, Any]:
    hits = [np.isin(own, found) for own in hashes]
    examples = [{"where": item.where, "words": " ".join(own[int(hit.argmax()):][:n])}
                for item, own, hit in zip(task.items, words, hits, strict=True) if hit.any()]
    return {"task": task.name, "items": len(words), "too_short": sum(not len(own) for own in hashes),
            "contaminated": len(examples), "ngrams": sum(map(len, hashes)),
            "found": int(sum(hit.sum() for hit in hits)), "examples": examples[:EXAMPLES]}


def print_contamination(console: Console, results: Sequence[dict[str, Any]], n: int) -> None:
    table = Table(title=f"{n}-grams of words that the training data has too")
    for column in ("task", "items", "too short", "contaminated", "n-grams", "of them found"):
        table.add_column(column, justify="left" if column == "task" else "right")
    for result in results:
        long_enough = result["items"] - result["too_short"]
        table.add_row(result["task"], str(result["items"]), str(result["too_short"]),
                      f"{result['contaminated']} ({_share(result['contaminated'], long_enough)})",
                      f"{result['ngrams']:,}", f"{result['found']:,} ({_share(result['found'], result['ngrams'])})")
    console.print(table)
    for result in results:
        for example in result["examples"][:1]:
            console.print(f"{example['where']}: {example['words']}", soft_wrap=True)


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "none"
