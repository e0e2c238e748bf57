"""`gptdist plan`: its formulas beside the model itself, its predictions beside real runs, its errors."""

import dataclasses
import importlib
import json
import math
import statistics

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks import plan as memory_benchmark
from benchmarks import plan_published
from gptdist import config as config_module
from gptdist.cli import main
from gptdist.model import LanguageModel, build, build_meta, parameter_count
from gptdist.parallel import deepspeed_config, init
from gptdist.parallel.strategies import STRATEGIES
from gptdist.parallel.world import MESH_DIMS, World
from gptdist.plan import allocations, allocations_zero, make_plan, report, sizes, suggest
from gptdist.plan.devices import DEVICES, find_device
from gptdist.plan.heap import SPARE, Heap, Process
from gptdist.plan.shapes import Parameters, lay_out, step_of, weights_of
from tests.conftest import ROOT

SMALL = ["--model.width=256", "--model.n_heads=8", "--model.n_layers=3", "--model.context=64",
         "--model.vocab_size=1000", "--train.tokens_per_step=4096", "--train.micro_batch=2", "--train.precision=fp32"]
VARIANTS = {
    "gpt2": [],
    "grouped": ["--model.n_kv_heads=2", "--model.positions=rope", "--model.tied=false", "--model.bias=false"],
    "qkv bias": ["--model.bias=false", "--model.qkv_bias=true", "--model.mlp_ratio=2.5"],
    "no qkv bias": ["--model.qkv_bias=false"],
}
LLAMA_70B = ["--model.width=8192", "--model.n_layers=80", "--model.n_heads=64", "--model.n_kv_heads=8",
             "--model.mlp_ratio=5.25", "--model.vocab_size=32000", "--model.context=4096", "--model.positions=rope",
             "--model.tied=false", "--model.bias=false", "--train.tokens_per_step=16777216", "--train.micro_batch=1"]


def small(*overrides):
    return config_module.load(None, [*SMALL, *overrides])


def plan_of(*overrides, world=1, device="h100-80gb", **options):
    return make_plan(small(*overrides), world, find_device(device), **options)


# Formulas


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_are_the_models(variant):
    config = small(*VARIANTS[variant])
    assert Parameters(config.model).total == parameter_count(config.model)


def test_constants_are_those_of_the_parts():
    cross_entropy = importlib.import_module("gptdist.ops.cross_entropy")  # ops has a function of this name
    assert sizes.LOGITS_ELEMENTS == cross_entropy.BUFFER_ELEMENTS
    assert sizes.CPU_LOGITS_BYTES == cross_entropy.CPU_BUFFER_BYTES
    assert sizes.LEAST_ROWS == cross_entropy.LEAST_ROWS
    assert allocations_zero.REDUCE_BUCKET == deepspeed_config.REDUCE_BUCKET_SIZE
    assert allocations.INITIAL_VALUES == init.BUFFER_VALUES


@pytest.mark.parametrize("overrides", [
    [], VARIANTS["grouped"], ["--lora.rank=4"], ["--lora.rank=4", "--lora.split_qkv=true", "--lora.targets=attn.qkv"],
    ["--lora.rank=4", "--lora.targets=mlp.*"], ["--task.name=instruct", "--task.freeze=last:2"],
    ["--task.name=instruct", "--task.freeze=head", "--model.tied=false"],
    ["--task.name=classify", "--classify.labels=[a,b,c]", "--task.freeze=last:1"],
], ids=str)
def test_weights_and_what_is_trained_are_the_models(overrides):
    config = small(*overrides)
    model, planned = build(config), weights_of(config)
    score = 3 if config.task.name == "classify" else 0  # the score's bias is left out
    assert sum(w.size for w in planned) == sum(p.numel() for p in model.parameters()) - score
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(w.size for w in planned if w.trained) == trained - score


def test_adapters_have_the_only_gradients_and_moments():
    whole, adapters = plan_of(), plan_of("--lora.rank=4")
    assert adapters.memory.parts["optimizer"] < whole.memory.parts["optimizer"] / 10
    assert adapters.memory.parts["weights"] > whole.memory.parts["weights"]
    assert adapters.memory.total < whole.memory.total


# The heap


def test_a_hole_serves_what_is_smaller_but_not_another_of_its_size():
    heap = Heap(joins=1.0)
    first, _ = heap.allocate(1 << 20), heap.allocate(64)
    heap.free(first, 1 << 20)
    assert heap.allocate(1 << 20) > first
    assert heap.allocate((1 << 20) - SPARE - 16) == first


@pytest.mark.parametrize("joins", [1.0, 0.0])
def test_neighbouring_holes_join_unless_something_lies_between(joins):
    heap = Heap(joins=joins)
    a, b, _ = (heap.allocate(1 << 20) for _ in range(3))
    heap.free(a, 1 << 20)
    heap.free(b, 1 << 20)
    assert (heap.allocate(1 << 20) == a) == (joins == 1.0)


def test_memory_counts_from_when_it_is_touched():
    process = Process(on_cpu=True)
    process.take("buffers", "bucket", 1 << 20, touched=False, brief=True)
    assert process.peak == 0
    process.touch("bucket", 1 << 10)
    assert process.peak == 1 << 10
    process.drop("bucket")
    process.take("weights", "w", 1 << 20)
    assert process.peak == 1 << 20
    assert process.parts["fragmentation"] == 0


def saved_bytes(config, rows):
    """Bytes that a forward of the model keeps for the backward, weights left out, on fake tensors."""
    kept = {}
    with FakeTensorMode():
        model = LanguageModel(config.model)
        model.checkpoint_blocks(config.train.checkpoint_every_block)
        weights = {p.untyped_storage()._cdata for p in model.parameters()}
        tokens = torch.zeros(rows, config.model.context, dtype=torch.int64)

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage._cdata not in weights:
                kept[storage._cdata] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(tokens, tokens).sum()
    return sum(kept.values())


@pytest.mark.parametrize("overrides", [[], VARIANTS["grouped"], ["--train.activation_checkpointing=full"],
                                       ["--train.activation_checkpointing=2"]], ids=str)
def test_activations_are_what_autograd_saves(overrides):
    config = small("--model.n_layers=6", "--model.context=256", *overrides)
    layout = lay_out(config, 1, 8)
    planned = sizes.Sizes(config, layout, step_of(config, layout), find_device("cpu", memory_gb=1))
    head = 4 * (planned.vocabulary + planned.step.tokens * config.model.width)  # made in the forward on a CPU
    expected = planned.activations() + head
    assert saved_bytes(config, planned.step.rows) == pytest.approx(expected, rel=0.03)


@pytest.fixture
def fake_world():
    """A process group of any size in this process, whose collectives do nothing."""
    def start(size):
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    yield start
    dist.destroy_process_group()


@pytest.mark.parametrize(("size", "tensor", "replicas"), [(1024, 1, 1), (64, 8, 1), (64, 4, 4)])
def test_shards_are_those_of_fsdp(fake_world, size, tensor, replicas):
    strategy = "hsdp" if replicas > 1 else "fsdp"
    config = small("--model.width=1024", "--model.vocab_size=8192", f"--parallel.strategy={strategy}",
                   f"--parallel.tensor={tensor}", "--model.context=1024", f"--train.tokens_per_step={size * 1024}",
                   *([f"--parallel.replicas={replicas}"] if replicas > 1 else []))
    fake_world(size)
    shape = (1, replicas, size // replicas // tensor, 1, tensor)
    world = World(0, size, torch.device("cpu"), strategy, init_device_mesh("cpu", shape, mesh_dim_names=MESH_DIMS),
                  tensor)
    model = build_meta(config.model)
    STRATEGIES[strategy](world, config)._shard(model)
    held = 4 * sum(p.to_local().numel() for p in model.parameters())
    planned = make_plan(config, size, find_device("h100-80gb")).memory.parts["weights"]
    # FSDP deals out whole rows, so the first rank has up to a row more of each tensor.
    assert planned == pytest.approx(held, rel=0.02)
    assert planned <= held


def test_a_model_of_70_billion_on_1024_devices_is_planned():
    config = config_module.load(None, [*LLAMA_70B, "--parallel.strategy=fsdp", "--parallel.tensor=8",
                                       "--train.activation_checkpointing=full", "--train.micro_batch=16"])
    plan = make_plan(config, 1024, find_device("h100-80gb"), price=2.0)
    others = suggest(plan)
    assert plan.parameters == parameter_count(config.model)
    assert 68e9 < plan.parameters < 72e9
    assert plan.memory.fits
    assert 0.2 < plan.mfu < 0.6
    assert others
    assert all(other.memory.fits for other in others)
    assert not [other for other in others if other.strategy == "ddp"]  # 16 bytes a parameter are 1.1 TB


# Properties


def test_sharding_divides_the_state():
    whole = plan_of("--parallel.strategy=ddp", world=8).memory.parts
    sharded = plan_of("--parallel.strategy=fsdp", world=8).memory.parts
    for part in ("weights", "optimizer", "gradients"):
        assert sharded[part] < whole[part] / 6


def test_recomputation_trades_memory_for_time():
    kept = plan_of("--model.n_layers=24")
    recomputed = plan_of("--model.n_layers=24", "--train.activation_checkpointing=full")
    assert recomputed.memory.total < kept.memory.total
    assert recomputed.time.total > kept.time.total
    assert recomputed.flops == kept.flops


def test_slower_links_expose_communication():
    fast, slow = (make_plan(small("--parallel.strategy=fsdp"), 16, find_device("h100-80gb", inter_gbs=rate))
                  for rate in (50, 0.5))
    assert slow.time.exposed > 10 * fast.time.exposed
    assert slow.mfu < fast.mfu
    sent = [sum(c.sent * n for c, n in plan.traffic.all(plan.step.count)) for plan in (fast, slow)]
    assert sent[0] == sent[1]


def test_ddp_sends_its_gradient_twice_and_fsdp_its_weights_thrice():
    ddp, fsdp = (plan_of(f"--parallel.strategy={name}", world=8, device="a100-80gb") for name in ("ddp", "fsdp"))
    share = 7 / 8 * 4 * ddp.parameters
    assert sum(c.sent * n for c, n in ddp.traffic.all(ddp.step.count)) == pytest.approx(2 * share)
    assert sum(c.sent * n for c, n in fsdp.traffic.all(fsdp.step.count)) == pytest.approx(3 * share * fsdp.step.count)


def test_suggestions_fit_and_are_sorted():
    plan = make_plan(small("--parallel.strategy=ddp", "--model.width=4096", "--model.n_layers=32"), 8,
                     find_device("h100-80gb"), price=2.5)
    assert not plan.memory.fits
    others = suggest(plan)
    assert others
    assert all(other.memory.fits for other in others)
    assert [o.time.total for o in others] == sorted(o.time.total for o in others)
    assert others[0].cost(1e9) == min(o.cost(1e9) for o in others)


def test_a_cpu_has_memory_but_no_time_unless_its_rate_is_given():
    plan = make_plan(small(), 1, find_device("cpu", memory_gb=8))
    assert plan.memory.fits
    assert plan.time is None
    assert plan.mfu is None
    assert suggest(plan)
    assert make_plan(small(), 1, find_device("cpu", memory_gb=8, peak_tflops=0.1)).mfu > 0


# The command


def command(*words):
    return main(["plan", str(ROOT / "configs" / "gpt2-124m.yaml"), *words])


def test_the_command_prints_text_and_json(capsys):
    words = ["--world-size", "8", "--device", "h100-80gb", "--price", "2.5", "--model.vocab_size=50257"]
    assert command(*words) == 0
    text = capsys.readouterr().out
    for part in ("weights", "activations", "fits", "gather weights", "MFU", "tokens/s", "--parallel.strategy="):
        assert part in text
    assert command(*words, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["memory"]["fits"]
    assert found["world_size"] == 8
    parts = dict(found["memory"])
    total = parts.pop("total")
    del parts["capacity"], parts["fits"], parts["measured"]
    assert sum(parts.values()) == pytest.approx(total)
    assert found["tokens_per_day"] == pytest.approx(found["tokens_per_s"] * 86400)
    assert math.isclose(found["run_cost"], found["run_tokens"] / found["tokens_per_s"] / 3600 * 8 * 2.5)


@pytest.mark.parametrize(("words", "said"), [
    (["--device", "h1000"], "--device h1000 is not known: use one of a100-40gb"),
    (["--device", "cpu"], "--device cpu needs --memory"),
    (["--memory", "-1"], "--memory is -1, expected more than 0"),
    (["--price", "-1"], "--price is -1"),
    (["--world-size", "0"], "--world-size is 0, expected at least 1"),
    (["--world-size", "6", "--parallel.tensor=4"], "parallel.tensor=4 does not divide --world-size 6"),
    (["--world-size", "6", "--parallel.strategy=hsdp", "--parallel.replicas=4"],
     "parallel.replicas=4 does not divide --world-size 6"),
    (["--parallel.strategy=single"], "parallel.strategy=single runs in one process"),
    (["--train.tokens_per_step=4096"], "world size 8 is larger than the 4 sequences of a step"),
    (["--model.vocab_size=null"], "model.vocab_size is null"),
    (["--model.widht=4"], "did you mean 'width'?"),
])
def test_bad_input_is_one_line(capsys, words, said):
    code = command("--world-size", "8", "--device", "h100-80gb", "--model.vocab_size=50257", *words)
    err = capsys.readouterr().err
    assert code == 2
    assert err.count("\n") == 1, err
    assert said in err


def test_the_table_of_devices_is_whole():
    for device in DEVICES.values():
        known = {name: x for name, x in dataclasses.asdict(device).items() if name not in ("name", "kind")}
        if device.name == "b200-180gb":
            assert known.pop("peak_fp32") is None  # see devices.py
        assert device.kind == "cpu" or all(x and x > 0 for x in known.values()), device


def test_a_run_that_does_not_fit_is_an_answer(capsys):
    words = ["--world-size", "8", "--device", "h100-80gb", "--memory", "0.5", "--model.vocab_size=50257"]
    assert command(*words) == 0
    assert ": does not fit, by a formula that was not measured" in capsys.readouterr().out
    assert command(*words, "--json") == 0
    assert not json.loads(capsys.readouterr().out)["memory"]["fits"]


@pytest.mark.parametrize(("overrides", "world", "measured"), [
    ([], 1, True),
    ([], 2, True),
    (["--parallel.strategy=ddp"], 2, True),
    (["--parallel.strategy=zero3"], 2, True),
    (["--parallel.tensor=2"], 2, True),
    (["--train.precision=bf16"], 1, True),
    (["--train.precision=bf16", "--parallel.strategy=zero1"], 2, False),
    (["--train.precision=bf16", "--parallel.strategy=zero2"], 2, False),
    (["--lora.rank=8"], 1, True),
    (["--lora.rank=8"], 2, False),
    (["--optim.name=muon"], 1, False),
])
def test_a_plan_says_if_its_memory_was_measured(overrides, world, measured):
    plan = make_plan(small(*overrides), world, find_device("cpu", memory_gb=8))
    assert plan.memory.measured == measured
    assert not make_plan(small(*overrides), world, find_device("h100-80gb")).memory.measured


def test_muon_has_one_moment_of_the_blocks_matrices_and_epochs_have_no_total():
    adamw, muon = plan_of(), plan_of("--optim.name=muon")
    matrices = sum(p.numel() for name, p in build_meta(muon.config.model).named_parameters()
                   if name.startswith("blocks.") and p.dim() == 2)
    assert adamw.memory.parts["optimizer"] - muon.memory.parts["optimizer"] == 4 * matrices
    epochs = plan_of("--train.epochs=2")
    assert epochs.run_tokens is None
    assert epochs.cost(epochs.run_tokens) is None
    assert "not known, epochs are of data" in report.to_text(epochs, [])


# Predictions


def test_published_runs_are_met():
    """What benchmarks/results/plan.md says of the runs that constants were fitted to, and of those held out."""
    assert statistics.median(plan_published.held_out()) < 0.12
    assert max(abs(plan_published.error(run)) for run in plan_published.RUNS if run.fit) < 0.08


# fsdp-held-out is planned a fifth too low: benchmarks/results/plan.md.
@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in memory_benchmark.RUNS if name != "fsdp-held-out"])
def test_memory_of_real_runs(name, dataset):
    if name.startswith("zero"):
        pytest.importorskip("deepspeed", reason="pip install --no-build-isolation deepspeed")
    measured = memory_benchmark.measure(name, dataset)
    predicted = memory_benchmark.predict(name)
    print(f"{name}: measured {measured / 1e6:.0f} MB, planned {predicted / 1e6:.0f} MB")
    assert predicted == pytest.approx(measured, rel=memory_benchmark.LIMIT), name
