"""How a conversation is written for a model: Alpaca, Phi-3, ChatML, or a template of one's own.

A template is a few strings with slots. One's own is a YAML file with these keys, or just the text of `turn`:

    turn: "Q: {prompt}\\nA: {answer}<|end|>\\n"   one exchange, repeated; required
    system: "{system}\\n\\n"                      what goes before the first turn, where there is a system prompt
    default_system: "Answer briefly."             the system prompt of conversations that have none
    input: "\\n\\n{input}"                        how an Alpaca object's input follows its instruction
    stop: ["\\nQ:"]                               texts at which generation ends, besides the token that ends an answer

Anything written <|like this|> in a template is one token. The same characters in what a user says are plain text, so no
message can forge a turn. What follows {answer}, up to the first such token, ends the answer and is learned with it;
without one <|endoftext|> ends it.
Sources: Taori et al., "Stanford Alpaca" (2023); Abdin et al., "Phi-3" (2024); OpenAI's ChatML.
"""

import dataclasses
import difflib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptdist.config import parse_yaml
from gptdist.data.instructions import ASSISTANT, Conversation, Turn
from gptdist.data.tokenizer import EOT, Tokenizer
from gptdist.errors import UserError

_SPECIAL = re.compile(r"<\|[^|<>\s]+\|>")
_SLOT = re.compile(r"\{(prompt|answer|system|input)\}")


@dataclass(frozen=True)
class Segment:
    """A piece of a written conversation."""

    text: str
    is_answer: bool = False  # what the model is to say
    is_special: bool = False  # one special token


@dataclass(frozen=True, kw_only=True)
class Template:
    """See the module's docstring."""

    name: str
    turn: str
    system: str | None = None
    default_system: str | None = None
    input: str = "\n\n{input}"
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raises ValueError for strings that make no template."""
        object.__setattr__(self, "stop", tuple(self.stop))
        for field, slots in (("turn", ["prompt", "answer"]), ("system", ["system"]), ("input", ["input"])):
            text = getattr(self, field)
            if text is not None and (found := _SLOT.findall(text)) != slots:
                raise ValueError(_slot_fault(field, found, slots))
        if self.default_system and self.system is None:
            raise ValueError("has a default_system but no `system` to say where it goes: add system: \"{system}\\n\"")
        if not all(self.stop):
            raise ValueError("has an empty text in `stop`")

    @property
    def specials(self) -> tuple[str, ...]:
        """Special tokens that a tokenizer needs for it, in order of appearance; <|endoftext|> is always there."""
        found = _SPECIAL.findall((self.system or "") + self.turn + self.input)
        return tuple(dict.fromkeys(name for name in found if name != EOT))

    def missing_from(self, tokenizer: Tokenizer) -> list[str]:
        """Its special tokens that a tokenizer does not have."""
        return [name for name in self.specials if name not in tokenizer.specials]

    @property
    def end(self) -> str:
        """The special token that ends an answer."""
        match = _SPECIAL.search(self._after)
        return match.group() if match else EOT

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts at which generation ends, besides <|endoftext|>: whatever no answer has inside."""
        return (*self.specials, *self.stop)

    @property
    def _before(self) -> str:
        return self.turn.split("{answer}")[0]

    @property
    def _after(self) -> str:
        return self.turn.split("{answer}")[1]

    def render(self, conversation: Conversation) -> list[Segment]:
        """A whole conversation, or one that ends with the user's turn: its answer then begins where the text ends.

        Raises UserError for a system prompt that the template has no place for.
        """
        segments = list(self._opening(conversation.system))
        for number, turn in enumerate(conversation.turns):
            if turn.role == ASSISTANT:
                segments += self._answer(turn, is_last=number == len(conversation.turns) - 1)
            else:
                segments += _fill(self._before, {"prompt": list(self._prompt(turn))})
        return _joined(segments)

    def _opening(self, system: str | None) -> Iterator[Segment]:
        system = self.default_system if system is None else system
        if not system:
            return
        if self.system is None:
            raise UserError(f"template {self.name} has no place for a system prompt: use another template, or leave "
                            f"the system prompt out")
        yield from _fill(self.system, {"system": [Segment(system)]})

    def _prompt(self, turn: Turn) -> Iterator[Segment]:
        yield Segment(turn.text)
        if turn.input:
            yield from _fill(self.input, {"input": [Segment(turn.input)]})

    def _answer(self, turn: Turn, *, is_last: bool) -> Iterator[Segment]:
        yield Segment(turn.text, is_answer=True)
        before_end, end, rest = self._after.partition(self.end)
        if not end:
            before_end, rest = "", self._after
        if before_end:
            yield Segment(before_end, is_answer=True)
        yield Segment(self.end, is_answer=True, is_special=True)
        if not is_last:
            yield from _fill(rest, {})

    def to_json(self) -> bytes:
        return (json.dumps(dataclasses.asdict(self), indent=2) + "\n").encode()


def _slot_fault(field: str, found: list[str], wanted: list[str]) -> str:
    if field == "turn" and "answer" not in found:
        return "has no {answer} in `turn`: without an answer slot there is nothing to learn; add {answer}"
    has = ", ".join(f"{{{name}}}" for name in found) or "no slot"
    return f"has {has} in `{field}`, expected {' and then '.join(f'{{{name}}}' for name in wanted)}, each once"


def _fill(text: str, values: dict[str, list[Segment]]) -> Iterator[Segment]:
    """The template text with its slots filled; only the template's own special tokens are special."""
    for part in re.split(rf"({_SPECIAL.pattern}|{_SLOT.pattern.replace('(', '(?:')})", text):
        slot = part[1:-1] if part.startswith("{") and part.endswith("}") else None
        if slot in values:
            yield from values[slot]
        elif part:
            yield Segment(part, is_special=_SPECIAL.fullmatch(part) is not None)


def _joined(segments: list[Segment]) -> list[Segment]:
    """Neighbours that are tokenized alike become one segment."""
    joined: list[Segment] = []
    for segment in segments:
        last = joined[-1] if joined else None
        if last and not (last.is_special or segment.is_special) and last.is_answer == segment.is_answer:
            joined[-1] = dataclasses.replace(last, text=last.text + segment.text)
        elif segment.text:
            joined.append(segment)
    return joined


TEMPLATES = {template.name: template for template in (
    Template(
        name="alpaca",
        system="{system}\n\n",
        default_system="Below is an instruction that describes a task. Write a response that appropriately completes "
                       "the request.",
        turn="### Instruction:\n{prompt}\n\n### Response:\n{answer}\n\n",
        input="\n\n### Input:\n{input}",
        stop=("\n\n### Instruction:",)),
    Template(
        name="phi3",
        system="<|system|>\n{system}<|end|>\n",
        turn="<|user|>\n{prompt}<|end|>\n<|assistant|>\n{answer}<|end|>\n",
        input="\n{input}"),
    Template(
        name="chatml",
        system="<|im_start|>system\n{system}<|im_end|>\n",
        turn="<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"),
)}


def load_template(spec: str) -> Template:
    """The template of a name, a YAML file, or the text of a turn itself. Raises UserError."""
    if spec in TEMPLATES:
        return TEMPLATES[spec]
    if spec.endswith((".yaml", ".yml", ".json")):
        return _from_file(Path(spec))
    if "{" in spec or "\n" in spec:
        return template_from({"name": "custom", "turn": spec}, f"template {spec!r}")
    near = difflib.get_close_matches(spec, TEMPLATES, n=1)
    hint = f"did you mean {near[0]}?" if near else f"expected {', '.join(TEMPLATES)}, a YAML file, or a text with " \
                                                   f"{{prompt}} and {{answer}}"
    raise UserError(f"unknown template {spec!r}; {hint}")


def template_from(values: Any, where: str) -> Template:
    """The template of a mapping, as from YAML or a checkpoint's template.json. Raises UserError naming `where`."""
    if not isinstance(values, dict):
        raise UserError(f"{where} is a {type(values).__name__}, expected keys such as turn and system")
    kinds = {field.name: (str,) for field in dataclasses.fields(Template)}
    kinds |= {"system": (str, type(None)), "default_system": (str, type(None)), "stop": (list, tuple)}
    for key, value in values.items():
        if key not in kinds:
            near = difflib.get_close_matches(str(key), kinds, n=1, cutoff=0.4)
            raise UserError(f"{where}: unknown key {key!r}; {f'did you mean {near[0]}?' if near else 'known: '}"
                            f"{'' if near else ', '.join(kinds)}")
        if not isinstance(value, kinds[key]) or (key == "stop" and not all(isinstance(s, str) for s in value)):
            raise UserError(f"{where}: {key} is {value!r}, expected a {'list of texts' if key == 'stop' else 'text'}")
    if "turn" not in values:
        raise UserError(f"{where} has no `turn`, expected one exchange with {{prompt}} and {{answer}}")
    try:
        return Template(**{"name": "custom"} | values)
    except ValueError as error:
        raise UserError(f"{where} {error}") from None


def _from_file(path: Path) -> Template:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read the template {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"template {path} is not valid YAML: {' '.join(str(error).split())}") from error
    values = parse_yaml(text, f"template {path}")
    return template_from({"name": path.stem} | values if isinstance(values, dict) else values, f"template {path}")


def encode(segments: list[Segment], tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """(token ids, which of them the model is to say). The tokenizer has the template's special tokens."""
    ids: list[int] = []
    is_answer: list[bool] = []
    for segment in segments:
        new = [tokenizer.specials[segment.text]] if segment.is_special else tokenizer.encode(segment.text)
        ids += new
        is_answer += [segment.is_answer] * len(new)
    return ids, is_answer


def check_specials(template: Template, tokenizer: Tokenizer) -> None:
    """Raise UserError unless the tokenizer has the template's special tokens."""
    if missing := template.missing_from(tokenizer):
        raise UserError(f"the model's tokenizer has no {', '.join(missing)}: it was not fine-tuned with the template "
                        f"{template.name}; leave --template out, or fine-tune with it")
