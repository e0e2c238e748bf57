"""In every rank of a world of each size (tests/ranks.py): every case of DeepSpeed and HSDP in one process group."""

from pathlib import Path

import torch

import gptdist.parallel.init as parallel_init
from gptdist import config as config_module
from gptdist.checkpoint import layout, store
from gptdist.model import build_meta
from gptdist.optim.adamw import build_adamw
from gptdist.parallel.strategies import Single, Strategy, make_strategy
from gptdist.parallel.world import World, env_world_size, init_world
from tests.training import run_tiny

# Of the 11 sequences of a step a rank takes up to 11, 6, 4, 3: in 4, 2, 2, 1 micro-batches.
DROPOUT = ["--model.dropout=0.1", "--eval.every=0", "--train.micro_batch=3"]
SHORT = [*DROPOUT, "--train.stop_at=10"]
BACKGROUND = ["--checkpoint.every=8", "--checkpoint.keep_last=3", "--checkpoint.asynchronous=true"]
HSDP = ["--parallel.replicas=2"]
OFFLOAD = ["--parallel.offload_optimizer=true"]
# World size -> name -> overrides. Cases that begin with bf16 are compared with fp32, the others with `single`.
CASES = {
    1: {"zero2": SHORT, "zero3": SHORT},
    2: {"zero1": [*DROPOUT, *BACKGROUND], "zero2": DROPOUT, "zero3": [*DROPOUT, *BACKGROUND],
        "hsdp": [*SHORT, *HSDP],
        "zero1-bf16": [*SHORT, "--train.precision=bf16"],
        "zero3-bf16": [*SHORT, "--train.precision=bf16"],
        "zero2-offload": [*SHORT, *OFFLOAD],
        "zero3-offload": [*SHORT, *OFFLOAD, "--parallel.offload_parameters=true"],
        "zero3-recompute": [*SHORT, "--train.activation_checkpointing=full"]},
    3: {"zero2": SHORT, "zero3": SHORT},
    4: {"zero1": SHORT, "zero2": SHORT, "zero3": SHORT, "hsdp": [*SHORT, *HSDP]},
}
# Of the long test, all 20 steps. DeepSpeed's CPUAdam is saved in the middle, so that its counters are restored too.
LONG = {
    1: {"zero2-long": DROPOUT, "zero3-long": DROPOUT},
    2: {"hsdp-long": [*DROPOUT, *HSDP],
        "zero3-cpuadam": [*DROPOUT, *OFFLOAD, "--parallel.offload_adam=deepspeed"]},
    3: {"zero1-long": DROPOUT, "zero2-long": DROPOUT, "zero3-long": DROPOUT},
    4: {"zero1-long": DROPOUT, "zero2-long": DROPOUT, "zero3-long": DROPOUT, "hsdp-long": [*DROPOUT, *HSDP]},
}
# One run that goes on under every strategy: (step it stops at, strategy), world size by world size.
CHAIN = {
    1: [(3, "fsdp"), (5, "zero3")],
    2: [(7, "zero1"), (8, "hsdp"), (10, "zero2")],
    3: [(11, "zero3"), (12, "fsdp"), (14, "zero1")],
    4: [(16, "zero3"), (18, "zero2")],
}
# Strategy that saves in the background at step 8 -> strategies that go on from it, to step 10.
GOES_ON = {"zero1": ["zero3"], "zero3": ["zero2", "zero3"]}


def run_cases(data: Path, out: Path, cases: dict[int, dict[str, list[str]]], *further: str) -> None:
    world = env_world_size()
    for name, overrides in cases[world].items():
        run_tiny(data, out / f"{name}-{world}", f"--parallel.strategy={name.split('-')[0]}", *overrides, *further)


def main(data: Path, out: Path) -> None:
    world = env_world_size()
    run_cases(data, out, CASES)
    for stop, strategy in CHAIN[world]:
        run_tiny(data, out / "chain", f"--parallel.strategy={strategy}", f"--train.stop_at={stop}", *DROPOUT)
    if world == 2:
        for saved, strategy in [(saved, strategy) for saved, others in GOES_ON.items() for strategy in others]:
            run_tiny(data, out / f"{strategy}-from-{saved}", f"--parallel.strategy={strategy}", *SHORT,
                     f"--checkpoint.resume={out / f'{saved}-2' / 'checkpoints' / layout.step_name(8)}")
        run_tiny(data, out / "init-2", "--parallel.strategy=zero2", "--train.steps=2", "--schedule.warmup_steps=0",
                 f"--checkpoint.init_from={out / 'zero3-2'}", *DROPOUT)
        for strategy in ("zero1", "zero2", "zero3", "ddp", "fsdp"):
            check_frozen_and_discarded(out, strategy)
        check_frozen_and_discarded(out, "fsdp", "--parallel.tensor=2")
        check_discarded(out, "--parallel.strategy=zero1", "--train.precision=bf16")
        check_discarded(out, "--parallel.strategy=zero2", *OFFLOAD)
        check_discarded(out, "--parallel.strategy=zero3", *OFFLOAD)
        check_no_rank_holds_the_model(out)


def long_cases(data: Path, out: Path) -> None:
    run_cases(data, out, LONG, "--train.stop_at=9")
    run_cases(data, out, LONG)


def small_config(out: Path, *overrides: str) -> config_module.Config:
    # Without the bias of qkv: that of the keys has no gradient but rounding, which Adam makes large.
    return config_module.load(None, [
        "--model.vocab_size=300", "--model.width=32", "--model.context=16", "--train.tokens_per_step=128",
        "--train.micro_batch=2", "--train.precision=fp32", "--model.qkv_bias=false", f"--run.dir={out}/small",
        *overrides])


def check_discarded(out: Path, *overrides: str) -> None:
    """A step that is thrown away leaves nothing behind."""
    config, losses = small_config(out, *overrides), []
    for discarded in (True, False):
        strategy = make_strategy(init_world(config.parallel), config)
        strategy.prepare(build_meta(config.model), lambda parameters: build_adamw(parameters, config.optim))
        if discarded:
            take_step(strategy, 7, discard=True)
        losses.append([take_step(strategy, step, discard=False) for step in range(2)])
    assert losses[0] == losses[1], f"{overrides}: {losses}"


def check_frozen_and_discarded(out: Path, name: str, *overrides: str) -> None:
    """Frozen parameters, two micro-batches a step, a step thrown away: as on one process, down to the checkpoint."""
    config = small_config(out, f"--parallel.strategy={name}", *overrides)
    world = init_world(config.parallel)
    single = Single(World(0, 1, world.device, "single", None), config)
    sharded = make_strategy(world, config)
    for strategy in (single, sharded):
        model = build_meta(config.model)
        for part in (model.wte, model.wpe, model.blocks[0].mlp, model.blocks[1].ln_1):
            part.requires_grad_(False)
        strategy.prepare(model, lambda parameters: build_adamw(parameters, config.optim))
    for step in range(4):
        losses = [take_step(strategy, step, discard=step == 1) for strategy in (single, sharded)]
        for a, b in zip(*losses, strict=True):
            assert abs(a - b) < 1e-5, f"{name}, step {step}: {losses}"
    path = store.save(out / f"frozen-{name}{''.join(overrides)}", 3, sharded.state(), {})
    saved = store.load_tensors(path)
    wanted = single.state()
    assert saved.keys() == wanted.keys()
    for key, tensor in wanted.items():
        difference = (saved[key] - tensor).abs().max()
        # Of the 3e-2 that three steps can go. Adam's go by a gradient's sign, and tensor parallel's other order of sums
        # changes the few gradients that are but rounding.
        assert difference < (1e-3 if world.tensor > 1 else 1e-5), f"{name}: {key} differs by {difference}"


def take_step(strategy: Strategy, step: int, discard: bool) -> list[float]:
    """[this process's loss sum or the global one's share, gradient norm] of one step on 8 sequences over all ranks."""
    world = strategy.world
    sequences = torch.randint(0, 300, (8, 17), generator=torch.Generator().manual_seed(step))
    rows = sequences.chunk(world.dp_size)[world.dp_rank]
    total = torch.zeros((), dtype=torch.float64)
    micro_batches = rows.chunk(2)
    for i, rows in enumerate(micro_batches):
        with strategy.micro_batch(is_last=i == 1):
            loss = strategy(rows[:, :-1].contiguous(), rows[:, 1:].contiguous()).sum()
            strategy.backward(loss, 8 * 16)
        total += loss.detach().double()
    norm = strategy.grad_norm().item()
    if discard:
        strategy.discard()
    else:
        strategy.apply(1e-2, 0.5)
    return [world.sum(total).item() / (8 * 16), norm]


def check_no_rank_holds_the_model(out: Path) -> None:
    """ZeRO-3: between steps a rank has its share; while preparing, at most one part of the model (here the largest)."""
    config = config_module.load(None, ["--model.vocab_size=65536", "--model.width=64", "--parallel.strategy=zero3",
                                       f"--run.dir={out}/memory", "--model.n_layers=1"])
    parallel_init.BUFFER_VALUES = 1 << 16
    strategy = make_strategy(init_world(config.parallel), config)
    strategy.prepare(build_meta(config.model), lambda parameters: build_adamw(parameters, config.optim))
    held = sum(p.numel() for p in strategy.model.parameters())
    assert held < 0.02 * strategy.n_parameters, f"{held} of {strategy.n_parameters} values are on this rank"
    assert strategy.model.head_weight is strategy.model.wte.weight
    shard = strategy.model_state()["model.wte.weight"]
    assert shard.flat.numel() == 65536 * 64 // 2
