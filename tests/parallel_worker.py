"""Started by torchrun once per world size: runs every distributed case in one process group.

Usage: torchrun --nproc-per-node W tests/parallel_worker.py DATA OUT CHAIN_STOP CHAIN_STRATEGY
"""

import sys
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import gptdist.parallel.init as parallel_init  # noqa: E402
from gptdist import config as config_module  # noqa: E402
from gptdist.model import build_meta  # noqa: E402
from gptdist.parallel.strategies import make_strategy  # noqa: E402
from gptdist.parallel.world import init_world  # noqa: E402
from tests.training import run_tiny, run_worker  # noqa: E402

MUON = ["--optim.name=muon", "--model.n_kv_heads=2"]
CASES = {
    "ddp": ["--parallel.strategy=ddp"],
    "fsdp": ["--parallel.strategy=fsdp", "--eval.prompt=The"],
    "fsdp-dropout": ["--parallel.strategy=fsdp", "--model.dropout=0.1"],
    "ddp-dropout": ["--parallel.strategy=ddp", "--model.dropout=0.1"],
    "fsdp-untied-rope-gqa": ["--parallel.strategy=fsdp", "--model.tied=false", "--model.positions=rope",
                             "--model.n_kv_heads=2", "--train.activation_checkpointing=full"],
    "fsdp-masked": ["--parallel.strategy=fsdp", "--data.path={masked}"],
    "ddp-masked": ["--parallel.strategy=ddp", "--data.path={masked}"],
    "ddp-muon": ["--parallel.strategy=ddp", *MUON],
    "fsdp-muon": ["--parallel.strategy=fsdp", *MUON],
    "hsdp-muon": ["--parallel.strategy=hsdp", "--parallel.replicas=2", *MUON],
    "fsdp-muon-lora": ["--parallel.strategy=fsdp", *MUON, "--lora.rank=4", "--lora.split_qkv=true"],
    "fsdp-bf16": ["--parallel.strategy=fsdp", "--train.precision=bf16"],
}
# Not at every world size. 3: ranks that have nothing of an adapter's A; 4: shards and replicas.
ONLY_AT = {"ddp-muon": (2,), "fsdp-muon": (2, 4), "hsdp-muon": (4,), "fsdp-muon-lora": (3,), "ddp-dropout": (2, 3),
           "ddp-masked": (2, 3), "fsdp-masked": (3, 4)}
RESUMED = ["fsdp-dropout", "fsdp-muon"]
CHAINS = {"chain": [], "chain-muon": MUON}


def cases_of(world: int) -> list[str]:
    """The cases that run at a world size."""
    return [name for name in CASES if world in ONLY_AT.get(name, (world,))]


def resumed_at(world: int) -> list[str]:
    return [name for name in RESUMED if name in cases_of(world)]


def case_options(name: str, out: Path) -> list[str]:
    """The overrides of a case. {masked}: a dataset most of whose targets count for nothing."""
    return [option.format(masked=out / "masked") for option in CASES[name]]


def main(data: Path, out: Path, chain_stop: int, chain_strategy: str) -> None:
    world = int(dist_world())
    for name in cases_of(world):
        run_tiny(data, out / f"{name}-{world}", *case_options(name, out), "--data.workers=2")
    # Resume at the same world size, here bit for bit.
    for name in resumed_at(world):
        run_tiny(data, out / f"{name}-resumed-{world}", *CASES[name], "--train.stop_at=9")
        run_tiny(data, out / f"{name}-resumed-{world}", *CASES[name])
    # The chains: each one run that goes on at every world size in turn.
    for name, options in CHAINS.items():
        run_tiny(data, out / name, *options, f"--parallel.strategy={chain_strategy}", f"--train.stop_at={chain_stop}")
    check_no_rank_holds_the_model(out, world)
    check_tied_after_sharding(out)


def dist_world() -> int:
    import os

    return int(os.environ["WORLD_SIZE"])


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


if __name__ == "__main__":
    run_worker(main, Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
