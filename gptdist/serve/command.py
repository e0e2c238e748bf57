"""Opens a checkpoint of any task and runs the server until it is told to stop; running answers are finished first."""

import math
import os
import signal
import socket
import sys
import webbrowser
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import uvicorn

from gptdist.checkpoint.restore import load_model, read_config
from gptdist.checkpoint.template import stored_template
from gptdist.data.templates import load_template
from gptdist.errors import UserError
from gptdist.parallel.host import set_up_process
from gptdist.serve.app import Api, Served
from gptdist.serve.engine import Limits, cache_bytes
from gptdist.serve.guard import LOOPBACK, Rules
from gptdist.tasks.classify import Labeller

KEY_VARIABLE = "GPTDIST_API_KEY"
FINISH_S = 60  # what running answers get when the server is to stop
SEND_TIMEOUT_S = 60.0
LONGEST_TIMEOUT_S = 86_400


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    host: str = "127.0.0.1"
    port: int = 8000  # 0: a free one
    send_timeout_s: float = SEND_TIMEOUT_S  # a client that reads nothing for so long is cut off
    name: str | None = None
    template: str | None = None
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    verify: bool = True
    open_page: bool = False
    api_key_file: str | None = None
    limits: Limits = field(default_factory=Limits)


def serve(checkpoint: Path, options: ServeOptions) -> None:
    """Serve a checkpoint until SIGINT or SIGTERM."""
    set_up_process(torch.device(options.device))
    api_key = read_api_key(options.api_key_file)
    if api_key is None and options.host not in LOOPBACK:
        print(f"gptdist serve: anyone who reaches {options.host} can use this server: set {KEY_VARIABLE}, or give "
              f"--api-key-file, so that requests need a key", file=sys.stderr)
    # Before the model: a taken port is said at once.
    with listen(options.host, options.port, options.send_timeout_s) as listener:
        api = Api(open_served(checkpoint, options), options.limits,
                  Rules(api_key=api_key, loopback_only=options.host in LOOPBACK))
        host = f"[{options.host}]" if ":" in options.host else options.host
        address = f"http://{host}:{listener.getsockname()[1]}"
        Server(api, address, options.open_page).run(sockets=[listener])


def open_served(checkpoint: Path, options: ServeOptions) -> Served:
    """What a checkpoint holds: a base model, one with a chat template, or a classifier; adapters are merged."""
    config = read_config(checkpoint)
    name = options.name or Path(config.run.dir).name or checkpoint.name
    if config.task.name == "classify":
        if options.template is not None:
            raise UserError(f"{checkpoint} is a classifier, which has no use for --template")
        return Served(name=name, labeller=Labeller(checkpoint, device=options.device, verify=options.verify))
    template = stored_template(checkpoint) if options.template is None else load_template(options.template)
    model, tokenizer, _ = load_model(checkpoint, device=options.device, dtype=options.dtype, verify=options.verify)
    return Served(name=name, model=model, tokenizer=tokenizer, template=template)


def read_api_key(path: str | None) -> str | None:
    """The key of a file's first line, or of the environment. Not of the command line, which every user can read."""
    if path is None:
        return os.environ.get(KEY_VARIABLE) or None
    try:
        key = Path(path).read_text(encoding="utf-8").partition("\n")[0].strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the API key in {path}: {getattr(error, 'strerror', None) or error}") from error
    if not key:
        raise UserError(f"{path} has no API key in its first line: write one there, or leave --api-key-file out")
    return key


def listen(host: str, port: int, send_timeout_s: float = SEND_TIMEOUT_S) -> socket.socket:
    """A socket that is bound. Raises UserError where that is not possible.

    The kernel ends a connection whose client has taken nothing of what waits for it for send_timeout_s.
    """
    if not 0 <= port <= 65535:
        raise UserError(f"--port is {port}, expected 0 (a free one) to 65535")
    if not 0 < send_timeout_s <= LONGEST_TIMEOUT_S:
        raise UserError(f"--send-timeout is {send_timeout_s:g}, expected more than 0 and at most {LONGEST_TIMEOUT_S} "
                        f"seconds")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        # asyncio sends small writes at once (TCP_NODELAY) where the protocol is named; else a stream's wait 40 ms.
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Its connections inherit it. uvicorn bounds no write, and closes a connection only when all is sent.
        if sys.platform == "linux":  # no other system has it
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, math.ceil(1000 * send_timeout_s))
        listener.bind(address)
    except OSError as error:
        raise UserError(f"cannot listen on {host} port {port}: {error.strerror}; choose another --port or --host"
                        ) from error
    return listener


class Server(uvicorn.Server):
    """uvicorn's, which says where it is when it is there, and whose end by a signal is no failure."""

    def __init__(self, api: Api, address: str, open_page: bool = False):
        super().__init__(uvicorn.Config(api.app, log_level="warning", access_log=False, server_header=False,
                                        timeout_keep_alive=30, timeout_graceful_shutdown=FINISH_S, lifespan="on"))
        self.api, self.address, self.open_page = api, address, open_page

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        served, engine = self.api.served, self.api.engine
        holds = f", a cache of {cache_bytes(engine) / 2**20:.0f} MiB" if engine else ""
        print(f"serving {served.name} ({served.task}{holds}) at {self.address}; Ctrl-C ends it", flush=True)
        if self.open_page and not webbrowser.open(self.address):
            print(f"gptdist serve: found no browser to open {self.address} with", file=sys.stderr)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, but a stop that was asked for is no death by a signal."""
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
