"""What a request may say: OpenAI's fields, and a few of our own. An unknown field is an error, never ignored.

Source: OpenAI's API reference, chat completions and completions.
"""

import secrets
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from gptdist.data.instructions import ASSISTANT, SYSTEM, USER, Conversation, Turn
from gptdist.generate import Sampling

MAX_CHOICES, MAX_PROMPTS, MAX_TEXTS, MAX_TOP, MAX_STOPS, MAX_MESSAGES = 16, 32, 256, 20, 16, 1024
SEEDS = 2**40

Stop = Annotated[str, Field(min_length=1, max_length=256)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    model: str | None = Field(None, description="the model's name, as /v1/models gives it")


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    include_usage: bool | None = None


class GenerationBody(Body):
    """What both ways to generate text have in common."""

    max_tokens: int | None = Field(None, ge=1, description="the answer also ends where the model's context does")
    temperature: float | None = Field(None, ge=0, le=2, description="0: the likeliest token; default 1")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, description="0: all; not OpenAI's")
    repetition_penalty: float | None = Field(None, ge=1e-3, le=1e3, description="1: off; not OpenAI's")
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    seed: int | None = Field(None, description="what a seed says is the same each time; none: another each time")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="taken, and of no effect")
    frequency_penalty: float | None = Field(None, description="0: there is only repetition_penalty")
    presence_penalty: float | None = Field(None, description="0: there is only repetition_penalty")
    logit_bias: dict[str, float] | None = Field(None, description="not supported: empty")

    @field_validator("frequency_penalty", "presence_penalty", "logit_bias")
    @classmethod
    def _off(cls, value: Any) -> Any:
        if value:
            raise ValueError("not supported: leave it out (repetition_penalty makes a model repeat less)")
        return value

    @property
    def choices(self) -> int:
        return self.n or 1

    def sampling(self, max_tokens: int, stops: tuple[str, ...] = ()) -> Sampling:
        """Raises UserError for values that cannot be sampled with."""
        own = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return Sampling(
            max_new_tokens=max_tokens, temperature=1.0 if self.temperature is None else self.temperature,
            top_k=self.top_k or 0, top_p=self.top_p or 1.0, repetition_penalty=self.repetition_penalty or 1.0,
            stop=tuple(dict.fromkeys((*own, *stops))),
            seed=secrets.randbelow(SEEDS) if self.seed is None else self.seed % SEEDS)


class TextPart(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["text"]
    text: str


class Message(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatBody(GenerationBody):
    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=1, description="as max_tokens, its newer name")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP)
    truncation: Literal["auto", "disabled"] | None = Field(
        None, description="auto: the oldest turns that do not fit in the context are left out; default: an error")

    @field_validator("messages")
    @classmethod
    def _alternate(cls, messages: list[Message]) -> list[Message]:
        roles = [message.role for message in messages]
        said = roles[1:] if roles[0] in ("system", "developer") else roles
        if not said or len(said) % 2 == 0 or said != [USER, ASSISTANT] * (len(said) // 2) + [USER]:
            raise ValueError(f"the roles are {', '.join(roles[:8])}{', ...' * (len(roles) > 8)}; expected a system "
                             f"message or none, then user and assistant by turns, the user's last")
        return messages

    def conversation(self) -> Conversation:
        first, *rest = self.messages
        has_system = first.role in (SYSTEM, "developer")
        turns = rest if has_system else self.messages
        return Conversation(tuple(Turn(turn.role, turn.text) for turn in turns), first.text if has_system else None)


class CompletionBody(GenerationBody):
    prompt: str | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)] | TokenIds | Annotated[
        list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)] = Field(description="texts or token ids")
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP)
    echo: bool | None = Field(None, description="not supported: false")
    best_of: int | None = Field(None, description="not supported: 1")
    suffix: str | None = Field(None, description="not supported: empty")

    @field_validator("echo", "suffix", "best_of")
    @classmethod
    def _unsupported(cls, value: Any) -> Any:
        if value and value is not True and value == 1:
            return value  # best_of
        if value:
            raise ValueError("not supported: leave it out")
        return value

    def prompts(self) -> list[str | list[int]]:
        one = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return [self.prompt] if one else self.prompt


class ClassifyBody(Body):
    input: str | Annotated[list[str], Field(min_length=1, max_length=MAX_TEXTS)]

    def texts(self) -> list[str]:
        return [self.input] if isinstance(self.input, str) else self.input


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    """What every answer with a status of 400 or more holds."""

    error: ErrorDetail
