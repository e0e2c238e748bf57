"""The embedded instructions: questions about Python's standard library, answered by the library itself.

"What does shutil.copyfile do?" is answered by the first sentence of its docstring. There are two sets: `library`, about
4,600 real names, asked about in 4 ways; `common`, the functions, classes and methods of the modules that programs use
most, in 12 ways, few enough for a small model to learn by heart. Names that hash low are held out, and so are some ways
of asking: the held-out conversations ask about unknown names in known words, and about known names in unknown words, by
turns. They need no download, and differ slightly between versions of Python.
"""

import hashlib
import importlib
import inspect
import re
from collections.abc import Iterable, Iterator, Sequence
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
ASKED_COMMON = (
    *ASKED, "How would you describe {name}?", "What is the purpose of {name}?", "{name}: what is it?",
    "In Python, what does {name} do?", "I came across {name}. What is it?", "Summarize {name}.",
    "Give me a short description of {name}.", "What happens when I use {name}?")
COMMON_HELD_OUT = (ASKED_HELD_OUT, "I forgot what {name} does.", "Why would a program need {name}?")


@dataclass(frozen=True)
class Questions:
    """Conversations of one question and one answer, each list in a fixed order whose beginning is a sample."""

    train: list[Conversation]
    names: list[Conversation]  # held out: about names that are not in `train`, in its words
    phrasings: list[Conversation]  # held out: about names that are in `train`, in other words

    @property
    def held_out(self) -> list[Conversation]:
        """Of both kinds as many, by turns."""
        return [c for pair in zip(self.names, self.phrasings, strict=False) for c in pair]


def python_questions(kind: Literal["library", "common"] = "library") -> Questions:
    if kind == "common":
        return _questions(common_names(), ASKED_COMMON, COMMON_HELD_OUT, share_in_other_words=1)
    return _questions(documented_names(), ASKED, (ASKED_HELD_OUT,), share_in_other_words=2 * HELD_OUT_SHARE)


def _questions(pairs: Iterable[tuple[str, str]], asked: Sequence[str], asked_held_out: Sequence[str],
               share_in_other_words: float) -> Questions:
    train, unknown_names, unknown_words = [], [], []
    for name, answer in sorted(pairs, key=lambda pair: name_hash(pair[0])):
        chosen = name_hash(name)
        if is_held_out(name):
            unknown_names.append(_conversation(asked[chosen % len(asked)], name, answer))
            continue
        train += [_conversation(words, name, answer) for words in asked]
        if chosen / 2**64 < share_in_other_words:
            unknown_words.append(_conversation(asked_held_out[chosen % len(asked_held_out)], name, answer))
    return Questions(train, unknown_names, unknown_words)


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


def _conversation(asked: str, name: str, answer: str) -> Conversation:
    return Conversation((Turn(USER, asked.format(name=name)), Turn(ASSISTANT, answer)))


def is_held_out(text: str) -> bool:
    return name_hash(text) / 2**64 < HELD_OUT_SHARE


def name_hash(name: str) -> int:
    """The same number in every process, for any order of the names."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
