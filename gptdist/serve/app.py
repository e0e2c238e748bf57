"""The HTTP interface: OpenAI's chat completions, completions and models, labels of texts, health, metrics, the page.

Source: OpenAI's API reference; "Server-sent events" of the HTML standard.
"""

import asyncio
import base64
import contextlib
import dataclasses
import difflib
import hashlib
import json
import math
import re
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException

from gptdist import __version__
from gptdist.data.instructions import Conversation
from gptdist.data.templates import Template, check_specials, encode
from gptdist.errors import UserError
from gptdist.generate import Sampling
from gptdist.model import LanguageModel
from gptdist.serve.engine import BusyError, Engine, Event, Job, Limits, TokenScore
from gptdist.serve.guard import ApiError, Guard, Rules
from gptdist.serve.metrics import Metrics
from gptdist.serve.schema import Body, ChatBody, ClassifyBody, CompletionBody, Error, GenerationBody
from gptdist.tasks.classify import Labeller

PAGE_FILE = Path(__file__).with_name("page.html")
FINISH = {"stop": "stop", "end": "stop", "length": "length"}
FAILURES = {"timeout": (408, "the answer took too long: ask for fewer tokens, or again when less is going on"),
            "failed": (500, "the model failed on this request; the server's log says why")}
COMPLETION_TOKENS = 16  # OpenAI's default for completions; a chat's answer may fill the context
EXPECTED = {400: {"model": Error}, 401: {"model": Error}, 404: {"model": Error}, 408: {"model": Error},
            413: {"model": Error}, 422: {"model": Error}, 429: {"model": Error}}


@dataclass(frozen=True, kw_only=True)
class Served:
    """What is served: a language model, with the template it was fine-tuned with, or a classifier."""

    name: str
    model: LanguageModel | None = None
    tokenizer: Any = None
    template: Template | None = None
    labeller: Labeller | None = None

    @property
    def task(self) -> str:
        if self.labeller is not None:
            return "classify"
        return "chat" if self.template else "base"


class Api:
    """One model behind HTTP. The engine computes on its own thread; everything here is on the event loop.

    Raises UserError for a template that the tokenizer lacks tokens for, and limits that the model cannot keep.
    """

    def __init__(self, served: Served, limits: Limits, rules: Rules):
        self.served, self.limits = served, limits
        self.created = int(time.time())
        self.engine = None
        if served.model is not None:
            self.engine = Engine(served.model, served.tokenizer, limits, self._deliver)
        if served.template is not None:
            check_specials(served.template, served.tokenizer)
        self.metrics = Metrics(self.engine)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._inboxes: dict[Job, asyncio.Queue[Event]] = {}
        self._labelling, self._to_label = asyncio.Lock(), 0
        self._usual_s = 1.0  # how long requests take, a moving average
        self._page = PAGE_FILE.read_text(encoding="utf-8")
        self.app = self._application(rules)

    def _application(self, rules: Rules) -> FastAPI:
        app = FastAPI(title="gptdist", version=__version__, docs_url=None, redoc_url=None, lifespan=self._lifespan)
        paths = []
        for method, path, run in (
            ("GET", "/", self.page), ("GET", "/health", self.health), ("GET", "/metrics", self.metrics_text),
            ("GET", "/v1/models", self.models), ("GET", "/v1/models/{model}", self.model),
            ("POST", "/v1/chat/completions", self.chat), ("POST", "/v1/completions", self.complete),
            ("POST", "/v1/classify", self.classify),
        ):
            app.add_api_route(path, run, methods=[method], responses=EXPECTED, response_model=None)
            paths.append(path)
        app.add_exception_handler(ApiError, lambda request, error: error.response())
        app.add_exception_handler(UserError, lambda request, error: ApiError(400, str(error)).response())
        app.add_exception_handler(RequestValidationError, lambda request, error: _invalid(error).response())
        app.add_exception_handler(Exception, lambda request, error: ApiError(
            500, "the server failed on this request; its log says why").response())
        app.add_exception_handler(HTTPException, lambda request, error: _http_error(error, paths).response())

        def count(path: str, status: int) -> None:
            self.metrics.requests.labels(path if path in paths else "other", status).inc()

        app.add_middleware(Guard, rules=rules, headers=security_headers(self._page), count=count)
        return app

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        self._loop = asyncio.get_running_loop()
        if self.engine is not None:
            self.engine.start()
        yield
        if self.engine is not None:
            await asyncio.to_thread(self.engine.close)

    # what is asked of it

    async def page(self) -> Response:
        """The page."""
        return HTMLResponse(self._page)

    async def health(self) -> dict[str, Any]:
        """Whether the server works, and how much it has to do."""
        rows = (len(self.engine.rows), len(self.engine.waiting)) if self.engine else (0, self._to_label)
        return {"status": "ok", "model": self.served.name, "running": rows[0], "waiting": rows[1]}

    async def metrics_text(self) -> Response:
        """Counters in Prometheus's text format."""
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def models(self) -> dict[str, Any]:
        """The one model that is served."""
        return {"object": "list", "data": [self._description()]}

    async def model(self, model: str) -> dict[str, Any]:
        """The model of this name."""
        self._check_name(model)
        return self._description()

    async def chat(self, body: ChatBody, request: Request) -> Response:
        """An answer to the last message of a conversation."""
        self._check_name(body.model)
        template = self._language_model("chat").template
        if template is None:
            raise ApiError(400, f"{self.served.name} is a base model, which was not fine-tuned to answer: use "
                                f"/v1/completions, or start the server with --template", code="not_a_chat_model")
        limit = body.max_completion_tokens or body.max_tokens or self.engine.context
        tokens, forgotten = self._chat_prompt(body, limit)
        top = body.top_logprobs or 0 if body.logprobs else None
        if body.top_logprobs is not None and not body.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs=true", param="top_logprobs")
        job = self._submit([tokens], body, body.sampling(limit, template.stops), top)
        return await self._answer(ChatFormat(self, job, forgotten), body, request)

    async def complete(self, body: CompletionBody, request: Request) -> Response:
        """Continuations of texts."""
        self._check_name(body.model)
        tokenizer = self._language_model("completions").tokenizer
        prompts = [tokenizer.encode(prompt) if isinstance(prompt, str) else prompt for prompt in body.prompts()]
        for prompt in prompts:
            if wrong := [token for token in prompt if token >= self.served.model.config.vocab_size]:
                raise ApiError(400, f"prompt has the token id {wrong[0]}, the model's vocabulary ends at "
                                    f"{self.served.model.config.vocab_size - 1}", param="prompt")
        job = self._submit(prompts, body, body.sampling(body.max_tokens or COMPLETION_TOKENS), body.logprobs)
        return await self._answer(CompletionFormat(self, job), body, request)

    async def classify(self, body: ClassifyBody) -> dict[str, Any]:
        """A label for each text."""
        self._check_name(body.model)
        labeller = self.served.labeller
        if labeller is None:
            raise ApiError(400, f"{self.served.name} is no classifier: it writes text, see /v1/completions",
                           code="not_a_classifier")
        if self._to_label >= self.limits.queue:
            raise self._busy()
        self._to_label += 1
        try:
            async with self._labelling:
                return await asyncio.to_thread(_labels, labeller, body.texts(), self.served.name)
        finally:
            self._to_label -= 1

    # how it is answered

    def _description(self) -> dict[str, Any]:
        served, labeller = self.served, self.served.labeller
        config = served.model.config if labeller is None else labeller.config.model
        return {
            "id": served.name, "object": "model", "created": self.created, "owned_by": "gptdist", "task": served.task,
            "context": config.context, "template": served.template.name if served.template else None,
            "system_prompt": bool(served.template and served.template.system),
            "labels": list(labeller.labels) if labeller else None}

    def _check_name(self, name: str | None) -> None:
        if name is not None and name != self.served.name:
            raise ApiError(404, f"there is no model {name!a} here: this server has {self.served.name!r}", param="model",
                           code="model_not_found")

    def _language_model(self, wanted: str) -> Served:
        if self.engine is None:
            raise ApiError(400, f"{self.served.name} is a classifier, which writes no text ({wanted}): use "
                                f"/v1/classify", code="not_a_language_model")
        return self.served

    def _chat_prompt(self, body: ChatBody, limit: int) -> tuple[list[int], int]:
        """(the conversation's tokens, how many of its first turns were left out to make them fit)."""
        context, conversation = self.engine.context, body.conversation()
        turns, room = conversation.turns, context - min(limit, context // 2)
        for first in range(0, len(turns), 2):  # a question goes with its answer
            rest = Conversation(turns[first:], conversation.system)
            tokens = encode(self.served.template.render(rest), self.served.tokenizer)[0]
            if body.truncation != "auto" or len(tokens) <= room:
                break
        return tokens, first

    def _submit(self, prompts: Sequence[Sequence[int]], body: GenerationBody, sampling: Sampling,
                top: int | None) -> Job:
        for prompt in prompts:
            if len(prompt) >= self.engine.context:
                raise ApiError(400, f"the prompt has {len(prompt)} tokens with all that goes around it, the model's "
                                    f"context is {self.engine.context}, and an answer needs room as well: shorten it",
                               code="context_length_exceeded", param="prompt")
        try:
            job = self.engine.submit(prompts, sampling, n=body.choices, top_logprobs=top)
        except BusyError:
            raise self._busy() from None
        self._inboxes[job] = asyncio.Queue()  # before the loop runs _dispatch
        return job

    def _busy(self) -> ApiError:
        wait = min(60, max(1, math.ceil(self._usual_s)))
        return ApiError(429, f"too many requests are waiting: try again in {wait} s", code="queue_full",
                        headers={"Retry-After": str(wait)})

    def _deliver(self, events: list[Event]) -> None:
        """On the engine's thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits for them
            self._loop.call_soon_threadsafe(self._dispatch, events)

    def _dispatch(self, events: list[Event]) -> None:
        for event in events:
            if event.job in self._inboxes:
                self._inboxes[event.job].put_nowait(event)

    async def events(self, job: Job) -> AsyncIterator[Event]:
        """News of a job to its end; what came together is one event. Raises ApiError where it fails."""
        left = job.n_choices
        inbox = self._inboxes[job]
        while left:
            news = [await inbox.get()]
            while not inbox.empty():
                news.append(inbox.get_nowait())
            for event in _joined(news):
                if event.error:
                    status, message = FAILURES[event.error]
                    raise ApiError(status, message, code=event.error)
                left -= event.finish is not None
                yield event

    async def _answer(self, form: "Format", body: GenerationBody, request: Request) -> Response:
        """The answer to a job, at once or as a stream. A client that goes away ends the job."""
        if body.stream:
            include_usage = bool(body.stream_options and body.stream_options.include_usage)
            return EventStream(form.stream(include_usage), lambda: self._close(form.job))
        try:
            done = await _unless_gone(request.receive, form.whole())
        finally:
            self._close(form.job)
        return Response(status_code=499) if done is None else JSONResponse(done)

    def _close(self, job: Job) -> None:
        job.cancel()
        del self._inboxes[job]
        now = time.monotonic()
        self._usual_s += 0.1 * (now - job.submitted - self._usual_s)
        self.metrics.count_job(job, now)


class EventStream(Response):
    """Server-sent events, until they end or the client has gone; then `close` is called."""

    media_type = "text/event-stream"

    def __init__(self, lines: AsyncIterator[str], close: Callable[[], None]):
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._lines, self._close = lines, close

    async def __call__(self, scope, receive, send) -> None:
        try:
            await _unless_gone(receive, self._write(send))
        finally:
            self._close()

    async def _write(self, send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async with contextlib.aclosing(self._lines) as lines:
            async for line in lines:
                await send({"type": "http.response.body", "body": f"data: {line}\n\n".encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b""})


class Format:
    """How the answer to a job is written; two kinds of it below."""

    prefix = kind = chunk_kind = ""

    def __init__(self, api: Api, job: Job):
        self.api, self.job = api, job
        self.tokenizer = api.served.tokenizer
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
        self.created = int(time.time())

    async def whole(self) -> dict[str, Any]:
        texts = [""] * self.job.n_choices
        scores: list[list[TokenScore]] = [[] for _ in texts]
        finish = [""] * len(texts)
        async for event in self.api.events(self.job):
            texts[event.choice] += event.text
            scores[event.choice] += event.scores
            finish[event.choice] = FINISH.get(event.finish, "")
        choices = [self.choice(i, texts[i]) | {"logprobs": self.logprobs(scores[i]), "finish_reason": finish[i]}
                   for i in range(len(texts))]
        return self._object(self.kind, choices) | {"usage": self._usage()}

    async def stream(self, include_usage: bool) -> AsyncIterator[str]:
        """The data of the events. An error that comes later than the first of them is one, too."""
        def chunk(choices: list[dict[str, Any]]) -> str:
            return json.dumps(self._object(self.chunk_kind, choices) | ({"usage": None} if include_usage else {}))

        for first in self.first_chunks():
            yield chunk([first | {"logprobs": None, "finish_reason": None}])
        try:
            async for event in self.api.events(self.job):
                yield chunk([self.delta(event.choice, event.text) | {
                    "logprobs": self.logprobs(event.scores), "finish_reason": FINISH.get(event.finish)}])
        except ApiError as error:
            yield json.dumps(error.body)
            return
        if include_usage:
            yield json.dumps(self._object(self.chunk_kind, []) | {"usage": self._usage()})
        yield "[DONE]"

    def first_chunks(self) -> list[dict[str, Any]]:
        return []

    def choice(self, index: int, text: str) -> dict[str, Any]:
        return {"index": index, "text": text}

    delta = choice

    def logprobs(self, scores: Sequence[TokenScore]) -> dict[str, Any] | None:
        raise NotImplementedError

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.api.served.name,
                "choices": choices}

    def _usage(self) -> dict[str, Any]:
        job = self.job
        return {"prompt_tokens": job.n_prompt_tokens, "completion_tokens": job.n_tokens,
                "total_tokens": job.n_prompt_tokens + job.n_tokens,
                "prompt_tokens_details": {"cached_tokens": min(job.n_cached, job.n_prompt_tokens)}}


class CompletionFormat(Format):
    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def logprobs(self, scores: Sequence[TokenScore]) -> dict[str, Any] | None:
        if self.job.top_logprobs is None:
            return None
        name = self._name
        return {"tokens": [name(s.token) for s in scores], "token_logprobs": [s.logprob for s in scores],
                "top_logprobs": [{name(token): value for token, value in s.top} for s in scores],
                "text_offset": [s.offset for s in scores]}

    def _name(self, token: int) -> str:
        """The token's text, or its bytes where these are none."""
        data = self.tokenizer.token_bytes(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


class ChatFormat(Format):
    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, api: Api, job: Job, forgotten: int):
        super().__init__(api, job)
        self.forgotten = forgotten

    def first_chunks(self) -> list[dict[str, Any]]:
        return [{"index": i, "delta": {"role": "assistant", "content": ""}} for i in range(self.job.n_choices)]

    def choice(self, index: int, text: str) -> dict[str, Any]:
        return {"index": index, "message": {"role": "assistant", "content": text}}

    def delta(self, index: int, text: str) -> dict[str, Any]:
        return {"index": index, "delta": {"content": text} if text else {}}

    def logprobs(self, scores: Sequence[TokenScore]) -> dict[str, Any] | None:
        if self.job.top_logprobs is None:
            return None

        def entry(token: int, logprob: float) -> dict[str, Any]:
            data = self.tokenizer.token_bytes(token)
            return {"token": data.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(data)}

        return {"content": [entry(s.token, s.logprob) | {"top_logprobs": [entry(*pair) for pair in s.top]}
                            for s in scores], "refusal": None}

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return super()._object(kind, choices) | ({"forgotten_turns": self.forgotten} if self.forgotten else {})


def _joined(news: list[Event]) -> list[Event]:
    """One event for each choice, in the order of their first."""
    by_choice: dict[int, Event] = {}
    for event in news:
        if before := by_choice.get(event.choice):
            event = dataclasses.replace(event, text=before.text + event.text, scores=[*before.scores, *event.scores])
        by_choice[event.choice] = event
    return list(by_choice.values())


async def _unless_gone(receive: Callable[[], Coroutine], work: Coroutine) -> Any:
    """What `work` returns; None, and `work` is cancelled, where the client goes away before."""
    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        return await working if working.done() else None
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


def _labels(labeller: Labeller, texts: list[str], name: str) -> dict[str, Any]:
    lines = [line | {"index": i, "truncated": labeller.truncated([texts[i]]) > 0}
             for i, line in enumerate(labeller.lines(texts))]
    return {"object": "list", "model": name, "data": [{k: v for k, v in line.items() if k != "text"} for line in lines]}


def _invalid(error: RequestValidationError) -> ApiError:
    """What is wrong with a body, in a sentence that helps."""
    first = error.errors()[0]
    where = [str(part) for part in first["loc"] if part != "body"]
    param = ".".join(where) or None
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {first.get('ctx', {}).get('error', 'it ends too early')}")
    if first["type"] == "extra_forbidden":
        known = {name for kind in (ChatBody, CompletionBody, ClassifyBody, Body) for name in kind.model_fields}
        near = difflib.get_close_matches(where[-1], known, n=1)
        return ApiError(400, f"unknown field {where[-1]!a}; {f'did you mean {near[0]}?' if near else 'leave it out'}",
                        param=param)
    said = re.sub(r"^Value error, ", "", first["msg"])
    said = said[:1].lower() + said[1:]
    if first["type"] == "missing" and not where:
        said = "expected a JSON object as the body, with the header 'Content-Type: application/json'"
    return ApiError(400, f"{param}: {said}" if param else said, param=param)


def _http_error(error: HTTPException, paths: list[str]) -> ApiError:
    said = {404: f"there is nothing at this path: use one of {', '.join(paths)}",
            405: "this path takes another method: GET for what is read, POST for what is asked"}
    return ApiError(error.status_code, said.get(error.status_code, str(error.detail)), headers=error.headers)


def security_headers(page: str) -> dict[str, str]:
    """Headers of every answer. The page may run its own script and style and talk to this server, nothing else."""
    def hashes(tag: str) -> str:
        parts = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(p.encode()).digest()).decode()}'" for p in parts)

    return {
        "Content-Security-Policy": f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; "
                                   "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
                                   "frame-ancestors 'none'",
        "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
