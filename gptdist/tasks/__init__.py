"""What can be learned, a module a task; trainer.py runs any of them by the protocol of task.Task."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gptdist.config import Config
    from gptdist.parallel.world import World
    from gptdist.tasks.task import Task

# task.name -> (module, class); imported when used.
TASKS = {
    "pretrain": ("gptdist.tasks.pretrain", "Pretrain"),
    "classify": ("gptdist.tasks.classify", "Classify"),
    "instruct": ("gptdist.tasks.instruct", "Instruct"),
    "dpo": ("gptdist.tasks.dpo", "Dpo"),
}


def make_task(config: "Config", world: "World") -> "Task":
    """The task that the configuration names, its data read. Raises UserError for data it cannot use."""
    module, name = TASKS[config.task.name]
    return getattr(importlib.import_module(module), name)(config, world)
