"""gptdist doctor --distributed: every rank of a launch beside the others, their clocks, and the rates between them.

It runs under the launcher that will train, takes seconds, and exits with 2 where a run would fail: a rank that is not
like the others, data that one of them cannot see, clocks that are apart.
"""

import contextlib
import dataclasses
import json as jsonlib
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from gptdist import config as config_module
from gptdist.cluster import Facts, check_batch, differences, facts_of, faults_of, who
from gptdist.config import Config, ParallelConfig
from gptdist.data.loader import rank_share
from gptdist.errors import EXIT_DONE, EXIT_USER, ActionableError, LostError, MissingError, UserError
from gptdist.parallel.measure import Rate, clock_offsets, rates
from gptdist.parallel.meeting import open_store, roll_call
from gptdist.parallel.world import choose_device, env_rank, env_world_size, join

TIMEOUT_S = 60  # for all ranks to start, and for a collective
PRINTED = "gptdist/doctor/printed"  # a key of the store
CLOCK_LIMIT_S = 2.0  # exit.json and logs of different hosts are put in order by their clocks


def run(path: str | None, overrides: list[str], *, json: bool = False) -> int:
    """Print what there is to see, on rank 0; the exit code, the same on every rank."""
    config, fault = _load(path, overrides)
    rank, size = env_rank(), env_world_size()
    found: dict[str, Any] = {}

    def judge(everyone: list[Facts]) -> dict[str, Any]:
        """Where some rank cannot begin, there is nothing to measure; said before the first process ends."""
        found.update(ranks=everyone, clock=[], rates=[], faults=_faults(everyone, config, size))
        cannot = faults_of(everyone)
        if cannot:
            _print(found, json)
        missing = any(kind == MissingError.__name__ for _, kind, _ in cannot)
        code = MissingError.exit_code if missing else EXIT_USER if found["faults"] else EXIT_DONE
        return {"begin": not cannot, "code": code}

    verdict = roll_call(facts_of(config, fault, thorough=True), judge, rank=rank, size=size, timeout_s=TIMEOUT_S)
    if not verdict["begin"]:
        return verdict["code"]
    return _measure(found, (config.parallel if config else ParallelConfig()).device, verdict["code"], json)


def _load(path: str | None, overrides: list[str]) -> tuple[Config | None, ActionableError | None]:
    if path is None:
        return None, None
    try:
        return config_module.load(path, overrides), None
    except UserError as error:
        return None, error


def _measure(found: dict[str, Any], wanted: str, code: int, json: bool) -> int:
    """Add the clocks and rates, print all, agree on the code; a collective call."""
    rank, size = env_rank(), env_world_size()
    if size > 1:
        try:
            device = choose_device(wanted)
            join(device, rank, size, TIMEOUT_S)
            clock, measured = clock_offsets(), rates(device)
        except (LostError, RuntimeError) as error:  # of gloo and NCCL
            return _apart(found, error, json)
        if rank == 0:
            found |= {"clock": clock, "rates": [dataclasses.asdict(rate) for rate in measured]}
            found["faults"] += _clock_faults(found["ranks"], clock)
    if rank == 0:
        _print(found, json)
        code = code or (EXIT_USER if found["faults"] else EXIT_DONE)
    if size > 1:
        everywhere = torch.tensor([code])
        dist.broadcast(everywhere, src=0)  # after rank 0 has printed: a launcher ends the others with the first
        code = int(everywhere)
    return code


def _apart(found: dict[str, Any], error: Exception, json: bool) -> int:
    """Print what there is where the ranks met in the store, but lose each other; the exit code."""
    rank = env_rank()
    store = open_store(rank, env_world_size(), TIMEOUT_S)
    if rank == 0:
        reason = " ".join(str(error).split())[:200]
        found["faults"].append(f"the ranks meet at MASTER_ADDR, but no collective works between them ({reason}): see "
                               f"that none has died, that GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name the network "
                               f"that joins the nodes, and that no firewall closes its ports")
        _print(found, json)
        store.set(PRINTED, "")
    else:
        with contextlib.suppress(dist.DistStoreError, dist.DistNetworkError):  # rank 0 is what has died
            store.wait([PRINTED], timedelta(seconds=TIMEOUT_S))  # a launcher ends the others with the first
    return EXIT_USER


def _faults(everyone: list[Facts], config: Config | None, size: int) -> list[str]:
    found = [f"{who(facts)}: {text}" for facts, _, text in faults_of(everyone)] + differences(everyone)
    for place, (name, (identity, problem)) in enumerate(everyone[0]["data"].items()):  # others may have it elsewhere
        theirs = [one for facts in everyone for one, _ in list(facts["data"].values())[place:place + 1]]
        if not identity and not any(theirs):
            found.append(f"no rank can read {name}: {problem}")
    if config is not None:
        found += [str(error) for error in [_attempt(lambda: check_batch(config, size))] if error]
    return found


def _attempt(check: Callable[[], None]) -> UserError | None:
    try:
        check()
    except UserError as error:
        return error
    return None


def _clock_faults(everyone: list[Facts], clock: list[tuple[float, float]]) -> list[str]:
    return [f"the clock of {who(facts)} is {abs(offset):.3f} s {'ahead of' if offset > 0 else 'behind'} that of "
            f"{who(everyone[0])}: set both by NTP" for facts, (offset, wrong) in zip(everyone, clock, strict=True)
            if abs(offset) - wrong > CLOCK_LIMIT_S]


# What is printed


def _print(found: dict[str, Any], json: bool) -> None:
    if json:
        print(jsonlib.dumps(found, indent=2), flush=True)
        return
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if os.isatty(1) else 180, highlight=False)
    columns = ("rank", "host", "device", "python", "torch", "gptdist", "deepspeed", "CUDA, NCCL", "clock", "batch",
               "data")
    table = Table(*columns, title=f"gptdist doctor --distributed: {len(found['ranks'])} ranks")
    for facts in found["ranks"]:
        table.add_row(*_row(facts, found["clock"], len(found["ranks"])))
    console.print(table)
    if found["rates"]:
        table = Table("collective", "bytes", "median of 5", "bus bandwidth", title="between all ranks, fp32")
        for rate in found["rates"]:
            table.add_row(*_rate_row(Rate(**rate)))
        console.print(table)
        console.print(ALGORITHMS)
    elif len(found["ranks"]) == 1:
        console.print("one process: start it with the launcher and the number of processes that will train")
    for fault in found["faults"]:
        console.print(f"fault: {fault}", soft_wrap=True, markup=False)
    if not found["faults"]:
        console.print("all right: every rank is like rank 0")
    sys.stdout.flush()  # before another rank ends, and with it the launcher this one


ALGORITHMS = ("Bus bandwidth is bytes x 2 (n - 1) / n over seconds for an all-reduce, x (n - 1) / n for an all-gather, "
              "as nccl-tests reckons it;\ngloo sends both around a ring, NCCL chooses ring, tree or NVLS "
              "(NCCL_ALGO). Seconds are the slowest rank's.")


def _row(facts: Facts, clock: list[tuple[float, float]], size: int) -> list[str]:
    same = facts["same"]
    offset, wrong = clock[facts["rank"]] if clock else (None, None)
    data = "\n".join(identity or f"cannot be read: {problem}" for identity, problem in facts["data"].values())
    return [str(facts["rank"]), facts["host"], facts["device"], same["python"], same["torch"],
            f"{same['gptdist']} {same['code'][:8]}", same["deepspeed"] or "none",
            f"{same['cuda'] or 'none'}, {same['nccl'] or 'none'}",
            "" if offset is None else f"{offset * 1000:+.2f} ± {wrong * 1000:.2f} ms", _share(facts, size), data]


def _share(facts: Facts, size: int) -> str:
    """Sequences of a step that are this rank's."""
    if facts["config"] is None:
        return ""
    values = facts["config"]
    sequences = (values["train.batch"] if values["task.name"] != "pretrain"
                 else values["train.tokens_per_step"] // values["model.context"])
    tensor = values["parallel.tensor"]
    start, stop = rank_share(sequences, facts["rank"] // tensor, max(1, size // tensor))
    return f"{stop - start} of {sequences}"


def _rate_row(rate: Rate) -> list[str]:
    return [rate.op.replace("_", "-"), f"{rate.size_bytes:,}", f"{rate.seconds * 1000:.2f} ms",
            f"{rate.bus_bytes_per_s / 1e9:.3f} GB/s"]
