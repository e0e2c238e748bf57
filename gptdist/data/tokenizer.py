"""Tokenizers: one class over `tiktoken.Encoding`, saved beside every dataset and checkpoint.

A tokenizer is (split pattern, byte-level BPE ranks, special tokens); `Tokenizer.hash` is the sha256 of those three
and identifies it: a dataset and a model belong together when their hashes are equal.
Building one from a file, a download or by training is in `tokenizer_build`; `build_tokenizer` is re-exported here.
"""

import base64
import codecs
import hashlib
import json
import re
from collections.abc import Collection, Iterable, Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
import tiktoken

from gptdist.errors import UserError

EOT = "<|endoftext|>"
FORMAT = 1
MAX_VOCAB = 1 << 24  # far above any real vocabulary: a larger id is damage, and would ask for a table of that size
# GPT-2's split pattern as tiktoken writes it: possessive quantifiers, so that it never backtracks within a word.
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
CHAR_PATTERN = r"(?s:.)"  # each character by itself: what marks a CharTokenizer in its files
# `\s+(?!\S)` needs one backtracking entry per character; tiktoken 0.14 panics between 512 000 and 1 024 000 of them.
_LONG_WHITESPACE = 65_536


class Tokenizer:
    """Byte-level BPE with special tokens; any text encodes and decodes without loss (valid UTF-8).

    Ids are `ranks` (a rank is an id) and `specials`; `vocab_size` is the largest id + 1. The specials in `added` are
    words of the text: wherever one is written, it is that token.
    """

    def __init__(self, *, name: str, ranks: dict[bytes, int], specials: dict[str, int], pattern: str = GPT2_PATTERN,
                 added: Iterable[str] = ()):
        """Raises ValueError for tokens, ids or a pattern that make no tokenizer."""
        _check_parts(name, ranks, specials, pattern)
        self.added = frozenset(added)
        if unknown := self.added - set(specials) | self.added & {EOT}:
            raise ValueError(f"tokenizer {name}: added tokens {sorted(unknown)} are not specials, or are {EOT}")
        self.name = name
        self.pattern = pattern
        self.ranks = ranks
        self.specials = dict(specials)
        try:
            self._encoding = tiktoken.Encoding(
                name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=self.specials
            )
        except ValueError as error:
            raise ValueError(f"tokenizer {name}: pattern or tokens cannot be used ({error})") from error

    @property
    def vocab_size(self) -> int:
        return self._encoding.max_token_value + 1

    @property
    def eot(self) -> int:
        """Id of <|endoftext|>, which ends every document."""
        return self.specials[EOT]

    @cached_property
    def hash(self) -> str:
        """sha256 (hex) over pattern, ranks, specials and added tokens; the name does not count."""
        digest = hashlib.sha256()
        added = [sorted(self.added)] if self.added else []
        digest.update(json.dumps([self.pattern, sorted(self.specials.items()), *added]).encode())
        digest.update(_ranks_to_lines(self.ranks))
        return digest.hexdigest()

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Return the ids of `text`. Special tokens written in the text are plain text unless `allow_special`.

        Raises UserError for text that has no UTF-8 form.
        """
        if allow_special:
            _check_utf8(text)
            return [i for part in _safe_parts(text) for i in self._encoding.encode(part, allowed_special="all")]
        return self.encode_array(text).tolist()

    def encode_array(self, text: str) -> np.ndarray:
        """Return the ids of `text` as uint32 (n_tokens,), special tokens but the added ones as plain text. Releases the
        GIL.

        Raises UserError for text that has no UTF-8 form.
        """
        _check_utf8(text)
        arrays = [self._encoding.encode_to_numpy(part, allowed_special=self.added, disallowed_special=())
                  for part in _safe_parts(text)]
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`; bytes that are not UTF-8 become U+FFFD.

        Raises ValueError for an id outside the vocabulary.
        """
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of one token. Raises ValueError for an id outside the vocabulary."""
        try:
            return self._encoding.decode_single_token_bytes(int(token_id))
        except (KeyError, OverflowError):
            raise ValueError(
                f"token id {int(token_id)} is not in tokenizer {self.name} (vocab_size {self.vocab_size})"
            ) from None

    def save(self, directory: str | Path) -> None:
        """Write `tokenizer.json` and `tokenizer.tiktoken` (tiktoken's rank format) into `directory`."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in self.files().items():
            (directory / name).write_bytes(content)

    def files(self) -> dict[str, bytes]:
        """What `save` writes, by file name."""
        header = {
            "format": FORMAT,
            "kind": "tiktoken",
            "name": self.name,
            "pattern": self.pattern,
            "specials": self.specials,
            "vocab_size": self.vocab_size,
            "hash": self.hash,
            **({"added": sorted(self.added)} if self.added else {}),
        }
        return {"tokenizer.tiktoken": _ranks_to_lines(self.ranks),
                "tokenizer.json": (json.dumps(header, indent=2) + "\n").encode()}

    @classmethod
    def load(cls, directory: str | Path) -> "Tokenizer":
        """Read what `save` wrote. Raises UserError when a file is missing, unreadable or altered."""
        header_path = Path(directory) / "tokenizer.json"
        header = _read_header(header_path)
        ranks = read_ranks(Path(directory) / "tokenizer.tiktoken", all_bytes=header["pattern"] != CHAR_PATTERN)
        tokenizer = tokenizer_from(header_path, name=header["name"], ranks=ranks, specials=header["specials"],
                                   pattern=header["pattern"], added=header.get("added", []))
        if tokenizer.hash != header["hash"]:
            raise UserError(
                f"{header_path}: the tokenizer files were altered (hash {tokenizer.hash[:12]}, "
                f"expected {header['hash'][:12]}); restore both files from where they were made"
            )
        return tokenizer


class CharTokenizer(Tokenizer):
    """A token for each character of a vocabulary. A text with another character cannot be encoded."""

    def __init__(self, *, name: str, ranks: dict[bytes, int], specials: dict[str, int], pattern: str = CHAR_PATTERN,
                 added: Iterable[str] = ()):
        super().__init__(name=name, ranks=ranks, specials=specials, pattern=pattern, added=added)
        try:
            points = {ord(token.decode()): i for token, i in ranks.items()}
        except (UnicodeDecodeError, TypeError) as error:
            raise ValueError(f"tokenizer {name}: a token is not one character ({error})") from error
        self._ids = np.full(max(points, default=0) + 2, -1)  # by code point; the last stands for all beyond
        self._ids[list(points)] = list(points.values())

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        return self._encode(text, self.specials if allow_special else self.added).tolist()

    def encode_array(self, text: str) -> np.ndarray:
        return self._encode(text, self.added)

    def _encode(self, text: str, words: Collection[str]) -> np.ndarray:
        """The ids of `text`; each of `words`, specials all of them, is one token wherever it is written."""
        _check_utf8(text)
        ids = self._ids[np.minimum(np.frombuffer(text.encode("utf-32-le"), "<u4"), len(self._ids) - 1)]
        if words:
            longest_first = "|".join(map(re.escape, sorted(words, key=len, reverse=True)))
            kept = np.ones(len(ids), bool)
            for found in re.finditer(longest_first, text):
                ids[found.start()] = self.specials[found.group()]
                kept[found.start() + 1 : found.end()] = False
            ids[~kept] = 0  # not looked at below
        if (unknown := ids < 0).any():
            at = int(unknown.argmax())
            raise UserError(f"character {text[at]!r} (U+{ord(text[at]):04X}), at {at} of the text, is none of the "
                            f"{len(self.ranks)} of tokenizer {self.name}: leave it out, or use a tokenizer such as "
                            f"bytes or bpe:VOCAB, which have all")
        return (ids[kept] if words else ids).astype(np.uint32)


def class_of(pattern: str) -> type[Tokenizer]:
    return CharTokenizer if pattern == CHAR_PATTERN else Tokenizer


class StreamDecoder:
    """Decodes one id at a time and holds back the bytes of an incomplete UTF-8 character."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """Return the text that `token_id` completes; '' while a character is incomplete."""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def finish(self) -> str:
        """Return what is still held back (U+FFFD for an incomplete character), at the end of a text."""
        return self._decoder.decode(b"", final=True)


def tokenizer_from(where: Path, **parts) -> Tokenizer:
    """Return the tokenizer of these parts, made from the file `where`. Raises UserError naming it."""
    try:
        return class_of(parts["pattern"])(**parts) if "pattern" in parts else Tokenizer(**parts)
    except ValueError as error:
        raise UserError(f"{where}: {error}; restore the file from where it was made") from error


def extend(tokenizer: Tokenizer, specials: Iterable[str]) -> Tokenizer:
    """Return a tokenizer with `specials` added after the last id; names that it already has keep their ids."""
    merged = dict(tokenizer.specials)
    next_id = tokenizer.vocab_size
    for name in specials:
        if name not in merged:
            merged[name] = next_id
            next_id += 1
    return type(tokenizer)(name=tokenizer.name, ranks=tokenizer.ranks, specials=merged, pattern=tokenizer.pattern,
                           added=tokenizer.added)


def add_tokens(tokenizer: Tokenizer, words: Iterable[str]) -> Tokenizer:
    """Return a tokenizer that has each of `words` as one token, with ids after the last one.

    Raises UserError for a word that is empty, given twice, or a token already.
    """
    words = list(words)
    for i, word in enumerate(words):
        if not word or word in words[:i] or word in tokenizer.specials or word.encode() in tokenizer.ranks:
            raise UserError(f"new token {word!r} is empty, given twice, or a token of {tokenizer.name} already: leave "
                            f"it out")
    grown = extend(tokenizer, words)
    return type(tokenizer)(name=grown.name, ranks=grown.ranks, specials=grown.specials, pattern=grown.pattern,
                           added=tokenizer.added | set(words))


def parts_of_new(old: Tokenizer, new: Tokenizer) -> list[list[int]] | None:
    """For each id that `new` has after those of `old`, in order: the ids that its text has in `old`.

    None where `new` is not `old` with further specials after it.
    """
    known = {name: i for name, i in new.specials.items() if i < old.vocab_size}
    further = sorted((i, name) for name, i in new.specials.items() if i >= old.vocab_size)
    if (new.pattern, new.ranks, known) != (old.pattern, old.ranks, old.specials) or not old.added <= new.added:
        return None
    if [i for i, _ in further] != list(range(old.vocab_size, new.vocab_size)):
        return None
    return [old.encode(name) for _, name in further]


def read_ranks(path: Path, *, all_bytes: bool = True) -> dict[bytes, int]:
    """Read a `.tiktoken` file: a line is base64(token), space, rank. Raises UserError naming the bad line.

    all_bytes: every single byte has to be a token, as a byte-level BPE needs.

    `tiktoken.load.load_tiktoken_bpe` is not used: it caches files by path and would return a stale copy.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot read the tokenizer's ranks ({error.strerror})") from error
    ranks, used = {}, set()
    for number, line in enumerate(lines, start=1):
        try:
            encoded, digits = line.split()
            token, rank = base64.b64decode(encoded, validate=True), int(digits)
        except ValueError:
            raise UserError(f"{path}:{number}: expected 'base64-token rank', got {line[:40]!r}") from None
        if not token or token in ranks or rank in used or not 0 <= rank < MAX_VOCAB:
            raise UserError(
                f"{path}:{number}: expected a token and a rank that no line above has, the rank in [0, {MAX_VOCAB}), "
                f"got {line[:40]!r}; restore the file"
            )
        ranks[token] = rank
        used.add(rank)
    if all_bytes:
        check_has_all_bytes(ranks, path)
    return ranks


def check_has_all_bytes(ranks: dict[bytes, int], where: Path) -> None:
    """Raise UserError unless every single byte is a token; otherwise some text could not be encoded."""
    missing = [b for b in range(256) if bytes([b]) not in ranks]
    if missing:
        raise UserError(
            f"{where}: {len(missing)} of the 256 byte tokens are missing (first: 0x{missing[0]:02x}); "
            "expected a complete byte-level BPE vocabulary"
        )


def _ranks_to_lines(ranks: dict[bytes, int]) -> bytes:
    ordered = sorted(ranks.items(), key=lambda item: item[1])
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ordered)


def _read_header(path: Path) -> dict:
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: not found; expected a directory written by Tokenizer.save") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from error
    missing = {"format", "name", "pattern", "specials", "hash"} - set(header if isinstance(header, dict) else ())
    if missing:
        raise UserError(f"{path}: lacks {', '.join(sorted(missing))}; expected a file written by Tokenizer.save")
    if header["format"] != FORMAT:
        raise UserError(f"{path}: format {header['format']!r} is unknown, expected {FORMAT}; update gptdist")
    added = header.get("added", [])
    if not isinstance(added, list) or not all(isinstance(word, str) for word in added):
        raise UserError(f"{path}: added is {str(added)[:40]!r}, expected a list of words; restore the file")
    for name, kind, expected in (("name", str, "a string"), ("pattern", str, "a string"), ("hash", str, "a string"),
                                 ("specials", dict, "an object of names and ids")):
        if not isinstance(header[name], kind):
            raise UserError(f"{path}: {name} is {str(header[name])[:40]!r}, expected {expected}; restore the file")
    return header


def _check_parts(name: str, ranks: dict[bytes, int], specials: dict[str, int], pattern: str) -> None:
    if EOT not in specials:
        raise ValueError(f"tokenizer {name}: specials must have {EOT}, got {sorted(specials)}")
    for token, i in [*ranks.items(), *specials.items()]:
        if not token or not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < MAX_VOCAB:
            raise ValueError(f"tokenizer {name}: token {token!r} has id {i!r}, expected a token of at least one byte "
                             f"and an integer in [0, {MAX_VOCAB})")
    if len({*ranks.values(), *specials.values()}) != len(ranks) + len(specials):
        raise ValueError(f"tokenizer {name}: two tokens have the same id")
    if not pattern or not isinstance(pattern, str):
        raise ValueError(f"tokenizer {name}: pattern is {pattern!r}, expected a regular expression")


def _check_utf8(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"the text is not valid Unicode (it has lone surrogates, the first {text[error.start]!r} at "
                        f"character {error.start}): was it UTF-8 where it came from?") from None


def _safe_parts(text: str) -> Iterator[str]:
    """Yield `text` in parts without a whitespace run so long that tiktoken panics; nearly always one part.

    Any run of 2 * _LONG_WHITESPACE characters covers one whole aligned block, so looking at blocks finds it cheaply.
    """
    blocks = range(0, len(text) - _LONG_WHITESPACE + 1, _LONG_WHITESPACE)
    if not any(text[i : i + _LONG_WHITESPACE].isspace() for i in blocks):
        yield text
        return
    start = 0
    for run in re.finditer(rf"\s{{{_LONG_WHITESPACE},}}", text):
        # The cut leaves at least one character of the run: GPT-2's pattern gives the last space to the next word.
        for cut in range(run.start() + _LONG_WHITESPACE, run.end(), _LONG_WHITESPACE):
            yield text[start:cut]
            start = cut
    yield text[start:]


def build_tokenizer(spec: str, texts: Iterable[str] | None = None, pattern: str = GPT2_PATTERN) -> Tokenizer:
    """Build a tokenizer from `bytes`, `char`, `gpt2`, `bpe:VOCAB` or a path; see `tokenizer_build.build`."""
    from gptdist.data.tokenizer_build import build

    return build(spec, texts, pattern)
