"""The HTTP interface of a server that runs: OpenAI's client, streams, errors, limits, who may ask."""

import json
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

pytest.importorskip("fastapi", reason="pip install 'gptdist[serve]'")
pytest.importorskip("uvicorn", reason="pip install 'gptdist[serve]'")

from gptdist.generate import Sampling
from gptdist.serve.engine import Limits
from gptdist.serve.guard import Rules
from tests.serving import CHAT, CONTEXT, Running, running, tiny_generator, tiny_served, wait_for

HI = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def server():
    with running(tiny_served()) as found:
        yield found


@pytest.fixture(scope="module")
def alone():
    return tiny_generator()


@pytest.fixture
def client(server: Running):
    openai = pytest.importorskip("openai", reason="the official client is the peer")
    with openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0) as found:
        yield found


def answer(alone, messages: str, **options) -> str:
    [completion] = alone.generate([messages], Sampling(**options))
    return completion.text


def test_the_openai_client_chats(client, alone):
    done = client.chat.completions.create(
        model="tiny", messages=[{"role": "system", "content": "Be brief."}, *HI], temperature=0.8, seed=5,
        max_tokens=12)
    want = answer(alone, "<Be brief.>Q:Hi\nA:", temperature=0.8, seed=5, max_new_tokens=12)
    assert done.choices[0].message.content == want
    assert (done.choices[0].message.role, done.choices[0].finish_reason, done.model) == ("assistant", "length", "tiny")
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (len("<Be brief.>Q:Hi\nA:"), 12)


def test_the_openai_client_streams(client, alone):
    chunks = list(client.chat.completions.create(
        model="tiny", messages=HI, temperature=0.8, seed=5, max_tokens=12, n=2, stream=True,
        stream_options={"include_usage": True}))
    *chunks, last = chunks
    for i in range(2):
        own = [c.choices[0] for c in chunks if c.choices[0].index == i]
        assert own[0].delta.role == "assistant"
        assert [c.finish_reason for c in own if c.finish_reason] == ["length"]
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices[0].index == 0)
    assert text == answer(alone, "Q:Hi\nA:", temperature=0.8, seed=5, max_new_tokens=12)
    assert (last.choices, last.usage.completion_tokens) == ([], 24)


def test_the_openai_client_completes(client, alone):
    done = client.completions.create(model="tiny", prompt=["One", "Two"], temperature=0, max_tokens=8, n=2)
    one, two = (answer(alone, prompt, temperature=0, max_new_tokens=8) for prompt in ("One", "Two"))
    assert [choice.text for choice in done.choices] == [one, one, two, two]
    parts = client.completions.create(model="tiny", prompt=[79, 110, 101], temperature=0, max_tokens=8, stream=True)
    assert "".join(part.choices[0].text for part in parts) == one


def test_stop_strings_and_the_end(client, alone):
    whole = answer(alone, "Q:Hi\nA:", temperature=0, max_new_tokens=30)
    stop = whole[5:7]
    done = client.chat.completions.create(model="tiny", messages=HI, temperature=0, max_tokens=30, stop=[stop])
    assert (done.choices[0].message.content, done.choices[0].finish_reason) == (whole[:whole.find(stop)], "stop")


def test_log_probabilities(client):
    done = client.chat.completions.create(model="tiny", messages=HI, temperature=0, max_tokens=5, logprobs=True,
                                          top_logprobs=3)
    entries = done.choices[0].logprobs.content
    assert len(entries) == 5
    for entry in entries:
        assert (entry.bytes, entry.logprob) == (entry.top_logprobs[0].bytes, entry.top_logprobs[0].logprob)
        assert len(entry.top_logprobs) == 3
    old = client.completions.create(model="tiny", prompt="Q:Hi\nA:", temperature=0, max_tokens=5, logprobs=2)
    scores = old.choices[0].logprobs
    assert scores.token_logprobs == pytest.approx([entry.logprob for entry in entries], abs=1e-4)
    assert [len(top) for top in scores.top_logprobs] == [2] * 5
    parts = [part.choices[0] for part in client.completions.create(
        model="tiny", prompt="Q:Hi\nA:", temperature=0, max_tokens=5, logprobs=0, stream=True)]
    streamed = [logprob for part in parts for logprob in part.logprobs.token_logprobs]
    assert streamed == pytest.approx(scores.token_logprobs, abs=1e-4)


def test_models(client, server):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "gptdist"
    described = server.client.get("/v1/models/tiny").json()
    assert (described["task"], described["context"], described["system_prompt"]) == ("chat", CONTEXT, True)


def test_the_oldest_turns_are_left_out_where_that_is_asked_for(server):
    turns = [{"role": role, "content": "x" * 20} for role in ("user", "assistant") * 3] + HI
    long = server.post("/v1/chat/completions", messages=turns, max_tokens=4)
    assert (long.status_code, long.json()["error"]["code"]) == (400, "context_length_exceeded")
    done = server.post("/v1/chat/completions", messages=turns, max_tokens=4, truncation="auto").json()
    assert done["forgotten_turns"] == 4
    assert done["usage"]["prompt_tokens"] == len(f"Q:{'x' * 20}\nA:{'x' * 20}_Q:Hi\nA:")


BAD = [
    ("/v1/chat/completions", dict(messages=[]), 400, "messages: list should have at least 1 item"),
    ("/v1/chat/completions", dict(), 400, "messages: field required"),
    ("/v1/chat/completions", dict(messages=[{"role": "robot", "content": ""}]), 400, "'system', 'developer', 'user'"),
    ("/v1/chat/completions", dict(messages=HI * 2), 400, "the roles are user, user; expected a system message or none"),
    ("/v1/chat/completions", dict(messages=HI, model="gpt-5"), 404, "there is no model 'gpt-5' here: this server has"),
    ("/v1/chat/completions", dict(messages=HI, model="\ud800"), 404, "there is no model '\\ud800' here"),
    ("/v1/chat/completions", dict(messages=HI, temperature=-1), 400, "temperature: input should be greater than or eq"),
    ("/v1/chat/completions", dict(messages=HI, temperature=1e-9), 400, "temperature is 1e-09, expected 0 (greedy)"),
    ("/v1/chat/completions", dict(messages=HI, temperature="hot"), 400, "temperature: input should be a valid number"),
    ("/v1/chat/completions", dict(messages=HI, temprature=1), 400, "unknown field 'temprature'; did you mean temper"),
    ("/v1/chat/completions", dict(messages=HI, n=10**30), 400, "n: "),
    ("/v1/chat/completions", dict(messages=HI, max_tokens=0), 400, "max_tokens: input should be greater than or equal"),
    ("/v1/chat/completions", dict(messages=HI, frequency_penalty=1), 400, "frequency_penalty: not supported: leave it"),
    ("/v1/chat/completions", dict(messages=HI, top_logprobs=2), 400, "top_logprobs needs logprobs=true"),
    ("/v1/chat/completions", dict(messages=HI, stop=""), 400, "stop."),
    ("/v1/chat/completions", dict(messages=[{"role": "user", "content": "x" * CONTEXT}]), 400, "context is 96"),
    ("/v1/chat/completions", dict(messages=[{"role": "user", "content": "\ud800"}]), 400, ""),
    ("/v1/completions", dict(prompt="x" * CONTEXT), 400, "the prompt has 96 tokens"),
    ("/v1/completions", dict(prompt=[70000]), 400, "prompt has the token id 70000, the model's vocabulary ends at 256"),
    ("/v1/completions", dict(prompt=[]), 400, "prompt"),
    ("/v1/completions", dict(prompt="x", echo=True), 400, "echo: not supported"),
    ("/v1/completions", dict(prompt="x", best_of=2), 400, "best_of: not supported"),
    ("/v1/classify", dict(input="x"), 400, "tiny is no classifier"),
    ("/v1/nothing", dict(), 404, "there is nothing at this path: use one of /, /health"),
]


@pytest.mark.parametrize(("path", "body", "status", "message"), BAD, ids=lambda v: str(v)[:40])
def test_bad_requests_get_a_sentence_that_helps(server, path, body, status, message):
    done = server.client.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert done.status_code == status, done.text
    error = done.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert message in error["message"]


@pytest.mark.parametrize(("content", "message"), [
    (b"{broken", "the body is not JSON"), (b"", "expected a JSON object"), (b"[" * 100_000, ""), (b"\xff", ""),
    (b'{"messages": ' + b"9" * 5000 + b"}", ""), (b"[]", ""), (b'{"messages": NaN}', "messages: "),
], ids=lambda v: str(v[:12]))
def test_bodies_that_are_no_request(server, content, message):
    done = server.client.post("/v1/chat/completions", content=content, headers={"Content-Type": "application/json"})
    assert done.status_code == 400, done.text
    assert message in done.json()["error"]["message"]


def test_other_methods_and_kinds_of_body(server):
    assert server.client.get("/v1/completions").json()["error"]["message"].startswith("this path takes another method")
    forged = server.client.post("/v1/completions", content='{"prompt": "x"}', headers={"Content-Type": "text/plain"})
    assert forged.status_code == 400, "what any web page may send without asking first"


def test_bodies_are_bounded_in_size_and_time():
    with running(tiny_served(), rules=Rules(max_body_bytes=1000, body_timeout_s=0.2)) as server:
        assert server.post("/v1/completions", prompt="x" * 2000).status_code == 413

        def parts():
            yield from [b"x" * 300] * 5

        done = server.client.post("/v1/completions", content=parts(), headers={"Content-Type": "application/json"})
        assert (done.status_code, done.json()["error"]["code"]) == (413, "too_large")
        with socket.create_connection(("127.0.0.1", int(server.address.rpartition(":")[2])), timeout=30) as slow:
            slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n"
                         b"Content-Type: application/json\r\n\r\n{")
            assert slow.recv(1000).startswith(b"HTTP/1.1 408 ")


def test_the_key(server):
    with running(tiny_served(), rules=Rules(api_key="s3cret")) as locked:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "s3cret"}):
            done = locked.client.get("/v1/models", headers=headers)
            assert (done.status_code, done.json()["error"]["type"]) == (401, "authentication_error")
        assert locked.client.get("/metrics").status_code == 401
        assert locked.client.get("/v1/models", headers={"Authorization": "Bearer s3cret"}).status_code == 200
        assert locked.client.get("/health").status_code == 200


def test_only_this_machine_is_answered(server):
    for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example"):
        done = server.client.get("/v1/models", headers={"Host": host})
        assert (done.status_code, done.json()["error"]["code"]) == (400, "wrong_host")
    for host in ("localhost:1", "[::1]:8000", "127.0.0.1"):
        assert server.client.get("/health", headers={"Host": host}).status_code == 200


def test_no_other_origin_is_let_in(server):
    done = server.client.options("/v1/completions", headers={
        "Origin": "https://evil.example", "Access-Control-Request-Method": "POST"})
    assert done.status_code == 405
    assert not [name for name in done.headers if name.startswith("access-control")]
    policy = server.client.get("/").headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


def test_a_full_queue_says_when_to_come_back():
    with running(tiny_served(), limits=Limits(rows=1, queue=2), slow_s=0.1) as server:
        ask = dict(prompt="x", max_tokens=60, temperature=1, seed=1)  # an answer of 6 s
        with ThreadPoolExecutor(3) as pool:
            jobs = [pool.submit(server.post, "/v1/completions", **ask)]
            wait_for(lambda: server.engine.rows)  # the queue takes two beside it
            jobs += [pool.submit(server.post, "/v1/completions", **ask) for _ in range(2)]
            wait_for(lambda: len(server.engine.waiting) == 2)
            done = server.post("/v1/completions", **ask)
            assert (done.status_code, done.json()["error"]["type"]) == (429, "rate_limit_error")
            assert 1 <= int(done.headers["retry-after"]) <= 60
            assert [job.result().status_code for job in jobs] == [200] * 3


def idle(server: Running) -> bool:
    engine = server.engine
    return not engine.rows and not engine.waiting and not engine.n_pages_used and not server.api._inboxes


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_row(stream):
    with running(tiny_served(), slow_s=0.05) as server:
        body = json.dumps(dict(prompt="x", max_tokens=90, temperature=1, seed=1, stream=stream)).encode()
        with socket.create_connection(("127.0.0.1", int(server.address.rpartition(":")[2])), timeout=30) as leaves:
            leaves.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                           b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
            wait_for(lambda: server.engine.rows and server.engine.rows[0].job.n_tokens >= 2)
            [row] = server.engine.rows
        wait_for(lambda: idle(server))
        assert row.job.n_tokens < 60, "it did not go on to the end"


@contextmanager
def unread_stream(server: Running):
    """The socket of a client that asks for a long stream and reads nothing of it."""
    server.send_little_ahead()
    body = json.dumps(dict(prompt="x", max_tokens=90, n=16, logprobs=20, stream=True, seed=1)).encode()
    with socket.socket() as sleeps:
        sleeps.settimeout(60)
        sleeps.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        sleeps.connect(("127.0.0.1", int(server.address.rpartition(":")[2])))
        sleeps.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                       b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
        wait_for(lambda: server.engine.rows)
        yield sleeps


def test_a_reader_that_does_not_read_holds_up_nobody():
    with running(tiny_served()) as server:
        with unread_stream(server):
            assert server.post("/v1/completions", prompt="y", max_tokens=5).status_code == 200
            wait_for(lambda: not server.engine.rows)  # its row ends, whether it reads or not
            assert len(server.api._inboxes) == 1, "and it still could"
        wait_for(lambda: idle(server))


def test_each_piece_of_a_stream_is_sent_at_once():
    """With Nagle's algorithm a piece waits for the acknowledgement of the one before, 40 ms."""
    with running(tiny_served()) as server:
        server.post("/v1/completions", prompt="y", max_tokens=2)
        [connection] = server._server.server_state.connections  # kept alive
        assert connection.transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def read_all(connection: socket.socket) -> None:
    while connection.recv(1 << 16):
        pass


def test_a_reader_that_never_reads_is_cut_off():
    """It gives its place back while its socket is open; one that reads, for longer than that, gets everything."""
    ask = dict(prompt="x", max_tokens=90, temperature=1, seed=1, stream=True)
    with running(tiny_served(), slow_s=0.02, send_timeout_s=0.5) as server, unread_stream(server) as sleeps:
        assert server.post("/v1/completions", **ask).text.endswith("data: [DONE]\n\n")  # 90 tokens, 0.02 s each
        wait_for(lambda: idle(server))
        with pytest.raises(ConnectionResetError):
            read_all(sleeps)


def test_many_at_once_get_their_own(alone):
    """More than a hundred requests, streamed and not: each gets the text of its own seed and prompt."""
    asked = [dict(prompt=f"request {i % 3}", max_tokens=6, temperature=1, seed=i % 5, stream=i % 2 == 0)
             for i in range(120)]
    want = {(b["prompt"], b["seed"]): answer(alone, b["prompt"], seed=b["seed"], max_new_tokens=6) for b in asked}

    def ask(server: Running, body) -> str:
        text = server.client.post("/v1/completions", json=body).text
        if not body["stream"]:
            return json.loads(text)["choices"][0]["text"]
        *lines, last = text.split("\n\n")[:-1]
        assert last == "data: [DONE]"
        return "".join(json.loads(line.removeprefix("data: "))["choices"][0]["text"] for line in lines)

    with running(tiny_served(), limits=Limits(queue=400)) as server, ThreadPoolExecutor(32) as pool:
        got = list(pool.map(lambda body: ask(server, body), asked))
        assert idle(server)
    assert got == [want[body["prompt"], body["seed"]] for body in asked]


def test_a_stream_that_fails_says_so(monkeypatch, capfd):
    openai = pytest.importorskip("openai", reason="the official client is the peer")
    with running(tiny_served()) as server:
        choose = server.engine._choose

        def fails_later(row, logits, sampling):
            if len(row.tokens) > row.n_prompt + 2:
                raise RuntimeError("out of ideas")
            return choose(row, logits, sampling)

        monkeypatch.setattr(server.engine, "_choose", fails_later)
        client = openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0)
        stream = client.completions.create(model="tiny", prompt="x", max_tokens=9, temperature=0, stream=True)
        with pytest.raises(openai.APIError, match="the model failed on this request"):
            list(stream)
        done = server.post("/v1/completions", prompt="x", max_tokens=9, temperature=0)
        assert (done.status_code, done.json()["error"]["type"]) == (500, "server_error")
    assert "out of ideas" in capfd.readouterr().err


def test_shutting_down_finishes_running_streams():
    ask = dict(prompt="x", max_tokens=40, temperature=0, stream=True)
    with (running(tiny_served(), slow_s=0.02) as server,
          server.client.stream("POST", "/v1/completions", json=ask) as stream):
        lines = stream.iter_lines()
        next(lines)
        server.stop()
        assert [line for line in lines if line][-1] == "data: [DONE]"


def test_metrics(alone):
    with running(tiny_served()) as server:
        server.post("/v1/completions", prompt="x" * 40, max_tokens=5, temperature=0)
        server.post("/v1/completions", prompt="x" * 40, max_tokens=5, temperature=0)
        server.post("/v1/completions", prompt="", temperature=0)  # 16 tokens, the protocol's default
        assert server.metric('gptdist_requests_total{path="/v1/completions",status="200"}') == 3
        assert server.metric("gptdist_prompt_tokens_total") == 81
        assert server.metric("gptdist_cached_prompt_tokens_total") == 32
        assert server.metric("gptdist_generated_tokens_total") == 26
        assert server.metric("gptdist_first_token_seconds_count") == 3
        assert server.metric("gptdist_rows_running") == 0
        assert server.metric("gptdist_cache_pages") == 96


def test_a_base_model_does_not_chat():
    with running(tiny_served(template=None)) as server:
        done = server.post("/v1/chat/completions", messages=HI)
        assert (done.status_code, done.json()["error"]["code"]) == (400, "not_a_chat_model")
        assert server.client.get("/v1/models").json()["data"][0]["task"] == "base"


def test_a_template_without_a_place_for_a_system_prompt():
    with running(tiny_served(template=type(CHAT)(name="bare", turn=CHAT.turn))) as server:
        done = server.post("/v1/chat/completions", messages=[{"role": "system", "content": "x"}, *HI])
        assert (done.status_code, "has no place for a system prompt" in done.text) == (400, True)


@pytest.mark.long
def test_schemathesis_finds_no_server_error(tmp_path):
    schemathesis = pytest.importorskip("schemathesis", reason="it makes up the requests")
    import subprocess
    import sys
    from pathlib import Path

    with running(tiny_served(), limits=Limits(timeout_s=20)) as server:
        done = subprocess.run(
            [str(Path(sys.executable).with_name("schemathesis")), "run", f"{server.address}/openapi.json", "--checks",
             "not_a_server_error", "--max-examples", "60", "--phases", "examples,coverage,fuzzing", "--seed", "1"],
            capture_output=True, text=True, timeout=900, cwd=tmp_path)
        assert schemathesis is not None
        assert done.returncode == 0, done.stdout[-5000:]
        assert server.engine.failures == 0
        wait_for(lambda: idle(server))


