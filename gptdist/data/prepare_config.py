"""The settings of `prepare`, from a YAML file and the command line."""

import dataclasses
import difflib
import os
import re
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gptdist.config import parse_yaml
from gptdist.data.quality import parse_rules
from gptdist.data.scrub import Scrub
from gptdist.data.writer import DEFAULT_SHARD_TOKENS
from gptdist.errors import UserError

EMBEDDED = "embedded"


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Settings of `prepare`. A YAML file has the same names, but `input` for `inputs`."""

    inputs: list[str]
    """Files, directories, globs, or the word `embedded` (the corpus that comes with Python); each is a source."""
    output: str
    """Directory to create: train/, val/, tokenizer/, report.json, report.html."""
    tokenizer: str = "gpt2"
    """bytes, char, gpt2, bpe:VOCAB, or a path; see `gptdist.data.tokenizer_build`."""
    add_tokens: list[str] = field(default_factory=list)
    """Words that become tokens of their own, after the tokenizer's."""
    compare_tokenizer: str | None = None
    """Another tokenizer, such as gpt2, whose bytes per token the report has beside this one's."""
    text_field: str = "text"
    """Field of JSONL objects, or column of Parquet, that has the text."""
    document_separator: str | None = None
    """Plain text: None (a file is one document), `blank-line`, or a string such as <|endoftext|>."""
    max_document_chars: int = 100_000
    """Longer plain-text documents are cut in several at the next end of a paragraph."""
    skip_bad: bool = False
    """Count what cannot be read (a record, a row group, the rest of a file) and go on, instead of failing."""
    val_fraction: float = 0.05
    """Share held out for validation, [0, 1); 0 makes no val/."""
    split: str = "documents"
    """documents: as data/split.py holds them out. tail: the input is one text, in memory, only control characters
    removed and NFC applied, with nothing between documents and no <|endoftext|>; its first int((1 - val_fraction) n) of
    n characters train, the rest is held out."""
    normalize: bool = True
    """Apply Unicode NFC."""
    min_chars: int = 1
    """Shorter documents are dropped."""
    max_chars: int = 0
    """Longer documents are dropped; 0: none."""
    rules: list[str] = field(default_factory=list)
    """Quality rules: groups (gopher, c4, lines), rules, RULE=LIMIT, RULE=off; see `gptdist.data.quality`."""
    languages: list[str] = field(default_factory=list)
    """Keep documents in these languages only (ISO 639-1 codes); empty: all."""
    language_min: float = 0.5
    """Least probability that the language is one of `languages`."""
    scrub: list[str] = field(default_factory=list)
    """Replace these by placeholders: email, phone, ip."""
    dedup: bool = True
    """Drop documents whose cleaned text was seen before; not where `split` is tail."""
    near_dedup: float = 0.0
    """Drop documents whose likeness to one kept before reaches this, such as 0.8; 0: off."""
    near_dedup_memory_mb: int = 1024
    """Near-duplicates: a larger table is kept in a file."""
    samples: int = 5
    """How many of the documents that each filter dropped the report shows."""
    workers: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    """Threads that tokenize."""
    shard_tokens: int = DEFAULT_SHARD_TOKENS
    """Tokens of a shard file."""
    overwrite: bool = False
    """Replace an existing dataset, and an unfinished one of other settings."""
    seed: int = 0
    """Key of the held-out split, and of near-duplicates' hash functions."""


# The settings that a split of one text leaves no room for, and their values that ask for nothing.
_OFF_IN_ONE_TEXT = {"document_separator": (None,), "min_chars": (0, 1), "max_chars": (0,), "rules": ([],),
                    "languages": ([],), "scrub": ([],), "near_dedup": (0,)}
# What changes neither the dataset nor what an unfinished one has.
INCIDENTAL = ("output", "workers", "overwrite", "near_dedup_memory_mb")


def load_config(path: str | None, given: dict[str, Any]) -> PrepareConfig:
    """The settings of a YAML file (None: none) with those given on the command line over them, by field name.

    Raises UserError for a file that cannot be read, an unknown key, a value of the wrong type, or no input or output.
    """
    values = {**(_read(path) if path else {}), **given}
    for name, flag in (("inputs", "input"), ("output", "output"), ("tokenizer", "tokenizer")):
        if name not in values:
            raise UserError(f"--{flag} is missing; give it on the command line or as `{flag}:` in a --config file")
    return PrepareConfig(**values)


def _read(path: str) -> dict[str, Any]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as YAML ({' '.join(str(error).split())[:200]})") from error
    values = parse_yaml(text, path)
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds a {type(values).__name__}, expected keys such as `input:` and `output:`")
    hints = typing.get_type_hints(PrepareConfig)
    hints = {"input" if name == "inputs" else name: hint for name, hint in hints.items()}
    for name, value in values.items():
        if name not in hints:
            close = difflib.get_close_matches(str(name), hints, n=1, cutoff=0.4)
            advice = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(hints)}"
            raise UserError(f"{path}: unknown key {name!r}; {advice}")
        if not _fits(value, hints[name]):
            raise UserError(f"{path}: {name} is {str(value)[:80]!r}, expected {_described(hints[name])}")
    return {"inputs" if name == "input" else name: value for name, value in values.items()}


def _fits(value: Any, hint: Any) -> bool:
    if isinstance(hint, types.UnionType):
        return any(_fits(value, part) for part in typing.get_args(hint))
    if typing.get_origin(hint) is list:
        return isinstance(value, list) and all(_fits(item, typing.get_args(hint)[0]) for item in value)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))


def _described(hint: Any) -> str:
    return str(hint) if not isinstance(hint, type) or typing.get_origin(hint) else hint.__name__


def check(config: PrepareConfig) -> None:
    """Raise UserError for settings that cannot work."""
    if not config.inputs:
        raise UserError("--input is empty; give text, JSONL or Parquet files, directories, globs, or the word embedded")
    for name, least, below in (("val_fraction", 0, 1), ("near_dedup", 0, 1.0000001), ("language_min", 0, 1.0000001)):
        if not least <= getattr(config, name) < below:
            upper = "below 1" if below == 1 else "at most 1"
            raise UserError(f"--{flag(name)} is {getattr(config, name)}, expected at least 0 and {upper}")
    if config.document_separator == "":
        raise UserError("--document-separator is empty; expected blank-line or a string such as <|endoftext|>")
    for name, least in (("workers", 1), ("shard_tokens", 1), ("max_document_chars", 1), ("near_dedup_memory_mb", 1),
                        ("max_chars", 0), ("samples", 0)):
        if getattr(config, name) < least:
            raise UserError(f"--{flag(name)} is {getattr(config, name)}, expected at least {least}")
    if not 0 <= config.seed < 1 << 63:
        raise UserError(f"--seed is {config.seed}, expected 0 to 2^63 - 1")
    if config.compare_tokenizer is not None and re.fullmatch("char|bpe:.*", config.compare_tokenizer):
        raise UserError(f"--compare-tokenizer is {config.compare_tokenizer}, which is made from texts; expected bytes, "
                        f"gpt2, or the path of a tokenizer")
    parse_rules(config.rules)
    Scrub(config.scrub)
    _check_split(config)


def _check_split(config: PrepareConfig) -> None:
    if config.split not in ("documents", "tail"):
        raise UserError(f"--split is {config.split}, expected documents or tail")
    for name, off in _OFF_IN_ONE_TEXT.items() if config.split == "tail" else ():
        if (value := getattr(config, name)) not in off:
            shown = " ".join(value) if isinstance(value, list) else repr(value)
            raise UserError(f"--split tail with --{flag(name)} {shown}: the input is one text there, without "
                            f"separators and filters; leave one of them out")


def flag(name: str) -> str:
    return name.replace("_", "-")


def fingerprint(config: PrepareConfig) -> dict[str, Any]:
    """The settings that an unfinished dataset has to share with the run that goes on with it."""
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in INCIDENTAL}
