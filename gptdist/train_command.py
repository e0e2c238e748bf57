"""`gptdist train` and `gptdist finetune`: one worker process, from its command line to its exit code."""

import re
import secrets
import sys
import time
import traceback

import torch
import torch.distributed as dist

from gptdist import config as config_module
from gptdist.checkpoint.ranks import Ranks
from gptdist.config import Config
from gptdist.errors import EXIT_BUG, EXIT_REQUEUE, EXIT_USER, ActionableError, LockedError, UserError
from gptdist.faults import ExitRecord
from gptdist.parallel.host import set_up_process
from gptdist.parallel.world import end_process, env_rank, env_world_size, init_world
from gptdist.trainer import Trainer

OUT_OF_MEMORY = ("out of memory: use a smaller train.micro_batch or model, train.activation_checkpointing=full, "
                 "or more processes with parallel.strategy=fsdp")
# How long the other ranks stay after an error that the main rank prints: launchers end it when one of them is gone.
MAIN_RANK_FIRST_S = 2
LOST_RANK = ("the connection to another rank is gone: it died or was killed (out of memory?): "
             "start again to go on from the last checkpoint")
# What gloo's and NCCL's errors say of it.
_LOST = re.compile(r"Connection (closed|reset) by peer|Broken pipe|remote process exited")


def train(path: str, overrides: list[str], *, command: str = "train", debug: bool = False) -> int:
    """Train as the configuration says. Does not return where a process group is up (see end_process).

    command: `train` runs any task; `finetune` refuses pretraining, which a forgotten task.name would mean.
    """
    rank = env_rank()
    try:
        config = config_module.load(path, overrides)
        if command == "finetune" and not config.is_finetuning:
            raise UserError(f"{path} has task.name=pretrain: set task.name to classify, instruct or dpo, or pretrain "
                            f"with `gptdist train {path}`")
    except UserError as error:
        # Every rank reads the same file and finds the same fault: one of them says so.
        if rank != 0:
            time.sleep(MAIN_RANK_FIRST_S)
            return error.exit_code
        raise
    record = ExitRecord(config.run.dir, rank)
    code, message = _run(config, record, command, debug)
    if message is not None:
        record.write(code, message)
    end_process(code)
    return code


def _run(config: Config, record: ExitRecord, command: str, debug: bool) -> tuple[int, str | None]:
    """(exit code, one line about it; None: nothing to record, the run directory is another run's).

    Errors are reported here, because the process may end without unwinding.
    """
    try:
        world = init_world(config.parallel)
        set_up_process(world.device)
        record.agree(Ranks(None).on_coordinator(lambda: secrets.token_hex(8)))
        return Trainer(config, world).run(), ""
    except ActionableError as error:
        if debug:
            traceback.print_exc()
        where = f" [rank {env_rank()}]" if env_world_size() > 1 and not error.agreed else ""
        if env_rank() == 0 or not error.agreed:
            print(f"gptdist {command}{where}: {error}", file=sys.stderr)
        else:
            time.sleep(MAIN_RANK_FIRST_S)
        return error.exit_code, None if isinstance(error, LockedError) else str(error)
    except Exception as error:
        if _is_out_of_memory(error):
            print(f"gptdist {command} [rank {env_rank()}]: {OUT_OF_MEMORY}", file=sys.stderr)
            return EXIT_USER, OUT_OF_MEMORY
        cause = record.failure()
        if cause is not None and not debug:
            # A rank that fails takes the others' connections down with it: theirs is not the error to show.
            if env_rank() == 0:
                print(f"gptdist {command}: stopped, because rank {cause['rank']} failed: {cause['message']}",
                      file=sys.stderr)
            return cause["code"], cause["message"]
        if _lost_a_rank(error) and not debug:
            print(f"gptdist {command} [rank {env_rank()}]: {LOST_RANK}", file=sys.stderr)
            return EXIT_REQUEUE, LOST_RANK
        traceback.print_exc()
        return EXIT_BUG, f"{type(error).__name__}: {error}"


def _lost_a_rank(error: Exception) -> bool:
    return dist.is_initialized() and isinstance(error, RuntimeError) and _LOST.search(str(error)) is not None


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
