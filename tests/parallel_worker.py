"""In every rank of a world of each size (tests/ranks.py): every distributed case in one process group."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import gptdist.parallel.init as parallel_init
from gptdist import config as config_module
from gptdist.checkpoint import layout
from gptdist.model import build_meta
from gptdist.parallel.strategies import make_strategy
from gptdist.parallel.world import env_world_size, init_world
from tests.training import run_tiny

MUON = ["--optim.name=muon", "--model.n_kv_heads=2"]
# What one process computes, to be compared with. {masked}: a dataset most of whose targets count for nothing.
REFERENCES = {
    "plain": [],
    "dropout": ["--model.dropout=0.1"],
    "untied": ["--model.tied=false", "--model.positions=rope", "--model.n_kv_heads=2",
               "--train.activation_checkpointing=full"],
    "masked": ["--data.path={masked}"],
    "muon": MUON,
    "muon-lora": [*MUON, "--lora.rank=4", "--lora.split_qkv=true"],
}


class Case(NamedTuple):
    """A reference, how it is divided, the world sizes at which it is, and further ones of the long test."""

    reference: str
    overrides: list[str]
    worlds: tuple[int, ...]
    long: tuple[int, ...] = ()


DDP, FSDP = ["--parallel.strategy=ddp"], ["--parallel.strategy=fsdp"]
HSDP = ["--parallel.strategy=hsdp", "--parallel.replicas=2"]
SHORT = ["--train.stop_at=10"]
PROMPT = "--eval.prompt=The"
# 3: uneven shards, and ranks that have nothing of an adapter's A; 4: shards and replicas.
CASES = {
    "ddp": Case("dropout", DDP, (1, 2, 3, 4)),
    "fsdp": Case("dropout", [*FSDP, PROMPT, "--checkpoint.every=9", "--checkpoint.keep_last=4"], (1, 2, 3, 4)),
    "fsdp-untied": Case("untied", [*FSDP, *SHORT], (3,), (1, 2, 4)),
    "ddp-masked": Case("masked", [*DDP, *SHORT], (3,), (2,)),
    "fsdp-masked": Case("masked", [*FSDP, *SHORT], (4,), (3,)),
    "ddp-muon": Case("muon", [*DDP, *SHORT], (2,)),
    "fsdp-muon": Case("muon", [*FSDP, *SHORT, "--checkpoint.every=5"], (2,), (4,)),
    "hsdp-muon": Case("muon", [*HSDP, *SHORT], (4,)),
    "fsdp-muon-lora": Case("muon-lora", [*FSDP, *SHORT], (3,)),
    "fsdp-bf16": Case("plain", [*FSDP, *SHORT, "--train.precision=bf16"], (1, 4), (2, 3)),
}
RESUMED = {"fsdp": 9, "fsdp-muon": 5}  # from the checkpoint of which step
CHAINS = {"chain": "dropout", "chain-muon": "muon"}
MICRO_BATCH = {1: 6, 2: 3, 3: 2, 4: 2}  # two of them a step, so that gradients accumulate


def cases_of(world: int, long: bool = False) -> list[str]:
    """The cases that run at a world size."""
    return [name for name, case in CASES.items() if world in (case.long if long else case.worlds)]


def resumed_at(world: int, long: bool = False) -> list[str]:
    return [name for name in cases_of(world, long) if name in RESUMED]


def reference_options(name: str, out: Path) -> list[str]:
    return [option.format(masked=out / "masked") for option in REFERENCES[name]]


def case_options(name: str, out: Path, world: int) -> list[str]:
    """The overrides of a case."""
    case = CASES[name]
    return [*reference_options(case.reference, out), *case.overrides, f"--train.micro_batch={MICRO_BATCH[world]}",
            "--data.workers=2"]


def run_cases(data: Path, out: Path, world: int, long: bool) -> None:
    for name in cases_of(world, long):
        run_tiny(data, out / f"{name}-{world}", *case_options(name, out, world))
    # Resume at the same world size, here bit for bit.
    for name in resumed_at(world, long):
        saved = out / f"{name}-{world}" / "checkpoints" / layout.step_name(RESUMED[name])
        run_tiny(data, out / f"{name}-resumed-{world}", *case_options(name, out, world), f"--checkpoint.resume={saved}",
                 "--eval.every=0", "--eval.prompt=")


def main(data: Path, out: Path, chain_stop: int, chain_strategy: str) -> None:
    world = env_world_size()
    run_cases(data, out, world, long=False)
    # The chains: each one run that goes on at every world size in turn.
    for name, reference in CHAINS.items():
        run_tiny(data, out / name, *reference_options(reference, out), f"--parallel.strategy={chain_strategy}",
                 f"--train.stop_at={chain_stop}", f"--train.micro_batch={MICRO_BATCH[world]}")
    check_no_rank_holds_the_model(out, world)
    check_tied_after_sharding(out)


def long_cases(data: Path, out: Path) -> None:
    run_cases(data, out, env_world_size(), long=True)


class LargestTensor(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in torch.utils._pytree.tree_leaves(result):
            if isinstance(value, torch.Tensor) and value.device.type != "meta" and type(value) is torch.Tensor:
                self.numel = max(self.numel, value.untyped_storage().size() // max(1, value.element_size()))
        return result


def check_no_rank_holds_the_model(out: Path, world: int) -> None:
    """Preparing a model makes no tensor larger than a shard of its largest parameter plus a bounded buffer."""
    config = config_module.load(None, ["--model.vocab_size=65536", "--model.width=64", "--parallel.strategy=fsdp",
                                       f"--run.dir={out}/memory", "--model.n_layers=1"])
    parallel_init.BUFFER_VALUES = buffer = 1 << 16
    strategy = make_strategy(init_world(config.parallel), config)
    with LargestTensor() as largest:
        strategy.prepare(build_meta(config.model), None)
    shard = -(-65536 * 64 // world)
    assert largest.numel <= shard + 2 * buffer, f"a tensor of {largest.numel} values was made, the shard has {shard}"
    local = sum(p.to_local().numel() for p in strategy.model.parameters())
    total = sum(p.numel() for p in strategy.model.parameters())
    assert local <= total / world * 1.1 + 64 * world


def check_tied_after_sharding(out: Path) -> None:
    config = config_module.load(None, ["--model.vocab_size=300", "--parallel.strategy=fsdp", f"--run.dir={out}/tied"])
    strategy = make_strategy(init_world(config.parallel), config)
    strategy.prepare(build_meta(config.model), None)
    assert strategy.model.head_weight is strategy.model.wte.weight
    assert not any(name.startswith("model.head") for name in strategy.model_state())
