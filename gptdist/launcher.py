"""One node's part of a job: torchrun's elastic agent, which starts workers again only where that may help.

launch/multinode.sh runs this on every node. Where plain torchrun restarts whatever failed and ends with 1, this one
looks at what the workers' exit codes and RUN_DIR/exit.json say: the user's input (2), a missing device (3) and a bug
(1) end the job at once on all nodes; a killed worker or a lost node starts the workers again from the last checkpoint,
on as many nodes as are there; a stop signal ends it with 75, for the scheduler to start it again.
"""

import argparse
import contextlib
import dataclasses
import fcntl
import functools
import json
import os
import re
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.elastic.agent.server import RunResult, WorkerGroup, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.rendezvous import RendezvousClosedError, RendezvousError, RendezvousTimeoutError
from torch.distributed.launcher import api

from gptdist import config as config_module
from gptdist.cluster import check_batch
from gptdist.config import Config
from gptdist.errors import (
    EXIT_BUG,
    EXIT_DONE,
    EXIT_INTERRUPTED,
    EXIT_MISSING,
    EXIT_REQUEUE,
    EXIT_USER,
    ActionableError,
    LockedError,
    MissingError,
    UserError,
)
from gptdist.faults import STOPPED, ExitRecord, lock_run_dir
from gptdist.parallel.meeting import connect, is_loopback, wait_for_store

STOP_SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"  # SLURM's --signal=USR1 reaches every process of a step
HOPELESS_S = 5  # how long workers that lost a peer get to end: they have nothing left to save
SIOCGIFADDR = 0x8915  # <linux/sockios.h>
DEFAULT_PORT = 29400  # torchrun's
OUTSIDE = "192.0.2.1"  # RFC 5737: no machine has it, so that the way to it is the way out

USAGE = "bash launch/multinode.sh [--hosts HOSTS] [options] CONFIG [--section.key=value ...]"
DESCRIPTION = """\
Run this on every node, or on one with --hosts. Options come before CONFIG, what overrides it after. Each has a default
from SLURM's variables or from those that Kubeflow sets (PET_*). Exit codes: 0 done, 1 a bug, or too many restarts
without a new checkpoint, 2 your input, 3 a device or tool is missing, 75 start it again."""


class Ended(Exception):
    """The job ends, on this node and, as the rendezvous closes, on the others."""

    def __init__(self, code: int, message: str):
        super().__init__(message)
        self.code = code


@dataclasses.dataclass(frozen=True)
class Job:
    """What this node knows of the job."""

    run_dir: Path
    min_nodes: int
    max_nodes: int
    max_restarts: int
    grace_s: int
    # when this process began, imports and all: a node beside it may have failed while these were under way
    began: float = dataclasses.field(default_factory=lambda: time.time() - time.process_time())
    workers_up: threading.Event = dataclasses.field(default_factory=threading.Event)

    @property
    def elastic(self) -> bool:
        return self.min_nodes < self.max_nodes

    def record(self) -> dict | None:
        """RUN_DIR/exit.json, if workers of this job wrote it."""
        try:
            record = json.loads((self.run_dir / "exit.json").read_text())
            return record if record["time"] >= self.began else None
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def newest_checkpoint(self) -> str:
        return max((path.name for path in (self.run_dir / "checkpoints").glob("step-*")), default="")

    def refusal(self) -> dict | None:
        """The record of a node that found before there were workers why there can be none."""
        record = self.record()
        return record if record and record["code"] in (EXIT_USER, EXIT_MISSING) else None


@contextlib.contextmanager
def heeding_refusals(job: Job) -> Iterator[None]:
    """Until the workers are up, a refusal by another node raises Ended here: that node will not come."""
    found: list[dict] = []

    def ended(number: int, frame: object) -> None:
        raise Ended(found[0]["code"], f"another node ended: {found[0]['message']}")

    def watch() -> None:
        while not job.workers_up.wait(timeout=1):
            if record := job.refusal():
                found.append(record)
                os.kill(os.getpid(), signal.SIGUSR2)
                return

    before = signal.signal(signal.SIGUSR2, ended)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        job.workers_up.set()
        watcher.join()
        signal.signal(signal.SIGUSR2, before)


def judge(job: Job, exit_code: int, record: dict | None) -> str:
    """Why the workers should start again, from the first failed one's exit code (below 0: a signal) and the record.

    Raises Ended where another start would end the same way, or is the scheduler's to make.
    """
    code, message = (record["code"], record["message"]) if record and record["code"] else (exit_code, "")
    if code in (EXIT_USER, EXIT_MISSING, EXIT_INTERRUPTED) or (code == EXIT_BUG and exit_code >= 0):
        raise Ended(code, message or f"a worker ended with exit code {code}")
    if message == STOPPED and exit_code >= 0:
        if not job.elastic:
            raise Ended(EXIT_REQUEUE, message)
        return "another node was stopped"
    if exit_code < 0:
        return f"a worker was killed by {signal.Signals(-exit_code).name}"
    return message or f"a worker ended with exit code {exit_code}"


class Agent(LocalElasticAgent):
    """torchrun's agent of a node. The number of restarts is counted anew from every new checkpoint."""

    def __init__(self, job: Job, **options: object):
        super().__init__(**options)
        self._job = job
        self._checkpoint = job.newest_checkpoint()

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, object]:
        self._job.workers_up.set()
        return super()._start_workers(worker_group)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        if result.state is WorkerState.HEALTHY and self._lost_nodes(worker_group):
            # The workers may not notice for long: a machine without power closes no connection.
            result = RunResult(state=WorkerState.UNHEALTHY)
        if result.state in (WorkerState.FAILED, WorkerState.UNHEALTHY):
            self._decide(worker_group, result)
        return result

    def _lost_nodes(self, worker_group: WorkerGroup) -> bool:
        """Whether a node has left the round under way, or has given no sign of life for the keep-alive time."""
        state = worker_group.spec.rdzv_handler._state_holder.state  # as num_nodes_waiting() last read it
        return state.closed or len(state.participants) < worker_group.group_world_size

    def _decide(self, worker_group: WorkerGroup, result: RunResult) -> None:
        """Count a restart, or raise Ended."""
        failures = sorted(result.failures.values(), key=lambda failure: failure.timestamp)
        exit_code = failures[0].exitcode if failures else EXIT_REQUEUE
        record = self._job.record()
        reason = judge(self._job, exit_code, record) if failures or record else "a node is gone"
        newest = self._job.newest_checkpoint()
        if newest != self._checkpoint:
            self._checkpoint, self._remaining_restarts = newest, self._job.max_restarts
        if self._remaining_restarts == 0:
            if self._job.max_restarts == 0:
                raise Ended(EXIT_REQUEUE, reason)
            message = f"gave up after {self._job.max_restarts} restarts without a new checkpoint: {reason}"
            ExitRecord(self._job.run_dir, worker_group.workers[0].global_rank).write(EXIT_BUG, message)
            raise Ended(EXIT_BUG, message)
        count = self._job.max_restarts - self._remaining_restarts + 1
        say(f"{reason}; starting again, {count} of {self._job.max_restarts} restarts since the last checkpoint")

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30) -> None:
        """Workers take no other signal of torchrun's for a request to save."""
        super()._shutdown(signal.SIGTERM, timeout)

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        """Before a node joins, the workers save a checkpoint; those that lost a peer cannot."""
        joining = worker_group.state is WorkerState.HEALTHY and not self._lost_nodes(worker_group)
        self._shutdown(timeout=self._job.grace_s if joining else HOPELESS_S)


def say(message: str) -> None:
    print(f"gptdist launcher [{socket.gethostname()}]: {message}", file=sys.stderr, flush=True)


# Network


def split_endpoint(endpoint: str) -> tuple[str, int]:
    """HOST, HOST:PORT or [IPv6]:PORT."""
    match = re.fullmatch(r"\[?([\w.-]+|[\da-fA-F:.]+(?=\]))\]?(?::(\d{1,5}))?", endpoint)
    port = int(match[2] or DEFAULT_PORT) if match else 0
    if not 0 < port <= 65535:
        raise UserError(f"--endpoint {endpoint} is no HOST:PORT: give a host that all nodes reach and a free port of "
                        f"it, such as node-1:{DEFAULT_PORT}")
    return match[1], port


def is_this_machine(host: str) -> bool:
    """Whether `host` is an address of this machine: only those can be bound."""
    if host in ("localhost", socket.gethostname()):
        return True
    try:
        family, _, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family) as probe:
            probe.bind(address)
        return True
    except OSError:
        return False


def port_is_free(port: int) -> bool:
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=dual).close()
        return True
    except OSError:
        return False


def address_towards(host: str, port: int) -> str:
    """This machine's address on the way to `host`; nothing is sent. Raises UserError where there is no way."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)
            return probe.getsockname()[0]
    except OSError as error:
        raise UserError(f"no way from this node to {host} ({error.strerror}): give --endpoint a name that every node "
                        f"knows, the first one too, or its address") from None


def address_for_others(host: str, port: int) -> str:
    """This node's address that the other nodes can use: that towards `host`, the endpoint's.

    The first node may know its own name as 127.0.1.1 alone, as Debian's /etc/hosts has it. Then it is the address of
    the way out of this machine.
    """
    address = address_towards(host, port)
    if is_loopback(address) and not is_loopback(host):
        try:
            address = address_towards(OUTSIDE, port)
        except UserError:
            raise UserError(f"{host} is {address} on this node, where the others cannot reach it: give --endpoint this "
                            f"node's address, or --interface or --local-addr") from None
        say(f"{host} is a loopback address here, so the other nodes get {address}: --interface or --local-addr gives "
            f"another")
    return address


def interfaces() -> dict[str, str]:
    """IPv4 address of each network interface that has one."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                reply = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:  # it has none
                continue
            found[name] = socket.inet_ntoa(reply[20:24])
    return found


def wait_for_endpoint(host: str, port: int, timeout_s: float) -> None:
    """Return once a rendezvous answers there. Raises UserError if another program does, Ended if nothing does."""
    try:
        connect(host, port)
    except OSError as error:
        say(f"waiting for {host}:{port} ({error})")
    try:
        if not wait_for_store(host, port, timeout_s):
            raise UserError(taken(host, port))
    except dist.DistNetworkError as error:
        raise Ended(EXIT_REQUEUE, f"{host}:{port}: {error}: is the first node up, and --endpoint right?") from None


def taken(host: str, port: int) -> str:
    return (f"port {port} of {host} is taken by another program: give all nodes another --endpoint HOST:PORT, or end "
            f"that program (`ss -ltnp 'sport = :{port}'` on {host} shows it)")


# Options


def parse(argv: Sequence[str]) -> argparse.Namespace:
    env = os.environ
    parser = argparse.ArgumentParser(
        prog="multinode.sh", usage=USAGE, description=DESCRIPTION, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", metavar="N|MIN:MAX", help="how many nodes; with a range the run goes on as long as "
                        "MIN are there, and takes in those that come (default: 1)",
                        default=env.get("PET_NNODES") or env.get("SLURM_NNODES") or "1")
    parser.add_argument("--node-rank", type=int, metavar="R", help="0 on the node of --endpoint (default: found by its "
                        "address)", default=env.get("SLURM_NODEID"))
    parser.add_argument("--endpoint", metavar="HOST:PORT", help="the first node, as the others reach it, and a free "
                        f"port of it (port's default: {DEFAULT_PORT})", default=env.get("PET_RDZV_ENDPOINT"))
    parser.add_argument("--processes-per-node", metavar="N|auto", help="default: auto, one per GPU, or one",
                        default=env.get("PET_NPROC_PER_NODE") or "auto")
    parser.add_argument("--max-restarts", type=int, metavar="N", help="starts of the workers without a new checkpoint "
                        "in between, beyond the first; 0: leave all to the scheduler (default: 3)",
                        default=env.get("PET_MAX_RESTARTS") or 3)
    parser.add_argument("--interface", metavar="NAME", help="network interface of gloo and NCCL (default: the one "
                        "towards the endpoint for gloo, NCCL's choice for NCCL)")
    parser.add_argument("--local-addr", metavar="ADDRESS", help="this node's address, as the others reach it (default: "
                        "that of the interface)")
    parser.add_argument("--join-timeout", type=int, default=600, metavar="S", help="how long to wait for MIN nodes "
                        "(default: 600)")
    parser.add_argument("--last-call", type=int, default=30, metavar="S", help="how long to wait for more once MIN are "
                        "there (default: 30)")
    parser.add_argument("--keep-alive", type=int, default=15, metavar="S", help="a node without a sign of life for "
                        "this long is lost (default: 15)")
    parser.add_argument("--grace", type=int, default=110, metavar="S", help="how long workers get to save after a stop "
                        "signal (default: 110)")
    parser.add_argument("--retry-code", type=int, default=EXIT_REQUEUE, metavar="CODE", help="exit code in place of 75 "
                        "(Kubeflow's ExitCode policy retries 128 to 255 alone)")
    parser.add_argument("--command", choices=("train", "finetune", "doctor"), default="train",
                        help="of gptdist; doctor: with --distributed (default: train)")
    parser.add_argument("--stop-at-eof", action="store_true", help="take the end of the input for a stop signal, as "
                        "--hosts does")
    parser.add_argument("--refuse", metavar="MESSAGE", help="start nothing: end with 2 and this message in "
                        "RUN_DIR/exit.json, as --hosts does of a host that it cannot reach")
    parser.add_argument("config", metavar="CONFIG", help="YAML configuration")
    parser.add_argument("overrides", nargs=argparse.REMAINDER, metavar="--section.key=value")
    args = parser.parse_args(argv)
    for name in ("max_restarts", "join_timeout", "last_call", "keep_alive", "grace"):
        if getattr(args, name) < 0:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}, expected 0 or more")
    return args


def parse_nodes(nodes: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)(?::(\d+))?", nodes)
    low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 0 < low <= high:
        raise UserError(f"--nodes {nodes} is neither a number of nodes nor MIN:MAX with 0 < MIN <= MAX")
    return low, high


def parse_processes(processes: str) -> int:
    if processes in ("auto", "gpu") and torch.cuda.device_count():
        return torch.cuda.device_count()
    if processes == "gpu":
        raise MissingError("--processes-per-node gpu: torch sees no GPU here")
    if processes == "auto":
        return 1
    if not processes.isdecimal() or processes == "0":
        raise UserError(f"--processes-per-node {processes} is neither a number nor auto")
    return int(processes)


def check_worlds(config: Config, nodes: range, processes: int) -> None:
    """Raise UserError for a number of nodes in `nodes` on which this configuration could not run.

    Started at another number than this, an elastic run would find out in the middle.
    """
    parallel = config.parallel
    for count in nodes:
        world = count * processes
        replicas = parallel.replicas or (count if parallel.strategy == "hsdp" else 1)
        among = (f"with --nodes {nodes[0]}:{nodes[-1]} and {processes} processes per node the run may have {world} "
                 f"processes")
        if parallel.strategy == "single" and world > 1:
            raise UserError(f"{among}, but parallel.strategy=single runs in one: use ddp or fsdp")
        if world % (replicas * parallel.tensor):
            raise UserError(f"{among}, which parallel.replicas={replicas} x parallel.tensor={parallel.tensor} does not "
                            f"divide: change those, or --nodes")
    try:
        check_batch(config, nodes[-1] * processes)
    except UserError as error:
        raise UserError(f"--nodes {nodes[0]}:{nodes[-1]} with {processes} processes per node: {error}") from None


# The node's part


def launch(args: argparse.Namespace) -> int:
    config = config_module.load(args.config, args.overrides)
    try:
        if args.refuse is not None:
            raise UserError(args.refuse)
        job = Job(Path(config.run.dir), *parse_nodes(args.nodes), args.max_restarts, args.grace)
        words = ["doctor", "--distributed"] if args.command == "doctor" else [args.command]
        with heeding_refusals(job):
            return run_agent(job, prepare(config, args, job),
                             ["-u", "-m", "gptdist", *words, args.config, *args.overrides])
    except ActionableError as error:
        note(Path(config.run.dir), error)
        raise


def note(run_dir: Path, error: ActionableError) -> None:
    """RUN_DIR/exit.json for an error before there are workers. A run that is up there keeps its own."""
    with contextlib.suppress(OSError, LockedError):  # this error is said on stderr
        run_dir.mkdir(parents=True, exist_ok=True)
        with lock_run_dir(run_dir):
            ExitRecord(run_dir, 0).write(error.exit_code, str(error))


def prepare(config: Config, args: argparse.Namespace, job: Job) -> api.LaunchConfig:
    """Look at all that can be told on this node alone, meet the first node, choose the network.

    Raises UserError or MissingError, Ended where the first node does not come up.
    """
    processes = parse_processes(args.processes_per_node)
    check_worlds(config, range(job.min_nodes, job.max_nodes + 1), processes)
    if args.endpoint is None and job.max_nodes > 1:
        raise UserError(f"--nodes {args.nodes} needs --endpoint HOST:PORT, the first node as all of them reach it")
    rendezvous = {"join_timeout": args.join_timeout, "last_call_timeout": args.last_call,
                  "keep_alive_interval": max(1, args.keep_alive // 3), "keep_alive_max_attempt": 3}
    if args.endpoint is None:
        endpoint, local_addr = "localhost:0", "localhost"
    else:
        host, port = split_endpoint(args.endpoint)
        endpoint = args.endpoint if args.endpoint.endswith(f":{port}") else f"{host}:{port}"
        rendezvous["is_host"] = meet(host, port, args.node_rank, args.join_timeout)
        local_addr = choose_network(args, host, port)
    return api.LaunchConfig(
        min_nodes=job.min_nodes, max_nodes=job.max_nodes, nproc_per_node=processes, run_id=job_id(config),
        rdzv_endpoint=endpoint, rdzv_backend="c10d", rdzv_configs=rendezvous,
        max_restarts=args.max_restarts, local_addr=local_addr,
        signals_to_handle=STOP_SIGNALS, shutdown_timeout=args.grace)


def job_id(config: Config) -> str:
    """The same on every node and after a requeue, and a file's name."""
    return re.sub(r"[^\w.-]", "_", os.environ.get("SLURM_JOB_ID") or config.run.dir)


def meet(host: str, port: int, node_rank: int | None, timeout_s: float) -> bool:
    """Whether this node hosts the rendezvous; if not, waits for it. Raises UserError for a port that is taken."""
    if node_rank is None:
        hosting = is_this_machine(host) and port_is_free(port)
    else:
        hosting = node_rank == 0
        if hosting and not port_is_free(port):
            raise UserError(taken(host, port))
    if not hosting:
        wait_for_endpoint(host, port, timeout_s)
    return hosting


def choose_network(args: argparse.Namespace, host: str, port: int) -> str:
    """This node's address for the others; gloo is bound to its interface, as it would else look up the hostname."""
    known = interfaces()
    if args.interface is not None:
        if args.interface not in known:
            raise UserError(f"--interface {args.interface} has no IPv4 address here: this node has "
                            f"{', '.join(f'{name} ({address})' for name, address in known.items())}")
        os.environ |= {"GLOO_SOCKET_IFNAME": args.interface, "NCCL_SOCKET_IFNAME": args.interface}
        return args.local_addr or known[args.interface]
    towards = address_for_others if parse_nodes(args.nodes)[1] > 1 else address_towards
    address = args.local_addr or towards(host, port)
    for name, its_address in known.items():
        if its_address == address:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    return address


def run_agent(job: Job, options: api.LaunchConfig, command: list[str]) -> int:
    """Run this node's workers to the end of the job; its exit code, the same on every node."""
    api.LocalElasticAgent = functools.partial(Agent, job)
    # torch 2.13 keeps the workers' store for the next start, whose workers read the addresses of the dead ones in it.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    try:
        api.elastic_launch(options, sys.executable)(*command)
        return EXIT_DONE
    except Ended as error:
        say(str(error))
        return error.code
    except SignalException as error:
        say(f"stopped by {error.sigval.name}")
        return stopped_code(job)
    except (RendezvousError, dist.DistError) as error:
        return lost_code(job, options, error)


def stopped_code(job: Job) -> int:
    """75, unless the workers had failed, or were done, before the signal."""
    record = job.record()
    return record["code"] if record else EXIT_REQUEUE


def lost_code(job: Job, options: api.LaunchConfig, error: Exception) -> int:
    """What the nodes that ended first say of the job; 75 where they said nothing."""
    record = job.record()
    if record and (record["code"] != EXIT_REQUEUE or isinstance(error, RendezvousClosedError)):
        say(record["message"] or "the run is done")
        return record["code"]
    if isinstance(error, RendezvousTimeoutError):
        say(f"fewer than {job.min_nodes} nodes came within {options.rdzv_configs['join_timeout']} s")
    else:
        say(f"the rendezvous at {options.rdzv_endpoint} is gone: the first node died, or the job has ended there "
            f"({type(error).__name__})")
    return EXIT_REQUEUE


def stop_at_eof() -> None:
    while os.read(0, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def stop(number: int, frame: object) -> None:
    """Before there are workers; torch's own handler takes over with them."""
    raise SignalException("stopped", sigval=signal.Signals(number))


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(sys.argv[1:] if argv is None else argv)
    for name in STOP_SIGNALS.split(","):
        signal.signal(getattr(signal, name), stop)
    if args.stop_at_eof:
        threading.Thread(target=stop_at_eof, daemon=True).start()
    try:
        code = launch(args)
    except ActionableError as error:
        say(str(error))
        code = error.exit_code
    except Ended as error:
        say(str(error))
        code = error.code
    except SignalException as error:
        say(f"stopped by {error.sigval.name} before the workers were up")
        code = EXIT_REQUEUE
    return args.retry_code if code == EXIT_REQUEUE else code


if __name__ == "__main__":
    sys.exit(main())
