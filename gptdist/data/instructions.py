"""Conversations to learn from: Alpaca, chat messages and ShareGPT files, read into one type.

    Alpaca     {"instruction": "...", "input": "...", "output": "..."}; `input` may be missing or empty
    messages   {"messages": [{"role": "system" | "user" | "assistant", "content": "..."}, ...]}
    ShareGPT   {"conversations": [{"from": "system" | "human" | "gpt", "value": "..."}, ...]}

A file is a JSON list of such objects or has one a line (JSONL); both are recognised, and so is the kind of each object.
Other keys of an object are left alone. Sources: Taori et al., "Stanford Alpaca" (2023); OpenAI's chat format.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from gptdist.errors import UserError

T = TypeVar("T")
USER, ASSISTANT, SYSTEM = "user", "assistant", "system"
ROLES = {USER: USER, "human": USER, ASSISTANT: ASSISTANT, "gpt": ASSISTANT, "chatgpt": ASSISTANT, SYSTEM: SYSTEM}
AUTO = "auto"
_KEYS = {"messages": ("messages",), "sharegpt": ("conversations",), "alpaca": ("instruction", "output")}
_SHOWN = 60  # characters of bad input that a message quotes


@dataclass(frozen=True)
class Turn:
    """What one side says. `input`: Alpaca's text to work on, which some templates put under a heading of its own."""

    role: str  # USER or ASSISTANT
    text: str
    input: str = ""


@dataclass(frozen=True)
class Conversation:
    """Turns that alternate and begin with the user's."""

    turns: tuple[Turn, ...]
    system: str | None = None

    def __post_init__(self) -> None:
        wanted = [USER, ASSISTANT] * len(self.turns)
        if not self.turns or [turn.role for turn in self.turns] != wanted[:len(self.turns)]:
            raise ValueError(f"turns are {[turn.role for turn in self.turns]}, expected user and assistant in turn")

    @property
    def answer(self) -> str:
        """The last thing the assistant says; "" where the last turn is the user's."""
        return self.turns[-1].text if self.turns[-1].role == ASSISTANT else ""

    def question(self) -> "Conversation":
        """The conversation without its last answer, as a prompt."""
        turns = self.turns[:-1] if self.turns[-1].role == ASSISTANT else self.turns
        return Conversation(turns, self.system)


@dataclass(frozen=True)
class Found(Generic[T]):
    """What a file holds. Objects that teach nothing are left out, but counted."""

    items: list[T]
    useless: str  # what those left out are, in the plural
    left_out: int = 0
    first_left_out: str = ""  # FILE:LINE

    def note(self) -> str:
        """One line about what was left out; "" if nothing was."""
        if not self.left_out:
            return ""
        return (f"left out {self.left_out} of {len(self.items) + self.left_out} {self.useless}, the first at "
                f"{self.first_left_out}")


def read_conversations(path: str | Path, format: str = AUTO) -> Found[Conversation]:
    """All conversations of a file. Raises UserError with the file and line of anything that is not one.

    format: what the objects have to be: "alpaca", "messages" or "sharegpt"; AUTO: each what its keys say.
    """
    return read_items(
        path, lambda record, where: _conversation(record, where, format),
        lambda c: all(turn.text.strip() for turn in c.turns if turn.role == ASSISTANT),
        useless="conversations with an empty answer", expected="instruction and output, messages, or conversations")


def read_items(path: str | Path, parse: Callable[[object, str], T], teaches: Callable[[T], bool], *, useless: str,
               expected: str) -> Found[T]:
    """What `parse` makes of every object of a file and its FILE:LINE, where it teaches something.

    useless: what the others are, in the plural; expected: the keys of an object. Raises UserError if nothing is left.
    """
    path = Path(path)
    items, left_out = [], []
    for line, record in records(path, read_text(path)):
        where = f"{path}:{line}"
        item = parse(record, where)
        if teaches(item):
            items.append(item)
        else:
            left_out.append(where)
    if not items:
        why = f"all {len(left_out)} objects are {useless}" if left_out else "no objects"
        raise UserError(f"{path}: {why}; expected a JSON list or JSONL of objects with {expected}")
    return Found(items, useless, len(left_out), left_out[0] if left_out else "")


def split_by_hash(items: Sequence[T], fraction: float, key: Callable[[T], str]) -> tuple[list[T], list[T]]:
    """(training, held-out) items, about `fraction` of them held out: those of equal keys meet on one side, wherever
    they stand."""
    sides: tuple[list[T], list[T]] = [], []
    for item in items:
        digest = hashlib.blake2b(key(item).encode(), digest_size=8).digest()
        sides[int.from_bytes(digest, "little") < fraction * 2**64].append(item)
    return sides


def read_text(path: Path) -> str:
    """A file of UTF-8. Raises UserError."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; expected a JSON or JSONL file of conversations"
                        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}); convert the file") from error


def records(path: Path, text: str) -> Iterator[tuple[int, object]]:
    """(line on which it begins, value) of every object of a JSON list or of JSONL."""
    if text.lstrip(_JSON_SPACE).startswith("["):
        yield from _list_items(path, text)
        return
    for line, content in enumerate(text.split("\n"), 1):
        if content.strip(_JSON_SPACE):
            value, end = _decode(path, content, _skip(content, 0), first_line=line)
            if _skip(content, end) != len(content):
                raise UserError(f"{path}:{line}: more after the JSON object: {content[end:end + _SHOWN]!r}; expected "
                                f"one object a line, or a list in [ ] of all of them")
            yield line, value


def _list_items(path: Path, text: str) -> Iterator[tuple[int, object]]:
    """The items of a JSON list, decoded one by one, so that each has its line."""
    at = _skip(text, text.index("[") + 1)
    line, counted = 1, 0
    while text[at:at + 1] != "]":
        line, counted = line + text.count("\n", counted, at), at
        value, at = _decode(path, text, at)
        yield line, value
        at = _skip(text, at)
        if text[at:at + 1] == ",":
            at = _skip(text, at + 1)
        elif at == len(text):
            raise UserError(f"{path}:{_line(text, at)}: the list has no end; is the file cut off?")
        elif text[at] != "]":
            raise UserError(f"{path}:{_line(text, at)}: {text[at]!r} after an item of the list, expected , or ]")
    if (rest := _skip(text, at + 1)) != len(text):
        raise UserError(f"{path}:{_line(text, rest)}: more after the list: {text[rest:rest + _SHOWN]!r}; expected one "
                        f"list in the file")


_JSON_SPACE = " \t\r\n"


def _skip(text: str, at: int) -> int:
    """The first position from `at` on that is no white space."""
    while at < len(text) and text[at] in _JSON_SPACE:
        at += 1
    return at


def _line(text: str, at: int) -> int:
    return text.count("\n", 0, at) + 1


def _decode(path: Path, text: str, at: int, first_line: int = 1) -> tuple[object, int]:
    """(value that begins at `at`, position after it)."""
    try:
        return json.JSONDecoder().raw_decode(text, at)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{first_line + error.lineno - 1}: not JSON: {error.msg} at column {error.colno}; "
                        f"expected a JSON list, or one object a line") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets without end
        raise UserError(f"{path}:{first_line + _line(text, at) - 1}: cannot be read as JSON ({error})") from None


def _conversation(record: object, where: str, format: str) -> Conversation:
    if not isinstance(record, dict):
        raise UserError(f"{where}: {short(record)}, expected a JSON object")
    found = next((name for name, keys in _KEYS.items() if any(key in record for key in keys)), None)
    if found is None or format not in (AUTO, found):
        wanted = " or ".join(f"{' and '.join(_KEYS[name])} ({name})" for name in _KEYS if format in (AUTO, name))
        raise UserError(f"{where}: keys {', '.join(map(str, record)) or 'none'}; expected {wanted}")
    if found == "messages":
        return from_messages(record["messages"], where, "messages", "role", "content")
    if found == "sharegpt":
        return from_messages(record["conversations"], where, "conversations", "from", "value")
    return _from_alpaca(record, where)


def _from_alpaca(record: dict, where: str) -> Conversation:
    for key in ("instruction", "output"):
        if key not in record:
            raise UserError(f"{where}: no {key}; an Alpaca object has instruction, output and perhaps input, this one "
                            f"has {', '.join(map(str, record))}")
    texts = {key: checked_text(record.get(key) if key != "input" else record.get(key) or "", where, key)
             for key in ("instruction", "input", "output")}
    if not texts["instruction"].strip():
        raise UserError(f"{where}: instruction is empty; expected what the answer answers")
    return Conversation((Turn(USER, texts["instruction"], texts["input"]), Turn(ASSISTANT, texts["output"])))


def from_messages(messages: object, where: str, key: str, role_key: str, text_key: str) -> Conversation:
    """The conversation of a list of messages that ends with an answer. Raises UserError naming `where` and `key`."""
    if not isinstance(messages, list):
        raise UserError(f"{where}: {key} is {short(messages)}, expected a list of objects with {role_key} and "
                        f"{text_key}")
    system, turns = None, []
    for number, message in enumerate(messages):
        role, text = _message(message, f"{where}: {key}[{number}]", role_key, text_key)
        if role == SYSTEM:
            if number:
                raise UserError(f"{where}: {key}[{number}] is a system message, expected it first or not at all")
            system = text
            continue
        wanted = ASSISTANT if len(turns) % 2 else USER
        if role != wanted:
            raise UserError(f"{where}: {key}[{number}] is the {role}'s, expected the {wanted}'s: user and assistant "
                            f"speak in turn, the user first")
        turns.append(Turn(role, text))
    if not turns or turns[-1].role != ASSISTANT:
        raise UserError(f"{where}: {key} ends with {'no turns' if not turns else 'the user'}, expected an answer of "
                        f"the assistant to learn from")
    return Conversation(tuple(turns), system)


def _message(message: object, where: str, role_key: str, text_key: str) -> tuple[str, str]:
    if not isinstance(message, dict):
        raise UserError(f"{where} is {short(message)}, expected an object with {role_key} and {text_key}")
    for key in (role_key, text_key):
        if key not in message:
            raise UserError(f"{where} has no {key}; its keys: {', '.join(map(str, message)) or 'none'}")
    name = message[role_key]
    role = ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise UserError(f"{where}: unknown {role_key} {short(name)}, expected {', '.join(ROLES)}")
    return role, checked_text(message[text_key], where, text_key)


def checked_text(value: object, where: str, key: str) -> str:
    """`value` if it is a string of Unicode. Raises UserError."""
    if not isinstance(value, str):
        raise UserError(f"{where}: {key} is {short(value)}, expected a string")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: {key} has half of a surrogate pair, which is not Unicode text; write it whole"
                        ) from None
    return value


def short(value: object) -> str:
    """Bad input as a message quotes it."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
