"""The embedded instructions: questions about Python's standard library, answered by the library itself.

"What does shutil.copyfile do?" is answered by the first sentence of its docstring. There are two sets: `library`, about
4,600 real names, asked about in 4 ways; `common`, the functions, classes and methods of the modules that programs use
most, in 24 ways, few enough for a small model to learn by heart. Names that hash low are held out, and so are some ways
of asking: the held-out conversations ask about unknown names in known words, and about known names in unknown words, by
turns. They need no download, and differ slightly between versions of Python.
"""

import hashlib
import importlib
import inspect
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from gptdist.data.corpus import embedded_docstrings
from gptdist.data.instructions import ASSISTANT, USER, Conversation, Turn

ASKED = ("What does {name} do?", "Explain {name}.", "What is {name} for?", "Describe {name} in one sentence.")
ASKED_HELD_OUT = "Tell me what {name} is good for."
HELD_OUT_SHARE = 0.05
WORDS = range(3, 21)  # of an answer: shorter ones say nothing, longer ones are mostly lists of options
PROSE = re.compile(r"[A-Z][^:]*\.")  # a sentence: no example, table or list of options

# Built-in functions and methods are in no file that could be parsed, so these modules are imported and asked.
COMMON_MODULES = (
    "builtins", "math", "random", "statistics", "itertools", "functools", "operator", "collections", "heapq", "bisect",
    "copy", "string", "textwrap", "re", "json", "csv", "datetime", "time", "os.path", "os", "glob", "shutil", "pathlib")
LIKE_BYTES = ("bytearray", "memoryview")  # their methods are those of bytes again
ASKED_COMMON = (
    *ASKED, "How would you describe {name}?", "What is the purpose of {name}?", "{name}: what is it?",
    "In Python, what does {name} do?", "I came across {name}. What is it?", "Summarize {name}.",
    "Give me a short description of {name}.", "What happens when I use {name}?", "What can I do with {name}?",
    "When should I use {name}?", "Why does Python have {name}?", "I do not know {name}. Explain it.",
    "I want to understand {name}.", "Please describe {name}.", "Could you explain what {name} does?",
    "Do you know {name}?", "Say what {name} does.", "How do I use {name}?", "My program calls {name}. What for?",
    "{name}?")
COMMON_HELD_OUT = (ASKED_HELD_OUT, "I forgot what {name} does.", "Why would a program need {name}?")
LONGEST = 180  # characters of a conversation of several questions: 128 tokens of the quickstart's hold it


@dataclass(frozen=True)
class Questions:
    """Conversations, each list in a fixed order whose beginning is a sample. Held-out ones have one question."""

    train: list[Conversation]
    names: list[Conversation]  # held out: about names that are not in `train`, in its words
    phrasings: list[Conversation]  # held out: about names that are in `train`, in other words

    @property
    def held_out(self) -> list[Conversation]:
        """Of both kinds as many, by turns."""
        return [c for pair in zip(self.names, self.phrasings, strict=False) for c in pair]


def python_questions(kind: Literal["library", "common"] = "library") -> Questions:
    """The set of this kind. In half of the ways to ask, short conversations of `common` have two questions, about two
    names: in a chat the second one comes after the first answer."""
    common = kind == "common"
    asked, held_out = (ASKED_COMMON, COMMON_HELD_OUT) if common else (ASKED, (ASKED_HELD_OUT,))
    pairs = sorted(common_names() if common else documented_names(), key=lambda pair: name_hash(pair[0]))
    known = [pair for pair in pairs if not is_held_out(pair[0])]
    by_words = [_conversations(known, words, number % 2 + 1 if common else 1, shift=number // 2)
                for number, words in enumerate(asked)]
    return Questions(
        [c for row in itertools.zip_longest(*by_words) for c in row if c is not None],
        [c for name, answer in pairs if is_held_out(name)
         for c in _conversations([(name, answer)], _one_of(asked, name))],
        [c for name, answer in known if common or name_hash(name) / 2**64 < 2 * HELD_OUT_SHARE
         for c in _conversations([(name, answer)], _one_of(held_out, name))])


def _conversations(pairs: Sequence[tuple[str, str]], words: str, length: int = 1, shift: int = 0) -> list[Conversation]:
    """Questions in these words about all names, up to `length` to a conversation, from the name number `shift` on."""
    shift %= len(pairs)
    conversations: list[tuple[Turn, ...]] = []
    for name, answer in (*pairs[shift:], *pairs[:shift]):
        turns = Turn(USER, words.format(name=name)), Turn(ASSISTANT, answer)
        before = conversations[-1] if conversations else ()
        if 0 < len(before) < 2 * length and sum(len(turn.text) for turn in before + turns) <= LONGEST:
            conversations[-1] = before + turns
        else:
            conversations.append(turns)
    return [Conversation(turns) for turns in conversations]


def _one_of(asked: Sequence[str], name: str) -> str:
    return asked[name_hash(name) % len(asked)]


def documented_names() -> Iterator[tuple[str, str]]:
    """(public qualified name, first sentence of its docstring), each name once."""
    seen = set()
    for name, docstring in embedded_docstrings():
        answer = first_sentence(docstring)
        if name not in seen and len(answer.split()) in WORDS and not any(p.startswith("_") for p in name.split(".")):
            seen.add(name)
            yield name, answer


def common_names() -> Iterator[tuple[str, str]]:
    """The same of what COMMON_MODULES define, as it is called in a program: len, str.split, math.sqrt."""
    for module_name in COMMON_MODULES:
        module = importlib.import_module(module_name)
        prefix = "" if module_name == "builtins" else f"{module_name}."
        for name in sorted(getattr(module, "__all__", None) or vars(module)):
            if name not in LIKE_BYTES:
                yield from _documented(f"{prefix}{name}", getattr(module, name))


def _documented(name: str, value: object) -> Iterator[tuple[str, str]]:
    """A function or class, and its methods."""
    own = name.rpartition(".")[2]
    if own.startswith("_") or not callable(value) or not isinstance(value.__doc__, str):
        return
    if sentence := _first_prose(inspect.cleandoc(value.__doc__)):
        yield name, sentence
    if inspect.isclass(value) and not issubclass(value, BaseException):
        for method, member in sorted(vars(value).items()):
            yield from _documented(f"{name}.{method}", getattr(member, "__func__", member))


def _first_prose(docstring: str) -> str:
    """The first sentence after the signature that many built-in functions' docstrings begin with; "" for none."""
    for paragraph in docstring.split("\n\n")[:2]:
        sentence = first_sentence(paragraph)
        if PROSE.fullmatch(sentence) and len(sentence.split()) in WORDS:
            return sentence
    return ""


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


def is_held_out(text: str) -> bool:
    return name_hash(text) / 2**64 < HELD_OUT_SHARE


def name_hash(name: str) -> int:
    """The same number in every process, for any order of the names."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
