"""The dataset directory: memory-mapped token shards, read and verified here, written by `writer`.

    meta.json                  format, tokenizer hash, vocab_size, dtype, counts, and size and sha256 of every file
    shard-00000.tokens.bin     raw little-endian uint16 or uint32, documents one after another, each ending in eot
    shard-00000.idx            little-endian int64: where each document of this shard starts, in tokens
    shard-00000.loss_mask.bin  optional stream, uint8 for each token: 1 if it is a target

nanoGPT's `train.bin` is a tokens file alone and opens as well.
"""

import hashlib
import json
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from gptdist.errors import UserError

FORMAT = 1
META_NAME = "meta.json"
TOKEN_DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
STREAM_DTYPES = TOKEN_DTYPES | {"uint8": np.dtype("u1")}
INDEX_DTYPE = np.dtype("<i8")
_META_FIELDS = {"format", "tokenizer_hash", "vocab_size", "eot", "n_tokens", "n_documents", "streams", "shards"}
_SHARD_NAME = re.compile(r"[\w-][\w.-]*", re.ASCII)


def token_dtype(vocab_size: int) -> str:
    """Return the name of the smallest dtype that holds ids below `vocab_size`."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def stream_file(shard: str, stream: str) -> str:
    """Return the file name of a stream of a shard, such as `shard-00000.tokens.bin`."""
    return f"{shard}.{stream}.bin"


@dataclass(frozen=True, kw_only=True)
class DatasetMeta:
    """What meta.json says. `tokenizer_hash`, `vocab_size` and `eot` are None for a raw .bin file."""

    n_tokens: int
    streams: dict[str, str]  # stream name -> dtype name; "tokens" is always there
    n_documents: int | None = None
    tokenizer_hash: str | None = None
    vocab_size: int | None = None
    eot: int | None = None
    shards: list[dict] = field(default_factory=list)  # {name, n_tokens, n_documents, files: {name: {size, sha256}}}


class TokenDataset:
    """The tokens of all shards as one sequence; nothing is read before it is asked for.

    Safe to read from several threads. `len(dataset)` is the number of tokens.
    """

    def __init__(self, path: Path, meta: DatasetMeta, streams: dict[str, list[np.ndarray]]):
        self.path = path
        self.meta = meta
        self._streams = streams
        self._ends = np.cumsum([len(part) for part in streams["tokens"]], dtype=np.int64)
        self._single = {name: parts[0] for name, parts in streams.items()} if len(self._ends) == 1 else None

    @classmethod
    def open(cls, path: str | Path, dtype: str = "uint16") -> "TokenDataset":
        """Open a split directory, or a raw token file whose ids have `dtype`.

        Raises UserError when something is missing, of an unknown format, or a file has not the size meta.json says.
        """
        path = Path(path)
        if path.is_file():
            return cls._open_raw(path, dtype)
        meta = read_meta(path)
        _check_sizes(path, meta)
        streams = {
            name: [_map(path / stream_file(shard["name"], name), STREAM_DTYPES[dtype]) for shard in meta.shards]
            for name, dtype in meta.streams.items()
        }
        return cls(path, meta, streams)

    @classmethod
    def _open_raw(cls, path: Path, dtype: str) -> "TokenDataset":
        if dtype not in TOKEN_DTYPES:
            raise UserError(f"{path}: dtype {dtype!r} is unknown; expected one of {', '.join(TOKEN_DTYPES)}")
        size, item_bytes = path.stat().st_size, TOKEN_DTYPES[dtype].itemsize
        if size == 0 or size % item_bytes:
            raise UserError(
                f"{path}: {size} bytes is not a positive multiple of {item_bytes} ({dtype}); expected raw token ids"
            )
        meta = DatasetMeta(n_tokens=size // item_bytes, streams={"tokens": dtype})
        return cls(path, meta, {"tokens": [_map(path, TOKEN_DTYPES[dtype])]})

    def __len__(self) -> int:
        return self.meta.n_tokens

    def has_stream(self, name: str) -> bool:
        return name in self._streams

    def window(self, start: int, n: int, stream: str = "tokens") -> np.ndarray:
        """Return elements [start, start + n) of a stream, (n,) in its dtype; a view where it lies in one shard.

        Raises IndexError when the window is not inside the dataset.
        """
        if start < 0 or n < 0 or start + n > self.meta.n_tokens:
            raise IndexError(f"{self.path}: window [{start}, {start + n}) is not inside [0, {self.meta.n_tokens})")
        if self._single is not None:
            return self._single[stream][start : start + n]
        parts = []
        shard = int(np.searchsorted(self._ends, start, side="right"))
        while n > 0:
            offset = start - int(self._ends[shard - 1]) if shard else start
            part = self._streams[stream][shard][offset : offset + n]
            parts.append(part)
            start, n, shard = start + len(part), n - len(part), shard + 1
        if not parts:
            return np.empty(0, STREAM_DTYPES[self.meta.streams[stream]])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    @cached_property
    def document_starts(self) -> np.ndarray:
        """Where each document starts in the whole sequence, int64 (n_documents,). Raises UserError for a raw file."""
        if self.path.is_file():
            raise UserError(f"{self.path}: a raw token file has no document index; prepare the text to get one")
        starts = [np.empty(0, np.int64)]
        for shard, end in zip(self.meta.shards, self._ends, strict=True):
            index = np.fromfile(self.path / f"{shard['name']}.idx", INDEX_DTYPE)
            starts.append(index.astype(np.int64) + (int(end) - shard["n_tokens"]))
        return np.concatenate(starts)


def read_meta(directory: Path) -> DatasetMeta:
    """Read and check meta.json. Raises UserError."""
    path = directory / META_NAME
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(_not_a_dataset(directory)) from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); prepare the dataset again") from error
    if not isinstance(raw, dict) or "format" not in raw:
        raise UserError(f"{path}: has no 'format'; expected a dataset's meta.json")
    if raw["format"] != FORMAT:
        raise UserError(f"{path}: format {raw['format']!r} is unknown, expected {FORMAT}; update gptdist")
    missing = _META_FIELDS - set(raw)
    if missing:
        raise UserError(f"{path}: lacks {', '.join(sorted(missing))}; prepare the dataset again")
    _check_types(path, raw)
    return DatasetMeta(**{name: raw[name] for name in _META_FIELDS - {"format"}})


def find_splits(path: Path) -> list[Path]:
    """The split directories that `path` is or holds: DIR/train, DIR/val, or DIR itself."""
    return [folder for folder in (path, path / "train", path / "val") if (folder / META_NAME).is_file()]


def _check_types(path: Path, raw: dict[str, Any]) -> None:
    """Raise UserError naming the first value of meta.json that has not the type or range that its readers rely on."""

    def require(ok: bool, name: str, value: Any, expected: str) -> None:
        if not ok:
            raise UserError(f"{path}: {name} is {str(value)[:80]!r}, expected {expected}; prepare the dataset again")

    require(isinstance(raw["tokenizer_hash"], str), "tokenizer_hash", raw["tokenizer_hash"], "a string")
    for name, least in (("vocab_size", 1), ("eot", 0), ("n_tokens", 0), ("n_documents", 0)):
        require(_is_count(raw[name], least), name, raw[name], f"an integer of at least {least}")
    streams, shards = raw["streams"], raw["shards"]
    require(isinstance(streams, dict), "streams", streams, "an object of stream names and dtypes")
    understood = all(isinstance(dtype, str) and dtype in STREAM_DTYPES for dtype in streams.values())
    if not understood or streams.get("tokens") not in TOKEN_DTYPES:
        raise UserError(f"{path}: streams {str(streams)[:80]!r} are not understood; expected tokens: uint16 or uint32")
    require(isinstance(shards, list), "shards", shards, "a list")
    for i, shard in enumerate(shards):
        require(isinstance(shard, dict), f"shards[{i}]", shard, "an object")
        name = shard.get("name")
        require(isinstance(name, str) and _SHARD_NAME.fullmatch(name) is not None, f"shards[{i}].name", name,
                "a file name such as shard-00000")
        for count in ("n_tokens", "n_documents"):
            value = shard.get(count)
            require(_is_count(value, 1), f"shards[{i}].{count}", value, "an integer of at least 1")
        files = shard.get("files")
        require(isinstance(files, dict) and all(map(_is_file_entry, files.values())), f"shards[{i}].files", files,
                "an object of file names, each with size and sha256")


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_file_entry(entry: Any) -> bool:
    return isinstance(entry, dict) and _is_count(entry.get("size"), 0) and isinstance(entry.get("sha256"), str)


def verify(path: str | Path) -> None:
    """Read a whole split directory and check every file's size and sha256, and that all ids are below vocab_size.

    Raises UserError naming the first bad file.
    """
    path = Path(path)
    dataset = TokenDataset.open(path)
    for shard in dataset.meta.shards:
        for name, expected in shard["files"].items():
            actual = _sha256(path / name)
            if actual != expected["sha256"]:
                raise UserError(
                    f"{path / name}: sha256 {actual[:12]} but {META_NAME} says {expected['sha256'][:12]}; "
                    "the file was altered or damaged, copy or prepare it again"
                )
        _check_ids(path / stream_file(shard["name"], "tokens"), dataset.meta)


def _sha256(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise UserError(f"{str(path)!r}: cannot be read ({error}), but {META_NAME} lists it; copy it again") from error


def _check_ids(path: Path, meta: DatasetMeta, chunk: int = 1 << 22) -> None:
    tokens = _map(path, TOKEN_DTYPES[meta.streams["tokens"]])
    for start in range(0, len(tokens), chunk):
        part = tokens[start : start + chunk]
        worst = int(part.argmax())
        if part[worst] >= meta.vocab_size:
            raise UserError(
                f"{path}: token {start + worst} is {part[worst]}, expected below vocab_size {meta.vocab_size}; "
                "prepare the dataset again with its tokenizer"
            )


def _check_sizes(directory: Path, meta: DatasetMeta) -> None:
    """Raise UserError unless every file of every shard has the size that its counts and meta.json both say."""
    if sum(shard["n_tokens"] for shard in meta.shards) != meta.n_tokens:
        raise UserError(f"{directory / META_NAME}: shards do not sum to n_tokens {meta.n_tokens}; prepare it again")
    for shard in meta.shards:
        needed = {f"{shard['name']}.idx": shard["n_documents"] * INDEX_DTYPE.itemsize}
        for stream, dtype in meta.streams.items():
            needed[stream_file(shard["name"], stream)] = shard["n_tokens"] * STREAM_DTYPES[dtype].itemsize
        for name, size in needed.items():
            _check_size(directory / name, size, shard["files"].get(name, {}).get("size"))


def _check_size(path: Path, needed: int, declared: int | None) -> None:
    if declared != needed:
        raise UserError(
            f"{path.parent / META_NAME}: says {declared} bytes for {path.name} but its counts need {needed}; "
            "prepare the dataset again"
        )
    try:
        actual = path.stat().st_size
    except FileNotFoundError:
        raise UserError(f"{path}: missing; {META_NAME} lists it with {needed} bytes, copy it again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check its permissions or copy it again") from error
    if actual != needed:
        raise UserError(f"{path}: {actual} bytes, expected {needed}; the file is cut or altered, copy it again")


def _map(path: Path, dtype: np.dtype) -> np.ndarray:
    """Memory-map a non-empty file read-only. A plain ndarray view: slicing np.memmap itself is several times slower."""
    return np.memmap(path, dtype=dtype, mode="r").view(np.ndarray)


def _not_a_dataset(directory: Path) -> str:
    if not directory.exists():
        return f"{directory}: no such dataset; expected a split directory with {META_NAME}, or a raw .bin file"
    splits = sorted(path.parent.name for path in directory.glob(f"*/{META_NAME}"))
    if splits:
        return f"{directory}: has the splits {', '.join(splits)}; give one of them, such as {directory / splits[0]}"
    return f"{directory}: has no {META_NAME}; expected a split directory of a prepared dataset"
