"""The embedded instructions: questions about Python's standard library, answered by the library itself.

"What does shutil.copyfile do?" is answered by the first sentence of its docstring, about 4,600 real names in all. Names
that hash low are held out, and so is one way of asking: the held-out conversations ask about unknown names in known
words, and about known names in unknown words, by turns. They need no download, and differ slightly between versions of
Python.
"""

import hashlib
import re
from collections.abc import Iterator

from gptdist.data.corpus import embedded_docstrings
from gptdist.data.instructions import ASSISTANT, USER, Conversation, Turn

ASKED = ("What does {name} do?", "Explain {name}.", "What is {name} for?", "Describe {name} in one sentence.")
ASKED_HELD_OUT = "Tell me what {name} is good for."
HELD_OUT_SHARE = 0.05
WORDS = range(3, 21)  # of an answer: shorter ones say nothing, longer ones are mostly lists of options
PROSE = re.compile(r"[A-Z][^:]*\.")  # a sentence: no example, table or list of options


def python_questions() -> tuple[list[Conversation], list[Conversation]]:
    """(training, held-out) conversations of one question and one answer, each in a fixed order."""
    train, unknown_names, unknown_words = [], [], []
    for name, answer in sorted(documented_names(), key=lambda pair: name_hash(pair[0])):  # the first ones are a sample
        chosen = name_hash(name)
        if is_held_out(name):
            unknown_names.append(_conversation(ASKED[chosen % len(ASKED)], name, answer))
            continue
        train += [_conversation(asked, name, answer) for asked in ASKED]
        if chosen / 2**64 < 2 * HELD_OUT_SHARE:
            unknown_words.append(_conversation(ASKED_HELD_OUT, name, answer))
    n = min(len(unknown_names), len(unknown_words))
    return train, [c for pair in zip(unknown_names[:n], unknown_words[:n], strict=True) for c in pair]


def documented_names() -> Iterator[tuple[str, str]]:
    """(public qualified name, first sentence of its docstring), each name once."""
    seen = set()
    for name, docstring in embedded_docstrings():
        answer = first_sentence(docstring)
        if name not in seen and len(answer.split()) in WORDS and not any(p.startswith("_") for p in name.split(".")):
            seen.add(name)
            yield name, answer


def later_sentences() -> Iterator[str]:
    """Sentences of docstrings that are nobody's first one, each once."""
    docstrings = [text for _, text in embedded_docstrings()]
    seen = {first_sentence(text) for text in docstrings}
    for text in docstrings:
        for sentence in (found for paragraph in text.split("\n\n") for found in _sentences(paragraph)):
            if sentence not in seen and len(sentence.split()) in WORDS and PROSE.fullmatch(sentence):
                seen.add(sentence)
                yield sentence


def first_sentence(text: str) -> str:
    """The first sentence of the first paragraph, on one line."""
    return _sentences(text.split("\n\n")[0])[0]


def _sentences(paragraph: str) -> list[str]:
    return re.split(r"(?<=[.!?])\s", " ".join(paragraph.split()))


def _conversation(asked: str, name: str, answer: str) -> Conversation:
    return Conversation((Turn(USER, asked.format(name=name)), Turn(ASSISTANT, answer)))


def is_held_out(text: str) -> bool:
    return name_hash(text) / 2**64 < HELD_OUT_SHARE


def name_hash(name: str) -> int:
    """The same number in every process, for any order of the names."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
