"""`gptdist train` and `gptdist finetune`: one worker process, from its command line to its exit code."""

import contextlib
import re
import secrets
import sys
import time
import traceback

import torch
import torch.distributed as dist

from gptdist import config as config_module
from gptdist.checkpoint.ranks import Ranks
from gptdist.cluster import meet
from gptdist.config import Config
from gptdist.errors import EXIT_BUG, EXIT_REQUEUE, EXIT_USER, ActionableError, LockedError, MissingError, UserError
from gptdist.faults import ExitRecord
from gptdist.faults.heartbeat import Heartbeat
from gptdist.faults.watchdog import Watchdog, positions
from gptdist.parallel.host import set_up_process
from gptdist.parallel.world import end_process, env_rank, env_world_size, init_world
from gptdist.trainer import Trainer

OUT_OF_MEMORY = ("out of memory: use a smaller train.micro_batch or model, train.activation_checkpointing=full, "
                 "or more processes with parallel.strategy=fsdp")
# How long the other ranks stay after an error that a user can mend: launchers end the main rank, which says and records
# it too, when one of them is gone.
MAIN_RANK_FIRST_S = 2
LOST_RANK = ("the connection to another rank is gone: it died or was killed (out of memory?): "
             "start again to go on from the last checkpoint")
# What gloo's, NCCL's and the store's errors say of a rank that is gone, and of one that does not answer.
_LOST = re.compile(r"Connection (closed|reset) by peer|Broken pipe|remote process exited|got 0 bytes")
_LATE = re.compile(r"Timed out waiting \d+ms|[Cc]ollective operation timeout")
LATE_RANK = ("a collective did not end within parallel.timeout_s, another rank hangs or has left: start again to go on "
             "from the last checkpoint")


def train(path: str, overrides: list[str], *, command: str = "train", debug: bool = False) -> int:
    """Train as the configuration says. Does not return where a process group is up (see end_process).

    command: `train` runs any task; `finetune` refuses pretraining, which a forgotten task.name would mean.
    """
    try:
        config, fault = _load(path, overrides, command), None
    except UserError as error:
        if env_world_size() == 1:
            raise
        config, fault = None, error  # the other ranks have to hear of it
    rank = env_rank()
    record, beat = ExitRecord(config.run.dir, rank) if config is not None else None, Heartbeat(rank)
    with contextlib.ExitStack() as held:
        held.callback(beat.close)
        code, message = _run(config, fault, record, beat, held, command, debug)
        if message is not None and record is not None:
            record.write(code, message)
        beat.enter("end")
        if rank != 0 and code in (EXIT_USER, MissingError.exit_code):
            time.sleep(MAIN_RANK_FIRST_S)
        _end(code, record, command)
    return code


def _load(path: str, overrides: list[str], command: str) -> Config:
    config = config_module.load(path, overrides)
    if command == "finetune" and not config.is_finetuning:
        raise UserError(f"{path} has task.name=pretrain: set task.name to classify, instruct or dpo, or pretrain "
                        f"with `gptdist train {path}`")
    return config


def _end(code: int, record: ExitRecord | None, command: str) -> None:
    """End the process. A rank that dies now, all work being done, is for the launcher to see."""
    try:
        end_process(code)
    except RuntimeError as error:
        lost = _lost_a_rank(error)
        if lost is None:
            raise
        print(f"gptdist {command} [rank {env_rank()}]: {lost}", file=sys.stderr)
        if record is not None:
            record.write(EXIT_REQUEUE, lost)
        end_process(EXIT_REQUEUE)


def _run(config: Config | None, fault: UserError | None, record: ExitRecord | None, beat: Heartbeat,
         held: contextlib.ExitStack, command: str, debug: bool) -> tuple[int, str | None]:
    """(exit code, one line about it; None: nothing to record, the run directory is another run's).

    fault: why there is no configuration, and no record. Errors are reported here, because the process may end without
    unwinding. held: what stays until then.
    """
    try:
        meet(config, fault)
        world = init_world(config.parallel)
        set_up_process(world.device)
        beat.start = Ranks(None).on_coordinator(lambda: secrets.token_hex(8))
        record.agree(beat.start)
        held.enter_context(Watchdog(beat, config.run.dir, world.size, record, timeout_s=config.run.hang_timeout_s,
                                    start_up_s=config.parallel.timeout_s, command=command))
        return Trainer(config, world, beat).run(), ""
    except ActionableError as error:
        if debug:
            traceback.print_exc()
        where = f" [rank {env_rank()}]" if env_world_size() > 1 and not error.agreed else ""
        if env_rank() == 0 or not error.agreed:
            print(f"gptdist {command}{where}: {error}", file=sys.stderr, flush=True)
        return error.exit_code, None if isinstance(error, LockedError) else str(error)
    except Exception as error:
        if _is_out_of_memory(error):
            print(f"gptdist {command} [rank {env_rank()}]: {OUT_OF_MEMORY}", file=sys.stderr)
            return EXIT_USER, OUT_OF_MEMORY
        cause = record.failure() if record is not None else None
        if cause is not None and not debug:
            # A rank that fails takes the others' connections down with it: theirs is not the error to show.
            if env_rank() == 0:
                print(f"gptdist {command}: stopped, because rank {cause['rank']} failed: {cause['message']}",
                      file=sys.stderr)
            return cause["code"], cause["message"]
        if (lost := _lost_a_rank(error)) and not debug:
            print(f"gptdist {command} [rank {env_rank()}]: {lost}", file=sys.stderr)
            return EXIT_REQUEUE, lost
        traceback.print_exc()
        if env_world_size() > 1 and config is not None:
            where = positions(config.run.dir, env_world_size(), beat.start)
            print(f"gptdist {command} [rank {env_rank()}]: where the ranks were: {where}", file=sys.stderr)
        return EXIT_BUG, f"{type(error).__name__}: {error}"


def _lost_a_rank(error: Exception) -> str | None:
    """What to say where the error is another rank's end."""
    if not dist.is_initialized() or not isinstance(error, RuntimeError):
        return None
    return LOST_RANK if _LOST.search(str(error)) else LATE_RANK if _LATE.search(str(error)) else None


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
