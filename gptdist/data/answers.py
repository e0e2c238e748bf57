"""Conversations as training rows: which tokens are learned, cutting to the context, packing.

    tokens   p p p a a E        p: prompt, a: answer, E: the token that ends it
    row      p p p a a          what the model reads
    targets  p p a a E          one further; with mask_prompt the p are ignored

The end token is a target once, and padding (data/examples.py) is never one: a model learns to end an answer, and
nothing about what follows. Source: Raschka, "Build a Large Language Model (From Scratch)" (2024), chapter 7.
"""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gptdist.data.examples import Example
from gptdist.data.instructions import Conversation
from gptdist.data.loader import IGNORED
from gptdist.data.templates import Template, encode
from gptdist.data.tokenizer import Tokenizer
from gptdist.errors import UserError


@dataclass(frozen=True)
class Answered:
    """One conversation in tokens. learned[i]: token i counts when it is predicted."""

    tokens: np.ndarray  # (n,) int64; ends with the token that ends an answer
    learned: np.ndarray  # (n,) bool

    @property
    def length(self) -> int:
        """Positions it takes in a row: the last token is a target only."""
        return len(self.tokens) - 1


@dataclass(frozen=True)
class Encoded:
    """All conversations in tokens, and what the context made of them."""

    items: list[Answered]
    kept: list[int]  # number of the conversation that each item is
    truncated: int  # of the items: cut to the context
    dropped: int  # no token of an answer was within the context
    context: int

    def note(self) -> str:
        """One line about what did not fit; "" if everything did."""
        n = len(self.items) + self.dropped
        parts = [f"{self.truncated} cut, their end token kept"] * (self.truncated > 0)
        parts += [f"{self.dropped} left out because no answer begins before the end"] * (self.dropped > 0)
        if not parts:
            return ""
        return f"of {n} conversations those longer than model.context={self.context}: {' and '.join(parts)}"


def encode_conversations(conversations: Sequence[Conversation], template: Template, tokenizer: Tokenizer, *,
                         context: int, mask_prompt: bool, where: str) -> Encoded:
    """Encode, cut to `context` positions, and drop what has no answer left. Raises UserError if nothing is left."""
    items, kept, truncated = [], [], 0
    for number, conversation in enumerate(conversations):
        ids, is_answer = encode(template.render(conversation), tokenizer)
        whole = Answered(np.array(ids, np.int64), np.array(is_answer, bool))
        item = cut(whole, context)
        if item is None:
            continue
        truncated += item is not whole
        if not mask_prompt:
            item = Answered(item.tokens, np.ones(len(item.tokens), bool))
        items.append(item)
        kept.append(number)
    if not items:
        raise UserError(f"{where}: none of {len(conversations)} conversations has a part of an answer within "
                        f"model.context={context} tokens: use a longer context, or a shorter template")
    return Encoded(items, kept, truncated, len(conversations) - len(items), context)


def cut(item: Answered, context: int) -> Answered | None:
    """The item within `context` positions: itself, or a part that ends with the end token, or None without an answer.

    A cut within an answer is closed by the end token; one within a later question goes back to the answer before it.
    """
    if item.length <= context:
        return item
    tokens, learned = item.tokens[:context + 1].copy(), item.learned[:context + 1].copy()
    if learned[-1] and learned[-2]:
        tokens[-1] = item.tokens[-1]
    else:
        learned[-1] = False  # an answer of which only the end token is left would teach to say nothing
    answers = np.flatnonzero(learned)
    return Answered(tokens[:answers[-1] + 1], learned[:answers[-1] + 1]) if len(answers) else None


def row_of(item: Answered) -> Example:
    """The item as a row of its own."""
    return Example(item.tokens[:-1], np.where(item.learned[1:], item.tokens[1:], IGNORED))


def pack(items: Sequence[Answered], context: int) -> list[list[int]]:
    """Numbers of the items of each row of at most `context` positions.

    Best-fit decreasing: the longest first, each into the fullest row that has room. A pure function of the lengths, so
    rows are samples like any other, and their order and resuming are as in pretraining.
    """
    order = sorted(range(len(items)), key=lambda i: (-items[i].length, i))
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (positions left, row), ascending
    for i in order:
        length = items[i].length
        at = bisect.bisect_left(room, (length, -1))
        left, row = room.pop(at) if at < len(room) else (context, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(i)
        bisect.insort(room, (left - length, row))
    return rows


def packed_row(items: Sequence[Answered]) -> Example:
    """Items behind each other in one row; attention looks no further back than to the start of each one."""
    rows = [row_of(item) for item in items]
    starts = np.cumsum([0, *(item.length for item in items[:-1])])
    return Example(np.concatenate([row.tokens for row in rows]), np.concatenate([row.targets for row in rows]),
                   np.repeat(starts, [item.length for item in items]).astype(np.int32))
