"""`gptdist serve` on checkpoints of every kind, as a process that is asked and stopped."""

import json
import os
import re
import signal
import subprocess
import sys

import httpx
import pytest

pytest.importorskip("fastapi", reason="pip install 'gptdist[serve]'")
pytest.importorskip("uvicorn", reason="pip install 'gptdist[serve]'")

from gptdist.chat import open_chat
from gptdist.checkpoint import layout
from gptdist.cli import main
from gptdist.errors import UserError
from gptdist.generate import Sampling
from gptdist.serve.command import ServeOptions, open_served, read_api_key
from gptdist.tasks.classify import Labeller
from tests.conftest import ROOT
from tests.finetune_worker import run_classify
from tests.serving import running
from tests.test_instruct import finetune
from tests.training import run_tiny


@pytest.fixture(scope="module")
def base(dataset, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "base"
    run_tiny(dataset, run_dir, "--model.context=64", "--train.tokens_per_step=704", "--train.steps=5", "--eval.every=0",
             "--eval.tokens=500")
    return run_dir


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    """A chat model whose checkpoint holds adapters alone."""
    folder = tmp_path_factory.mktemp("runs")
    data = folder / "sums.jsonl"
    data.write_text("\n".join(json.dumps({"messages": [
        {"role": "user", "content": f"{a}+{b}"}, {"role": "assistant", "content": f"is {a + b}"}]})
        for a in range(10) for b in range(3)))
    finetune(data, base, folder / "lora", "--lora.rank=2", "--lora.save=adapters", "--train.steps=3",
             "--model.dropout=0")
    return folder / "lora"


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    texts = folder / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"{word} {i}", "label": word}) + "\n"
                             for i in range(20) for word in ("yes", "no", "perhaps")))
    run_classify(texts, folder / "answers", "--train.steps=3")
    return folder / "answers"


def latest(run_dir):
    return layout.resolve(str(run_dir), "latest")


def test_a_process_that_serves_and_stops(base, tmp_path):
    """A base model, by the command: asked over HTTP, with a key, and stopped in the middle of a stream."""
    (tmp_path / "key").write_text("s3cret\n")
    with subprocess.Popen(
            [sys.executable, "-m", "gptdist", "serve", str(base), "--port", "0", "--name", "mine", "--api-key-file",
             str(tmp_path / "key")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"}) as process:
        said = process.stdout.readline()
        address = re.search(r"serving mine \(base, a cache of \d+ MiB\) at (http://127\.0\.0\.1:\d+); Ctrl-C", said)
        assert address, said + process.stderr.read()
        headers = {"Authorization": "Bearer s3cret"}
        with httpx.Client(base_url=address[1], timeout=60) as client:
            assert client.get("/v1/models").status_code == 401
            assert client.get("/v1/models", headers=headers).json()["data"][0]["id"] == "mine"
            body = {"prompt": "Return", "max_tokens": 60, "stream": True}
            with client.stream("POST", "/v1/completions", json=body, headers=headers) as stream:
                lines = stream.iter_lines()
                next(lines)
                process.send_signal(signal.SIGTERM)
                assert [line for line in lines if line][-1] == "data: [DONE]"
        assert process.wait(60) == 0
        assert process.stderr.read() == ""


def test_adapters_chat_as_gptdist_chat_does(adapters):
    checkpoint = latest(adapters)
    chat = open_chat(checkpoint, Sampling(max_new_tokens=8, temperature=0))
    want = "".join(chat.say("3+4"))
    with running(open_served(checkpoint, ServeOptions())) as server:
        done = server.post("/v1/chat/completions", messages=[{"role": "user", "content": "3+4"}], temperature=0,
                           max_tokens=8)
        assert done.json()["choices"][0]["message"]["content"] == want
        assert done.json()["model"] == "lora"


def test_a_classifier_labels(classifier):
    checkpoint = latest(classifier)
    texts = ["yes 3", "no " * 40, "perhaps"]
    with running(open_served(checkpoint, ServeOptions())) as server:
        done = server.post("/v1/classify", input=texts).json()
        assert [line["index"] for line in done["data"]] == [0, 1, 2]
        assert [line["truncated"] for line in done["data"]] == [False, True, False]
        for line, want in zip(done["data"], Labeller(checkpoint).lines(texts), strict=True):
            assert (line["label"], line["probabilities"]) == (want["label"], pytest.approx(want["probabilities"]))
        assert server.post("/v1/classify", input="no").json()["data"][0]["index"] == 0
        for path, body, message in (
            ("/v1/classify", dict(input=""), "text 1 is empty"), ("/v1/classify", dict(input=[]), "input"),
            ("/v1/classify", dict(input="\ud800"), ""),
            ("/v1/completions", dict(prompt="x"), "is a classifier, which writes no text"),
            ("/v1/chat/completions", dict(messages=[{"role": "user", "content": "x"}]), "is a classifier"),
        ):
            bad = server.client.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
            assert (bad.status_code, message in bad.json()["error"]["message"]) == (400, True), bad.text
        assert server.client.get("/v1/models").json()["data"][0]["labels"] == ["no", "perhaps", "yes"]
        assert server.client.get("/health").json()["status"] == "ok"
        assert server.metric('gptdist_requests_total{path="/v1/classify",status="200"}') == 2


def test_other_options_are_named(base, classifier, tmp_path, capsys, monkeypatch):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for arguments, message in (
            ([str(base), "--port", port], f"cannot listen on 127.0.0.1 port {port}: Address already in use; choose"),
            ([str(base), "--port", "70000"], "--port is 70000, expected 0 (a free one) to 65535"),
            ([str(base), "--send-timeout", "0"], "--send-timeout is 0, expected more than 0 and at most 86400 seconds"),
            ([str(base), "--cache-tokens", "8", "--port", "0"], "a cache of 8 tokens is too small for one text"),
            ([str(base), "--queue", "0"], "the server's limit of queue is 0, expected more than 0"),
            ([str(base), "--template", "phi3", "--port", "0"], "the model's tokenizer has no <|system|>"),
            ([str(classifier), "--template", "phi3", "--port", "0"], "a classifier, which has no use for --template"),
            ([str(base), "--api-key-file", str(tmp_path / "none")], "cannot read the API key in"),
        ):
            assert main(["serve", *arguments]) == 2
            assert message in capsys.readouterr().err
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(UserError, match="has no API key in its first line"):
        read_api_key(str(tmp_path / "empty"))
    monkeypatch.setenv("GPTDIST_API_KEY", "k")
    assert read_api_key(None) == "k"


def test_a_missing_package_names_the_extra(base, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", str(base)]) == 3
    assert "install the extra with `pip install 'gptdist[serve]'`" in capsys.readouterr().err
