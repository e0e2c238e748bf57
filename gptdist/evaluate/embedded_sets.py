"""Evaluation sets made from the standard library's documentation: small, offline, in a fixed order.

A model that was trained on `gptdist prepare --input embedded` has read most of these texts (`gptdist contamination`
says how many): such a score tells what it remembers, and compares models of one corpus. They differ slightly between
versions of Python, as the texts do.

    stdlib-choice     which of four sentences begins the documentation of a name?
    stdlib-cloze      the last word of a sentence
    stdlib-text       perplexity of docstrings
    stdlib-qa         "What does shutil.copyfile do?"
    stdlib-classify   which kind of module is a docstring from?
    stdlib-summarize  the first sentence of a docstring from the rest of it
    stdlib-translate  an identifier in words: assertAlmostEqual -> assert almost equal
"""

import re
from collections.abc import Callable, Iterable

from gptdist.data.corpus import embedded_docstrings
from gptdist.data.labelled import embedded_labelled
from gptdist.data.questions import documented_names, first_sentence, later_sentences, name_hash, python_questions
from gptdist.evaluate.items import Item, TaskSet

GROUP = "stdlib"
SIZE, GENERATED = 200, 50  # items of a set; of one whose answers are generated
CHOICES = 4
_CAMEL = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")


def embedded_set(name: str) -> TaskSet:
    kind, make = SETS[name]
    items = [Item(f"{name} item {i}", *rest) for i, rest in enumerate(make(), 1)]
    return TaskSet(name, kind, items)


def _choice() -> Iterable[tuple]:
    pairs = sorted(documented_names(), key=lambda pair: name_hash(pair[0]))
    for i, (name, sentence) in enumerate(pairs[:SIZE]):
        # The others by a hash of their own: neighbours would be the same ones for a whole run of names.
        others = sorted({text for _, text in pairs[i + 1:i + 1 + 3 * CHOICES]} - {sentence},
                        key=lambda text: name_hash(name + text))[:CHOICES - 1]
        choices = sorted([sentence, *others], key=lambda text: name_hash(text + name))
        yield f"{name}\n\n", (sentence,), tuple(choices)


def _cloze() -> Iterable[tuple]:
    found = []
    for sentence in later_sentences():
        words = sentence.rstrip(".").rsplit(None, 1)
        if len(sentence.split()) >= 8 and words[-1].isalpha():
            found.append((words[0], (words[1],)))
    return _sample(found, SIZE)


def _text() -> Iterable[tuple]:
    return _sample([(text,) for _, text in embedded_docstrings() if 300 <= len(text) <= 3000], GENERATED)


def _qa() -> Iterable[tuple]:
    return [(c.turns[0].text, (c.answer,)) for c in python_questions().held_out[:GENERATED]]


def _classify() -> Iterable[tuple]:
    return _sample([(row.text, (row.label,)) for row in embedded_labelled()], SIZE)


def _summarize() -> Iterable[tuple]:
    found = []
    for _, text in embedded_docstrings():
        rest = text.partition("\n\n")[2].strip()
        if 200 <= len(rest) <= 800 and len(first_sentence(text).split()) >= 5:
            found.append((rest, (first_sentence(text),)))
    return _sample(found, GENERATED)


def _translate() -> Iterable[tuple]:
    names = {name.rpartition(".")[2].strip("_") for name, _ in embedded_docstrings()}
    words = {name: [part.lower() for part in _CAMEL.findall(name)] for name in names}
    return _sample([(name, (" ".join(parts),)) for name, parts in words.items()
                    if len(parts) >= 4 and sum(map(len, parts)) >= 12], GENERATED)


def _sample(found: Iterable[tuple], count: int) -> list[tuple]:
    """`count` different ones in an order that no neighbourhood survives; the same for any order of what was found."""
    return sorted(dict.fromkeys(found), key=lambda item: (name_hash(item[0]), item))[:count]


SETS: dict[str, tuple[str, Callable[[], Iterable[tuple]]]] = {
    "stdlib-choice": ("choice", _choice), "stdlib-cloze": ("cloze", _cloze), "stdlib-text": ("text", _text),
    "stdlib-qa": ("qa", _qa), "stdlib-classify": ("classify", _classify),
    "stdlib-summarize": ("summarize", _summarize), "stdlib-translate": ("translate", _translate)}
