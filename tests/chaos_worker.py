"""A job of two processes (conftest.Workers): the undisturbed run of the chaos test."""

from pathlib import Path

from benchmarks import chaos
from gptdist import config as config_module
from gptdist.parallel.host import set_up_process
from gptdist.parallel.world import init_world
from gptdist.trainer import Trainer

KILLS = 4


def main(data: Path, out: Path) -> None:
    config = config_module.load(str(chaos.write_config(data, out / "chaos", "fsdp", chaos.steps_of(KILLS))), [])
    world = init_world(config.parallel)
    set_up_process(world.device)
    assert Trainer(config, world).run() == 0
