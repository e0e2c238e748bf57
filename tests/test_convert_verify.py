"""`gptdist verify`: what is wrong is named, from a flipped byte to a NaN."""

import json

import pytest
import torch

from gptdist.checkpoint import load_tensors, resolve
from gptdist.checkpoint.files import write_file
from gptdist.checkpoint.index import Chunk, Entry, encode
from gptdist.checkpoint.shards import Part, write_shard
from gptdist.checkpoint.store import seal
from gptdist.checkpoint.stream import READ_BYTES, TensorReader, write_checkpoint
from gptdist.checkpoint.verify_values import verify_values
from gptdist.cli import main
from gptdist.errors import UserError
from tests.training import run_tiny


@pytest.fixture(scope="module")
def run(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("verify") / "run"
    run_tiny(dataset, folder, "--train.stop_at=1")
    return folder


def test_a_trained_run_is_right(run, capsys):
    found = verify_values(resolve(run))
    assert found.optimizer
    assert found.step == 1
    assert main(["verify", str(run), "--which", "best"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert "step-00000001: all right: step 1" in out
    assert "with optimizer" in out


def spoiled(run, folder, spoil):
    """A copy of the run's checkpoint after `spoil(tensors, files)`; its checksums are right."""
    source = resolve(run)
    tensors = load_tensors(source)
    names = ["config.yaml", "train_state.json", "tokenizer/tokenizer.json", "tokenizer/tokenizer.tiktoken"]
    files = {name: (source / name).read_bytes() for name in names}
    spoil(tensors, files)
    parts = [Part(key, t.dtype, tuple(t.shape), lambda t=t: t) for key, t in tensors.items()]
    write_checkpoint(folder, 1, parts, files)
    return folder


def set_value(key, index, value):
    def spoil(tensors, files):
        tensors[key][index] = value
    return spoil


def replace(key, make):
    def spoil(tensors, files):
        tensors[key] = make(tensors[key])
    return spoil


def extra(key):
    return lambda tensors, files: tensors.update({key: torch.zeros(2)})


def without(*keys):
    def spoil(tensors, files):
        for key in keys:
            del tensors[key]
    return spoil


def file(name, old, new):
    def spoil(tensors, files):
        assert old in files[name]
        files[name] = files[name].replace(old, new)
    return spoil


W = "blocks.1.mlp.fc.weight"


@pytest.mark.parametrize(("spoil", "message"), [
    (set_value(f"model.{W}", (3, 5), float("nan")),
     f"model.{W} (shard-00000.safetensors) has 1 values that are not finite, the first at [3, 5]: nan"),
    (set_value(f"optim.{W}.exp_avg_sq", (0, 0), float("-inf")), f"optim.{W}.exp_avg_sq (shard-00000.safetensors) has"),
    (set_value(f"optim.{W}.step", (), float("nan")), "the first at []: nan"),
    (without("model.ln_f.weight"), "no tensor model.ln_f.weight (1 missing), which the model of config.yaml has"),
    (extra("model.more"), "model.more (1 such) is no tensor of the model of config.yaml"),
    (replace(f"model.{W}", lambda t: t[:-1]), f"model.{W} (shard-00000.safetensors) has shape (127, 32), config.yaml "
                                              f"gives (128, 32)"),
    (replace(f"model.{W}", torch.Tensor.bfloat16), "is torch.bfloat16, expected torch.float32"),
    (without(f"optim.{W}.exp_avg"), f"optim.{W}: the optimizer's slots are ['exp_avg_sq', 'step']"),
    (without(*(f"optim.{W}.{slot}" for slot in ("exp_avg", "exp_avg_sq", "step"))), "slots are missing"),
    (extra("optim.blocks.9.x.exp_avg"), "optim.blocks.9.x.*: the model of config.yaml has no such parameter"),
    (replace(f"optim.{W}.exp_avg", lambda t: t.t()), "has shape (32, 128)"),
    (file("config.yaml", b"n_layers: 2", b"n_layers: 3"), "no tensor model.blocks.2"),
    (file("config.yaml", b"vocab_size: 257", b"vocab_size: 258"), "its tokenizer has 257 ids, its model.vocab_size is"),
    (file("train_state.json", b'"step": 1', b'"step": 2'), "train_state.json says step 2, MANIFEST.json step 1"),
])
def test_what_is_wrong_is_named(spoil, message, run, tmp_path, capsys):
    path = spoiled(run, tmp_path / "checkpoint", spoil)
    assert main(["verify", str(path)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_weights_only_is_right(run, tmp_path):
    def spoil(tensors, files):
        for key in [key for key in tensors if key.startswith("optim.")]:
            del tensors[key]

    assert not verify_values(spoiled(run, tmp_path / "checkpoint", spoil)).optimizer


def test_a_flipped_byte(run, tmp_path):
    path = spoiled(run, tmp_path / "checkpoint", lambda tensors, files: None)
    shard = path / "shard-00000.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(UserError, match=r"shard-00000.safetensors: its checksum is wrong"):
        verify_values(path)


def test_a_missing_file_and_a_newer_format(run, tmp_path):
    path = spoiled(run, tmp_path / "checkpoint", lambda tensors, files: None)
    manifest = json.loads((path / "MANIFEST.json").read_text())
    (path / "MANIFEST.json").write_text(json.dumps(manifest | {"format": 2}))
    with pytest.raises(UserError, match="checkpoint format 2"):
        verify_values(path)
    (path / "MANIFEST.json").write_text(json.dumps(manifest))
    (path / "config.yaml").unlink()
    with pytest.raises(UserError, match=r"config.yaml: No such file"):
        verify_values(path)


def test_boxes_cover_a_large_tensor_once(tmp_path):
    """A tensor of more than READ_BYTES comes in pieces of whole rows, at their offsets."""
    rows = READ_BYTES // 4000 + 1000
    value = torch.arange(rows * 1000, dtype=torch.int32).view(rows, 1000)
    write_checkpoint(tmp_path / "c", 0, [Part("x", value.dtype, tuple(value.shape), lambda: value)], {})
    reader, seen = TensorReader(tmp_path / "c"), 0
    for _, offset, box in reader.boxes("x"):
        assert offset == (seen, 0)
        assert box.nbytes <= READ_BYTES
        assert torch.equal(box, value[seen:seen + len(box)])
        seen += len(box)
    assert seen == rows
    assert torch.equal(reader.read("x"), value)


def test_a_tensor_in_several_files_is_read_whole(tmp_path):
    """As ranks save it: one file each, boxes that cut both dimensions."""
    value = torch.arange(24.0).view(6, 4)
    spans = [((0, 0), (4, 4)), ((4, 0), (2, 1)), ((4, 1), (2, 3))]
    path, records, chunks = tmp_path / "c", {}, []
    path.mkdir()
    for number, (offset, shape) in enumerate(spans):
        name, key = f"shard-{number:05d}.safetensors", f"x@{number}"
        box = value[offset[0]:offset[0] + shape[0], offset[1]:offset[1] + shape[1]]
        records[name] = write_shard(path / name, [Part(key, box.dtype, shape, lambda box=box: box)])
        chunks.append(Chunk(offset, shape, name, key))
    index = encode({"x": Entry(value.dtype, (6, 4), tuple(chunks))})
    seal(path, 0, records | {"index.json": write_file(path / "index.json", [index])}, {})
    reader = TensorReader(path)
    assert torch.equal(reader.read("x"), value)
    again = torch.zeros(6, 4)
    for _, (row, column), box in reader.boxes("x"):
        again[row:row + box.shape[0], column:column + box.shape[1]] += box
    assert torch.equal(again, value)
