"""DeepSpeed's JSON: derived from the configuration, laid over by the user's own, contradictions refused; bad input."""

import builtins
import json

import pytest
import torch

from gptdist import config as config_module
from gptdist.config import ParallelConfig
from gptdist.errors import MissingError, UserError
from gptdist.parallel.deepspeed_config import DEFAULTS, YAML_NAMES, deepspeed_config, resolved_deepspeed_config
from gptdist.parallel.flat_shard import FlatShard, boxes
from gptdist.parallel.world import init_world
from tests.conftest import run_gptdist


def zero_config(*overrides, strategy="zero2"):
    return config_module.load(None, ["--model.context=32", "--train.tokens_per_step=352", "--train.micro_batch=2",
                                     "--train.grad_clip=0.5", f"--parallel.strategy={strategy}", *overrides])


def with_json(tmp_path, values, world=2, **kwargs):
    path = tmp_path / "ds.json"
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return resolved_deepspeed_config(zero_config(f"--parallel.deepspeed_config={path}", **kwargs), world)


@pytest.mark.parametrize(("world", "batch", "rows", "count"), [(1, 12, 2, 6), (2, 12, 2, 3), (4, 12, 3 // 2 + 1, 2)])
def test_batch_sizes_cover_the_largest_share(world, batch, rows, count):
    """11 sequences a step, micro-batches of at most 2."""
    found = deepspeed_config(zero_config(), world)
    assert found["train_micro_batch_size_per_gpu"] * found["gradient_accumulation_steps"] * world == \
        found["train_batch_size"] >= 11
    assert (found["train_micro_batch_size_per_gpu"], found["gradient_accumulation_steps"]) == (rows, count)


def test_derived_settings_follow_the_yaml():
    found = deepspeed_config(zero_config("--train.precision=bf16", "--parallel.offload_optimizer=true",
                                         "--parallel.offload_parameters=true", strategy="zero3"), 2)
    assert found["zero_optimization"]["stage"] == 3
    assert found["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert found["zero_optimization"]["offload_param"]["device"] == "cpu"
    assert found["bf16"] == {"enabled": True}
    assert found["gradient_clipping"] == 0.5


def test_a_users_json_adds_and_may_repeat(tmp_path):
    found = with_json(tmp_path, {
        "zero_optimization": {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 1000},
        "gradient_clipping": "auto", "train_micro_batch_size_per_gpu": "auto", "wall_clock_breakdown": True,
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": [0.9, 0.95], "weight_decay": 0.1}}})
    assert found["zero_optimization"]["overlap_comm"] is True
    assert found["zero_optimization"]["reduce_bucket_size"] == 1000
    assert found["gradient_clipping"] == 0.5
    assert found["wall_clock_breakdown"] is True
    assert "optimizer" not in found


@pytest.mark.parametrize(("values", "theirs", "ours"), [
    ({"train_batch_size": 64}, "train_batch_size=64", "12"),
    ({"train_micro_batch_size_per_gpu": 4}, "train_micro_batch_size_per_gpu=4", "train.micro_batch"),
    ({"gradient_accumulation_steps": 7}, "gradient_accumulation_steps=7", "says 3"),
    ({"gradient_clipping": 1.0}, "gradient_clipping=1.0", "0.5"),
    ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage=3", "says 2"),
    ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, '"cpu"', "parallel.offload_optimizer"),
    ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, '"nvme"', "parallel.offload_parameters"),
    ({"bf16": {"enabled": True}}, "bf16.enabled=true", "says false"),
    ({"fp16": {"enabled": True}}, "fp16.enabled=true", "train.precision"),
    ({"optimizer": {"type": "Lamb"}}, '"Lamb"', '"AdamW"'),
    ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-5}}}, "optimizer.params.lr=1e-05", "0.0006"),
    ({"scheduler": {"type": "WarmupLR"}}, "scheduler", "schedule.name=cosine"),
    ({"data_types": {"grad_accum_dtype": "bf16"}}, '"bf16"', '"fp32"'),
    ({"wall_clock_breakdown": "auto"}, "wall_clock_breakdown", "nothing in the YAML"),
    ({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, "torch_autocast.enabled=true", "train.precision"),
    ({"amp": {"enabled": True}}, "amp.enabled=true", "train.precision"),
    ({"zero_optimization": True}, "zero_optimization=true", "expected an object such as"),
    ({"zero_optimization": {"offload_optimizer": None}}, "offload_optimizer=null", 'such as {"device": "..."}'),
    ({"bf16": "auto"}, 'bf16="auto"', 'an object such as {"enabled": "..."}'),
    ({"train_batch_size": {"x": 1}}, 'train_batch_size={"x": 1}', "a value such as 12"),
    ({"train_batch_sise": 7}, "'train_batch_sise'", "did you mean 'train_batch_size'?"),
    ({"zero_optimisation": {}}, "'zero_optimisation'", "did you mean 'zero_optimization'?"),
    ({"my_notes": {}}, "'my_notes'", "would ignore; remove it"),
    ("[1]", "list", "expected an object"),
    ("{", "not valid JSON", "ds.json"),
])
def test_a_contradiction_names_both_values(tmp_path, values, theirs, ours):
    with pytest.raises(UserError) as caught:
        with_json(tmp_path, values)
    assert theirs in str(caught.value)
    assert ours in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_checked_entry_is_derived_at_some_stage():
    derived = deepspeed_config(zero_config(strategy="zero3"), 2)
    for name in YAML_NAMES.keys() - DEFAULTS.keys():
        value = derived
        for key in name.split("."):
            value = value[key]


@pytest.mark.parametrize(("zero", "message"), [
    ({"overlap_com": True}, "DeepSpeedZeroConfig overlap_com"),
    ({"cpu_offload": True}, "cpu_offload"),
    ({"reduce_bucket_size": "big"}, "reduce_bucket_size"),
])
def test_what_deepspeed_refuses_names_the_file(zero, message, tmp_path, monkeypatch):
    pytest.importorskip("deepspeed", reason="the deepspeed package is not installed")
    from gptdist.parallel.zero import check_json

    values = with_json(tmp_path, {"zero_optimization": zero}, world=1)
    with pytest.raises(UserError, match=r"parallel.deepspeed_config=ds.json is refused by DeepSpeed: ") as caught:
        check_json(values, "ds.json")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    check_json(with_json(tmp_path, {"zero_optimization": {"overlap_comm": True}}, world=1), "ds.json")


@pytest.mark.parametrize(("world", "message"), [(0, "--processes is 0, expected at least 1"),
                                                (12, "world size 12 is larger than the 11 sequences of a step")])
def test_a_number_of_processes_that_cannot_train(world, message):
    with pytest.raises(UserError, match=message):
        resolved_deepspeed_config(zero_config(), world)


def test_an_unknown_json_file(tmp_path):
    with pytest.raises(UserError, match=r"cannot read parallel.deepspeed_config=.*none.json: No such file"):
        resolved_deepspeed_config(zero_config(f"--parallel.deepspeed_config={tmp_path}/none.json"), 2)


@pytest.mark.parametrize(("values", "message"), [
    (dict(strategy="fsdp", offload_optimizer=True), "offload_optimizer needs parallel.strategy=zero1.*got fsdp"),
    (dict(strategy="zero2", offload_parameters=True), "offload_parameters needs parallel.strategy=zero3, got zero2"),
    (dict(strategy="zero2", offload_adam="deepspeed"), "for parallel.offload_optimizer=true"),
    (dict(strategy="zero2", replicas=2), "replicas=2 belongs to parallel.strategy=hsdp, got zero2"),
    (dict(strategy="hsdp", replicas=-1), "replicas is -1"),
    (dict(strategy="ddp", deepspeed_config="x.json"), "deepspeed_config needs parallel.strategy=zero1.*got ddp"),
])
def test_options_of_another_strategy_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        ParallelConfig(**values)


def test_compiling_under_zero3_is_refused():
    with pytest.raises(UserError, match=r"train.compile=true with parallel.strategy=zero3"):
        zero_config("--train.compile=true", strategy="zero3")


def test_replicas_that_do_not_divide_the_processes(monkeypatch):
    monkeypatch.setattr("gptdist.parallel.world.join", lambda *args: None)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match="replicas=3 does not divide the 4 processes"):
        init_world(ParallelConfig(strategy="hsdp", replicas=3, device="cpu", threads=1))


def test_a_missing_deepspeed_says_how_to_install_it(monkeypatch):
    from gptdist.parallel.zero import import_deepspeed

    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "deepspeed":
            raise ModuleNotFoundError("No module named 'deepspeed'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(MissingError, match=r"zero3 needs DeepSpeed .*pip install"):
        import_deepspeed("zero3", torch.device("cpu"))


def test_the_command_line_prints_the_json_and_refuses_a_contradiction_once(tmp_path):
    done = run_gptdist("config", "configs/debug.yaml", "--deepspeed", "--processes", "2", "--parallel.strategy=zero1")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["zero_optimization"]["stage"] == 1
    done = run_gptdist("config", "configs/debug.yaml", "--deepspeed")
    assert done.returncode == 2
    assert "does not use DeepSpeed" in done.stderr


def test_a_flat_piece_is_boxes_that_tile_it():
    """Every piece of every small shape: the boxes, in order, are exactly the piece's row-major elements."""
    for shape in [(), (7,), (5, 4), (3, 1, 4), (2, 3, 2, 2)]:
        whole = torch.arange(max(1, torch.Size(shape).numel())).view(shape)
        for start in range(whole.numel() + 1):
            for stop in range(start, whole.numel() + 1):
                found = []
                for box in boxes(shape, start, stop):
                    part = whole
                    for dim, (offset, size) in enumerate(zip(box.offsets, box.sizes, strict=True)):
                        part = part.narrow(dim, offset, size)
                    assert part.flatten()[0] == box.first
                    found += part.flatten().tolist()
                assert found == list(range(start, stop))
                assert len(boxes(shape, start, stop)) <= max(1, 2 * len(shape) - 1)


def test_a_flat_shard_computes_nothing():
    with pytest.raises(NotImplementedError, match="only for checkpoints"):
        FlatShard(torch.arange(4.0), 2, (3, 4)) + 1
