"""Preparing datasets: content, split, determinism, streaming, bad input."""

import gzip
import json
import os
import random
import socket
import subprocess
import sys

import numpy as np
import pytest

from gptdist.data import read
from gptdist.data.format import TokenDataset, verify
from gptdist.data.prepare import PrepareConfig, prepare
from gptdist.data.progress import progress_bar
from gptdist.data.read import DocumentReader, ReadSettings
from gptdist.data.tokenizer import Tokenizer
from gptdist.errors import UserError
from tests.conftest import run_gptdist


def sentences(n, seed=0):
    """Return n different documents of 5 to 60 words."""
    rng = random.Random(seed)
    words = ["the", "model", "reads", "text", "naïve", "tokens", "and", "日本", "writes", "shards", "<|endoftext|>"]
    return [f"{i} " + " ".join(rng.choices(words, k=rng.randint(5, 60))) for i in range(n)]


def write_jsonl(path, texts, field="text"):
    path.write_text("".join(json.dumps({field: text, "id": i}) + "\n" for i, text in enumerate(texts)))
    return str(path)


def run(tmp_path, inputs, name="out", **kwargs):
    inputs = inputs if isinstance(inputs, list) else [inputs]
    return prepare(PrepareConfig(inputs=inputs, output=str(tmp_path / name), **{"tokenizer": "bytes", **kwargs}))


def documents_of(path, tokenizer):
    """Return the decoded documents of a split, after checking that each ends in eot and has no other."""
    dataset = TokenDataset.open(path)
    tokens = dataset.window(0, len(dataset))
    parts = np.split(tokens, dataset.document_starts[1:])
    assert all(part[-1] == tokenizer.eot and (part[:-1] != tokenizer.eot).all() for part in parts)
    return [tokenizer.decode(part[:-1]) for part in parts]


def test_jsonl_to_dataset_and_back(tmp_path):
    texts = sentences(500)
    report = run(tmp_path, write_jsonl(tmp_path / "a.jsonl", texts), tokenizer="bpe:300", shard_tokens=2000)
    tokenizer = Tokenizer.load(tmp_path / "out" / "tokenizer")
    train, val = (documents_of(tmp_path / "out" / split, tokenizer) for split in ("train", "val"))
    assert sorted(train + val) == sorted(texts)
    assert train == [text for text in texts if text in set(train)]  # input order is kept
    assert 5 <= len(val) <= 60
    for split in ("train", "val"):
        verify(tmp_path / "out" / split)
        meta = TokenDataset.open(tmp_path / "out" / split).meta
        assert (meta.tokenizer_hash, meta.vocab_size, meta.eot) == (tokenizer.hash, 300, 299)
    assert report == json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["split"]["method"] == "by document"
    assert report["documents"] == 500
    assert report["characters"] == sum(map(len, texts))
    assert report["tokens"] == sum(report["split"][split]["tokens"] for split in ("train", "val"))
    assert not list(tmp_path.glob("out.tmp-*"))
    assert not list((tmp_path / "out").glob("*.sqlite"))


def shards_of(path):
    return {file.relative_to(path): file.read_bytes() for file in path.rglob("shard-*")}


def test_workers_do_not_change_the_dataset(tmp_path, monkeypatch):
    source = write_jsonl(tmp_path / "a.jsonl", sentences(400))
    monkeypatch.setattr("gptdist.data.prepare._BATCH_CHARS", 1000)
    for workers in (1, 4):
        run(tmp_path, source, name=str(workers), workers=workers)
    assert shards_of(tmp_path / "1") == shards_of(tmp_path / "4")


def test_split_does_not_depend_on_order_but_on_the_seed(tmp_path):
    texts = sentences(400)
    tokenizer = Tokenizer(name="b", ranks={bytes([i]): i for i in range(256)}, specials={"<|endoftext|>": 256})
    val = []
    for name, order, seed in (("a", texts, 0), ("b", texts[::-1], 0), ("c", texts, 1)):
        run(tmp_path, write_jsonl(tmp_path / f"{name}.jsonl", order), name=name, seed=seed)
        val.append(set(documents_of(tmp_path / name / "val", tokenizer)))
    assert val[0] == val[1]
    assert val[0] != val[2]


def test_few_documents_hold_out_the_end(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 1000)
    report = run(tmp_path, str(tmp_path / "a.txt"), val_fraction=0.1)
    assert report["split"]["method"].startswith("last tokens")
    train = TokenDataset.open(tmp_path / "out" / "train")
    val = TokenDataset.open(tmp_path / "out" / "val")
    assert (len(train), len(val)) == (902, 100)  # 1000 + eot, of which 100 held out, and an eot at the cut
    assert train.window(901, 1).tolist() == val.window(99, 1).tolist() == [256]


def test_no_validation(tmp_path):
    (tmp_path / "a.txt").write_text("hello")
    run(tmp_path, str(tmp_path / "a.txt"), val_fraction=0)
    assert TokenDataset.open(tmp_path / "out" / "train").window(0, 6).tolist() == [*b"hello", 256]
    assert not (tmp_path / "out" / "val").exists()


def test_cleaning_is_counted(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", ["same", "same\x00", "e\u0301\ud800", "", "  "] + ["x" * 10] * 3)
    report = run(tmp_path, source, val_fraction=0)
    filters = report["filters"]
    assert {name: (c["documents_in"], c["documents_out"]) for name, c in filters.items()} == {
        "control": (8, 8), "nfc": (8, 8), "min_chars": (8, 6), "duplicates": (6, 3),
    }  # fmt: skip
    assert filters["control"]["characters_in"] - filters["control"]["characters_out"] == 2
    assert report["documents"] == 3
    assert run(tmp_path, source, name="all", dedup=False, val_fraction=0)["documents"] == 6


def test_many_inputs_globs_gzip_and_fields(tmp_path):
    (tmp_path / "a.txt").write_text("plain", encoding="utf-8-sig")
    with gzip.open(tmp_path / "b.txt.gz", "wt") as file:
        file.write("zipped")
    with gzip.open(tmp_path / "c.jsonl.gz", "wt") as file:
        file.write('\n{"body": "json"}\n\n')
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "d.txt").write_bytes(b"windows\r\nlines")
    inputs = [str(tmp_path / "a.txt"), str(tmp_path / "*.gz"), str(tmp_path / "**" / "*.txt")]
    run(tmp_path, inputs, text_field="body", val_fraction=0)
    tokenizer = Tokenizer.load(tmp_path / "out" / "tokenizer")
    assert documents_of(tmp_path / "out" / "train", tokenizer) == ["plain", "zipped", "json", "windows\nlines"]


def test_embedded_corpus_and_progress_bar(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes stderr for a terminal
    config = PrepareConfig(inputs=["embedded"], output=str(tmp_path / "out"), tokenizer="bytes")
    with progress_bar() as update:
        report = prepare(config, progress=update)
    assert report["documents"] > 300
    assert report["split"]["val"]["documents"] > 5
    assert "documents" in capsys.readouterr().err


def test_no_progress_bar_without_a_terminal(tmp_path, capsys):
    config = PrepareConfig(inputs=[write_jsonl(tmp_path / "a.jsonl", sentences(300))], output=str(tmp_path / "out"),
                           tokenizer="bpe:300")
    with progress_bar() as update:
        prepare(config, progress=update)
    assert capsys.readouterr().err == ""


def test_a_failing_prepare_prints_one_line(tmp_path):
    (tmp_path / "a.txt").write_text("ab")
    for tokenizer in ("bytes", "bpe:5000"):
        done = run_gptdist("prepare", "--input", str(tmp_path / "a.txt"), "--output", str(tmp_path / "out"),
                           "--tokenizer", tokenizer)
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1, done.stderr
        assert done.stderr.startswith("gptdist prepare: ")


def test_leftovers_of_killed_processes_are_removed(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    host = socket.gethostname()
    dead = tmp_path / f"out.tmp-{host}-{gone.pid}-0123abcd"
    aside = tmp_path / f"out.tmp-{host}-{gone.pid}-0123abcd.old"  # its dataset is not in place: the only copy
    kept = [aside, *(tmp_path / name for name in (
        f"out.tmp-{host}-{os.getpid()}-0123abcd", f"out.tmp-other{host}-{gone.pid}-0123abcd",
        f"mine.tmp-{host}-{gone.pid}-0123abcd", f"out.tmp-{host}-{gone.pid}-notes"))]
    for path in [dead, *kept]:
        (path / "train").mkdir(parents=True)
    (tmp_path / "a.txt").write_text("hello")
    run(tmp_path, str(tmp_path / "a.txt"), val_fraction=0)
    assert not dead.exists()
    assert all(path.exists() for path in kept)
    run(tmp_path, str(tmp_path / "a.txt"), val_fraction=0, overwrite=True)
    assert not aside.exists()


def test_val_of_one_token(tmp_path):
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(UserError, match=r"val has 1 token \(--val-fraction 0\.05\), expected at least 2"):
        run(tmp_path, str(tmp_path / "a.txt"))


def test_progress_reaches_the_total(tmp_path):
    states = []
    config = PrepareConfig(
        inputs=[write_jsonl(tmp_path / "a.jsonl", sentences(300))], output=str(tmp_path / "out"), tokenizer="bytes"
    )
    prepare(config, progress=lambda p: states.append((p.bytes_read, p.bytes_total, p.documents)))
    assert states[-1] == ((tmp_path / "a.jsonl").stat().st_size,) * 2 + (300,)


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 7, 1000])
def test_chunks_never_break_characters_or_separators(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(read, "_CHUNK_BYTES", chunk)
    path = tmp_path / "a.txt"
    documents = ["日本語 text", "naïve 🙂🙃", "two\nlines", "last\r"]
    path.write_bytes("\r\n\r\n".join(documents).encode())
    assert list(DocumentReader(path, ReadSettings("text", read.BLANK_LINE, 1000))) == documents
    path.write_bytes("<|endoftext|>".join([*documents, ""]).encode())
    assert list(DocumentReader(path, ReadSettings("text", "<|endoftext|>", 1000))) == documents


@pytest.mark.parametrize("paragraph", ["word " * 30 + "\n\n", "word " * 30 + "\n", "word ", "x"])
@pytest.mark.parametrize("chunk", [10, 10_000])
def test_long_text_is_cut_and_nothing_is_lost(tmp_path, monkeypatch, paragraph, chunk):
    monkeypatch.setattr(read, "_CHUNK_BYTES", chunk)
    path = tmp_path / "a.txt"
    text = paragraph * (5000 // len(paragraph))
    path.write_text(text)
    documents = list(DocumentReader(path, ReadSettings("text", None, 400)))
    assert "".join(documents) == text
    assert len(documents) > 4
    assert max(map(len, documents)) <= 800
    assert all(document.endswith(paragraph) for document in documents[:-1])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"abc\0def", r"a\.txt: NUL byte at offset 3"),
        ("a.txt", b"0123456789\xe9more", r"a\.txt: invalid UTF-8 at byte 10 \(0xe9"),
        ("a.txt", b"0123456789\xe2\x82", r"a\.txt: invalid UTF-8 at byte 10"),
        ("a.txt", b"", r"a\.txt: the file is empty"),
        ("a.txt", b" \n ", "no documents are left after cleaning"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', r"a\.jsonl:2: not JSON"),
        ("a.jsonl", b'{"text": "a"}\n\n{"body": "b", "id": 1}', r"a\.jsonl:3: no field 'text'; fields found: body, id"),
        ("a.jsonl", b'{"text": 3}', r"a\.jsonl:1: field 'text' is int"),
        ("a.jsonl", b"[1]", r"a\.jsonl:1: expected a JSON object"),
        ("a.jsonl", b'{"text": "\xff"}', r"a\.jsonl:1: invalid UTF-8 at byte 10"),
        ("a.jsonl", b'{"text": ""}', r"no documents are left .*min_chars: 1 -> 0"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl:1: not JSON"),
        ("a.json", b"[]", r"\.json files are not supported"),
        ("a.txt.gz", b"not gzip", "damaged gzip"),
        ("a.txt.gz", gzip.compress(b"x" * 1000, mtime=0)[:20], "damaged gzip"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        run(tmp_path, str(tmp_path / name))
    assert [path.name for path in tmp_path.iterdir()] == [name]  # nothing is left behind


def test_bad_file_while_training_a_tokenizer(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": ')
    with pytest.raises(UserError, match=r"a\.jsonl:2: not JSON"):
        run(tmp_path, str(tmp_path / "a.jsonl"), tokenizer="bpe:300")


def test_invalid_utf8_offset_counts_the_whole_file(tmp_path, monkeypatch):
    monkeypatch.setattr(read, "_CHUNK_BYTES", 16)
    (tmp_path / "a.txt").write_bytes("é".encode() * 50 + b"\xff")
    with pytest.raises(UserError, match="at byte 100 "):
        run(tmp_path, str(tmp_path / "a.txt"))


def test_endless_line(tmp_path, monkeypatch):
    monkeypatch.setattr(read, "_MAX_LINE_BYTES", 10)
    with pytest.raises(UserError, match=r"a\.jsonl:1: line longer than 10 bytes"):
        run(tmp_path, write_jsonl(tmp_path / "a.jsonl", ["long enough"]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": []}, "--input is empty"),
        ({"inputs": ["/no/such/file.txt"]}, "no such file"),
        ({"inputs": ["/no/such/*.txt"]}, "no file matches"),
        ({"min_chars": 1, "near_dedup": 1.5}, "--near-dedup is 1.5, expected at least 0 and at most 1"),
        ({"rules": ["gofer"]}, "--rules has 'gofer', expected a group"),
        ({"rules": ["words_min=many"]}, "--rules has 'words_min=many', expected a limit"),
        ({"scrub": ["names"]}, "--scrub has names, expected some of email, phone, ip"),
        ({"max_chars": -1}, "--max-chars is -1"),
        ({"val_fraction": 1.0}, "--val-fraction is 1.0"),
        ({"val_fraction": -0.1}, "--val-fraction is -0.1"),
        ({"workers": 0}, "--workers is 0"),
        ({"shard_tokens": 0}, "--shard-tokens is 0"),
        ({"max_document_chars": 0}, "--max-document-chars is 0"),
        ({"document_separator": ""}, "--document-separator is empty"),
        ({"seed": -1}, "--seed is -1"),
        ({"seed": 1 << 63}, "--seed is 9223372036854775808"),
        ({"tokenizer": "nonsense"}, "no such name or path"),
        ({"output": "/proc/nothing/here"}, "cannot write here"),
    ],
)
def test_bad_settings(tmp_path, change, message):
    good = {"inputs": ["embedded"], "output": str(tmp_path / "out"), "tokenizer": "bytes"}
    with pytest.raises(UserError, match=message):
        prepare(PrepareConfig(**{**good, **change}))
    assert not any(tmp_path.iterdir())


def test_existing_output_and_overwrite(tmp_path):
    (tmp_path / "a.txt").write_text("first")
    run(tmp_path, str(tmp_path / "a.txt"), val_fraction=0)
    with pytest.raises(UserError, match="exists and is not empty"):
        run(tmp_path, str(tmp_path / "a.txt"))
    (tmp_path / "a.txt").write_text("second")
    run(tmp_path, str(tmp_path / "a.txt"), val_fraction=0, overwrite=True)
    assert len(TokenDataset.open(tmp_path / "out" / "train")) == 7
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "out"]


def test_interrupt_leaves_nothing(tmp_path):
    def interrupt(progress):
        raise KeyboardInterrupt

    config = PrepareConfig(inputs=["embedded"], output=str(tmp_path / "out"), tokenizer="bytes")
    with pytest.raises(KeyboardInterrupt):
        prepare(config, progress=interrupt)
    assert not any(tmp_path.iterdir())
