"""Texts with labels: reading them from files, balancing and splitting them, and an embedded set.

Files, by suffix:
    .csv, .tsv       a header that names the columns of text and label; a .tsv may be label<TAB>text without one
    .jsonl, .ndjson  a JSON object a line
    others           label<TAB>text a line, as the UCI SMS Spam Collection; csv's quoting holds here too
"""

import csv
import io
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gptdist.data.corpus import embedded_docstrings
from gptdist.errors import UserError

_JSONL = {".jsonl", ".ndjson"}
_MAX_FIELD = 16 << 20  # characters; more is a quote that nothing closes
_LINE_END = re.compile(r"[\r\n]")
_SHOWN = 5  # line numbers in a message
_FIELD_OPTIONS, _TEXT_OPTION = "classify.text_field and classify.label_field", "--text-field"  # finetune's, classify's

# Embedded: what a docstring of the standard library is about, told by its top-level module.
FAMILIES = {
    "concurrency": ("asyncio", "multiprocessing", "threading", "concurrent", "subprocess", "queue", "sched",
                    "selectors"),
    "files": ("pathlib", "tarfile", "zipfile", "shutil", "_pyio", "tempfile", "gzip", "bz2", "lzma", "os", "fileinput",
              "filecmp", "glob", "posixpath", "ntpath", "codecs", "io", "fnmatch", "stat", "pickle", "shelve"),
    "graphics": ("tkinter", "turtle", "colorsys"),
    "mail": ("email", "mailbox", "smtplib", "imaplib", "poplib", "nntplib", "smtpd", "mailcap", "quopri"),
    "numbers": ("_pydecimal", "fractions", "numbers", "statistics", "random", "datetime", "calendar", "ipaddress",
                "heapq", "bisect", "operator"),
    "testing": ("unittest", "doctest", "bdb", "pdb", "pydoc", "traceback", "trace", "cProfile", "profile", "pstats",
                "timeit", "inspect", "logging", "warnings"),
    "web": ("http", "urllib", "wsgiref", "xmlrpc", "ftplib", "socketserver", "cgi", "ssl", "html", "xml", "webbrowser"),
}
_SHORTEST_DOCSTRING = 30  # characters: "Return self." tells nothing


@dataclass(frozen=True)
class LabelledText:
    text: str
    label: str
    where: str  # file and line, for messages


@dataclass(frozen=True)
class Splits:
    """Training, validation and test texts; the latter two may be empty."""

    train: list[LabelledText]
    val: list[LabelledText]
    test: list[LabelledText]
    notes: tuple[str, ...] = ()  # what to say about how they were read


def read_labelled(path: str | Path, *, text_field: str = "text", label_field: str = "label") -> list[LabelledText]:
    """The labelled texts of a file in its order. Raises UserError with line numbers for rows it cannot use."""
    path, rows, faults = Path(path), [], defaultdict(list)
    for line, text, label in _records(path, text_field, label_field):
        if label is None or not label.strip():
            faults["no label"].append(line)
        elif text is None or not text.strip():
            faults["an empty text"].append(line)
        else:
            rows.append(LabelledText(text, label.strip(), f"{path} line {line}"))
    for fault, lines in faults.items():
        raise UserError(f"{path}: {_rows(lines)} {fault} ({_lines(lines)}): expected a text and a label in every row; "
                        f"complete or remove them")
    if not rows:
        raise UserError(f"{path} has no rows, expected labelled texts")
    return rows


def several_lines_note(path: str | Path, rows: Sequence[LabelledText]) -> str:
    """One line about rows of a label<TAB>text file that span several lines, as a stray quote does; "" for others."""
    if Path(path).suffix.lower() in {".csv", *_JSONL}:
        return ""
    spanning = [row for row in rows if _LINE_END.search(row.text) or _LINE_END.search(row.label)]
    if not spanning:
        return ""
    n = len(spanning)
    return (f"{n} {'row spans' if n == 1 else 'rows span'} several lines, the first at {spanning[0].where}: a text "
            f"that begins with a quote goes on to the next one; remove quotes that are not meant so")


def read_texts(path: str | Path, *, text_field: str = "text") -> list[str]:
    """Texts to be labelled: that column or field of .csv, .tsv and .jsonl, the lines of other files."""
    path = Path(path)
    if path.suffix.lower() in {".csv", ".tsv", *_JSONL}:
        found = [(line, text) for line, text, _ in _records(path, text_field, None)]
    else:
        found = list(enumerate(re.split(r"\r?\n", _read(path)), 1))
        if not found[-1][1]:  # behind the last line end
            found.pop()
    if empty := [line for line, text in found if text is None or not text.strip()]:
        raise UserError(f"{path}: {_rows(empty)} an empty text ({_lines(empty)}): remove them")
    if not found:
        raise UserError(f"{path} has no texts")
    return [text for _, text in found]


def _rows(lines: Sequence[int]) -> str:
    return "1 row has" if len(lines) == 1 else f"{len(lines)} rows have"


def _lines(lines: Sequence[int]) -> str:
    shown = ", ".join(map(str, lines[:_SHOWN])) + (", ..." if len(lines) > _SHOWN else "")
    return f"lines {shown}" if len(lines) > 1 else f"line {shown}"


# Files

Record = tuple[int, str | None, str | None]  # line number, text, label


def _records(path: Path, text_field: str, label_field: str | None) -> Iterator[Record]:
    if path.suffix.lower() in _JSONL:
        return _jsonl_records(path, text_field, label_field)
    return _table_records(path, text_field, label_field)


def _read(path: Path) -> str:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:  # the csv module wants line ends as they are
            return file.read()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error


def _jsonl_records(path: Path, text_field: str, label_field: str | None) -> Iterator[Record]:
    for line, text in enumerate(_read(path).split("\n"), 1):
        if not text.strip():
            continue
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} line {line} is not JSON ({error}): expected an object with {text_field!r}"
                            ) from error
        if not isinstance(record, dict) or text_field not in record:
            has = f"keys {', '.join(record)}" if isinstance(record, dict) else f"a {type(record).__name__}"
            raise UserError(f"{path} line {line} has no field {text_field!r}, it has {has[:200]}: set "
                            f"{_FIELD_OPTIONS if label_field else _TEXT_OPTION}")
        value, label = record[text_field], record.get(label_field)
        if not isinstance(value, str):
            raise UserError(f"{path} line {line}: {text_field!r} is a {type(value).__name__}, expected a text")
        if isinstance(label, int):
            label = json.dumps(label)
        if not isinstance(label, str | None):
            raise UserError(f"{path} line {line}: {label_field!r} is a {type(label).__name__}, expected a text or a "
                            f"whole number")
        yield line, value, label


def _table_records(path: Path, text_field: str, label_field: str | None) -> Iterator[Record]:
    suffix = path.suffix.lower()
    rows = _table_rows(path, "," if suffix == ".csv" else "\t")
    if suffix in (".csv", ".tsv"):
        first = next(rows, None)
        if first is None:
            return
        columns, wanted = first[1], [text_field] if label_field is None else [text_field, label_field]
        if all(name in columns for name in wanted):
            yield from _named_columns(path, rows, columns, wanted)
            return
        if suffix == ".csv" or len(columns) != 2 or label_field is None:
            missing = next(name for name in wanted if name not in columns)
            how = f"columns are separated by {'commas' if suffix == '.csv' else 'tabs'}, and named by "
            raise UserError(f"{path} has no column {missing!r}, its first line names {', '.join(columns)[:200]}: {how}"
                            f"{_FIELD_OPTIONS if label_field else _TEXT_OPTION}")
        rows = (row for part in ([first], rows) for row in part)  # no header: label<TAB>text
    for line, fields in rows:
        if len(fields) != 2:
            raise UserError(f"{path} line {line} has {len(fields)} fields, expected label<TAB>text")
        yield line, fields[1], fields[0]


def _named_columns(path: Path, rows: Iterator[tuple[int, list[str]]], columns: list[str],
                   wanted: list[str]) -> Iterator[Record]:
    places = [columns.index(name) for name in wanted]
    for line, fields in rows:
        if len(fields) != len(columns):
            raise UserError(f"{path} line {line} has {len(fields)} fields, its first line names {len(columns)} "
                            f"columns: quote fields that have the separator in them, and close every quote")
        values = [fields[place] for place in places]
        yield line, values[0], values[1] if len(values) > 1 else None


def _table_rows(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """(number of its first line, fields) of every row that is not blank."""
    limit = csv.field_size_limit(_MAX_FIELD)
    lines = io.StringIO(_read(path), newline="")  # str.splitlines would split at U+0085, U+2028 and others too
    line = 1
    try:
        reader = csv.reader(lines, delimiter=delimiter)
        for fields in reader:
            if fields:
                yield line, fields
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path} line {line} cannot be read ({error}): is there a quote that nothing closes?"
                        ) from error
    finally:
        csv.field_size_limit(limit)


# Labels, balance, splits


def find_labels(rows: Iterable[LabelledText], listed: Sequence[str] = ()) -> list[str]:
    """The labels, in the listed order or sorted. Raises UserError for fewer than two, or for a text without one."""
    counts = Counter(row.label for row in rows)
    if not listed:
        if len(counts) < 2:
            raise UserError(f"the training texts have the label {', '.join(counts)!r} alone, expected two or more")
        return sorted(counts)
    if missing := [label for label in listed if label not in counts]:
        raise UserError(f"classify.labels has {missing[0]!r}, which no training text has: they have {_listed(counts)}")
    check_labels(rows, listed)
    return list(listed)


def check_labels(rows: Iterable[LabelledText], labels: Sequence[str]) -> None:
    """Raise UserError for the first text whose label is not in `labels`."""
    for row in rows:
        if row.label not in labels:
            raise UserError(f"{row.where} has the label {row.label!r}, which training does not know: its labels are "
                            f"{_listed(labels)}")


def _listed(labels: Iterable[str]) -> str:
    shown = sorted(labels)
    return ", ".join(map(repr, shown[:20])) + (", ..." if len(shown) > 20 else "")


def undersample(rows: Sequence[LabelledText], seed: int) -> list[LabelledText]:
    """As many texts of each label as the rarest has, label after label.

    The rarest label's texts stay in their order; of another label's a fresh RandomState(seed) draws, as pandas'
    DataFrame.sample does: the balanced set of Raschka 2024, chapter 6.
    """
    by_label: dict[str, list[LabelledText]] = {label: [] for label in sorted({row.label for row in rows})}
    for row in rows:
        by_label[row.label].append(row)
    count = min(map(len, by_label.values()))
    result = []
    for members in by_label.values():
        drawn = range(count) if len(members) == count else _draw(len(members), count, seed)
        result += [members[i] for i in drawn]
    return result


def split(rows: Sequence[LabelledText], shares: Sequence[float], seed: int) -> Splits:
    """Shuffled by a fresh RandomState(seed), cut at int(n train), int(n train) + int(n validation)."""
    n_train, n_val = int(len(rows) * shares[0]), int(len(rows) * shares[1])
    order = _draw(len(rows), len(rows), seed)
    if shares[2] == 0:
        n_val = len(rows) - n_train  # nothing is lost to rounding
    parts = order[:n_train], order[n_train:n_train + n_val], order[n_train + n_val:]
    return Splits(*([rows[i] for i in part] for part in parts))


def _draw(n: int, count: int, seed: int) -> np.ndarray:
    return np.random.RandomState(seed).choice(n, count, replace=False)


# Embedded


def embedded_labelled() -> list[LabelledText]:
    """Docstrings of the standard library, labelled by what their module is for; each docstring once.

    Before it stands the name of what it describes, without those of module and class: "readline", a blank line, "Read
    and return one line ...".
    """
    families = {module: family for family, modules in FAMILIES.items() for module in modules}
    found: dict[str, LabelledText] = {}
    shared = set()
    for name, text in embedded_docstrings():
        family = families.get(name.partition(".")[0])
        if family is None or len(text) < _SHORTEST_DOCSTRING:
            continue
        key = re.sub(r"\s+", " ", text)
        if "." in name:
            text = f"{name.rpartition('.')[2]}\n\n{text}"
        if found.setdefault(key, LabelledText(text, family, name)).label != family:
            shared.add(key)
    return [row for key, row in found.items() if key not in shared]
