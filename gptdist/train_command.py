"""`gptdist train` and `gptdist finetune`: one worker process, from its command line to its exit code."""

import sys
import traceback

import torch

from gptdist import config as config_module
from gptdist.config import Config
from gptdist.errors import EXIT_BUG, EXIT_USER, ActionableError, UserError
from gptdist.faults import read_exit_record, write_exit_record
from gptdist.parallel.world import end_process, env_rank, env_world_size, init_world
from gptdist.trainer import Trainer

OUT_OF_MEMORY = ("out of memory: use a smaller train.micro_batch or model, train.activation_checkpointing=full, "
                 "or more processes with parallel.strategy=fsdp")


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
            return error.exit_code
        raise
    code, message = _run(config, command, debug)
    write_exit_record(config.run.dir, code=code, rank=rank, message=message)
    end_process(code)
    return code


def _run(config: Config, command: str, debug: bool) -> tuple[int, str]:
    """(exit code, one line about it). Errors are reported here, because the process may end without unwinding."""
    try:
        return Trainer(config, init_world(config.parallel)).run(), ""
    except ActionableError as error:
        if debug:
            traceback.print_exc()
        where = f" [rank {env_rank()}]" if env_world_size() > 1 and not error.agreed else ""
        if env_rank() == 0 or not error.agreed:
            print(f"gptdist {command}{where}: {error}", file=sys.stderr)
        return error.exit_code, str(error)
    except Exception as error:
        if _is_out_of_memory(error):
            print(f"gptdist {command} [rank {env_rank()}]: {OUT_OF_MEMORY}", file=sys.stderr)
            return EXIT_USER, OUT_OF_MEMORY
        cause = read_exit_record(config.run.dir)
        if cause is not None and not debug:
            # A rank that fails takes the others' connections down with it: theirs is not the error to show.
            return cause["code"], cause["message"]
        traceback.print_exc()
        return EXIT_BUG, f"{type(error).__name__}: {error}"


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
