"""Inputs of `prepare`: compressed files, Parquet, directories; bad ones are named, or counted with --skip-bad."""

import bz2
import gzip
import json
import lzma
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptdist.cli import main
from gptdist.data import read
from gptdist.data.prepare import PrepareConfig, prepare
from gptdist.data.read import DocumentReader, ReadSettings, find_files
from gptdist.errors import MissingError, UserError

SETTINGS = ReadSettings("text", None, 100_000)


def zstd_compress(data):
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        zstd = pytest.importorskip("backports.zstd", reason="backports.zstd is not installed (extra `data`)")
    return zstd.compress(data)


COMPRESS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstd_compress}


def lines(n):
    return "".join(json.dumps({"text": f"document {i} " + "x" * (i * 37 % 101)}) + "\n" for i in range(n)).encode()


def write_parquet(path, texts, rows_of_a_group=10, **columns):
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed (extra `data`)")
    from pyarrow import parquet

    table = pa.table({"text": texts, **columns})
    parquet.write_table(table, path, row_group_size=rows_of_a_group, compression="none", use_dictionary=False,
                        write_page_checksum=True)


def run(tmp_path, inputs, **kwargs):
    inputs = inputs if isinstance(inputs, list) else [inputs]
    return prepare(PrepareConfig(inputs=[str(one) for one in inputs], **{
        "output": str(tmp_path / "out"), "tokenizer": "bytes", "val_fraction": 0, "workers": 1, **kwargs}))


@pytest.mark.parametrize("suffix", COMPRESS)
def test_compressed_files_read_as_what_is_in_them(tmp_path, suffix):
    compress = COMPRESS[suffix]
    (tmp_path / "a.jsonl").write_bytes(lines(40))
    path = tmp_path / f"a.jsonl.{suffix}"
    path.write_bytes(compress(lines(20)) + compress(lines(40)[len(lines(20)):]))  # two members, as `cat` makes them
    expected = list(DocumentReader(tmp_path / "a.jsonl", SETTINGS))
    assert len(expected) == 40
    assert list(DocumentReader(path, SETTINGS)) == expected
    assert list(DocumentReader(path, SETTINGS, start=17)) == expected[17:]
    (tmp_path / f"b.txt.{suffix}").write_bytes(compress("naïve".encode()))
    assert list(DocumentReader(tmp_path / f"b.txt.{suffix}", SETTINGS)) == ["naïve"]


@pytest.mark.parametrize("suffix", COMPRESS)
def test_cut_and_damaged_compressed_files(tmp_path, suffix):
    whole = COMPRESS[suffix](lines(300))
    path = tmp_path / f"a.jsonl.{suffix}"
    (tmp_path / "good.txt").write_text("good")
    for i, damaged in enumerate((whole[:len(whole) // 2], whole[:-3], b"no such format at all")):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=rf"a\.jsonl\.{suffix}: damaged \w+ file after record \d+ .*copy it again"):
            run(tmp_path, path)
        assert not list(tmp_path.glob("out*"))
        report = run(tmp_path, [path, tmp_path / "good.txt"], skip_bad=True, output=str(tmp_path / f"skipped-{i}"))
        assert report["bad"]["count"] == 1
        assert "damaged" in report["bad"]["examples"][0]


def test_directories_have_text_files_at_any_depth(tmp_path):
    for name in ("b/a.txt", "b/c/d.md", "a.jsonl", "z.txt.gz", ".hidden/x.txt", "b/.y.txt", "program.py", "b/data.bin"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        content = f"text of {name}"
        (tmp_path / "in" / name).write_bytes(gzip.compress(content.encode()) if name.endswith("gz") else
                                             b'{"text": "j"}\n' if name.endswith("jsonl") else content.encode())
    found = [str(path.relative_to(tmp_path / "in")) for path in find_files(str(tmp_path / "in"))]
    assert found == ["a.jsonl", "b/a.txt", "b/c/d.md", "z.txt.gz"]
    report = run(tmp_path, [tmp_path / "in", tmp_path / "in" / "b" / "a.txt", tmp_path / "in" / "*.py"])
    assert [(one["files"], one["documents"]) for one in report["sources"]] == [(4, 4), (1, 1)]  # a file counts once
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: no \.jsonl, .*\*\*/\*\.py"):
        run(tmp_path, tmp_path / "empty")


def test_parquet_by_row_group(tmp_path):
    texts = [f"document {i} naïve" for i in range(35)]
    write_parquet(tmp_path / "a.parquet", texts, id=list(range(35)))
    path = tmp_path / "a.parquet"
    assert list(DocumentReader(path, SETTINGS)) == texts
    for start in (0, 1, 9, 10, 11, 34, 35):
        assert list(DocumentReader(path, SETTINGS, start=start)) == texts[start:]
    report = run(tmp_path, path)
    assert (report["documents"], report["characters"]) == (35, sum(map(len, texts)))
    with pytest.raises(UserError, match=r"a\.parquet: no column 'body'; columns found: id, text"):
        run(tmp_path, path, text_field="body", overwrite=True)
    with pytest.raises(UserError, match=r"a\.parquet: column 'id' holds int64, expected strings"):
        run(tmp_path, path, text_field="id", overwrite=True)
    path.write_bytes(b"PAR1")
    with pytest.raises(UserError, match="not a readable Parquet file"):
        run(tmp_path, path, overwrite=True)


def test_a_damaged_row_group_is_named_and_the_others_are_read(tmp_path):
    path = tmp_path / "a.parquet"
    write_parquet(path, [f"row number {i:04}" for i in range(40)])
    data = bytearray(path.read_bytes())
    at = data.find(b"row number 0013")
    data[at + 12] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"a\.parquet: row group 1 \(rows 11 to 20\) is damaged"):
        run(tmp_path, path)
    report = run(tmp_path, path, skip_bad=True)
    assert report["documents"] == 30
    assert report["bad"]["count"] == 1


def test_a_row_without_text(tmp_path):
    write_parquet(tmp_path / "a.parquet", ["a", None, "c"])
    with pytest.raises(UserError, match=r"a\.parquet: row 2: 'text' is null"):
        run(tmp_path, tmp_path / "a.parquet")
    assert run(tmp_path, tmp_path / "a.parquet", skip_bad=True)["documents"] == 2


def test_missing_packages_are_named(tmp_path, monkeypatch):
    for name in ("pyarrow", "py3langid", "backports", "backports.zstd", "compression", "compression.zstd"):
        monkeypatch.setitem(sys.modules, name, None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    (tmp_path / "a.txt.zst").write_bytes(b"xxxx")
    (tmp_path / "a.txt").write_text("text")
    for name, message in (("a.parquet", "pyarrow"), ("a.txt.zst", "backports.zstd")):
        with pytest.raises(MissingError, match=rf"{name}.*{message}.*gptdist\[data\]"):
            run(tmp_path, tmp_path / name, skip_bad=True)
    with pytest.raises(MissingError, match=r"py3langid: pip install 'gptdist\[data\]'"):
        run(tmp_path, tmp_path / "a.txt", languages=["en"])


def test_skip_bad_counts_rows_and_names_the_first(tmp_path):
    good = ['{"text": "one"}', '{"text": "two"}', '{"text": "three"}']
    bad = ['{"body": "x"}', "not json", '{"text": 5}', '{"text": "\\xff']
    (tmp_path / "a.jsonl").write_bytes("\n".join([good[0], *bad, *good[1:]]).encode("latin-1"))
    (tmp_path / "b.txt").write_bytes("mixed é".encode() + "é".encode("latin-1"))
    report = run(tmp_path, [tmp_path / "a.jsonl", tmp_path / "b.txt"], skip_bad=True)
    assert report["documents"] == 3
    assert report["bad"]["count"] == 5
    assert "a.jsonl:2: no field 'text'" in report["bad"]["examples"][0]
    assert "b.txt: invalid UTF-8 at byte 8" in report["bad"]["examples"][4]


def test_a_source_of_which_nothing_is_left_is_named(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "blank.txt").write_text("  \n\n ")
    assert main(["prepare", "--input", str(tmp_path / "a.txt"), str(tmp_path / "blank.txt"), "--output",
                 str(tmp_path / "out"), "--tokenizer", "bytes", "--val-fraction", "0"]) == 0
    assert f"{tmp_path / 'blank.txt'}: nothing is left of it\n" in capsys.readouterr().out


def test_only_bad_input_is_an_error(tmp_path):
    (tmp_path / "a.jsonl").write_text("nothing\n")
    with pytest.raises(UserError, match=r"no documents are left .*1 bad records, the first: .*: "):
        run(tmp_path, tmp_path / "a.jsonl", skip_bad=True)
    assert not (tmp_path / "out").exists()


json_values = st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(
    inner, max_size=3) | st.dictionaries(st.sampled_from(["text", "body", ""]), inner, max_size=3), max_leaves=5)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.binary(max_size=40) | json_values.map(lambda value: json.dumps(value).encode())), st.integers(0, 5))
def test_any_jsonl_gives_texts_or_bad_records(tmp_path_factory, records, start):
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    data = b"\n".join(records)
    path.write_bytes(data or b"\n")
    bad = []
    texts = list(DocumentReader(path, SETTINGS, on_bad=bad.append))
    filled = [line for line in data.split(b"\n") if line and not line.isspace()]
    assert len(texts) + len(bad) == len(filled)
    assert all(isinstance(text, str) for text in texts)
    later = []
    assert list(DocumentReader(path, SETTINGS, start=start, on_bad=later.append)) == texts[len(texts) - len(list(
        DocumentReader(path, SETTINGS, start=start, on_bad=lambda error: None))):]
    assert len(later) <= len(bad)
    if bad:
        with pytest.raises(UserError):
            list(DocumentReader(path, SETTINGS))


@settings(deadline=None, max_examples=60)
@given(st.binary(max_size=300), st.sampled_from(["gz", "bz2", "xz", "zst"]), st.integers(0, 400), st.booleans())
def test_any_damage_to_a_compressed_file_is_noticed_or_harmless(tmp_path_factory, tail, suffix, where, cut):
    """Bytes changed or cut anywhere raise nothing but errors that name the file."""
    path = tmp_path_factory.mktemp("damaged") / f"a.jsonl.{suffix}"
    whole = COMPRESS[suffix](lines(30))
    where = min(where, len(whole) - 1)
    path.write_bytes(whole[:where] + (b"" if cut else tail + whole[where + len(tail):]))
    bad = []
    list(DocumentReader(path, SETTINGS, on_bad=bad.append))
    assert all(path.name in str(error) for error in bad)


def test_long_jsonl_line_is_bad_not_endless(tmp_path, monkeypatch):
    monkeypatch.setattr(read, "_MAX_LINE_BYTES", 20)
    (tmp_path / "a.jsonl").write_text('{"text": "ok"}\n{"text": "' + "x" * 100 + '"}\n')
    bad = []
    assert list(DocumentReader(tmp_path / "a.jsonl", SETTINGS, on_bad=bad.append)) == ["ok"]
    assert len(bad) == 1
