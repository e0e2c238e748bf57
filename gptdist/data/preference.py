"""Pairs of answers to learn a preference from: a prompt, the answer that is chosen and one that is rejected.

    texts      {"prompt": "...", "chosen": "...", "rejected": "..."}
    Alpaca     {"instruction": "...", "input": "...", "chosen": "...", "rejected": "..."}; `input` may be missing
    messages   {"prompt": [messages], "chosen": [messages], "rejected": [messages]}; without `prompt` the chosen and the
               rejected ones are whole conversations that differ in their last answer

A file is a JSON list of such objects or has one a line (JSONL). Messages are {"role": ..., "content": ...}.
The embedded pairs ask what a name of Python's standard library does: chosen is the first sentence of its docstring,
which says so; rejected is a sentence with as many words from further down in some docstring, about a detail.
"""

import collections
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gptdist.data.answers import Answered, cut, row_of
from gptdist.data.examples import Example
from gptdist.data.instructions import (
    ASSISTANT,
    USER,
    Conversation,
    Found,
    Turn,
    checked_text,
    from_messages,
    read_items,
    short,
    split_by_hash,
)
from gptdist.data.loader import IGNORED
from gptdist.data.questions import PROSE, documented_names, is_held_out, later_sentences, name_hash
from gptdist.data.templates import Template, encode
from gptdist.data.tokenizer import Tokenizer
from gptdist.errors import UserError

ASKED = "What does {name} do?"
_ROLE, _CONTENT = "role", "content"


@dataclass(frozen=True)
class Preference:
    """`question` ends with the user's turn."""

    question: Conversation
    chosen: str
    rejected: str

    def answered(self, answer: str) -> Conversation:
        return Conversation((*self.question.turns, Turn(ASSISTANT, answer)), self.question.system)


def read_preferences(path: str | Path) -> Found[Preference]:
    """All pairs of a file that prefer something. Raises UserError with file and line of anything that is no pair."""
    return read_items(path, _preference, lambda pair: bool(pair.chosen.strip()) and pair.chosen != pair.rejected,
                      useless="pairs whose answers are equal or whose chosen one is empty",
                      expected="prompt, chosen and rejected")


def _preference(record: object, where: str) -> Preference:
    if not isinstance(record, dict):
        raise UserError(f"{where}: {short(record)}, expected a JSON object")
    for key in ("chosen", "rejected"):
        if key not in record:
            raise UserError(f"{where}: no {key}; a pair has prompt (or instruction), chosen and rejected, this one has "
                            f"{', '.join(map(str, record)) or 'no keys'}")
    question = _question(record, where)
    chosen, rejected = (_answer(record[key], where, key, question) for key in ("chosen", "rejected"))
    if chosen.question() != rejected.question():
        raise UserError(f"{where}: chosen and rejected answer different prompts; expected conversations that differ in "
                        f"their last answer")
    return Preference(chosen.question(), chosen.answer, rejected.answer)


def _question(record: dict, where: str) -> Conversation | None:
    """None: the answers are whole conversations."""
    match record:
        case {"prompt": list(messages)}:
            return from_messages([*messages, {_ROLE: ASSISTANT, _CONTENT: ""}], where, "prompt", _ROLE,
                                 _CONTENT).question()
        case {"prompt": prompt}:
            text, given = checked_text(prompt, where, "prompt"), ""
        case {"instruction": instruction}:
            text = checked_text(instruction, where, "instruction")
            given = checked_text(record.get("input") or "", where, "input")
        case _:
            return None
    if not text.strip():
        raise UserError(f"{where}: the prompt is empty; expected what the answers answer")
    return Conversation((Turn(USER, text, given),))


def _answer(value: object, where: str, key: str, question: Conversation | None) -> Conversation:
    """The conversation that ends with this answer."""
    if not isinstance(value, list):
        if question is None:
            raise UserError(f"{where}: no prompt or instruction for the text in {key}; expected one of them")
        return Preference(question, "", "").answered(checked_text(value, where, key))
    begins = [{_ROLE: turn.role, _CONTENT: turn.text} for turn in question.turns] if question else []
    first = value[0].get(_ROLE) if value and isinstance(value[0], dict) else None
    if first != ASSISTANT:  # a whole conversation
        begins = []
    whole = from_messages([*begins, *value], where, key, _ROLE, _CONTENT)
    if question is None:
        return whole
    if begins:
        return Preference(question, "", "").answered(whole.answer)
    if whole.question().turns != question.turns:
        raise UserError(f"{where}: {key} is a conversation that does not begin with prompt; expected the prompt's "
                        f"messages and an answer, or the answer alone")
    return Preference(question, "", "").answered(whole.answer)


def python_preferences() -> tuple[list[Preference], list[Preference]]:
    """(training, held-out) embedded pairs, each in a fixed order; they share neither names nor rejected sentences."""
    names = sorted(documented_names(), key=lambda pair: name_hash(pair[0]))
    names = [(name, answer) for name, answer in names if PROSE.fullmatch(answer)]  # of the same form as the sentences
    sentences = sorted(later_sentences(), key=name_hash)
    train, held_out = (
        list(_python_pairs((pair for pair in names if is_held_out(pair[0]) == side),
                           (sentence for sentence in sentences if is_held_out(sentence) == side)))
        for side in (False, True))
    return train, held_out


def _python_pairs(names: Iterable[tuple[str, str]], sentences: Iterable[str]) -> Iterator[Preference]:
    """The two answers of a pair have as many words, so that length tells nothing."""
    by_words = collections.defaultdict(collections.deque)
    for sentence in sentences:
        by_words[len(sentence.split())].append(sentence)
    for name, answer in names:
        if others := by_words[len(answer.split())]:
            yield Preference(Conversation((Turn(USER, ASKED.format(name=name)),)), answer, others[0])
            others.rotate(-1)


@dataclass(frozen=True)
class EncodedPairs:
    """All pairs as rows of training, and what the context made of them."""

    rows: list[Example]  # chosen answer of pair 0, rejected one of pair 0, chosen one of pair 1, ...
    left_out: int  # pairs with an answer that does not begin within the context, or alike there
    truncated: int  # of those in rows: with an answer cut to the context
    context: int

    def __len__(self) -> int:
        return len(self.rows) // 2

    def take(self, pairs: Sequence[int]) -> "EncodedPairs":
        """These pairs, in this order."""
        return dataclasses.replace(self, rows=[self.rows[2 * i + side] for i in pairs for side in (0, 1)])

    def shorter_chosen(self, pairs: Sequence[int]) -> float:
        """Share of these pairs whose chosen answer has fewer tokens; one of equal length counts half."""
        lengths = np.array([[(self.rows[2 * i + side].targets != IGNORED).sum() for side in (0, 1)] for i in pairs])
        return float((lengths[:, 0] < lengths[:, 1]).mean() + (lengths[:, 0] == lengths[:, 1]).mean() / 2)

    def note(self) -> str:
        """One line about what did not fit; "" if everything did."""
        n = len(self) + self.left_out
        parts = [f"left out {self.left_out} of {n} pairs whose answers do not differ within "
                 f"model.context={self.context} tokens"] * (self.left_out > 0)
        parts += [f"{self.truncated} of {n} pairs have an answer cut to model.context={self.context} tokens, its end "
                  f"token kept"] * (self.truncated > 0)
        return "; ".join(parts)


def encode_preferences(pairs: Sequence[Preference], template: Template, tokenizer: Tokenizer, *, context: int,
                       where: str) -> EncodedPairs:
    """Encode and cut to `context` positions. Raises UserError if nothing is left of any pair."""
    rows, truncated = [], 0
    for pair in pairs:
        whole = [_answered(pair.answered(answer), template, tokenizer) for answer in (pair.chosen, pair.rejected)]
        items = [cut(item, context) for item in whole]
        if any(item is None for item in items):
            continue
        chosen, rejected = map(row_of, items)
        if not _alike(chosen, rejected):
            rows += [chosen, rejected]
            truncated += any(item is not uncut for item, uncut in zip(items, whole, strict=True))
    if not rows:
        raise UserError(f"{where}: none of {len(pairs)} pairs has answers that differ within model.context={context} "
                        f"tokens: use a longer context, or a shorter template")
    return EncodedPairs(rows, len(pairs) - len(rows) // 2, truncated, context)


def _answered(conversation: Conversation, template: Template, tokenizer: Tokenizer) -> Answered:
    """The conversation in tokens. Only those of the last answer are targets: answers before it are of the prompt."""
    ids, is_answer = encode(template.render(conversation), tokenizer)
    learned = np.array(is_answer, bool)
    learned[:_last_run(learned)] = False
    return Answered(np.array(ids, np.int64), learned)


def _last_run(mask: np.ndarray) -> int:
    """Where the last run of True in `mask` begins."""
    last = int(np.flatnonzero(mask)[-1])
    before = np.flatnonzero(~mask[:last])
    return int(before[-1]) + 1 if len(before) else 0


def _alike(a: Example, b: Example) -> bool:
    return np.array_equal(a.tokens, b.tokens) and np.array_equal(a.targets, b.targets)


def split_preferences(pairs: Sequence[Preference], fraction: float) -> tuple[list[Preference], list[Preference]]:
    """(training, held-out) pairs by a hash of the prompt: pairs that share one meet on one side."""
    return split_by_hash(pairs, fraction, key=lambda pair: repr(pair.question))
