"""Readers of foreign bytes: tests/fuzzing.py runs them in a process of bounded memory; here what it found once."""

import json
import lzma
import subprocess
import sys

import pytest
import torch

from gptdist import config as config_module
from gptdist.checkpoint import layout, load_tensors
from gptdist.checkpoint.restore import load_model
from gptdist.config import parse_yaml
from gptdist.convert.importer import import_model
from gptdist.data.read import DocumentReader, ReadSettings
from gptdist.errors import UserError
from tests import fuzzing
from tests.conftest import ROOT


def fuzz(*words: str, timeout_s: int) -> None:
    done = subprocess.run([sys.executable, "-m", "tests.fuzzing", *words], cwd=ROOT, capture_output=True, text=True,
                          timeout=timeout_s, env=dict(fuzzing.os.environ, OMP_NUM_THREADS="1", MALLOC_ARENA_MAX="2"))
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]


def test_readers_answer_or_raise_our_errors():
    fuzz("--examples", "8", timeout_s=300)


@pytest.mark.long
@pytest.mark.parametrize("name", list(fuzzing.TARGETS))
def test_readers_answer_or_raise_our_errors_for_long(name):
    fuzz("--targets", name, "--examples", "2000", "--seed", "1", timeout_s=3600)


BAD_READERS = '''
import os, pickle
from tests import fuzzing

bad = {
    "open for writing": lambda: open("/dev/shm/gptdist-fuzz", "w").close(),
    "os.system": lambda: os.system("true"),
    "MemoryError": lambda: bytearray(1 << 32),
    "ZeroDivisionError": lambda: 1 / 0,
    "pickle.find_class": lambda: pickle.loads(b"cos\\nsystem\\n."),
    "TooLong": lambda: [None for i in iter(int, 1) if i],
}
chosen = lambda: None
fuzzing.FILES["bad"] = lambda: {"a.json": b"{}"}
fuzzing.TARGETS["bad"] = fuzzing.Target(lambda folder: None, lambda folder: chosen())
harness = fuzzing.Harness(["bad"])
fuzzing.EXAMPLE_S = 1
for why, chosen in bad.items():
    try:
        harness.check("bad", {"a.json": b"x"})
    except AssertionError as error:
        assert str(error).startswith("bad:   a.json: b'x'") and why in str(error), error
    else:
        raise SystemExit(f"{why} was not noticed")
'''


def test_what_no_reader_may_do_is_noticed():
    """In a process of its own: an audit hook and a limit of memory stay."""
    done = subprocess.run([sys.executable, "-c", BAD_READERS], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


# What it found


def test_aliases_that_stand_for_too_much(tmp_path):
    (tmp_path / "run.yaml").write_text("model:\n  " + fuzzing.BOMB.replace("\n", "\n  "))
    with pytest.raises(UserError, match="stands for more than 100,000 values"):
        config_module.load(str(tmp_path / "run.yaml"))
    with pytest.raises(UserError, match="stands for more than"):
        parse_yaml("a: &a [*a]", "x")
    assert parse_yaml("a: &a [1]\nb: *a", "x") == {"a": [1], "b": [1]}


@pytest.mark.parametrize("text", ["a: 2026-13-45", "[" * 1_500, "a: [", "!!python/object/apply:os.system ['x']"])
def test_what_is_no_yaml(text):
    with pytest.raises(UserError, match="x is not valid YAML"):
        parse_yaml(text, "x")


@pytest.fixture
def checkpoint(tmp_path):
    fuzzing.seed_checkpoint(tmp_path)
    return tmp_path / "c"


def rewrite(checkpoint, name, change):
    """Change a file, and make the manifest agree with it."""
    files = {f"c/{path.relative_to(checkpoint).as_posix()}": path.read_bytes() for path in checkpoint.rglob("*")
             if path.is_file()}
    files[f"c/{name}"] = change(files[f"c/{name}"])
    for path, data in fuzzing.reseal_checkpoint(files).items():
        (checkpoint.parent / path).write_bytes(data)


def test_an_index_that_claims_more_than_its_files_have(checkpoint):
    def change(data):
        index = json.loads(data)
        entry = index["tensors"]["model.wte.weight"]
        entry["shape"] = [2**58]
        entry["chunks"] = [entry["chunks"][0] | {"offset": [0], "shape": [2**58]}]
        return json.dumps(index).encode()

    rewrite(checkpoint, "index.json", change)
    with pytest.raises(UserError, match=r"claims more bytes in shard-00000\.safetensors than it has"):
        load_tensors(checkpoint)


@pytest.mark.parametrize(("old", "new", "message"), [
    (b"n_layers: 1", b"n_layers: 1000000000", "has 1000000000 blocks, it has"),
    (b"width: 8", b"width: 80000000", r"config\.yaml gives \(384, 80000000\)"),
    (b"model:", b"[]\n#", "holds a list, expected a run's configuration|not valid YAML"),
])
def test_a_configuration_that_asks_for_more_than_the_checkpoint_has(checkpoint, old, new, message):
    rewrite(checkpoint, "config.yaml", lambda data: data.replace(old, new, 1))
    with pytest.raises(UserError, match=message):
        load_model(checkpoint)


def test_tables_of_a_checkpoint_that_are_none(checkpoint):
    rewrite(checkpoint, "train_state.json", lambda data: b"[1]")
    with pytest.raises(UserError, match=r"train_state\.json is not a JSON table"):
        layout.read_train_state(checkpoint)


@pytest.mark.parametrize(("key", "value"), [("n_layer", 10**9), ("n_embd", 10**40), ("layer_norm_epsilon", 10**400)])
def test_a_foreign_configuration_of_impossible_size(tmp_path, key, value):
    (source := tmp_path / "hf").mkdir()
    fuzzing.seed_hf(source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(UserError, match=r"config\.json"):
        import_model(str(source), str(tmp_path / "out"))


@pytest.mark.parametrize("value", [torch.zeros(1).expand(1 << 40), torch.zeros(257, 8, device="meta"),
                                   torch.zeros(257, 8).to_sparse()], ids=["expanded", "meta", "sparse"])
def test_a_tensor_that_its_file_does_not_hold(tmp_path, value):
    files = fuzzing.nanogpt_files()
    files["ckpt.pt"].value["model"]["transformer.wte.weight"] = value
    (tmp_path / "ckpt.pt").write_bytes(files["ckpt.pt"].encode())
    with pytest.raises(UserError, match=r"transformer\.wte\.weight is no plain tensor that the file holds|no file of"):
        import_model(str(tmp_path), str(tmp_path / "out"), tokenizer="bytes")


def test_an_xz_file_that_asks_for_a_dictionary_beyond_all_memory(tmp_path, monkeypatch):
    path = tmp_path / "a.txt.xz"
    path.write_bytes(lzma.compress(b"text"))

    def no_memory(*_):
        raise MemoryError

    monkeypatch.setattr(lzma.LZMAFile, "read", no_memory)
    with pytest.raises(UserError, match="damaged xz file"):
        list(DocumentReader(path, ReadSettings("text", None, 100)))
