"""Directories: complete or not, latest, best, retention, and what the messages name."""

import json
import os

import pytest
import torch

from gptdist import checkpoint
from gptdist.checkpoint import layout
from gptdist.errors import UserError


def save(root, step, val_loss=None):
    files = {"train_state.json": json.dumps({"step": step, "val_loss": val_loss}).encode(), "tokenizer/merges": b"ab"}
    return checkpoint.save(root, step, {"w": torch.full((64,), float(step))}, files)


def names(paths):
    return [path.name for path in paths]


def test_complete_and_files(tmp_path):
    path = save(tmp_path, 40, 1.5)
    manifest = checkpoint.complete(path)
    assert manifest.step == 40
    assert set(manifest.files) == {"shard-00000.safetensors", "index.json", "train_state.json", "tokenizer/merges"}
    assert checkpoint.read_train_state(path) == {"step": 40, "val_loss": 1.5}
    assert checkpoint.read_file(path, "tokenizer/merges") == b"ab"
    with pytest.raises(UserError, match=r"it has no config\.yaml"):
        checkpoint.read_file(path, "config.yaml")


@pytest.mark.parametrize("name", ["shard-00000.safetensors", "tokenizer/merges"])
def test_truncated_or_absent_file_is_named(tmp_path, name):
    path = save(tmp_path, 40)
    os.truncate(path / name, 1)
    with pytest.raises(UserError, match=rf"{name} has 1 bytes, expected \d+"):
        checkpoint.load(path, {"w": torch.zeros(64)})
    (path / name).unlink()
    with pytest.raises(UserError, match=f"{name}: No such file"):
        checkpoint.complete(path)


@pytest.mark.parametrize("name", ["shard-00000.safetensors", "tokenizer/merges", "index.json", "train_state.json"])
def test_altered_byte_is_named(tmp_path, name):
    path = save(tmp_path, 40)
    checkpoint.verify(path)
    checkpoint.verify_together(path)
    data = bytearray((path / name).read_bytes())
    data[-1] ^= 1
    (path / name).write_bytes(data)
    checkpoint.complete(path)
    with pytest.raises(UserError, match=f"{name}: its checksum is wrong"):
        checkpoint.verify_together(path)
    found = []
    for rank in range(3):
        try:
            checkpoint.verify(path, rank, 3)
        except UserError:
            found.append(rank)
    assert len(found) == 1, "exactly one rank hashes the bad file"


def test_manifest_missing_or_unusable(tmp_path):
    path = save(tmp_path, 40)
    manifest = path / "MANIFEST.json"
    text = manifest.read_text()
    for content, expected in [
        (text.replace('"format": 1', '"format": 2'), "checkpoint format 2; this version of gptdist reads format 1"),
        (text.replace('"format": 1', '"format": true'), "checkpoint format True"),
        (text.replace("tokenizer/merges", "../../merges"), r"bad entry '\.\./\.\./merges'"),
        (text.replace('"index.json"', '"indices.json"'), "lacks a step"),
        (text[:-9], "is not JSON"),
        ("[]", "is not a table"),
    ]:
        manifest.write_text(content)
        with pytest.raises(UserError, match=expected):
            checkpoint.complete(path)
    manifest.unlink()
    with pytest.raises(UserError, match=r"step-00000040: MANIFEST\.json: No such file"):
        checkpoint.load(path, {"w": torch.zeros(64)})


def test_scan_latest_best(tmp_path):
    assert checkpoint.scan(tmp_path / "none") == ([], [])
    for step, loss in [(9, 2.0), (10, 1.0), (20, 1.0), (100_000_000, 3.0), (30, None), (40, float("nan"))]:
        save(tmp_path, step, loss)
    (tmp_path / "step-00000010" / "MANIFEST.json").unlink()
    (tmp_path / ".tmp-step-00000050-aa").mkdir()
    (tmp_path / "notes.txt").write_text("")
    good, bad = checkpoint.scan(tmp_path)
    assert names(good) == ["step-00000009", "step-00000020", "step-00000030", "step-00000040", "step-100000000"]
    assert [(path.name, "MANIFEST.json" in why) for path, why in bad] == [("step-00000010", True)]
    assert checkpoint.latest(tmp_path).name == "step-100000000"
    assert checkpoint.best(tmp_path).name == "step-00000020"


def test_resolve(tmp_path):
    root = tmp_path / "run" / "checkpoints"
    first, last = save(root, 1, 1.0), save(root, 2, 2.0)
    assert checkpoint.resolve(first) == first
    assert checkpoint.resolve(tmp_path / "run") == checkpoint.resolve(root) == last
    assert checkpoint.resolve(tmp_path / "run", "best") == first
    (last / "shard-00000.safetensors").unlink()
    assert checkpoint.resolve(tmp_path / "run") == first
    with pytest.raises(UserError, match=r"step-00000002: shard-00000\.safetensors: No such file"):
        checkpoint.resolve(last)
    (first / "MANIFEST.json").unlink()
    with pytest.raises(UserError, match=r"no complete step-\* directory \(2 incomplete, the last one: .*step-00000002"):
        checkpoint.resolve(tmp_path / "run")
    with pytest.raises(UserError, match="is not a directory"):
        checkpoint.resolve(tmp_path / "nowhere")
    save(tmp_path / "unscored", 1)
    with pytest.raises(UserError, match="records a val_loss"):
        checkpoint.resolve(tmp_path / "unscored", "best")


def test_prune(tmp_path):
    for step in range(1, 7):
        save(tmp_path, step, abs(step - 2.0))
    (tmp_path / "step-00000003" / "index.json").unlink()
    removed = checkpoint.prune(tmp_path, keep_last=2)
    assert names(removed) == ["step-00000001", "step-00000004"]
    assert sorted(names(tmp_path.iterdir())) == ["step-00000002", "step-00000003", "step-00000005", "step-00000006"]
    assert names(checkpoint.prune(tmp_path, keep_last=1, keep_best=False)) == ["step-00000002", "step-00000005"]
    with pytest.raises(UserError, match="keep_last is 0"):
        checkpoint.prune(tmp_path, keep_last=0)


def test_an_interrupted_removal_is_not_a_checkpoint(tmp_path, monkeypatch):
    for step in (1, 2):
        save(tmp_path, step)
    monkeypatch.setattr(layout.shutil, "rmtree", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        checkpoint.prune(tmp_path, keep_last=1)
    monkeypatch.undo()
    good, bad = checkpoint.scan(tmp_path)
    assert (names(good), bad) == (["step-00000002"], [])
    assert len(checkpoint.clean_stale(tmp_path)) == 1
    assert names(tmp_path.iterdir()) == ["step-00000002"]


def test_the_last_complete_checkpoint_stays_beside_newer_damaged_ones(tmp_path):
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    os.truncate(tmp_path / "step-00000003" / "shard-00000.safetensors", 10)
    (tmp_path / "step-00000004" / "index.json").unlink()
    assert names(checkpoint.prune(tmp_path, keep_last=1, keep_best=False)) == ["step-00000001"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000003", "step-00000004"]
    assert checkpoint.prune(tmp_path, keep_last=1, keep_best=False) == []


def test_set_aside_frees_the_step(tmp_path):
    path = save(tmp_path, 40)
    (path / "index.json").unlink()
    moved = checkpoint.set_aside(path)
    assert moved.name.startswith("damaged-step-00000040-")
    save(tmp_path, 40)
    checkpoint.clean_stale(tmp_path)
    assert moved.exists()
    assert names(checkpoint.scan(tmp_path)[0]) == ["step-00000040"]
