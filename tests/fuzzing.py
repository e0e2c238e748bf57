"""Every reader of bytes that others wrote, fed with what is nearly right and what is hostile.

    python -m tests.fuzzing                                  # all targets, 25 examples each
    python -m tests.fuzzing --examples 2000 --seed 7         # longer, other examples
    python -m tests.fuzzing --targets hf nanogpt --minutes 30   # until the time is up
    python -m tests.fuzzing --targets jsonl --atheris -runs=100000   # guided by coverage (pip install atheris)

A reader may answer or raise one of gptdist.errors; nothing else. While it reads, this process may take MEMORY_BYTES
more than it has, EXAMPLE_S seconds, and neither start a program, open a connection, find a class for a pickle, nor
write outside the example's folder. The exit code is 1 where one of this happened, with the example that shows it.

A valid set of files is changed in one to three places: in its values (JSON, YAML, the header of safetensors, what
torch.save wrote) or its bytes; manifests and checksums are then made right again in every other example, so that what
lies behind them is reached as well.
"""

import argparse
import contextlib
import faulthandler
import hashlib
import io
import json
import os
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from gptdist.errors import ActionableError

MEMORY_BYTES = 1 << 30
EXAMPLE_S = 30
FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect",
             "socket.bind", "pickle.find_class", "ctypes.dlopen", "marshal.loads", "code.__new__")


# Files as values: what is changed before it becomes bytes


@dataclass
class Json:
    value: Any

    def encode(self) -> bytes:
        return json.dumps(self.value).encode()


@dataclass
class Lines:
    """JSONL."""

    value: list[Any]

    def encode(self) -> bytes:
        rows = self.value if isinstance(self.value, list) else [self.value]
        return "".join(json.dumps(row) + "\n" for row in rows).encode()


@dataclass
class Yaml:
    value: Any

    def encode(self) -> bytes:
        return yaml.safe_dump(self.value).encode("utf-8", "surrogatepass")


@dataclass
class Safetensors:
    value: Any  # the header
    data: bytes

    def encode(self) -> bytes:
        header = json.dumps(self.value).encode()
        return struct.pack("<Q", len(header)) + header + self.data


@dataclass
class Torch:
    value: Any
    zipped: bool = True

    def encode(self) -> bytes:
        file = io.BytesIO()
        torch.save(self.value, file, _use_new_zipfile_serialization=self.zipped)
        return file.getvalue()


Files = dict[str, Any]  # name -> bytes or one of the above


def parsed(folder: Path) -> Files:
    """The files of a folder, those of known formats as values."""
    return {path.relative_to(folder).as_posix(): parsed_file(path) for path in sorted(folder.rglob("*"))
            if path.is_file()}


def parsed_file(path: Path) -> Any:
    data = path.read_bytes()
    match path.suffix:
        case ".json":
            return Json(json.loads(data))
        case ".jsonl":
            return Lines([json.loads(line) for line in data.splitlines()])
        case ".yaml":
            return Yaml(yaml.safe_load(data))
        case ".safetensors":
            size = struct.unpack("<Q", data[:8])[0]
            return Safetensors(json.loads(data[8:8 + size]), data[8 + size:])
    return data


# Changes. `choose(n)` gives a number below n: hypothesis's, a random generator's or atheris's

Choose = Callable[[int], int]

NUMBERS = (0, 1, -1, 2, 3, 7, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32, 2**53, 2**60, 2**63 - 1, 2**63, 2**64,
           10**30, 10**400, 0.0, -0.5, 1.5, 1e-300, 1e308, float("inf"), float("nan"))
TEXTS = ("", "x", "0", "null", "../x", "../../../../etc/passwd", "/etc/passwd", "a/b", "a\0b", "\ud800", "\n",
         "x" * 300, "é" * 70_000, "float32", "F32", "F8_E8M0", "__metadata__", "model.wte.weight", "<|endoftext|>",
         "(a+)+$", "[", "%s", "{0.__class__}", "$HOME", "2026-13-45", "-1", "NaN")
OTHERS = (None, True, False, [], {}, [[]], [None], {"": None}, [1, 2], {"a": 1}, {"x": {"x": {"x": []}}},
          list(range(300)))
BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 10)}]\n" for i in range(12))
WHOLE = (b"", b"\0", b"\xff\xfe\0\0", b"null", b"[]", b"{}", b"[" * 100_000, b'{"a":' * 100_000, b"1" * 5000,
         b"\n" * 5000, b"x" * 100_000, b" " * 200_000, (2**60).to_bytes(8, "little") + b"{}",
         (2).to_bytes(8, "little") + b"{}",
         b"PK\x03\x04" + b"\0" * 60, b"\x80\x04\x95", b"PAR1" + b"\0" * 40 + b"PAR1", b"\x1f\x8b\x08" + b"\0" * 20,
         b"\xfd7zXZ\0" + b"\0" * 40, b"BZh9" + b"\0" * 30, b"\x28\xb5\x2f\xfd" + b"\xff" * 30, BOMB.encode(),
         b"model: " + BOMB.replace("\n", "\n  ").encode(), b"a: &a [*a]\n", b"a: 2026-13-45\n", b"? {a: b}\n: c\n",
         b"model: !!python/object/apply:os.system ['touch pwned']\n", b"%YAML 9.9\n---\n", b"a: 0b2\n", b"- " * 20_000,
         b"cos\nsystem\n(S'touch pwned'\ntR.")


def tensors() -> list[torch.Tensor]:
    """What a state dict may hold and weights are not."""
    return [torch.zeros(()), torch.zeros(0), torch.zeros(1).expand(1 << 40), torch.zeros(1 << 12, device="meta"),
            torch.zeros(3, 3).to_sparse(), torch.full((4,), float("nan")), torch.arange(5),
            torch.zeros(4, dtype=torch.bool),
            torch.zeros(2, dtype=torch.complex64), torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8),
            torch.nn.Parameter(torch.ones(2)), torch.zeros(5, 7)[::2, ::3]]


def strange(choose: Choose, with_tensors: bool) -> Any:
    pool: list[Any] = [*NUMBERS, *TEXTS, *OTHERS]
    if with_tensors:
        pool += tensors()
    return pool[choose(len(pool))]


def changed_value(value: Any, choose: Choose, with_tensors: bool) -> Any:
    """`value` with one place in it replaced, removed, doubled or renamed."""
    if isinstance(value, dict) and value and choose(8):
        keys = list(value)
        key = keys[choose(len(keys))]
        match choose(12):
            case 0:
                return {k: v for k, v in value.items() if k != key}
            case 1:
                return {(TEXTS[choose(len(TEXTS))] if k == key else k): v for k, v in value.items()}
            case 2:
                return value | {TEXTS[choose(len(TEXTS))]: value[key]}
        return value | {key: changed_value(value[key], choose, with_tensors)}
    if isinstance(value, list) and value and choose(8):
        at = choose(len(value))
        match choose(12):
            case 0:
                return value[:at] + value[at + 1:]
            case 1:
                return value[:at] + [value[at]] * 2 + value[at + 1:]
        return [*value[:at], changed_value(value[at], choose, with_tensors), *value[at + 1:]]
    if isinstance(value, int) and not isinstance(value, bool) and choose(2):
        return (value + 1, value - 1, -value, value * 2, value << 40)[choose(5)]
    return strange(choose, with_tensors)


def changed_bytes(data: bytes, choose: Choose) -> bytes:
    at, n = choose(len(data) + 1), 1 + choose(40)
    match choose(7):
        case 0:
            return WHOLE[choose(len(WHOLE))]
        case 1:
            return data[:at]
        case 2:
            return data[:at] + data[at + n:]
        case 3:
            return data[:at] + data[at:at + n] * 2 + data[at + n:]
        case 4:
            return data[:at] + bytes([choose(256)]) * n + data[at + n:]
        case 5:
            return data[:at] + (2**63 - 1 >> choose(60)).to_bytes(8, ("little", "big")[choose(2)]) + data[at + 8:]
    return data[:at] + bytes(choose(256) for _ in range(1 + choose(3))) + data[at + 1:]


def changed(files: Files, raw: dict[str, bytes], choose: Choose) -> dict[str, bytes]:
    """raw: the bytes of the files, which those keep that are not changed."""
    files, result = dict(files), dict(raw)
    for _ in range(1 + choose(3)):
        name = sorted(files)[choose(len(files))]
        file = files[name]
        if isinstance(file, bytes) or not choose(4):
            files[name] = result[name] = changed_bytes(result[name], choose)
            continue
        value = changed_value(file.value, choose, isinstance(file, Torch))
        files[name] = type(file)(**vars(file) | {"value": value})
        result[name] = encoded(files[name])
    return result


def encoded(file: Any) -> bytes:
    if isinstance(file, bytes):
        return file
    try:
        return file.encode()
    except (ValueError, TypeError, RuntimeError, yaml.YAMLError):  # a value that this format does not have
        return b"?"


# What is read


@dataclass(frozen=True)
class Target:
    """A valid set of files, how it is read, and how checksums are made to agree with it."""

    seed: Callable[[Path], None]  # writes it into an empty folder
    read: Callable[[Path], None]
    reseal: Callable[[dict[str, bytes]], dict[str, bytes]] = lambda files: files


TARGETS: dict[str, Target] = {}


def target(seed: Callable[[Path], None], reseal: Callable = lambda files: files) -> Callable:
    def register(read: Callable[[Path], None]) -> Callable[[Path], None]:
        TARGETS[read.__name__.removeprefix("read_")] = Target(seed, read, reseal)
        return read
    return register


def write_files(**files: str | bytes) -> Callable[[Path], None]:
    """name__suffix=content."""
    def seed(folder: Path) -> None:
        for name, content in files.items():
            path = folder / name.replace("__", ".")
            path.write_bytes(content.encode() if isinstance(content, str) else content)
    return seed


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def seed_dataset(folder: Path) -> None:
    import numpy as np

    from gptdist.data.tokenizer_build import build
    from gptdist.data.writer import write_dataset

    tokenizer = build("bytes")
    tokenizer.save(folder / "tokenizer")
    for split, n in (("train", 300), ("val", 40)):
        with write_dataset(folder / split, tokenizer_hash=tokenizer.hash, vocab_size=257, eot=256, shard_tokens=150,
                           loss_mask=split == "train") as writer:
            for start in range(0, n, 50):
                tokens = np.append(np.arange(start, start + 49) % 256, 256)
                writer.add(tokens, np.ones(50, np.uint8) if split == "train" else None)


def reseal_dataset(files: dict[str, bytes]) -> dict[str, bytes]:
    """meta.json with the sizes and checksums of the files that are there, where it still has their form."""
    files = dict(files)
    for split in ("train", "val"):
        try:
            meta = json.loads(files[f"{split}/meta.json"])
            for shard in meta["shards"]:
                for name in shard["files"]:
                    data = files[f"{split}/{name}"]
                    shard["files"][name] = {"size": len(data), "sha256": sha(data)}
            files[f"{split}/meta.json"] = json.dumps(meta).encode()
        except (ValueError, TypeError, KeyError, RecursionError):
            continue
    return files


@target(seed_dataset, reseal_dataset)
def read_dataset(folder: Path) -> None:
    import numpy as np

    from gptdist.data.format import TokenDataset, verify
    from gptdist.data.loader import PretrainSource, eval_batches
    from gptdist.tasks.pretrain import open_data

    train, val, tokenizer = open_data(str(folder))
    source = PretrainSource(train, context=8, seed=1, sequences_per_step=4, micro_batch=2, document_mask=True,
                            eot=tokenizer.eot)
    for step in range(3):
        source.step(step, step * 4)
    if val is not None:
        list(eval_batches(val, context=8, micro_batch=4))
    assert train.document_starts.dtype == np.int64
    for split in ("train", "val"):
        verify(folder / split)
    assert TokenDataset.open(folder / "train").meta.n_tokens == len(train)


def seed_checkpoint(folder: Path) -> None:
    from gptdist.data.tokenizer_build import build
    from tests.convert_models import random_checkpoint

    random_checkpoint(folder / "c", build("bytes"), width=8, n_heads=2, n_layers=1, context=8)


def reseal_checkpoint(files: dict[str, bytes]) -> dict[str, bytes]:
    """MANIFEST.json of the files that are there, and their checksums."""
    files = dict(files)
    with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
        manifest = json.loads(files["c/MANIFEST.json"])
        for name in manifest["files"]:
            data = files[f"c/{name}"]
            manifest["files"][name] = {"size": len(data), "sha256": sha(data)}
        files["c/MANIFEST.json"] = json.dumps(manifest).encode()
    return files


@target(seed_checkpoint, reseal_checkpoint)
def read_checkpoint(folder: Path) -> None:
    from gptdist.checkpoint import layout, load_tensors
    from gptdist.checkpoint.inspect import describe, print_description
    from gptdist.checkpoint.restore import load_model
    from gptdist.checkpoint.template import stored_template
    from gptdist.checkpoint.verify_values import verify_values
    from gptdist.trainer import TrainState

    path = folder / "c"
    for read in (lambda: load_tensors(path), lambda: TrainState.read(path), lambda: stored_template(path),
                 lambda: layout.best(folder), lambda: verify_values(path), lambda: layout.resolve(folder),
                 lambda: load_model(path, verify=False)[0](torch.zeros(1, 4, dtype=torch.int64))):
        with contextlib.suppress(ActionableError):  # each by itself
            read()
    with contextlib.redirect_stdout(io.StringIO()):
        print_description(describe(str(path)), tensors=True)


def seed_tokenizer(folder: Path) -> None:
    from gptdist.data.tokenizer_build import build
    from tests.convert_models import small_tokenizer

    small_tokenizer().save(folder / "bpe")
    build("char", ["hello wörld"]).save(folder / "char")


def reseal_tokenizer(files: dict[str, bytes]) -> dict[str, bytes]:
    """The hash of what is there, where that is a tokenizer at all."""
    from gptdist.data.tokenizer import CHAR_PATTERN, Tokenizer, class_of, read_ranks

    files = dict(files)
    with tempfile.TemporaryDirectory() as name:
        for kind in ("bpe", "char"):
            with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError, AttributeError, ActionableError):
                header = json.loads(files[f"{kind}/tokenizer.json"])
                (Path(name) / "ranks").write_bytes(files[f"{kind}/tokenizer.tiktoken"])
                ranks = read_ranks(Path(name) / "ranks", all_bytes=header["pattern"] != CHAR_PATTERN)
                made: Tokenizer = class_of(header["pattern"])(
                    name=header["name"], ranks=ranks, specials=header["specials"], pattern=header["pattern"])
                files[f"{kind}/tokenizer.json"] = json.dumps(header | {"hash": made.hash}).encode()
    return files


@target(seed_tokenizer, reseal_tokenizer)
def read_tokenizer(folder: Path) -> None:
    from gptdist.data.tokenizer import StreamDecoder, Tokenizer

    for kind in ("bpe", "char"):
        with contextlib.suppress(ActionableError):
            tokenizer = Tokenizer.load(folder / kind)
            ids = tokenizer.encode("hello hello" + "a" * 40)
            tokenizer.decode(ids)
            decoder = StreamDecoder(tokenizer)
            "".join(map(decoder.push, ids))
            assert max(ids) < tokenizer.vocab_size


def seed_foreign_tokenizers(folder: Path) -> None:
    from gptdist.convert.tokenizer import byte_characters, hugging_face_files, printable
    from tests.convert_models import small_tokenizer

    tokenizer = small_tokenizer()
    for name, content in hugging_face_files(tokenizer, 32).items():
        (folder / "hf").mkdir(exist_ok=True)
        (folder / "hf" / name).write_bytes(content)
    for name in ("vocab.json", "merges.txt"):
        (folder / "pair").mkdir(exist_ok=True)
        (folder / "pair" / name).write_bytes((folder / "hf" / name).read_bytes())
    vocab, merges = printable(tokenizer)
    (folder / "gpt2").mkdir()
    (folder / "gpt2" / "encoder.json").write_text(json.dumps(vocab))
    (folder / "gpt2" / "vocab.bpe").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    (folder / "ranks.tiktoken").write_bytes(tokenizer.files()["tokenizer.tiktoken"])
    assert len(byte_characters()) == 256


@target(seed_foreign_tokenizers)
def read_foreign_tokenizers(folder: Path) -> None:
    from gptdist.convert.tokenizer import find_tokenizer
    from gptdist.data.tokenizer_build import build

    for read in (lambda: find_tokenizer([folder / "hf"]), lambda: find_tokenizer([folder / "pair"]),
                 lambda: build(str(folder / "gpt2")), lambda: build(str(folder / "ranks.tiktoken"))):
        with contextlib.suppress(ActionableError):
            tokenizer = read()
            if tokenizer is not None:
                tokenizer.encode("hello hello" + "a" * 40)


def gpt2_state(transposed: bool) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """(config.json, tensors) of a tiny GPT-2 under the original names; transposed: as Hugging Face's Conv1D."""
    from gptdist.config import ModelConfig
    from gptdist.convert import gpt2

    config = ModelConfig(vocab_size=257, context=8, width=8, n_heads=2, n_layers=1)
    state = {}
    for name, shape in gpt2.plain_shapes(config, 257).items():
        value = torch.ones(shape) / 8
        state[gpt2.gpt2_name(name)] = value.t().contiguous() if transposed and ".h." in gpt2.gpt2_name(name) and (
            value.dim() == 2) else value
    return {"model_type": "gpt2", "vocab_size": 257, "n_positions": 8, "n_embd": 8, "n_head": 2, "n_layer": 1}, state


def seed_hf(folder: Path) -> None:
    from safetensors.torch import save_file

    from gptdist.convert.tokenizer import hugging_face_files
    from gptdist.data.tokenizer_build import build

    config, state = gpt2_state(True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(state, folder / "model.safetensors")
    for name, content in hugging_face_files(build("bytes"), 8).items():
        (folder / name).write_bytes(content)


@target(seed_hf)
def read_hf(folder: Path) -> None:
    from gptdist.convert.importer import import_model

    import_model(str(folder), str(folder / "out"))


def read_folder(name: str, files: Callable[[], Files], read: Callable[[Path], None]) -> None:
    """A target whose files are values that no reader here could parse back."""
    FILES[name] = files
    TARGETS[name] = Target(lambda folder: None, read)


FILES: dict[str, Callable[[], Files]] = {}


def hf_bin_files() -> Files:
    config, state = gpt2_state(True)
    return {"config.json": Json(config), "pytorch_model.bin": Torch(state)}


def hf_legacy_files() -> Files:
    config, state = gpt2_state(True)
    return {"config.json": Json(config), "pytorch_model.bin": Torch(state, zipped=False)}


def nanogpt_files() -> Files:
    _, state = gpt2_state(False)
    args = {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 8, "bias": True, "vocab_size": 257, "dropout": 0.0}
    return {"ckpt.pt": Torch({"model": state, "model_args": args, "iter_num": 3})}


def deepspeed_files(stage: int) -> Callable[[], Files]:
    def files() -> Files:
        from gptdist.config import ModelConfig
        from gptdist.convert import gpt2

        config = ModelConfig(vocab_size=257, context=8, width=8, n_heads=2, n_layers=1)
        shapes = gpt2.shapes(config)
        total = sum(torch.Size(shape).numel() for shape in shapes.values())
        model = {"module": {}, "param_shapes": [{name: torch.Size(shape) for name, shape in shapes.items()}],
                 "shared_params": {}, "frozen_param_shapes": None, "ds_config": {"zero_optimization": {"stage": stage}},
                 "global_steps": 8, "skipped_steps": 0}
        state: dict[str, Any] = {"zero_stage": stage, "partition_count": 1}
        steps = {"state": {0: {"step": torch.tensor(8.0)}}, "param_groups": [{"lr": 0.1}]}
        if stage == 3:
            state |= {"optimizer_state_dict": steps, "fp32_flat_groups": [torch.ones(total)]}
        else:
            state |= {"base_optimizer_state": steps, "single_partition_of_fp32_groups": [torch.ones(total)],
                      "param_alignment_paddings": [[0] * len(shapes)], "partition_count": [1]}
        first = "zero_pp_rank_0_" if stage == 3 else ""
        return {f"s/{first}mp_rank_00_model_states.pt": Torch(model), "latest": b"s",
                "s/zero_pp_rank_0_mp_rank_00_optim_states.pt": Torch({"optimizer_state_dict": state}),
                "config.yaml": Yaml({"model": {"vocab_size": 257, "context": 8, "width": 8, "n_heads": 2,
                                               "n_layers": 1}})}
    return files


def read_import(folder: Path) -> None:
    from gptdist.convert.importer import import_model

    import_model(str(folder), str(folder / "out"), tokenizer="bytes")


for _name, _files in (("hf_bin", hf_bin_files), ("hf_legacy", hf_legacy_files), ("nanogpt", nanogpt_files),
                      ("zero2", deepspeed_files(2)), ("zero3", deepspeed_files(3))):
    read_folder(_name, _files, read_import)


def seed_config(folder: Path) -> None:
    from gptdist.config import Config, from_dict, to_dict, to_yaml

    config = from_dict({"task": {"name": "pretrain"}, "data": {"mixture": [{"path": "a", "weight": 1}]}}, "seed")
    assert isinstance(config, Config)
    (folder / "whole.yaml").write_text(to_yaml(config))
    (folder / "small.yaml").write_text(yaml.safe_dump({"model": to_dict(config)["model"]}))
    (folder / "prepare.yaml").write_text("input: [a.txt]\noutput: out\ntokenizer: bytes\nrules: [gopher]\n")
    (folder / "template.yaml").write_text("turn: '{prompt} {answer}<|end|>'\nend: <|end|>\nstop: [x]\n")


@target(seed_config)
def read_config(folder: Path) -> None:
    from gptdist import config
    from gptdist.data.prepare_config import check, load_config
    from gptdist.data.templates import load_template

    for read in (lambda: config.load(str(folder / "whole.yaml")), lambda: config.load(str(folder / "small.yaml")),
                 lambda: check(load_config(str(folder / "prepare.yaml"), {})),
                 lambda: load_template(str(folder / "template.yaml"))):
        with contextlib.suppress(ActionableError):
            read()


def seed_documents(folder: Path) -> None:
    import bz2
    import gzip
    import lzma

    rows = "".join(json.dumps({"text": f"Document {i}, with some words. " * 3, "label": i}) + "\n" for i in range(8))
    plain = "A text.\n\nAnother one, longer. é\n" * 10
    for name, data in (("a.jsonl", rows), ("a.txt", plain)):
        (folder / name).write_text(data)
    for suffix, compress in ((".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)):
        (folder / f"b.jsonl{suffix}").write_bytes(compress(rows.encode()))
    with contextlib.suppress(ImportError):
        from gptdist.data.compressed import zstd_module

        (folder / "b.txt.zst").write_bytes(zstd_module(folder / "b.txt.zst").compress(plain.encode()))
    with contextlib.suppress(ImportError):
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"text": [f"row {i} of it" for i in range(40)], "n": list(range(40))}),
                            folder / "c.parquet", row_group_size=16)


@target(seed_documents)
def read_documents(folder: Path) -> None:
    from gptdist.data.read import DocumentReader, ReadSettings

    for path in sorted(folder.iterdir()):
        for on_bad in (None, lambda error: None):
            with contextlib.suppress(ActionableError):
                texts = list(DocumentReader(path, ReadSettings("text", None, 200), on_bad=on_bad))
                assert all(isinstance(text, str) for text in texts)


@target(write_files(
    a__csv="text,label\nhello,x\n\"a, b\",y\n", b__tsv="label\ttext\nx\thello\ny\tbye\n", c__txt="x\thello\ny\tbye\n",
    d__jsonl='{"text": "hello", "label": "x"}\n{"text": "bye", "label": 2}\n'))
def read_labelled(folder: Path) -> None:
    from gptdist.data.labelled import read_labelled, read_texts

    for path in sorted(folder.iterdir()):
        for read in (read_labelled, read_texts):
            with contextlib.suppress(ActionableError):
                read(path)


CONVERSATION = {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"},
                             {"role": "assistant", "content": "ho"}]}
ALPACA = {"instruction": "do", "input": "this", "output": "done"}
SHAREGPT = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]}
PAIR = {"prompt": "p", "chosen": "c", "rejected": "r"}


@target(write_files(a__json=json.dumps([CONVERSATION, ALPACA, SHAREGPT]), b__jsonl=json.dumps(ALPACA) + "\n",
                    c__jsonl=json.dumps(PAIR) + "\n" + json.dumps({k: [{"role": "user", "content": "p"}, {
                        "role": "assistant", "content": k}] for k in ("chosen", "rejected")}) + "\n"))
def read_conversations(folder: Path) -> None:
    from gptdist.data.instructions import read_conversations
    from gptdist.data.preference import read_preferences

    for path in sorted(folder.iterdir()):
        for read in (read_conversations, read_preferences):
            with contextlib.suppress(ActionableError):
                read(path)


@target(write_files(
    a__jsonl='{"ctx": "a", "endings": ["b", "c"], "label": 0}\n{"question": "a", "choices": ["b"], "label": "0"}\n',
    b__jsonl='{"question": {"stem": "a", "choices": [{"text": "b", "label": "A"}]}, "answerKey": "A"}\n',
    c__jsonl='{"question": "q", "answer": ["a", "b"]}\n', d__jsonl='{"text": "it ends here"}\n',
    e__jsonl='{"source": "a", "target": "b"}\n', f__jsonl='{"document": "a", "summary": "b"}\n', g__txt="a text\n",
    h__jsonl='{"input": "a", "output": "b"}\n"prompt"\n{"prompt": "x"}\n'))
def read_items(folder: Path) -> None:
    from gptdist.evaluate.items import read_task
    from gptdist.generate import read_examples, read_prompts

    for path in sorted(folder.iterdir()):
        for read in (read_task, lambda p: read_task(p, "cloze"), lambda p: read_task(p, skip_bad=True), read_prompts,
                     read_examples):
            with contextlib.suppress(ActionableError):
                read(str(path))


@target(write_files(metrics__jsonl='{"kind": "train", "step": 1, "loss": 2.0}\n{"kind": "eval", "step": 1}\n',
                    exit__json='{"code": 2, "rank": 1, "message": "m", "start": null, "time": 1e12}\n',
                    sweep__json='{"settings": {}, "runs": {}}', report__json='{"settings": {}}'))
def read_run(folder: Path) -> None:
    from gptdist.config import DataConfig, RunConfig
    from gptdist.faults import ExitRecord
    from gptdist.metrics import Metrics, plot_losses, read_rows

    ExitRecord(folder, 0).failure()
    for read in (lambda: read_rows(folder / "metrics.jsonl"), lambda: plot_losses(folder, folder / "loss.png"),
                 lambda: Metrics(folder, RunConfig(tensorboard=False), start_step=1, resolved={}).close()):
        with contextlib.suppress(ActionableError):
            read()
    assert DataConfig().path == ""


# Running them


class TooLong(BaseException):
    """Not an Exception: readers that catch those do not hide it."""


class Watched:
    """What the interpreter does while a reader runs (sys.addaudithook), in a folder."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.folder: str | None = None
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple) -> None:
        if self.folder is None:
            return
        if event in FORBIDDEN and not (event in ("code.__new__", "marshal.loads") or _imports()):
            self.seen.append(f"{event}{arguments!r:.200}")
        if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            path, mode, flags = os.fsdecode(arguments[0]), arguments[1] or "", arguments[2] or 0
            writes = any(c in mode for c in "wax+") or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if writes and not os.path.abspath(path).startswith(self.folder) and path != os.devnull and not _imports():
                self.seen.append(f"open for writing: {path}")


def _imports() -> bool:
    """Whether a module is being imported: that loads libraries and writes .pyc files."""
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


class Harness:
    """Runs one example after another; `check` raises AssertionError where a reader did what none may."""

    def __init__(self, names: list[str]):
        self.watched = Watched()
        self.seeds, self.raw = {}, {}
        for name in names:  # imports, caches and the valid files themselves
            self.seeds[name], self.raw[name] = self._seed(name)
            self.check(name, self.raw[name], valid=True)
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY_BYTES, resource.RLIM_INFINITY))
        signal.signal(signal.SIGALRM, self._too_long)

    def _seed(self, name: str) -> tuple[Files, dict[str, bytes]]:
        if name in FILES:
            files = FILES[name]()
            return files, {file: encoded(value) for file, value in files.items()}
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            TARGETS[name].seed(folder)
            files = parsed(folder)
            return files, {file: (folder / file).read_bytes() for file in files}

    def _too_long(self, *_: object) -> None:
        raise TooLong

    def example(self, name: str, choose: Choose) -> None:
        files = changed(self.seeds[name], self.raw[name], choose)
        if choose(2):
            files = TARGETS[name].reseal(files)
        self.check(name, files)

    def check(self, name: str, files: dict[str, bytes], valid: bool = False) -> None:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary).resolve() / "files"
            for file, data in files.items():
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                (folder / file).write_bytes(data)
            self.watched.seen.clear()
            self.watched.folder = str(folder.parent)
            signal.alarm(0 if valid else EXAMPLE_S)
            faulthandler.dump_traceback_later(2 * EXAMPLE_S, exit=True)  # a loop in C hears no signal
            try:
                TARGETS[name].read(folder)
            except ActionableError:
                assert not valid, f"{name}: the valid files are refused: {traceback.format_exc()}"
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                raise AssertionError(f"{name}: {self._shown(name, files)}\n{traceback.format_exc(limit=-6)}") from None
            finally:
                signal.alarm(0)
                faulthandler.cancel_dump_traceback_later()
                self.watched.folder = None
            assert not self.watched.seen, f"{name}: {self._shown(name, files)}\n{self.watched.seen[:5]}"

    def _shown(self, name: str, files: dict[str, bytes]) -> str:
        """What was changed."""
        return "\n".join(f"  {file}: {data[:400]!r}" for file, data in files.items()
                         if data != self.raw[name].get(file))


def by_hypothesis(harness: Harness, name: str, examples: int, seed: int) -> None:
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as seeded
    from hypothesis import strategies as st

    @seeded(seed)
    @settings(max_examples=examples, deadline=None, database=None, phases=(Phase.generate,),
              suppress_health_check=list(HealthCheck))
    @given(st.randoms(use_true_random=True))
    def run(chooser: random.Random) -> None:
        harness.example(name, chooser.randrange)

    run()


def by_time(harness: Harness, names: list[str], minutes: float, seed: int) -> Iterator[int]:
    """Random examples of all targets in turn until the time is up; yields how many there were."""
    began, count = time.monotonic(), 0
    while time.monotonic() - began < minutes * 60:
        for name in names:
            chooser = random.Random(f"{seed} {count}")
            harness.example(name, chooser.randrange)
            count += 1
        yield count


def by_atheris(harness: Harness, name: str, arguments: list[str]) -> None:
    import atheris

    def one(data: bytes) -> None:
        provider = atheris.FuzzedDataProvider(data)
        harness.example(name, lambda n: provider.ConsumeIntInRange(0, n - 1))

    atheris.instrument_all()
    atheris.Setup([sys.argv[0], *arguments], one)
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--examples", type=int, default=25, help="of each target (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=0, help="in place of --examples: as many as there is time for")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--atheris", action="store_true", help="of one target; further options are libFuzzer's")
    args, rest = parser.parse_known_args()
    torch.set_num_threads(1)
    os.fsync = os.fdatasync = lambda fd: None  # nothing here has to outlive a power failure
    harness = Harness(args.targets)
    if args.atheris:
        by_atheris(harness, args.targets[0], rest)
        return 0
    failed = 0
    if args.minutes:
        count = 0
        for count in by_time(harness, args.targets, args.minutes, args.seed):  # noqa: B007
            pass
        print(f"{count} examples of {len(args.targets)} targets: all right")
        return 0
    for name in args.targets:
        began = time.monotonic()
        try:
            by_hypothesis(harness, name, args.examples, args.seed)
        except AssertionError as error:
            failed += 1
            print(error)
        print(f"{name}: {args.examples} examples, {time.monotonic() - began:.1f} s", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
