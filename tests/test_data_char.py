"""Characters as tokens, and a text whose end is held out: `--tokenizer char`, `--split tail`, data.input."""

import json
import shutil

import numpy as np
import pytest

from gptdist.cli import main
from gptdist.config import DataConfig, load
from gptdist.convert.tokenizer import hugging_face_files
from gptdist.data.prepare import PrepareConfig, prepare, prepare_input
from gptdist.data.tokenizer import (
    EOT,
    CharTokenizer,
    StreamDecoder,
    Tokenizer,
    add_tokens,
    build_tokenizer,
    extend,
    parts_of_new,
)
from gptdist.errors import UserError
from gptdist.tasks.pretrain import open_data
from tests.training import eval_losses, run_tiny

TEXT = "".join(f"Line {i}: to be, or naïve 🙂?\n\n" for i in range(997))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def test_ids_are_the_places_of_the_characters():
    tokenizer = build_tokenizer("char", ["cab", "é\n"])
    assert isinstance(tokenizer, CharTokenizer)
    assert tokenizer.vocab_size == 6
    assert tokenizer.eot == 5
    assert tokenizer.encode("abc\né") == [1, 2, 3, 0, 4]
    assert tokenizer.decode([4, 0, 1]) == "é\na"
    assert tokenizer.encode("") == []


def test_an_unknown_character_is_named():
    tokenizer = build_tokenizer("char", ["cab"])
    for text, shown in (("bad", "'d' (U+0064), at 2"), ("a🙂", "'🙂' (U+1F642), at 1"), (EOT, "'<' (U+003C), at 0")):
        with pytest.raises(UserError) as caught:
            tokenizer.encode(text)
        assert f"character {shown} of the text, is none of the 3 of tokenizer char" in str(caught.value)


def test_special_tokens_in_a_text():
    tokenizer = extend(build_tokenizer("char", ["cab" + EOT]), ["<|user|>"])
    assert isinstance(tokenizer, CharTokenizer)
    assert tokenizer.encode(f"a{EOT}b<|user|>", allow_special=True) == [
        tokenizer.encode("a")[0], tokenizer.eot, tokenizer.encode("b")[0], tokenizer.eot + 1]
    assert len(tokenizer.encode(EOT)) == len(EOT)


def test_added_words_are_tokens_wherever_they_are_written(tmp_path):
    plain = build_tokenizer("char", ["cab"])
    tokenizer = add_tokens(plain, ["ab", "abc"])
    assert isinstance(tokenizer, CharTokenizer)
    assert tokenizer.encode("cabcab") == [2, 5, 4]
    assert tokenizer.encode("cabcab", allow_special=True) == [2, 5, 4]
    assert tokenizer.decode([2, 5, 4]) == "cabcab"
    assert add_tokens(tokenizer, ["ca"]).encode("caab") == [6, 4]
    assert parts_of_new(plain, tokenizer) == [[0, 1], [0, 1, 2]]
    with pytest.raises(UserError, match=r"character 'd' \(U\+0064\), at 3 of the text"):
        tokenizer.encode("abcd")
    tokenizer.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert isinstance(loaded, CharTokenizer)
    assert loaded.hash == tokenizer.hash
    assert loaded.encode("cabcab") == [2, 5, 4]


def test_it_is_saved_and_loaded(tmp_path):
    tokenizer = build_tokenizer("char", [TEXT])
    tokenizer.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert isinstance(loaded, CharTokenizer)
    assert loaded.hash == tokenizer.hash
    assert loaded.encode(TEXT) == tokenizer.encode(TEXT)
    assert loaded.decode(loaded.encode(TEXT)) == TEXT
    decoder = StreamDecoder(loaded)
    assert "".join(map(decoder.push, loaded.encode(TEXT[:100]))) == TEXT[:100]


def test_what_makes_none(tmp_path):
    with pytest.raises(UserError, match="the text is empty"):
        build_tokenizer("char", [""])
    tokenizer = build_tokenizer("char", ["ab"])
    tokenizer.save(tmp_path)
    ranks = tmp_path / "tokenizer.tiktoken"
    ranks.write_text(ranks.read_text().replace("YQ==", "YWI="))  # a, ab
    with pytest.raises(UserError, match="a token is not one character"):
        Tokenizer.load(tmp_path)


def test_hugging_face_cannot_have_it():
    with pytest.raises(UserError, match="characters for tokens"):
        hugging_face_files(build_tokenizer("char", ["ab"]), 64)


@pytest.mark.parametrize("tokenizer", ["char", "bytes"])
def test_the_last_characters_are_held_out(text, tmp_path, tokenizer):
    report = prepare(PrepareConfig(inputs=[str(text)], output=str(tmp_path / "out"), tokenizer=tokenizer, split="tail",
                                   val_fraction=0.1, max_document_chars=500))
    train, val, loaded = open_data(str(tmp_path / "out"))
    cut = int(0.9 * len(TEXT))
    for dataset, part in ((train, TEXT[:cut]), (val, TEXT[cut:])):
        tokens = dataset.window(0, len(dataset))
        assert loaded.decode(tokens.tolist()) == part
        assert loaded.eot not in tokens
        assert tokens.dtype == np.uint16
    assert report["split"] == {"method": "last characters", "train": {"documents": 1, "tokens": len(train)},
                               "val": {"documents": 1, "tokens": len(val)}}
    assert report["characters"] == len(TEXT)


def test_files_are_one_text_with_nothing_between(text, tmp_path):
    prepare(PrepareConfig(inputs=[str(text), str(text)], output=str(tmp_path / "same"), tokenizer="char", split="tail"))
    other = tmp_path / "other.txt"
    other.write_text("more", encoding="utf-8")
    prepare(PrepareConfig(inputs=[str(text), str(other)], output=str(tmp_path / "out"), tokenizer="char", split="tail",
                          val_fraction=0))
    train, val, tokenizer = open_data(str(tmp_path / "out"))
    assert val is None
    assert tokenizer.decode(train.window(0, len(train)).tolist()) == TEXT + "more"


def test_one_text_is_one_source_of_the_report(text, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"text": "more 🙂"}) + "\n", encoding="utf-8")
    report = prepare(PrepareConfig(inputs=[str(text), str(other)], output=str(tmp_path / "out"), tokenizer="char",
                                   split="tail", add_tokens=["to be"], compare_tokenizer="bytes"))
    [source] = report["sources"]
    assert source["name"] == f"{text}, {other}"
    assert source["files"] == 2
    assert source["tokens"] == report["tokens"] == len(TEXT + "more 🙂") - 997 * (len("to be") - 1)
    assert [use["bytes"] for use in source["compared"]] == [len((TEXT + "more 🙂").encode())] * 2
    assert [use["tokens"] for use in source["compared"]] == [report["tokens"], len((TEXT + "more 🙂").encode())]
    assert (tmp_path / "out" / "report.html").exists()


@pytest.mark.parametrize(("setting", "shown"), [
    ({"min_chars": 2}, "--min-chars 2"), ({"max_chars": 9}, "--max-chars 9"), ({"rules": ["c4"]}, "--rules c4"),
    ({"languages": ["en", "de"]}, "--languages en de"), ({"scrub": ["ip"]}, "--scrub ip"),
    ({"near_dedup": 0.8}, "--near-dedup 0.8"), ({"document_separator": "<|x|>"}, "--document-separator '<|x|>'")])
def test_one_text_is_not_filtered(text, tmp_path, setting, shown):
    with pytest.raises(UserError) as caught:
        prepare(PrepareConfig(inputs=[str(text)], output=str(tmp_path / "out"), tokenizer="char", split="tail",
                              **setting))
    assert str(caught.value).startswith(f"--split tail with {shown}: ")
    assert not (tmp_path / "out").exists()


def test_the_split_from_a_file_of_settings(text, tmp_path, capsys):
    settings = tmp_path / "corpus.yaml"
    settings.write_text(f"input: ['{text}']\noutput: '{tmp_path / 'out'}'\ntokenizer: char\nsplit: tail\n",
                        encoding="utf-8")
    assert main(["prepare", "--config", str(settings)]) == 0
    assert json.loads((tmp_path / "out" / "report.json").read_text())["split"]["method"] == "last characters"
    settings.write_text(settings.read_text().replace("tail", "end"), encoding="utf-8")
    assert main(["prepare", "--config", str(settings)]) == 2
    assert "--split is end, expected documents or tail" in capsys.readouterr().err


def test_settings_that_do_not_fit(text, tmp_path):
    with pytest.raises(UserError, match="--split tail with --document-separator 'blank-line'"):
        prepare(PrepareConfig(inputs=[str(text)], output=str(tmp_path / "out"), tokenizer="char", split="tail",
                              document_separator="blank-line"))
    with pytest.raises(UserError, match=r"data\.input=x, but data\.path is empty"):
        load(None, ["--data.input=x"])
    with pytest.raises(UserError, match=r"data\.input=x is what data\.path is made of, but data\.mixture is given"):
        load(None, ["--data.input=x", "--data.mixture=[{path: y, weight: 1}]"])
    with pytest.raises(UserError, match="--compare-tokenizer is char, which is made from texts"):
        prepare(PrepareConfig(inputs=[str(text)], output=str(tmp_path / "out"), compare_tokenizer="char"))
    with pytest.raises(UserError, match=r"data\.val_fraction is 1\.0"):
        load(None, ["--data.val_fraction=1"])
    with pytest.raises(UserError, match=r"data\.input=x is for pretraining, but task\.name=dpo"):
        load(None, ["--data.input=x", "--data.path=y", "--task.name=dpo"])


def test_a_run_prepares_its_text_and_keeps_the_dataset(text, tmp_path):
    options = ["--train.steps=2", "--schedule.warmup_steps=0", "--eval.every=0", "--eval.tokens=0"]
    data, run = tmp_path / "data", tmp_path / "run"
    run_tiny(data, run, *options, f"--data.input={text}")
    again = tmp_path / "again"
    before = (data / "report.json").stat().st_mtime_ns
    run_tiny(data, again, *options, f"--data.input={text}")
    assert (data / "report.json").stat().st_mtime_ns == before
    assert eval_losses(again) == eval_losses(run)
    assert json.loads((run / "checkpoints/step-00000002/tokenizer/tokenizer.json").read_text())["name"] == "char"


def test_another_dataset_in_the_way_is_named(text, dataset, tmp_path):
    config = DataConfig(input=str(text), path=str(tmp_path / "data"))
    prepare_input(config)
    prepare_input(config)
    (tmp_path / "other.txt").write_text("another text")
    for name in (tmp_path / "other.txt", "nowhere.txt"):
        with pytest.raises(UserError, match=rf"was prepared from .*text\.txt, whose text is not that of .*{name}"):
            prepare_input(DataConfig(input=str(name), path=config.path))
    with pytest.raises(UserError, match=r"was prepared with tokenizer=char, data\.input asks for bytes"):
        prepare_input(DataConfig(input=str(text), path=config.path, tokenizer="bytes"))
    with pytest.raises(UserError, match="was prepared with split=documents"):
        prepare_input(DataConfig(input=str(dataset.parent / "text.txt"), path=str(dataset), tokenizer="bytes"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no dataset of `gptdist prepare`"):
        prepare_input(DataConfig(input=str(text), path=str(tmp_path / "empty")))


def test_the_same_text_may_lie_elsewhere_or_be_gone(text, tmp_path, monkeypatch):
    moved = tmp_path / "folder" / "moved.txt"
    moved.parent.mkdir()
    shutil.copy(text, moved)
    data = str(tmp_path / "data")
    prepare_input(DataConfig(input=str(moved), path=data))
    prepare_input(DataConfig(input=str(text), path=data))
    monkeypatch.chdir(moved.parent)
    prepare_input(DataConfig(input="./moved.txt", path=data))
    moved.write_text(moved.read_text() + "more")
    with pytest.raises(UserError, match="whose text is not that of"):
        prepare_input(DataConfig(input=str(moved), path=data))
    moved.unlink()
    monkeypatch.delenv("GPTDIST_DATA", raising=False)
    for name in (str(moved), "$GPTDIST_DATA/moved.txt"):
        prepare_input(DataConfig(input=name, path=data))


def test_the_text_may_be_named_by_the_environment(text, tmp_path, monkeypatch):
    config = DataConfig(input="$GPTDIST_DATA/text.txt", path=str(tmp_path / "data"))
    monkeypatch.delenv("GPTDIST_DATA", raising=False)
    with pytest.raises(UserError, match=r"data\.input=\$GPTDIST_DATA/text\.txt: the environment lacks"):
        prepare_input(config)
    monkeypatch.setenv("GPTDIST_DATA", str(text.parent))
    prepare_input(config)
    assert json.loads((tmp_path / "data" / "report.json").read_text())["settings"]["inputs"] == [str(text)]
