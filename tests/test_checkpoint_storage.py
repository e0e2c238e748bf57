"""One process: the bits that come back, what is refused, and what a hostile or broken checkpoint cannot do."""

import errno
import json
import math
import pickle
import random
import tempfile
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from gptdist import checkpoint
from gptdist.checkpoint import files, index, shards
from gptdist.checkpoint.index import INDEX_NAME
from gptdist.errors import UserError


def state():
    torch.manual_seed(0)
    return {
        "model.wte.weight": torch.randn(12, 5),
        "model.t": torch.randn(6, 7).bfloat16().t(),
        "model.ids": torch.arange(9),
        "model.mask": torch.tensor([True, False]),
        "model.empty": torch.zeros(0, 3),
        "optim.wte.weight.step": torch.tensor(7.0),
    }


def blank(tensors):
    return {key: torch.zeros(t.shape, dtype=t.dtype) for key, t in tensors.items()}


def bits(tensor):
    return tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)


def assert_same_bits(a, b):
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    assert torch.equal(bits(a), bits(b))


@pytest.fixture
def saved(tmp_path):
    return checkpoint.save(tmp_path, 40, state(), {"train_state.json": b"{}", "tokenizer/vocab.json": b"[1]"})


def test_round_trip_without_warnings(tmp_path):
    tensors = state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = checkpoint.save(tmp_path, 40, tensors)
        loaded = blank(tensors)
        assert checkpoint.load(path, loaded) == []
    assert path == tmp_path / "step-00000040"
    for key in tensors:
        assert_same_bits(loaded[key], tensors[key])
    for key, tensor in checkpoint.load_tensors(path).items():
        assert_same_bits(tensor, tensors[key])


def test_loads_into_parameters_views_and_other_floats(saved):
    parameter = torch.nn.Parameter(torch.zeros(12, 5))
    checkpoint.load(saved, {"model.wte.weight": parameter})
    assert_same_bits(parameter.data, state()["model.wte.weight"])
    strided = torch.zeros(5, 12).t()
    checkpoint.load(saved, {"model.wte.weight": strided})
    assert_same_bits(strided, parameter.data)
    low = torch.zeros(12, 5, dtype=torch.bfloat16)
    checkpoint.load(saved, {"model.wte.weight": low})
    assert_same_bits(low, parameter.data.bfloat16())


def test_load_tensors_converts_floats_only(saved):
    loaded = checkpoint.load_tensors(saved, ["model.wte.weight", "model.ids"], dtype=torch.float16)
    assert {key: t.dtype for key, t in loaded.items()} == {"model.wte.weight": torch.float16, "model.ids": torch.int64}
    with pytest.raises(UserError, match=r"has no model\.nothing"):
        checkpoint.load_tensors(saved, ["model.nothing"])


def test_shards_are_plain_safetensors(saved):
    loaded = load_file(saved / "shard-00000.safetensors")
    assert_same_bits(loaded["model.t"], state()["model.t"].contiguous())
    assert checkpoint.read_index(saved)["model.t"] == ((7, 6), torch.bfloat16)


def test_missing_keys(saved):
    wanted = {"model.wte.weight": torch.zeros(12, 5), "model.new": torch.zeros(2), "lora.a": torch.ones(2)}
    with pytest.raises(UserError, match=r"has no lora\.a, model\.new"):
        checkpoint.load(saved, wanted)
    with pytest.raises(UserError, match=r"has no model\.new \("):
        checkpoint.load(saved, wanted, allow_missing=lambda key: key.startswith("lora."))
    assert wanted["model.wte.weight"].eq(0).all(), "nothing is read before the keys are checked"
    assert checkpoint.load(saved, wanted, strict=False) == ["lora.a", "model.new"]
    assert wanted["lora.a"].eq(1).all()
    assert_same_bits(wanted["model.wte.weight"], state()["model.wte.weight"])


def test_shape_and_dtype_mismatch(saved):
    expected = r"^model\.wte\.weight: the checkpoint has \(12, 5\), this model wants \(12, 6\)"
    with pytest.raises(UserError, match=expected):
        checkpoint.load(saved, {"model.wte.weight": torch.zeros(12, 6)})
    with pytest.raises(UserError, match=r"model\.ids: the checkpoint has torch\.int64"):
        checkpoint.load(saved, {"model.ids": torch.zeros(9)})


def test_refuses_what_it_cannot_store(tmp_path):
    with pytest.raises(TypeError, match=r"model\.x is not a tensor"):
        checkpoint.save(tmp_path, 1, {"model.x": object()})
    with pytest.raises(TypeError, match=r"model\.c has dtype torch\.complex64"):
        checkpoint.save(tmp_path, 1, {"model.c": torch.zeros(2, dtype=torch.complex64)})
    assert list(tmp_path.iterdir()) == []


def test_never_overwrites(saved, tmp_path):
    before = (saved / INDEX_NAME).read_bytes()
    with pytest.raises(UserError, match="already exists and is never overwritten"):
        checkpoint.save(tmp_path, 40, {"x": torch.zeros(1)})
    (tmp_path / "step-00000041").mkdir()
    with pytest.raises(UserError, match="already exists"):
        checkpoint.save(tmp_path, 41, {"x": torch.zeros(1)})
    assert (saved / INDEX_NAME).read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000040", "step-00000041"]


@pytest.mark.parametrize("nth", [1, 2, 3, 5], ids=["shard header", "shard data", "index", "a file or the manifest"])
def test_disk_full_leaves_nothing(tmp_path, monkeypatch, nth):
    real, calls = files.os.write, []

    def full(fd, data):
        calls.append(1)
        if len(calls) >= nth:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data[: max(1, len(data) // 2)] if nth == 2 else data)  # a short write comes first

    monkeypatch.setattr(files.os, "write", full)
    expected = r"^cannot save to .*\.tmp-step-00000040-\w+/\S+: No space left on device .*free some disk space"
    with pytest.raises(UserError, match=expected) as caught:
        checkpoint.save(tmp_path, 40, {"x": torch.zeros(3)}, {"train_state.json": b"{}"})
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_root_under_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot create .*file.*: Not a directory"):
        checkpoint.save(tmp_path / "file" / "checkpoints", 1, state())


def tamper(path, name, change):
    """Rewrite a JSON file, keeping the manifest true to it."""
    data = json.loads((path / name).read_text())
    change(data)
    (path / name).write_text(json.dumps(data))
    if name != "MANIFEST.json":
        record = files.hash_file(path / name)
        tamper(path, "MANIFEST.json", lambda m: m["files"].update({name: vars(record)}))


def chunk_of(data, key="model.wte.weight"):
    return data["tensors"][key]["chunks"][0]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda d: chunk_of(d).update(file="../../secret"), r"'\.\./\.\./secret' is not the name of a file"),
        (lambda d: chunk_of(d).update(file="/etc/passwd"), "is not the name of a file"),
        (lambda d: chunk_of(d).update(file="other.safetensors"), "which MANIFEST.json does not name"),
        (lambda d: chunk_of(d).update(shape=[11, 5]), "its chunks hold 55 elements, its shape has 60"),
        (lambda d: chunk_of(d).update(offset=[1, 0]), "does not fit"),
        (lambda d: chunk_of(d).update(offset=[-1, 0]), "a chunk needs offset"),
        (lambda d: chunk_of(d).update(shape=[12, 5, 1]), "does not fit"),
        (lambda d: chunk_of(d).update(key="model.ids"), "does not hold 'model.ids' as F32"),
        (lambda d: chunk_of(d).update(key=3), "a chunk needs offset"),
        (lambda d: d["tensors"]["model.wte.weight"].update(dtype="object"), "expected dtype"),
        (lambda d: d["tensors"]["model.wte.weight"].update(dtype="float64"), "does not hold"),
        (lambda d: d["tensors"]["model.wte.weight"].update(shape=[True, 60]), "is not a list of sizes"),
        (lambda d: d.update(format=2), "checkpoint format 2; this version of gptdist reads format 1"),
        (lambda d: d.update(tensors=[]), "no table of tensors"),
    ],
)
def test_hostile_index_is_refused(saved, change, expected):
    tamper(saved, INDEX_NAME, change)
    with pytest.raises(UserError, match=expected):
        checkpoint.load(saved, {"model.wte.weight": torch.zeros(12, 5)})


def test_overlapping_chunks_are_refused():
    def entry(*offsets):
        chunks = [{"offset": [o, 0], "shape": [2, 2], "file": "f", "key": "k"} for o in offsets]
        return json.dumps({"format": 1, "tensors": {"w": {"dtype": "float32", "shape": [4, 2], "chunks": chunks}}})

    assert len(index.decode(entry(0, 2), "index.json")["w"].chunks) == 2
    with pytest.raises(UserError, match="its chunks overlap"):
        index.decode(entry(0, 1), "index.json")


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda b: b[:4], "it has no header"),
        (lambda b: (2**40).to_bytes(8, "little") + b[8:], "its header claims"),
        (lambda b: b[:8] + b"x" + b[9:], "its header is not JSON"),
        (lambda b: b[:-8], "does not hold"),
    ],
)
def test_broken_shard_file(tmp_path, damage, expected):
    path = tmp_path / "shard.safetensors"
    shards.write_shard(path, [shards.Part("w", torch.float32, (4,), lambda: torch.ones(4))])
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=expected), shards.ShardFile(path) as shard:
        shard.read("w", (4,), torch.float32, (0,), torch.empty(4))


class Bomb:
    def __init__(self, sentinel):
        self.sentinel = sentinel

    def __reduce__(self):
        return open, (str(self.sentinel), "w")


def test_planted_pickles_do_not_run(saved, tmp_path):
    sentinel = tmp_path / "sentinel"
    payload = pickle.dumps(Bomb(sentinel))
    pickle.loads(payload).close()
    assert sentinel.exists(), "the payload works when it is unpickled"
    sentinel.unlink()
    for name in (".metadata", "__0_0.distcp", "model.pt", "train_state.pkl"):
        (saved / name).write_bytes(payload)
    checkpoint.load(saved, blank(state()))
    checkpoint.load_tensors(saved)
    checkpoint.verify(saved)
    (saved / INDEX_NAME).write_bytes(payload)
    tamper_manifest = files.hash_file(saved / INDEX_NAME)
    tamper(saved, "MANIFEST.json", lambda m: m["files"].update({INDEX_NAME: vars(tamper_manifest)}))
    with pytest.raises(UserError, match="not JSON"):
        checkpoint.load(saved, blank(state()))
    assert not sentinel.exists()


class Boxed(torch.Tensor):
    """A tensor that saves and loads itself as separate boxes, through DCP's protocol for checkpointable subclasses."""

    @staticmethod
    def __new__(cls, full, boxes):
        self = torch.Tensor._make_wrapper_subclass(cls, full.shape, dtype=full.dtype)
        self.parts = {offset: full[window(offset, shape)].clone() for offset, shape in boxes}
        return self

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(func)

    def __create_chunk_list__(self):
        return [ChunkStorageMetadata(torch.Size(o), part.shape) for o, part in self.parts.items()]

    def __create_write_items__(self, fqn, obj):
        return [self.write_item(fqn, chunk) for chunk in self.__create_chunk_list__()]

    def write_item(self, fqn, chunk):
        data = TensorWriteData(chunk=chunk, properties=TensorProperties(self.dtype), size=self.size())
        return WriteItem(index=MetadataIndex(fqn, chunk.offsets), type=WriteItemType.SHARD, tensor_data=data)

    def __get_tensor_shard__(self, where):
        return self.parts[tuple(where.offset)]


def window(offset, shape):
    return tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))


def partition(offset, shape, rng):
    """Boxes that tile a box: cut it at random until pieces are small or chance stops."""
    axes = [i for i, n in enumerate(shape) if n > 1]
    if not axes or rng.random() < 0.3:
        return [(tuple(offset), tuple(shape))]
    axis = rng.choice(axes)
    cut = rng.randrange(1, shape[axis])
    right = [o + cut * (i == axis) for i, o in enumerate(offset)]
    sizes = [cut, shape[axis] - cut]
    low, high = ([size if i == axis else n for i, n in enumerate(shape)] for size in sizes)
    return partition(offset, low, rng) + partition(right, high, rng)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    shape=st.lists(st.integers(0, 7), max_size=4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int64]),
    block=st.sampled_from([16, 64, 1 << 20]),
    strided=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_boxes_give_the_same_bits(shape, dtype, block, strided, seed):
    rng = random.Random(seed)
    raw = torch.frombuffer(bytearray(rng.randbytes(8 + math.prod(shape) * 8)), dtype=dtype)
    full = raw[: math.prod(shape)].reshape(shape)  # any bits: NaN payloads and subnormals too
    if strided:
        full = full.permute(tuple(reversed(range(full.ndim))))
    start = (0,) * full.ndim
    source = Boxed(full, partition(start, full.shape, rng))
    target = Boxed(torch.zeros_like(full), partition(start, full.shape, rng))
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as root:
        patch.setattr(shards, "BLOCK_BYTES", block)
        path = checkpoint.save(root, 1, {"w": source, "plain": full})
        loaded = torch.zeros_like(full)
        checkpoint.load(path, {"w": target, "plain": loaded})
        whole = checkpoint.load_tensors(path)["w"]
    assert_same_bits(loaded, full)
    assert_same_bits(whole, full)
    for offset, part in target.parts.items():
        assert_same_bits(part, full[window(offset, part.shape)])
