"""What evaluation tasks ask: the kinds of items, and reading them from files.

A kind says which keys a JSON object (a line of a .jsonl file) has; of names in parentheses one is enough.

    choice     (ctx, context, question, query, prompt), (endings, choices), (label, answer, answerKey, gold): the number
               from 0, the letter or the text of the right one. HellaSwag; ARC's {"text": [...], "label": [...]} too
    cloze      text, whose last word is to be found (LAMBADA); or (context, prompt) and (target, completion)
    text       text: perplexity and bits per byte. A .txt file is one text
    classify   text, label; also .csv, .tsv and label<TAB>text files, as `gptdist finetune` reads them
    qa         question, (answer, answers), and perhaps context. answers: a list, or SQuAD's {"text": [...]}
    translate  source, target (a text or a list of them)
    summarize  (document, article, text), (summary, highlights)
"""

import codecs
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptdist.data.labelled import read_labelled
from gptdist.errors import UserError

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_SHOWN = 60  # characters of bad input that a message quotes


@dataclass(frozen=True)
class Item:
    """One question. What `query` and `answers` are depends on the kind."""

    where: str  # FILE line N
    query: str  # context, question, source; the text of `text` and `classify`
    answers: tuple[str, ...] = ()  # right ones; of `choice` and `cloze` the one
    choices: tuple[str, ...] = ()

    @property
    def answer(self) -> str:
        return self.answers[0]


@dataclass(frozen=True)
class TaskSet:
    """A task's items. `skipped` lines were no items; `first_skipped` says what was wrong with the first."""

    name: str
    kind: str
    items: list[Item]
    skipped: int = 0
    first_skipped: str = ""


def read_task(path: str, kind: str | None = None, *, skip_bad: bool = False) -> TaskSet:
    """The items of a file. kind: None: told by the keys of its first object, or by .txt.

    Raises UserError with the file and line of anything that is not an item; with skip_bad it is counted.
    """
    if kind is not None and kind not in KINDS:
        raise UserError(f"{kind!r} is no kind of task, expected KIND=FILE with one of {', '.join(KINDS)}")
    name, file = Path(path).stem, Path(path)
    if file.suffix == ".txt" and kind in (None, "text"):
        if not (text := _decoded(_bytes(file), path)).strip():
            raise UserError(f"{path} is empty, expected a text")
        return TaskSet(name, "text", [Item(path, text)])
    if file.suffix in (".csv", ".tsv", ".txt") and kind in (None, "classify"):
        rows = read_labelled(path, text_field="text", label_field="label")
        return TaskSet(name, "classify",
                       [Item(f"{path} row {i}", row.text, (row.label,)) for i, row in enumerate(rows, 1)])
    items, faults = [], []
    for number, line in enumerate(_bytes(file).split(b"\n"), 1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            record = _record(_decoded(line, where), where)
            kind = kind or _kind_of(record, where)
            items.append(KINDS[kind](record, where))
        except UserError as error:
            if not skip_bad:
                raise UserError(f"{error}; mend the line, or count such lines with --skip-bad") from error
            faults.append(str(error))
    if not items:
        why = f"none of its {len(faults)} lines is a question with its answer, such as {faults[0]}" if faults else \
            "it has no lines"
        raise UserError(f"{path} holds nothing to evaluate on: {why}")
    return TaskSet(name, kind, items, len(faults), faults[0] if faults else "")


def _bytes(path: Path) -> bytes:
    """A file without a byte order mark."""
    try:
        return path.read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; expected the name of an embedded set, or a file of "
                        f"questions") from error


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 text (its byte {error.start})") from error


def _record(line: str, where: str) -> Mapping[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON ({getattr(error, 'msg', error)})") from error
    if not isinstance(record, dict):
        raise UserError(f"{where} is {_short(record)}, expected a JSON object")
    return record


def _kind_of(record: Mapping[str, Any], where: str) -> str:
    for kind, keys in (("choice", ("endings", "choices")), ("translate", ("source",)),
                       ("summarize", ("summary", "highlights")), ("cloze", ("target", "completion")),
                       ("qa", ("question",)), ("classify", ("label",))):
        if any(key in record for key in keys):
            return kind
    if "text" in record:
        raise UserError(f"{where} has only a text: say what to do with it, as in --tasks cloze=FILE (find the last "
                        f"word) or --tasks text=FILE (perplexity)")
    raise UserError(f"{where} has the keys {', '.join(record) or 'none'}, which no kind of task has: expected for "
                    f"instance question and choices, or question and answer")


# The kinds


def _choice(record: Mapping[str, Any], where: str) -> Item:
    query, choices = _string(record, CONTEXTS, where), _first(record, ("endings", "choices"), where)
    if "question" in record and "ctx" not in record:
        query = f"Question: {query}\nAnswer:"
    names: Sequence[Any] = ()
    if isinstance(choices, dict):
        names, choices = choices.get("label", ()), choices.get("text")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c.strip() for c in choices):
        raise UserError(f"{where}: the choices are {_short(choices)}, expected a list of two or more texts")
    right = _number(_first(record, ("label", "answer", "answerKey", "gold"), where), choices, list(names), where)
    return Item(where, query, (choices[right],), tuple(choices))


def _number(label: Any, choices: Sequence[str], names: Sequence[Any], where: str) -> int:
    """Which choice a label means."""
    given = label
    if label in names:
        return names.index(label)
    if isinstance(label, str) and label in choices:
        return choices.index(label)
    if isinstance(label, str) and label.strip().isdecimal():
        label = int(label)
    elif isinstance(label, str) and len(label.strip()) == 1 and label.strip().upper() in LETTERS:
        label = LETTERS.index(label.strip().upper())
    if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < len(choices):
        raise UserError(f"{where}: the label is {_short(given)}, expected 0 to {len(choices) - 1}, a letter, or one of "
                        f"the {len(choices)} choices")
    return label


def _cloze(record: Mapping[str, Any], where: str) -> Item:
    if "text" not in record:
        answers = _answers(record, ("target", "completion"), where)
        return Item(where, _string(record, ("context", "prompt"), where), answers[:1])
    words = _string(record, ("text",), where).rsplit(None, 1)
    if len(words) < 2:
        raise UserError(f"{where}: the text is {_short(record['text'])}, expected two words or more")
    return Item(where, words[0], (words[1],))


def _document(record: Mapping[str, Any], where: str) -> Item:
    return Item(where, _string(record, ("text",), where))


def _classify(record: Mapping[str, Any], where: str) -> Item:
    label = _first(record, ("label",), where)
    label = json.dumps(label) if isinstance(label, int) else label
    if not isinstance(label, str) or not label.strip():
        raise UserError(f"{where}: the label is {_short(label)}, expected a text or a whole number")
    return Item(where, _string(record, ("text",), where), (label,))


def _qa(record: Mapping[str, Any], where: str) -> Item:
    question = _string(record, ("question",), where)
    if record.get("context"):
        question = f"{_string(record, ('context',), where)}\n{question}"
    return Item(where, question, _answers(record, ("answers", "answer"), where))


def _translate(record: Mapping[str, Any], where: str) -> Item:
    return Item(where, _string(record, ("source",), where), _answers(record, ("target",), where))


def _summarize(record: Mapping[str, Any], where: str) -> Item:
    return Item(where, _string(record, ("document", "article", "text"), where),
                _answers(record, ("summary", "highlights"), where))


CONTEXTS = ("ctx", "context", "question", "query", "prompt")
KINDS: dict[str, Callable[[Mapping[str, Any], str], Item]] = {
    "choice": _choice, "cloze": _cloze, "text": _document, "classify": _classify, "qa": _qa, "translate": _translate,
    "summarize": _summarize}


def _first(record: Mapping[str, Any], keys: Sequence[str], where: str) -> Any:
    """The value of the first of the keys that is there."""
    for key in keys:
        if record.get(key) is not None:
            return record[key]
    raise UserError(f"{where} has no {' or '.join(keys)}, only {', '.join(record) or 'no keys at all'}")


def _string(record: Mapping[str, Any], keys: Sequence[str], where: str) -> str:
    value = _first(record, keys, where)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: {' or '.join(keys)} is {_short(value)}, expected a text")
    return value


def _answers(record: Mapping[str, Any], keys: Sequence[str], where: str) -> tuple[str, ...]:
    value = _first(record, keys, where)
    if isinstance(value, dict):
        value = value.get("text")
    values = value if isinstance(value, list) else [value]
    if not values or not all(isinstance(v, str) and v.strip() for v in values):
        raise UserError(f"{where}: {' or '.join(keys)} is {_short(value)}, expected the right answer or a list of them")
    return tuple(values)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


def texts_of(items: Iterable[Item]) -> Iterator[tuple[str, str]]:
    """(where, all that an item tells) of each: question and right answer."""
    for item in items:
        yield item.where, " ".join((item.query, *item.answers[:1]))
