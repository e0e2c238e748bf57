"""In every rank of a world of 2 and of 4 (tests/ranks.py): every tensor-parallel case in one process group."""

import math
import os
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard

from gptdist.errors import UserError
from gptdist.model import build_meta, initial_values
from gptdist.parallel.strategies import Strategy, make_strategy
from gptdist.parallel.world import World, env_world_size, init_world
from tests.training import run_tiny, tiny_config

# Every model accumulates over uneven micro-batches and clips (see TINY). The chain's has parts that FSDP2 cuts
# unevenly: 37 hidden units and 129 token ids per tensor-parallel rank of 2.
COMMON = ["--train.micro_batch=6", "--eval.every=0"]
MODELS = {
    "tied": [*COMMON, "--model.dropout=0.1"],
    "untied": [*COMMON, "--model.dropout=0.1", "--model.tied=false", "--model.positions=rope", "--model.n_heads=8",
               "--model.n_kv_heads=4", "--train.activation_checkpointing=full", "--data.document_mask=true"],
    "chain": [*COMMON, "--model.dropout=0.1", "--model.mlp_ratio=2.3125", "--model.vocab_multiple=2"],
    "plain": COMMON,
}
SHORT = ["--train.stop_at=8"]
FSDP = ["--parallel.strategy=fsdp"]
TP2, TP4 = [*FSDP, "--parallel.tensor=2"], [*FSDP, "--parallel.tensor=4"]
TP2_DP2 = [*TP2, "--train.micro_batch=4"]
HSDP = ["--parallel.strategy=hsdp", "--parallel.replicas=2", "--parallel.tensor=2"]
# World size -> run: (model, how it is divided).
RUNS = {
    2: {"tied-tp2": ("tied", TP2), "untied-tp2": ("untied", [*TP2, *SHORT]),
        "bf16-tp2": ("plain", [*TP2, "--train.precision=bf16", *SHORT])},
    4: {"tied-tp2-dp2": ("tied", TP2_DP2), "untied-tp2-dp2": ("untied", [*TP2_DP2, *SHORT]),
        "tied-tp4": ("tied", [*TP4, *SHORT]), "untied-tp4": ("untied", [*TP4, *SHORT]),
        "tied-tp2-hsdp": ("tied", [*HSDP, *SHORT])},
}
LONG = {  # of the long test, all 20 steps
    2: {"tied-compiled": ("tied", [*TP2, "--train.compile=true"]), "untied-tp2-long": ("untied", TP2)},
    4: {"untied-tp2-dp2-long": ("untied", TP2_DP2), "tied-tp4-long": ("tied", TP4), "untied-tp4-long": ("untied", TP4)},
}
# One run goes on as: single to step 5, then these at worlds 2 and 4, then single to step 20.
CHAIN = {2: [(TP2, 9), (FSDP, 12)], 4: [(TP2, 16)]}


def run_cases(data: Path, out: Path, runs: dict[int, dict[str, tuple[str, list[str]]]]) -> None:
    for name, (model, division) in runs[env_world_size()].items():
        run_tiny(data, out / name, *MODELS[model], *division)


def long_cases(data: Path, out: Path) -> None:
    os.environ.pop("TORCHDYNAMO_DISABLE")  # which tests/ranks.py sets
    torch._dynamo.config.disable = False
    run_cases(data, out, LONG)


def main(data: Path, out: Path) -> None:
    world = env_world_size()
    for tensor in sorted({2, world}):
        check_parameters(data, out, tensor)
    check_refusals(data, out)
    run_cases(data, out, RUNS)
    check_sum()
    for division, stop in CHAIN[world]:
        run_tiny(data, out / "chain", *MODELS["chain"], *division, f"--train.stop_at={stop}")


def prepare(data: Path, out: Path, *options: str) -> Strategy:
    config = tiny_config(data, out / "prepared", *options)
    strategy = make_strategy(init_world(config.parallel), config)
    strategy.prepare(build_meta(config.model), None)
    return strategy


def check_parameters(data: Path, out: Path, tensor: int) -> None:
    """Every parameter has its initial values whatever divides it, uneven parts included, and each rank just its own."""
    strategy = prepare(data, out, f"--parallel.tensor={tensor}", *FSDP, "--model.width=20",
                       f"--model.mlp_ratio={0.75 * tensor}", f"--model.vocab_size={151 * tensor - 3}",
                       f"--model.vocab_multiple={151 * tensor}")
    config, mesh = strategy.config, strategy.world.mesh
    for name, parameter in strategy.model.named_parameters():
        shape = tuple(parameter.shape)
        expected = initial_values(name, shape, 0, parameter.numel(), n_layers=config.model.n_layers,
                                  seed=config.run.seed).view(shape)
        assert torch.equal(parameter.full_tensor(), expected), name
        assert parameter.placements[-1] == expected_placement(name), name
        ranks = mesh["dp_shard"].size() * (1 if parameter.placements[-1].is_replicate() else tensor)
        row = math.prod(parameter.to_local().shape[1:])
        assert parameter.to_local().numel() <= parameter.numel() / ranks + row, name


def expected_placement(name: str):
    if name.endswith(("attn.proj.weight", "mlp.proj.weight")):
        return Shard(1)
    divided = ("wte.weight", "qkv.weight", "qkv.bias", "fc.weight", "fc.bias")
    return Shard(0) if name.endswith(divided) else Replicate()


def check_refusals(data: Path, out: Path) -> None:
    config = tiny_config(data, out / "refused", *FSDP, "--parallel.tensor=8", "--model.n_heads=8")
    with pytest.raises(UserError, match=r"parallel\.tensor=8 does not divide the . processes"):
        init_world(config.parallel)


def check_sum() -> None:
    """Sums count a tensor-parallel group once; a signal that one rank of it received counts."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    world = World(rank, size, torch.device("cpu"), "fsdp", init_device_mesh("cpu", (size,)), tensor=2)
    dp = size // 2
    assert (world.dp_rank, world.dp_size) == (rank // 2, dp)
    signal = int(rank == 1)
    assert world.sum(torch.tensor([world.dp_rank + 1, signal])).tolist() == [dp * (dp + 1) // 2, 1]
    loss = torch.tensor(0.1 * (world.dp_rank + 1), dtype=torch.float64)
    assert world.sum(loss).item() == pytest.approx(0.1 * dp * (dp + 1) / 2, abs=1e-15)
