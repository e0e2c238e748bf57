"""`gptdist chat`: a conversation with a fine-tuned model in the terminal, or over a pipe.

`Chat` is the conversation: turns, what fits in the context, streaming an answer. `Terminal` is the dialogue around it:
reads lines, obeys /commands, shows notes. Answers go to stdout, everything else to stderr.
"""

import dataclasses
import difflib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import torch
from rich.console import Console

from gptdist.checkpoint.restore import load_model
from gptdist.checkpoint.template import stored_template
from gptdist.data.instructions import ASSISTANT, USER, Conversation, Turn
from gptdist.data.templates import Template, check_specials, encode, load_template
from gptdist.errors import UserError
from gptdist.generate import Generator, Sampling

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Chat:
    """A conversation with one model. Without a template it is a base model, which continues each text on its own."""

    def __init__(self, generator: Generator, template: Template | None, sampling: Sampling, system: str | None = None):
        """Raises UserError where the template has no place for `system`, or the tokenizer lacks its special tokens."""
        self.generator, self.template = generator, template
        self.sampling = sampling
        self.turns: list[Turn] = []
        self.forgotten = 0  # turns of the last prompt that did not fit
        self._said = 0
        if template is not None:
            check_specials(template, generator.tokenizer)
        self.set_system(system)

    def set_system(self, text: str | None) -> None:
        if text is not None and self.template is None:
            raise UserError("a base model has no system prompt: it continues text")
        if text is not None:
            self.template.render(Conversation((Turn(USER, ""),), text))  # says so if it has no place for one
        self.system = text

    def reset(self) -> None:
        """Forget what was said; the system prompt stays."""
        self.turns = []
        self.forgotten = 0

    def say(self, text: str) -> Iterator[str]:
        """Say something; yields the answer as it comes. However far it got, it is then part of the conversation.

        Raises UserError for a text that does not fit in the context.
        """
        prompt = self._continuation(text) if self.template is None else self._prompt(Turn(USER, text))
        sampling = self._sampling(len(prompt))
        self._said += 1
        answer = ""
        try:
            for piece in self.generator.stream(prompt, sampling):
                answer += piece
                yield piece
        finally:
            if self.template is not None:
                self.turns += [Turn(USER, text), Turn(ASSISTANT, answer)]

    def _sampling(self, n_prompt: int) -> Sampling:
        stops = self.template.stops if self.template else ()
        room = self.generator.context - n_prompt  # an answer never pushes its own question out of the context
        return dataclasses.replace(
            self.sampling, max_new_tokens=min(self.sampling.max_new_tokens, room),
            stop=tuple(dict.fromkeys((*self.sampling.stop, *stops))), seed=self.sampling.seed + self._said)

    def _continuation(self, text: str) -> list[int]:
        ids = self.generator.tokenizer.encode(text) or [self.generator.tokenizer.eot]
        self._check_length(len(ids))
        return ids

    def _prompt(self, new: Turn) -> list[int]:
        """The newest turns that leave room for an answer; without room for any, the new turn alone."""
        context = self.generator.context
        limit = context - min(self.sampling.max_new_tokens, context // 2)
        for first in range(0, len(self.turns) + 1, 2):  # a question goes with its answer
            ids = self._encode([*self.turns[first:], new])
            if len(ids) <= limit:
                break
        self._check_length(len(ids))
        self.forgotten = first
        return ids

    def _encode(self, turns: list[Turn]) -> list[int]:
        return encode(self.template.render(Conversation(tuple(turns), self.system)), self.generator.tokenizer)[0]

    def _check_length(self, n: int) -> None:
        context = self.generator.context
        if n >= context:
            shorter = "say less" if self.system is None else "say less, or shorten the system prompt"
            raise UserError(f"that is {n} tokens with all that goes around it, the model's context is {context}: "
                            f"{shorter}")

    def to_json(self) -> str:
        """The conversation as a line of chat messages, which fine-tuning reads."""
        messages = [{"role": turn.role, "content": turn.text} for turn in self.turns]
        if self.system is not None:
            messages.insert(0, {"role": "system", "content": self.system})
        return json.dumps({"messages": messages}, ensure_ascii=False)


def open_chat(checkpoint: Path, sampling: Sampling, *, template: str | None = None, system: str | None = None,
              device: str = "cpu", dtype: torch.dtype = torch.float32, verify: bool = True) -> Chat:
    """A chat with the model of a checkpoint. template: instead of the one that it was fine-tuned with."""
    chosen = load_template(template) if template is not None else stored_template(checkpoint)
    model, tokenizer, _ = load_model(checkpoint, device=device, dtype=dtype, verify=verify)
    return Chat(Generator(model, tokenizer), chosen, sampling, system)


COMMANDS = {
    "/help": "what can be said here",
    "/system": "/system TEXT sets the system prompt; alone it shows it",
    "/reset": "forget the conversation; the system prompt stays",
    "/save": "/save FILE writes the conversation as a line of JSON, which fine-tuning reads",
    "/quit": "leave; so does Ctrl-D",
}


class Terminal:
    """The dialogue. On a terminal it prompts and colours; over a pipe every line is a message."""

    def __init__(self, chat: Chat, stdin: TextIO | None = None):
        self.chat, self.stdin = chat, stdin or sys.stdin
        self.interactive = self.stdin.isatty()
        self.notes = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)

    def run(self) -> None:
        self._greet()
        if self.interactive:
            import readline  # noqa: F401  lines can be edited and called back
        while (line := self._read()) is not None:
            if not line.strip():
                continue
            if line.startswith("/") and not line.startswith("//"):
                if not self._obey(*line.strip().partition(" ")[::2]):
                    return
            else:
                self._answer(line.removeprefix("/") if line.startswith("//") else line)

    def _greet(self) -> None:
        if self.chat.template is None:
            self._note("This is a base model: it was not fine-tuned to answer. It continues each text that you write, "
                       "and knows nothing of the ones before. Fine-tuning for instructions makes it a chat.")
        elif self.interactive:
            self._note(f"Template {self.chat.template.name}, context {self.chat.generator.context} tokens. /help lists "
                       f"the commands, Ctrl-C stops an answer, Ctrl-D leaves.")

    def _read(self) -> str | None:
        """The next line, or None at the end. Raises UserError for bytes that are no text."""
        try:
            return self._next_line()
        except UnicodeDecodeError as error:
            raise UserError(f"the input is not {error.encoding.upper()} text (byte 0x{error.object[error.start]:02x}); "
                            f"convert it") from None

    def _next_line(self) -> str | None:
        if not self.interactive:
            line = self.stdin.readline()
            return line.rstrip("\r\n") if line else None
        while True:
            try:
                return input("\nyou> ")
            except EOFError:
                print()
                return None
            except KeyboardInterrupt:
                self._note("\n/quit or Ctrl-D leaves")

    def _answer(self, text: str) -> None:
        """Stream the answer; Ctrl-C ends it, and the conversation goes on with what there is of it."""
        pieces = self.chat.say(text)
        try:
            first = next(pieces, "")
            if self.chat.forgotten:
                self._note(f"(the first {self.chat.forgotten} turns no longer fit in the context)")
            self._show(first)
            for piece in pieces:
                self._show(piece)
        except UserError as error:
            self._note(str(error))
            return
        except KeyboardInterrupt:
            self._show(" [stopped]")
        finally:
            pieces.close()
        self._show("\n")

    def _show(self, text: str) -> None:
        """Print a part of an answer as it is; on a terminal without the control characters that would steer it."""
        print(_CONTROL.sub("\ufffd", text) if self.interactive else text, end="", flush=True)

    def _obey(self, command: str, argument: str) -> bool:
        """Do what a /command says; False to leave."""
        argument = argument.strip()
        try:
            match command:
                case "/quit" | "/exit":
                    return False
                case "/help":
                    for name, meaning in COMMANDS.items():
                        self._note(f"{name:8} {meaning}")
                    self._note("//...    says something that begins with /")
                case "/reset":
                    self.chat.reset()
                    self._note("The conversation starts anew.")
                case "/system":
                    self._system(argument)
                case "/save":
                    self._save(argument)
                case _:
                    near = difflib.get_close_matches(command, COMMANDS, n=1)
                    self._note(f"There is no {command}; {f'did you mean {near[0]}?' if near else 'see /help'}")
        except UserError as error:
            self._note(str(error))
        return True

    def _system(self, text: str) -> None:
        if text:
            self.chat.set_system(text)
            self._note("The system prompt is set.")
        elif self.chat.system is not None:
            self._note(f"System prompt: {self.chat.system}")
        else:
            default = self.chat.template.default_system if self.chat.template else None
            self._note(f"No system prompt is set{f'; the template has: {default}' if default else ''}.")

    def _save(self, name: str) -> None:
        if not name:
            raise UserError("/save needs the name of a file: /save talk.jsonl")
        if not self.chat.turns:
            raise UserError("nothing has been said that could be saved")
        try:
            with Path(name).open("x", encoding="utf-8") as file:
                file.write(self.chat.to_json() + "\n")
        except FileExistsError:
            raise UserError(f"{name} already exists and is never overwritten: choose another name") from None
        except OSError as error:
            raise UserError(f"cannot write {name}: {error.strerror}") from error
        self._note(f"{len(self.chat.turns)} turns saved in {name}")

    def _note(self, text: str) -> None:
        self.notes.print(text, style="dim")
