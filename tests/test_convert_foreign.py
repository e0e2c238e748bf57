"""nanoGPT's and DeepSpeed's checkpoints in: equal logits, equal bits, and refusals."""

import os
import pickle
import subprocess
import sys
import tarfile
import types
import zipfile
from enum import IntEnum
from pathlib import Path

import pytest
import torch

from gptdist.checkpoint import load_tensors
from gptdist.checkpoint.restore import read_config
from gptdist.checkpoint.verify_values import verify_values
from gptdist.config import ModelConfig
from gptdist.convert import gpt2 as gpt2_layout
from gptdist.convert.deepspeed import STAND_INS, _step
from gptdist.convert.files import read_torch
from gptdist.convert.importer import import_model
from gptdist.errors import UserError
from tests.conftest import ROOT
from tests.convert_models import (
    VOCAB,
    Evil,
    gpt2,
    hf_logits,
    logits,
    nanogpt_checkpoint,
    small_tokenizer,
    some_tokens,
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tok")
    small_tokenizer().save(folder)
    return str(folder)


# nanoGPT

@pytest.mark.parametrize(("options", "rows"), [({}, VOCAB), ({"prefix": "_orig_mod."}, 320), ({"bias": False}, 384)])
def test_nanogpt_gives_equal_logits(options, rows, tokenizer, tmp_path):
    """Against transformers with the same weights; without biases against biases of zero."""
    pytest.importorskip("transformers", reason="the reference is transformers")
    model = gpt2()
    if options.get("bias") is False:
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.zeros_(p)
    torch.save(nanogpt_checkpoint(model, rows=rows, **options), tmp_path / "ckpt.pt")
    done = import_model(str(tmp_path), str(tmp_path / "out"), tokenizer=tokenizer)
    assert (done.format, done.config.vocab_size, done.config.bias) == ("nanogpt", VOCAB, options.get("bias", True))
    assert "exact GELU" in done.note
    tokens = some_tokens()
    assert (logits(done.path, tokens) - hf_logits(model, tokens)).abs().max() < 1e-4
    verify_values(done.path)


def edit(**changes):
    return lambda found: found["model_args"].update(changes)


@pytest.mark.parametrize(("spoil", "message"), [
    (edit(n_layer=3), "no tensor transformer.h.2"),
    (edit(n_embd=64), "different models"),
    (edit(n_head="4"), "model_args n_head is '4'"),
    (edit(n_head=5), r"ckpt.pt: model.n_heads=5 does not divide model.width=32"),
    (edit(dropout=[1]), r"ckpt.pt: model_args dropout is \[1\], expected a number"),
    (lambda found: found["model"]["transformer.wpe.weight"].fill_(float("nan")), "ckpt.pt: transformer.wpe.weight has"),
    (lambda found: found.pop("model_args"), "expected nanoGPT's 'model' and 'model_args'"),
    (lambda found: found["model_args"].pop("bias"), "it lacks bias"),
    (lambda found: found.update(model=[1]), "expected a table of tensors"),
])
def test_bad_nanogpt_checkpoints(spoil, message, tokenizer, tmp_path):
    pytest.importorskip("transformers", reason="the model is made by transformers")
    found = nanogpt_checkpoint(gpt2())
    spoil(found)
    torch.save(found, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match=message):
        import_model(str(tmp_path / "ckpt.pt"), str(tmp_path / "out"), tokenizer=tokenizer)
    assert [p.name for p in tmp_path.iterdir()] == ["ckpt.pt"]


def test_code_in_a_nanogpt_checkpoint_does_not_run(tokenizer, tmp_path):
    torch.save({"model": {}, "model_args": Evil(tmp_path / "sentinel")}, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match=r"asks for tests.convert_models.touch, .*nothing of it was run"):
        import_model(str(tmp_path), str(tmp_path / "out"), tokenizer=tokenizer)
    assert [p.name for p in tmp_path.iterdir()] == ["ckpt.pt"]
    torch.load(tmp_path / "ckpt.pt", weights_only=False)  # the code is real: unpickled carelessly, it runs
    assert (tmp_path / "sentinel").exists()


class System:
    """A command of the shell that runs when it is unpickled."""

    def __init__(self, sentinel):
        self.sentinel = sentinel

    def __reduce__(self):
        return os.system, (f"touch {self.sentinel}",)


def test_a_blocked_module_is_named(tmp_path):
    """torch has a text of its own for modules such as posix."""
    torch.save({"a": System(tmp_path / "sentinel")}, tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"x\.pt: its pickle asks for posix\.system, .*nothing of it was run"):
        read_torch(tmp_path / "x.pt")
    assert [p.name for p in tmp_path.iterdir()] == ["x.pt"]


def cut(**how):
    def write(path):
        torch.save({"a": torch.ones(1000)}, path, **how)
        path.write_bytes(path.read_bytes()[:-300])
    return write


@pytest.mark.parametrize("write", [
    lambda path: path.write_bytes(b""),
    lambda path: path.write_text("hello world"),
    lambda path: path.write_bytes(b"\x80\x02}q\x00garbage"),
    lambda path: path.write_bytes(pickle.dumps({"a": Evil(path.with_name("sentinel"))})),
    lambda path: torch.save({"a": Evil(path.with_name("sentinel"))}, path, _use_new_zipfile_serialization=False),
    lambda path: torch.save(torch.nn.Linear(2, 2), path),
    lambda path: tarfile.open(path, "w").close(),
    lambda path: zipfile.ZipFile(path, "w").writestr("a", "b"),
    cut(), cut(_use_new_zipfile_serialization=False),
])
def test_files_that_are_not_tensors_of_torch_save(write, tmp_path):
    """One line that names the file; torch's own advice to load it unchecked is not passed on."""
    write(tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"x\.pt") as error:
        read_torch(tmp_path / "x.pt")
    assert "\n" not in str(error.value)
    assert "weights_only" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["x.pt"]


# DeepSpeed

CONFIG = ModelConfig(vocab_size=VOCAB, context=32, width=32, n_layers=2, n_heads=4)
YAML = "model: {vocab_size: 300, context: 32, width: 32, n_layers: 2, n_heads: 4}\n"


@pytest.fixture
def deepspeed_classes(monkeypatch):
    """Modules with the classes that DeepSpeed's files name, so that files like its can be pickled without it."""
    stage = IntEnum("ZeroStageEnum", {"disabled": 0, "optimizer_states": 1, "gradients": 2, "weights": 3})
    scaler = type("LossScaler", (), {})
    for cls, module in ((stage, "deepspeed.runtime.zero.config"), (scaler, "deepspeed.runtime.fp16.loss_scaler")):
        for parent in (module.rsplit(".", n)[0] for n in range(module.count("."), -1, -1)):
            if parent not in sys.modules:
                monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
        cls.__module__ = module
        monkeypatch.setattr(sys.modules[module], cls.__name__, cls, raising=False)
    return stage, scaler


def weights():
    torch.manual_seed(2)
    return {name: torch.randn(shape) for name, shape in gpt2_layout.shapes(CONFIG).items()}


def write_zero(folder: Path, stage: int, world: int, classes, prefix: str = "", padding: int = 0) -> dict:
    """A directory as DeepSpeed writes it: matrices and vectors are two groups; rank r's flat part of each."""
    stage_enum, scaler = classes
    tensors = weights()
    groups = [{n: t for n, t in tensors.items() if (t.dim() > 1) == matrices} for matrices in (True, False)]
    folder.mkdir(parents=True)
    shapes = [{prefix + n: t.shape for n, t in group.items()} for group in groups]
    model = {"module": {}, "param_shapes": shapes, "buffer_names": [], "shared_params": {}, "dp_world_size": world,
             "frozen_param_shapes": None, "ds_config": {"zero_optimization": {"stage": stage}}, "global_steps": 8,
             "skipped_steps": 1}
    if stage == 0:
        torch.save(model | {"module": {prefix + n: t for n, t in tensors.items()}},
                   folder / "mp_rank_00_model_states.pt")
        return tensors
    for rank in range(world if stage == 3 else 1):
        name = f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" if stage == 3 else "mp_rank_00_model_states.pt"
        torch.save(model, folder / name)
    for rank in range(world):
        state = {"zero_stage": stage_enum(stage), "loss_scaler": scaler(), "overflow": False}
        steps = {"state": {0: {"step": torch.tensor(7.0)}}, "param_groups": [{"lr": 0.1}]}
        if stage == 3:
            state |= {"optimizer_state_dict": steps, "partition_count": world,
                      "fp32_flat_groups": [zero3_part(g, rank, world) for g in groups]}
        else:
            state |= {"base_optimizer_state": steps, "partition_count": [world] * 2,
                      "single_partition_of_fp32_groups": [zero2_part(g, rank, world, padding) for g in groups],
                      "param_alignment_paddings": [[padding] * len(g) for g in groups] if padding else None}
        torch.save({"optimizer_state_dict": state}, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return tensors


def zero2_part(group, rank, world, padding):
    flat = torch.cat([torch.cat([t.flatten(), torch.full((padding,), 99.0)]) for t in group.values()])
    per = -(-len(flat) // world)
    return flat[rank * per:(rank + 1) * per].clone()


def zero3_part(group, rank, world):
    pieces = []
    for t in group.values():
        per = -(-t.numel() // world)
        padded = torch.cat([t.flatten(), torch.full((per * world - t.numel(),), 99.0)])
        pieces.append(padded[rank * per:(rank + 1) * per])
    return torch.cat(pieces)


@pytest.mark.parametrize(("stage", "world", "options"), [
    (0, 1, {}), (1, 1, {}), (1, 2, {"prefix": "module."}), (2, 3, {"padding": 5}), (3, 1, {}),
    (3, 2, {"prefix": "_orig_mod."}), (3, 5, {})])
def test_zero_gives_equal_bits(stage, world, options, deepspeed_classes, tokenizer, tmp_path):
    tensors = write_zero(tmp_path / "zero" / "global_step7", stage, world, deepspeed_classes, **options)
    (tmp_path / "zero" / "latest").write_text("global_step7\n")
    (tmp_path / "config.yaml").write_text(YAML)
    done = import_model(str(tmp_path / "zero"), str(tmp_path / "out"), tokenizer=tokenizer)
    assert done.format == "deepspeed"
    found = load_tensors(done.path)
    assert found.keys() == {f"model.{name}" for name in tensors}
    assert all(torch.equal(found[f"model.{name}"], value) for name, value in tensors.items())
    assert read_config(done.path).model == CONFIG
    verify_values(done.path)


def rename(old, new):
    return lambda folder: (folder / old).rename(folder / new)


def other_world(folder):
    path = folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    found = torch.load(path, weights_only=False)
    found["optimizer_state_dict"]["partition_count"] = [4, 4]
    torch.save(found, path)


def short_flat(folder):
    path = folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    found = torch.load(path, weights_only=False)
    flats = found["optimizer_state_dict"]["single_partition_of_fp32_groups"]
    flats[0] = flats[0][:-100].clone()
    torch.save(found, path)


def truncated(folder):
    path = folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    path.write_bytes(path.read_bytes()[:-500])


def other_step(folder):
    path = folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    found = torch.load(path, weights_only=False)
    found["optimizer_state_dict"]["base_optimizer_state"]["state"][0]["step"] = torch.tensor(5.0)
    torch.save(found, path)


def other_model_step(folder):
    path = folder / "mp_rank_00_model_states.pt"
    torch.save(torch.load(path, weights_only=False) | {"global_steps": 20}, path)


def not_finite(folder):
    path = folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    found = torch.load(path, weights_only=False)
    found["optimizer_state_dict"]["single_partition_of_fp32_groups"][1][-1] = float("nan")
    torch.save(found, path)


def evil(folder):
    torch.save({"optimizer_state_dict": Evil(folder.parent / "sentinel")},
               folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt")


@pytest.mark.parametrize(("spoil", "message"), [
    (lambda f: (f / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink(), "2 ranks, but the file of rank 1 is missi"),
    (lambda f: (f / "zero_pp_rank_0_mp_rank_00_optim_states.pt").unlink(), "2 ranks, but the file of rank 0 is missi"),
    (lambda f: [p.unlink() for p in f.glob("*_optim_states.pt")], "ZeRO-2 weights are in zero_pp_rank"),
    (lambda f: (f / "mp_rank_00_model_states.pt").unlink(), "no mp_rank_00_model_states.pt"),
    (rename("mp_rank_00_model_states.pt", "mp_rank_01_model_states.pt"), "tensor parallelism"),
    (other_world, "saved by 4 ranks with ZeRO-2"),
    (short_flat, "the files are not of one model"),
    (truncated, r"is not a complete file of torch.save \(RuntimeError: [^.]*\); get the file again$"),
    (other_step, r"rank_1_mp_rank_00_optim_states.pt was saved after step 5, zero_pp_rank_0\S* after step 7"),
    (other_model_step, r"mp_rank_00_model_states.pt was saved after step 19, zero_pp_rank_0\S* after step 7"),
    (not_finite, "zero: ln_f.bias has values that are not finite"),
    (evil, "refused, nothing of it was run"),
    (lambda f: (f.parent / "config.yaml").write_text(YAML.replace("n_layers: 2", "n_layers: 3")), "no tensor blocks.2"),
    (lambda f: (f.parent / "config.yaml").write_text(YAML.replace("context: 32", "context: 64")), "wpe.weight has sh"),
    (lambda f: (f.parent / "config.yaml").unlink(), "give the run's configuration with --config"),
    (lambda f: (f.parent / "config.yaml").write_text(YAML.replace("300", "299")), "vocabulary has 384 rows"),
])
def test_bad_zero_directories(spoil, message, deepspeed_classes, tokenizer, tmp_path):
    write_zero(tmp_path / "zero", 2, 2, deepspeed_classes)
    (tmp_path / "config.yaml").write_text(YAML)
    spoil(tmp_path / "zero")
    with pytest.raises(UserError, match=message) as error:
        import_model(str(tmp_path / "zero"), str(tmp_path / "out"), tokenizer=tokenizer)
    assert "\n" not in str(error.value)
    assert {p.name for p in tmp_path.iterdir()} <= {"zero", "config.yaml"}  # no output, no sentinel


@pytest.mark.parametrize(("optimizer", "step"), [
    ({"state": {0: {"step": 3}}}, 3), ({"state": {}, "param_groups": [{"step": 4}]}, 4), ({"state": {}}, None),
    ({"state": {0: {"step": "x"}}}, None), ([{"exp_avg": 1}], None), (None, None)])
def test_steps_are_counted_by_tensor_or_by_group(optimizer, step):
    assert _step(optimizer) == step


def test_latest_cannot_lead_elsewhere(tokenizer, tmp_path):
    (tmp_path / "zero").mkdir()
    (tmp_path / "zero" / "latest").write_text("../elsewhere")
    with pytest.raises(UserError, match="which is no folder there"):
        import_model(str(tmp_path / "zero"), str(tmp_path / "out"), tokenizer=tokenizer)


@pytest.mark.long
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_what_a_deepspeed_engine_saved(stage, tokenizer, tmp_path):
    """Against DeepSpeed's own zero_to_fp32, two ranks."""
    pytest.importorskip("deepspeed", reason="the deepspeed package is not installed")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m",
               "tests.deepspeed_save_worker", str(stage), str(tmp_path / "zero")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"})
    assert done.returncode == 0, done.stderr[-3000:]
    (tmp_path / "config.yaml").write_text(YAML)
    path = import_model(str(tmp_path / "zero"), str(tmp_path / "out"), tokenizer=tokenizer).path
    expected, found = torch.load(tmp_path / "zero" / "expected.pt", weights_only=True), load_tensors(path)
    assert {f"model.{name}" for name in expected} == found.keys()
    assert all(torch.equal(found[f"model.{name}"], value) for name, value in expected.items())


class AsEarlyPython311:
    """Pickled as getattr(holder, name), as Python 3.11.0 to 3.11.3 does with an enum's member."""

    def __init__(self, holder, name):
        self.call = getattr, (holder, name)

    def __reduce__(self):
        return self.call


def test_an_enum_of_early_python_3_11_is_read_and_no_other_attribute(deepspeed_classes, tmp_path):
    stage = deepspeed_classes[0]
    pickled = {"good": (stage, "gradients"), "dunder": (stage, "__class__"), "other": (torch.Size, "count")}
    for name, (holder, attribute) in pickled.items():
        torch.save({"zero_stage": AsEarlyPython311(holder, attribute)}, tmp_path / f"{name}.pt")
    assert read_torch(tmp_path / "good.pt", STAND_INS)["zero_stage"] == 2
    for name in ("dunder", "other"):
        with pytest.raises(UserError, match="nothing of it was run"):
            read_torch(tmp_path / f"{name}.pt", STAND_INS)
