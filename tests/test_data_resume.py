"""`prepare` goes on after a kill and makes the same dataset; its report and page; its YAML."""

import functools
import json
import os
import signal
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from gptdist.data import prepare as prepare_module
from gptdist.data.prepare import PrepareConfig, prepare
from gptdist.data.prepare_config import load_config
from gptdist.errors import UserError
from tests.conftest import ROOT
from tests.test_data_prepare import sentences, shards_of, write_jsonl

FILTERS = {"rules": ["words_min=8", "top_2_gram_max=0.6"], "near_dedup": 0.8, "scrub": ["email"], "skip_bad": True}
# A process that is killed at its n-th batch, as the power might go.
KILLED = """
import functools, json, os, signal, sys
from gptdist.data import prepare
prepare.SeenDigests = functools.partial(prepare.SeenDigests, max_in_memory=50)
prepare._BATCH_CHARS, prepare._SAVE_CHARS = 2000, 6000
n = 0
def progress(state):
    global n
    n += 1
    if n == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
prepare.prepare(prepare.PrepareConfig(**json.loads(sys.argv[1])), progress)
"""


@pytest.fixture
def small_steps(monkeypatch):
    monkeypatch.setattr(prepare_module, "_BATCH_CHARS", 2000)
    monkeypatch.setattr(prepare_module, "_SAVE_CHARS", 6000)
    monkeypatch.setattr(prepare_module, "SeenDigests",
                        functools.partial(prepare_module.SeenDigests, max_in_memory=50))


def write_inputs(tmp_path):
    texts = [*sentences(300), *sentences(40), *(f"{text} again" for text in sentences(300) if len(text.split()) > 35)]
    texts += [f"write to me@mail{i}.org " + text for i, text in enumerate(sentences(100, seed=2))]
    first = write_jsonl(tmp_path / "a.jsonl", texts)
    with open(first, "a") as file:
        file.write("bad line\n")
    (tmp_path / "b.txt").write_text("\n\n".join(sentences(300, seed=3)))
    return [first, str(tmp_path / "b.txt")]


def config_of(tmp_path, name, inputs, **kwargs):
    return {"inputs": inputs, "output": str(tmp_path / name), "tokenizer": "bpe:300",
            "document_separator": "blank-line", "shard_tokens": 5000, "val_fraction": 0.1, "workers": 2,
            **FILTERS, **kwargs}


def kill_at(config, batch):
    done = subprocess.run([sys.executable, "-c", KILLED, json.dumps(config), str(batch)], cwd=ROOT, timeout=300,
                          capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == -signal.SIGKILL, done.stderr


def comparable(report):
    report = {name: value for name, value in report.items() if name not in ("settings", "speed", "resumed")}
    return json.loads(json.dumps(report))


def test_goes_on_after_kills_byte_for_byte(tmp_path, small_steps):
    inputs = write_inputs(tmp_path)
    expected = prepare(PrepareConfig(**config_of(tmp_path, "whole", inputs)))
    assert expected["near_duplicates"]["hits"] > 40
    assert expected["near_duplicates"]["table_bytes"] > 0
    assert expected["filters"]["duplicates"]["documents_out"] < expected["filters"]["duplicates"]["documents_in"]
    assert expected["scrubbed"] == {"email": 100}
    assert expected["bad"]["count"] == 1
    config = config_of(tmp_path, "killed", inputs)
    for batch in (30, 12):  # the second in the process that went on
        kill_at(config, batch)
        assert (tmp_path / "killed.partial" / "state.json").exists()
        assert (tmp_path / "killed.partial" / "seen-digests.sqlite").exists()
        assert not (tmp_path / "killed").exists()
    report = prepare(PrepareConfig(**config))
    assert report["resumed"] == 2
    assert comparable(report) == comparable(expected)
    assert shards_of(tmp_path / "killed") == shards_of(tmp_path / "whole")
    assert len(shards_of(tmp_path / "killed")) > 6
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == [
        "report.html", "report.json", "tokenizer", "train", "val"]
    assert not list(tmp_path.glob("*.partial"))


def test_other_settings_do_not_go_on(tmp_path, small_steps):
    config = config_of(tmp_path, "out", write_inputs(tmp_path), tokenizer="bytes")
    n = 0

    def interrupt(progress):
        nonlocal n
        n += 1
        if n == 25:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(PrepareConfig(**config), interrupt)
    assert (tmp_path / "out.partial" / "state.json").exists()
    with pytest.raises(UserError, match=r"unfinished dataset of other settings or input \(min_chars\)"):
        prepare(PrepareConfig(**config | {"min_chars": 7}))
    os.utime(tmp_path / "b.txt", ns=(1, 1))
    with pytest.raises(UserError, match=r"unfinished dataset of other settings or input \(the input files\)"):
        prepare(PrepareConfig(**config))
    assert (tmp_path / "out.partial" / "state.json").exists()
    assert prepare(PrepareConfig(**config | {"overwrite": True}))["resumed"] == 0


def test_two_processes_do_not_share_an_output(tmp_path):
    inputs = write_inputs(tmp_path)
    config = PrepareConfig(**config_of(tmp_path, "out", inputs, tokenizer="bytes"))

    def second(progress):
        with pytest.raises(UserError, match="another process is preparing"):
            prepare(config)

    prepare(config, second)


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text = [], set(), ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        assert not {"src", "href"} & {name for name, _ in attrs}

    def handle_data(self, data):
        self.text += data


def test_report_and_page_show_what_was_dropped(tmp_path):
    texts = [*sentences(60), "short <script>alert(1)</script>", "buy now " * 20]
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    report = prepare(PrepareConfig(inputs=[source], output=str(tmp_path / "out"), tokenizer="bpe:300", samples=2,
                                   rules=["words_min=4", "top_2_gram_max=0.9"], compare_tokenizer="bytes"))
    assert report == json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["samples"]["words_min"] == [
        {"where": f"{source}:61", "reason": "2 < 4", "text": "short <script>alert(1)</script>"}]
    assert report["samples"]["top_2_gram_max"][0]["text"] == "buy now " * 20
    [counts] = report["sources"]
    size = sum(len(text.encode()) for text in texts[:60])
    assert (counts["documents"], counts["bytes"]) == (60, size)
    assert counts["bytes_per_token"] == pytest.approx(size / counts["tokens"])
    assert 0 < counts["coverage"] < 1
    ours, theirs = counts["compared"]
    assert ours["tokens"] == counts["tokens"]
    assert (theirs["tokenizer"], theirs["tokens"], theirs["coverage"]) == ("bytes", size, 0.0)
    page = Page((tmp_path / "out" / "report.html").read_text())
    assert "script" not in page.tags
    assert "short <script>alert(1)</script>" in page.text
    assert "words_min" in page.text


def test_a_yaml_file_is_a_corpus(tmp_path):
    path = tmp_path / "corpus.yaml"
    path.write_text("input: [a.txt]\noutput: out\ntokenizer: bytes\nmin_chars: 7\nval_fraction: 0\nrules: [gopher]\n")
    config = load_config(str(path), {"output": "other"})
    assert (config.inputs, config.output, config.min_chars, config.rules) == (["a.txt"], "other", 7, ["gopher"])
    for text, message in (("inptu: [a]", "unknown key 'inptu'; did you mean 'input'"),
                          ("input: a", "input is 'a', expected list"),
                          ("[1]", "holds a list"), ("min_chars: yes", "min_chars is 'True', expected int"),
                          ("input: [", "is not valid YAML")):
        path.write_text(text + "\n")
        with pytest.raises(UserError, match=message):
            load_config(str(path), {})
    path.write_text("output: out\ntokenizer: bytes\n")
    with pytest.raises(UserError, match="--input is missing"):
        load_config(str(path), {})
