"""A server in this process, on a free port, that the tests of serve/ share; and a tiny model for it."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx

from gptdist.data.templates import Template
from gptdist.data.tokenizer import build_tokenizer, extend
from gptdist.generate import Generator
from gptdist.serve.app import Api, Served
from gptdist.serve.engine import Limits
from gptdist.serve.guard import Rules
from tests.test_generate import generator

CHAT = Template(name="tiny", system="<{system}>", turn="Q:{prompt}\nA:{answer}<|endoftext|>")
CONTEXT = 96


def tiny_generator(**options) -> Generator:
    return generator(extend(build_tokenizer("bytes"), CHAT.specials),
                     **({"context": CONTEXT, "width": 64, "n_layers": 2} | options))


def tiny_served(**options) -> Served:
    tiny = tiny_generator()
    return Served(**(dict(name="tiny", model=tiny.model, tokenizer=tiny.tokenizer, template=CHAT) | options))


class Running:
    """A server that runs; `client` asks it."""

    def __init__(self, api: Api, server, port: int):
        self.api, self.engine, self._server = api, api.engine, server
        self.address = f"http://127.0.0.1:{port}"
        self.client = httpx.Client(base_url=self.address, timeout=60)

    def post(self, path: str, **body) -> httpx.Response:
        return self.client.post(path, json=body)

    def send_little_ahead(self) -> None:
        """The kernel holds little of what a client does not read; for the connections from now on."""
        self._server.servers[0].sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)

    def stop(self) -> None:
        """As a signal does: no new requests, the running ones are finished."""
        self._server.should_exit = True

    def metric(self, line: str) -> float:
        """The value after the line's beginning in /metrics."""
        [value] = [found.split()[-1] for found in self.client.get("/metrics").text.splitlines()
                   if found.startswith(f"{line} ")]
        return float(value)


@contextmanager
def running(served: Served, *, limits: Limits | None = None, rules: Rules | None = None,
            slow_s: float = 0.0, port: int = 0, send_timeout_s: float = 60.0) -> Iterator[Running]:
    """slow_s: what each step of the engine takes besides."""
    import uvicorn

    from gptdist.serve.command import listen

    api = Api(served, limits or Limits(), rules or Rules())
    if slow_s:
        step = api.engine.step

        def slow_step() -> None:
            step()
            time.sleep(slow_s)

        api.engine.step = slow_step
    server = uvicorn.Server(uvicorn.Config(api.app, log_level="warning", timeout_graceful_shutdown=10))
    listener = listen("127.0.0.1", port, send_timeout_s)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        wait_for(lambda: server.started)
        found = Running(api, server, listener.getsockname()[1])
        yield found
        found.client.close()
    finally:
        server.should_exit = True
        thread.join()


def wait_for(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "did not happen within a minute"
        time.sleep(0.005)
