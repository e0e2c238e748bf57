"""The dataset directory: round trips at any shard size, damage detected, all or nothing."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptdist.data.format import TokenDataset, token_dtype, verify
from gptdist.data.writer import atomic_directory, write_dataset
from gptdist.errors import UserError

SMALL = {"tokenizer_hash": "abc", "vocab_size": 300, "eot": 256}
LARGE = {"tokenizer_hash": "abc", "vocab_size": 100_000, "eot": 256}
documents_strategy = st.lists(st.lists(st.integers(0, 299), min_size=1, max_size=12), min_size=1, max_size=15)


def write(path: Path, documents, masks=None, **kwargs) -> TokenDataset:
    with write_dataset(path, **{**SMALL, **kwargs}, loss_mask=masks is not None) as writer:
        for i, document in enumerate(documents):
            writer.add(np.array(document), None if masks is None else np.array(masks[i]))
    return TokenDataset.open(path)


@pytest.fixture
def dataset_path(tmp_path):
    path = tmp_path / "train"
    write(path, [range(10), range(20), range(5)], shard_tokens=15)
    return path


@settings(max_examples=60, deadline=None)
@given(documents=documents_strategy, shard_tokens=st.integers(1, 60), large=st.booleans(), data=st.data())
def test_round_trip(tmp_path_factory, documents, shard_tokens, large, data):
    path = tmp_path_factory.mktemp("round-trip") / "train"
    dataset = write(path, documents, shard_tokens=shard_tokens, **(LARGE if large else {}))
    flat = [token for document in documents for token in document]
    assert len(dataset) == len(flat)
    assert dataset.window(0, len(flat)).tolist() == flat
    assert dataset.window(0, len(flat)).dtype == (np.uint32 if large else np.uint16)
    start = data.draw(st.integers(0, len(flat)))
    n = data.draw(st.integers(0, len(flat) - start))
    assert dataset.window(start, n).tolist() == flat[start : start + n]
    assert dataset.document_starts.tolist() == np.cumsum([0, *map(len, documents[:-1])]).tolist()
    for shard in dataset.meta.shards:
        assert shard["n_tokens"] <= shard_tokens or shard["n_documents"] == 1
    verify(path)


def test_loss_mask_stream(tmp_path):
    masks = [[0, 1, 1], [1, 0]]
    dataset = write(tmp_path / "train", [[1, 2, 3], [4, 5]], masks, shard_tokens=3)
    assert dataset.has_stream("loss_mask")
    assert dataset.window(1, 4, "loss_mask").tolist() == [1, 1, 1, 0]
    verify(tmp_path / "train")


def test_files_are_as_documented(dataset_path):
    meta = json.loads((dataset_path / "meta.json").read_text())
    assert (meta["format"], meta["dtype"], meta["n_tokens"], meta["n_documents"]) == (1, "uint16", 35, 3)
    assert sorted(path.name for path in dataset_path.iterdir()) == sorted(
        ["meta.json"] + [f"shard-0000{i}.{name}" for i in range(3) for name in ("tokens.bin", "idx")]
    )
    assert np.fromfile(dataset_path / "shard-00001.tokens.bin", "<u2").tolist() == list(range(20))
    assert np.fromfile(dataset_path / "shard-00001.idx", "<i8").tolist() == [0]


def test_token_dtype_covers_the_vocabulary():
    assert token_dtype(65_536) == "uint16"
    assert token_dtype(65_537) == "uint32"


def test_raw_nanogpt_file(tmp_path):
    path = tmp_path / "train.bin"
    np.arange(100, dtype=np.uint16).tofile(path)
    dataset = TokenDataset.open(path)
    assert len(dataset) == 100
    assert dataset.window(98, 2).tolist() == [98, 99]
    with pytest.raises(UserError, match="no document index"):
        _ = dataset.document_starts


@pytest.mark.parametrize("window", [(-1, 2), (0, 36), (34, 2), (0, -1)])
def test_window_outside(dataset_path, window):
    with pytest.raises(IndexError, match="is not inside"):
        TokenDataset.open(dataset_path).window(*window)


@settings(max_examples=40, deadline=None)
@given(documents=documents_strategy, data=st.data())
def test_any_damage_is_found(tmp_path_factory, documents, data):
    """A file cut anywhere fails at open; a flipped bit anywhere fails in verify; the message names the file."""
    path = tmp_path_factory.mktemp("damage") / "train"
    write(path, documents, shard_tokens=20)
    victim = data.draw(st.sampled_from(sorted(p for p in path.iterdir() if p.name != "meta.json")))
    content = victim.read_bytes()
    victim.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(UserError, match=victim.name):
        TokenDataset.open(path)
    altered = bytearray(content)
    altered[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    victim.write_bytes(altered)
    with pytest.raises(UserError, match=f"{victim.name}.*sha256"):
        verify(path)


def test_missing_file(dataset_path):
    (dataset_path / "shard-00001.idx").unlink()
    with pytest.raises(UserError, match=r"shard-00001\.idx: missing"):
        TokenDataset.open(dataset_path)


def test_verify_finds_ids_outside_the_vocabulary(tmp_path):
    path = tmp_path / "train"
    write(path, [[1, 299]])
    meta = json.loads((path / "meta.json").read_text())
    (path / "meta.json").write_text(json.dumps(meta | {"vocab_size": 299}))
    with pytest.raises(UserError, match=r"shard-00000\.tokens\.bin: token 1 is 299, expected below vocab_size 299"):
        verify(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format 2 is unknown"),
        ({"n_tokens": 36}, "do not sum"),
        ({"shards": None}, "lacks shards"),
        ({"streams": {"tokens": "float32"}}, "not understood"),
        ("{", "JSON"),
        ("[]", "format"),
    ],
)
def test_bad_meta(dataset_path, change, message):
    path = dataset_path / "meta.json"
    if isinstance(change, str):
        path.write_text(change)
    else:
        meta = json.loads(path.read_text()) | change
        path.write_text(json.dumps({name: value for name, value in meta.items() if value is not None}))
    with pytest.raises(UserError, match=message):
        TokenDataset.open(dataset_path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 300) | st.integers() | st.floats() | st.text(max_size=5)
    | st.sampled_from(["tokens", "uint8", "uint32", "..", "a/b", "a\0", "shard-00001"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
)


def places_in(value, path=()):
    """The path of every value inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places_in(inner, (*path, key))


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_value_in_meta_is_a_dataset_or_the_users_error(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("meta") / "train"
    write(path, [range(10), range(20), range(5)], shard_tokens=15)
    meta = json.loads((path / "meta.json").read_text())
    *parents, last = data.draw(st.sampled_from(list(places_in(meta))))
    inner = meta
    for key in parents:
        inner = inner[key]
    if data.draw(st.integers(0, 3)) == 0:
        del inner[last]
    else:
        inner[last] = data.draw(json_values)
    (path / "meta.json").write_text(json.dumps(meta))
    message = ""
    try:
        dataset = TokenDataset.open(path)
        assert dataset.window(0, len(dataset)).tolist() == [*range(10), *range(20), *range(5)]
        verify(path)
    except UserError as error:
        message = str(error)
    assert "\n" not in message


def test_meta_in_pieces(dataset_path):
    """Each wrong type is named with its place."""
    path = dataset_path / "meta.json"
    good = json.loads(path.read_text())
    shard = good["shards"][0]
    for change, message in (
        ({"shards": 3}, "shards is '3', expected a list"),
        ({"streams": []}, "streams is"),
        ({"n_tokens": -1}, "n_tokens is '-1', expected an integer of at least 0"),
        ({"shards": [{**shard, "files": None}]}, r"shards\[0\]\.files"),
        ({"shards": [{**shard, "n_tokens": -1}]}, r"shards\[0\]\.n_tokens"),
        ({"shards": [{**shard, "name": "../x"}]}, r"shards\[0\]\.name"),
        ({"shards": ["x"]}, r"shards\[0\] is 'x'"),
    ):
        path.write_text(json.dumps(good | change))
        with pytest.raises(UserError, match=message):
            TokenDataset.open(dataset_path)


def test_wrong_paths(tmp_path, dataset_path):
    with pytest.raises(UserError, match="no such dataset"):
        TokenDataset.open(tmp_path / "nothing")
    with pytest.raises(UserError, match="give one of them"):
        TokenDataset.open(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"has no meta\.json"):
        TokenDataset.open(tmp_path / "empty")
    odd = tmp_path / "odd.bin"
    odd.write_bytes(b"abc")
    with pytest.raises(UserError, match="not a positive multiple of 2"):
        TokenDataset.open(odd)
    with pytest.raises(UserError, match="dtype 'int8' is unknown"):
        TokenDataset.open(odd, dtype="int8")


@pytest.mark.parametrize("bad", [[], [300], [-1], [70_000]])
def test_writer_refuses_bad_documents_and_leaves_nothing(tmp_path, bad):
    with pytest.raises(ValueError, match="token"):
        write(tmp_path / "train", [np.array([1, 2, 3]), np.array(bad, np.int64)])
    assert not any(tmp_path.iterdir())


def test_writer_checks_masks(tmp_path):
    with pytest.raises(ValueError, match="loss_mask has shape"):
        write(tmp_path / "train", [[1, 2]], masks=[[1]])
    with pytest.raises(ValueError, match="missing"), write_dataset(tmp_path / "x", **SMALL, loss_mask=True) as writer:
        writer.add(np.array([1]))


def test_existing_output(tmp_path, dataset_path):
    with pytest.raises(UserError, match="exists and is not empty"):
        write(dataset_path, [[1]])
    assert len(TokenDataset.open(dataset_path)) == 35
    with write_dataset(dataset_path, overwrite=True, **SMALL) as writer:
        writer.add(np.array([7]))
    assert TokenDataset.open(dataset_path).window(0, 1).tolist() == [7]
    assert [path.name for path in tmp_path.iterdir()] == ["train"]


def test_failed_overwrite_keeps_the_old(tmp_path, dataset_path):
    with pytest.raises(RuntimeError), write_dataset(dataset_path, overwrite=True, **SMALL):
        raise RuntimeError
    assert len(TokenDataset.open(dataset_path)) == 35
    assert [path.name for path in tmp_path.iterdir()] == ["train"]


def test_overwrite_refuses_what_is_no_dataset(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("keep me")
    with pytest.raises(UserError, match="is not a dataset"), atomic_directory(tmp_path / "home", overwrite=True):
        pass
    assert (tmp_path / "home" / "letter.txt").exists()


def test_output_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"), atomic_directory(tmp_path / "file"):
        pass
    with pytest.raises(UserError, match="cannot write here"), atomic_directory(tmp_path / "file" / "out"):
        pass


def test_full_disk_is_the_users_error(tmp_path):
    with pytest.raises(UserError, match="No space left"), atomic_directory(tmp_path / "out"):
        raise OSError(28, "No space left on device")
    assert not any(tmp_path.iterdir())
