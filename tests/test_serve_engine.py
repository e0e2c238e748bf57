"""Continuous batching: every request gets what it would get alone; pages, queue, fairness, cancelling."""

import dataclasses
import time

import pytest
import torch

from gptdist.data.tokenizer import build_tokenizer
from gptdist.errors import UserError
from gptdist.generate import PAGE, SCRATCH, Generator, Sampling
from gptdist.serve.engine import BusyError, Engine, Limits
from gptdist.serve.pages import SharedPool
from tests.test_generate import generator

CONTEXT = 96


@pytest.fixture(scope="module")
def alone() -> Generator:
    return generator(build_tokenizer("bytes"), context=CONTEXT, width=64, n_layers=2)


class Collected(Engine):
    """An engine that the test steps by hand, with what it delivered."""

    def __init__(self, alone: Generator, **limits):
        super().__init__(alone.model, alone.tokenizer, Limits(**limits), self._events_of)
        self.seen = []

    def _events_of(self, events):
        self.seen += events

    def step(self):
        super().step()
        self.seen, self._events = self.seen + self._events, []

    def ask(self, text: str, sampling: Sampling, **options):
        return self.submit([self.tokenizer.encode(text)], sampling, **options)

    def run(self):
        while self.rows or self.waiting:
            self.step()

    def text(self, job, choice: int = 0) -> tuple[str, str | None]:
        events = [e for e in self.seen if e.job is job and e.choice == choice]
        assert all(e.finish is None for e in events[:-1]), "nothing comes after the end"
        return "".join(e.text for e in events), events[-1].finish if events else None


REQUESTS = [
    ("hello there", Sampling(max_new_tokens=20, temperature=0)),
    ("a", Sampling(max_new_tokens=7, temperature=0.9, seed=3)),
    ("x" * 50, Sampling(max_new_tokens=30, temperature=1.2, top_k=20, seed=4)),
    ("the same beginning, " * 2 + "one", Sampling(max_new_tokens=12, temperature=0.8, top_p=0.9, seed=5)),
    ("the same beginning, " * 2 + "two", Sampling(max_new_tokens=25, temperature=0.7, repetition_penalty=1.3, seed=6)),
    ("", Sampling(max_new_tokens=9, temperature=1.0, seed=7, stop=("e", "q"))),
    ("y" * 90, Sampling(max_new_tokens=200, temperature=0)),
]


@pytest.fixture(scope="module")
def answers(alone) -> list[tuple[str, str]]:
    """Of REQUESTS, each alone."""
    return [expected(alone, text, sampling) for text, sampling in REQUESTS]


def expected(alone: Generator, text: str, sampling: Sampling) -> tuple[str, str]:
    room = CONTEXT - max(len(text), 1)
    [completion] = alone.generate([text], dataclasses.replace(sampling,
                                                              max_new_tokens=min(sampling.max_new_tokens, room)))
    return completion.text, completion.finish


@pytest.mark.parametrize("limits", [{}, {"rows": 2}, {"chunk": 7}, {"cache_tokens": 2 * CONTEXT}], ids=str)
def test_each_request_gets_what_it_gets_alone(alone, answers, limits):
    """Whatever joins and leaves beside it, however small batch, chunks and cache are."""
    engine = Collected(alone, **limits)
    jobs = []
    for text, sampling in REQUESTS:
        jobs.append(engine.ask(text, sampling))
        engine.step()
    engine.run()
    assert [engine.text(job) for job in jobs] == answers
    assert engine.n_pages_used == 0
    assert sorted([*engine.pool._free, *engine.pool._idle]) == list(range(1, engine.pool.n_pages + 1))


@pytest.mark.parametrize("options", [{"positions": "rope", "n_kv_heads": 2}])
def test_other_models(options):
    alone = generator(build_tokenizer("bytes"), context=CONTEXT, width=64, n_layers=2, **options)
    engine = Collected(alone, chunk=16)
    jobs = [engine.ask(text, sampling) for text, sampling in REQUESTS]
    engine.run()
    assert [engine.text(job) for job in jobs] == [expected(alone, *request) for request in REQUESTS]


def test_choices_of_a_request(alone):
    engine = Collected(alone)
    sampling = Sampling(max_new_tokens=10, temperature=1.0, seed=2)
    prompt = "the same prompt for all of the choices"
    job = engine.ask(prompt, sampling, n=4)
    engine.run()
    texts = [engine.text(job, i)[0] for i in range(4)]
    assert texts[0] == expected(alone, prompt, sampling)[0]
    assert len(set(texts)) == 4
    assert job.n_cached == 3 * (len(prompt) // PAGE * PAGE), "they share the full pages of their prompt"
    assert job.n_tokens == 40


def test_a_shared_beginning_is_computed_once(alone):
    engine = Collected(alone)
    system = "You are a helpful assistant, and you answer briefly. "
    first = engine.ask(system + "One?", Sampling(max_new_tokens=3, temperature=0))
    engine.run()
    second = engine.ask(system + "Two?", Sampling(max_new_tokens=3, temperature=0))
    engine.run()
    assert (first.n_cached, second.n_cached) == (0, len(system) // PAGE * PAGE)
    assert engine.text(second) == expected(alone, system + "Two?", Sampling(max_new_tokens=3, temperature=0))


def test_the_next_turn_finds_the_answer_before_it(alone):
    engine = Collected(alone)
    job = engine.ask("question", Sampling(max_new_tokens=40, temperature=0))
    engine.run()
    tokens = engine.tokenizer.encode("question") + alone.generate(
        ["question"], Sampling(max_new_tokens=40, temperature=0))[0].tokens
    after = engine.submit([[*tokens, 65, 66]], Sampling(max_new_tokens=2, temperature=0))
    engine.run()
    assert (job.n_cached, after.n_cached) == (0, 47 // PAGE * PAGE), "the last token was never written"


def test_a_new_request_waits_for_no_other_to_end(alone):
    engine = Collected(alone, chunk=16)
    long = engine.ask("a", Sampling(max_new_tokens=90, temperature=1.0, seed=11))
    for _ in range(5):
        engine.step()
    late = engine.ask("b" * 60, Sampling(max_new_tokens=3, temperature=1.0, seed=12))
    before = long.n_tokens
    for _ in range(4):  # 60 tokens in chunks of 16
        assert late.first_token is None
        engine.step()
    assert late.first_token is not None
    assert long.n_tokens == before + 4, "nor does the other one wait for it"


def test_one_long_prompt_does_not_hold_up_the_short_ones(alone):
    engine = Collected(alone, chunk=16)
    long = engine.ask("z" * 90, Sampling(max_new_tokens=2, temperature=0))
    engine.step()
    short = engine.ask("hi", Sampling(max_new_tokens=1, temperature=0))
    engine.step()
    assert short.first_token is not None
    assert long.first_token is None
    engine.run()
    assert engine.text(long) == expected(alone, "z" * 90, Sampling(max_new_tokens=2, temperature=0))


def test_cancelling_frees_the_row_within_one_token(alone):
    engine = Collected(alone, rows=1)
    job = engine.ask("go on", Sampling(max_new_tokens=80, temperature=0), n=2)
    other = engine.ask("b", Sampling(max_new_tokens=2, temperature=0))
    for _ in range(3):
        engine.step()
    assert (len(engine.rows), len(engine.waiting)) == (1, 2)
    job.cancel()
    n_seen = len(engine.seen)
    engine.step()
    assert [row.job for row in engine.rows] == [other]
    assert not engine.waiting
    assert all(event.job is other for event in engine.seen[n_seen:])
    engine.run()
    assert engine.n_pages_used == 0


def test_requests_that_take_too_long_end_with_an_error(alone):
    engine = Collected(alone, rows=1, timeout_s=0.05)
    jobs = [engine.ask("go on", Sampling(max_new_tokens=80, temperature=0)) for _ in range(2)]
    engine.step()
    time.sleep(0.06)
    engine.run()
    assert [(e.job, e.error) for e in engine.seen if e.error] == [(job, "timeout") for job in jobs]
    assert engine.n_pages_used == 0


def test_the_queue_has_an_end(alone):
    engine = Collected(alone, rows=1, queue=3)
    sampling = Sampling(max_new_tokens=2, temperature=0)
    jobs = [engine.ask("a", sampling)]
    engine.step()
    jobs += [engine.ask("b", sampling) for _ in range(3)]
    with pytest.raises(BusyError):
        engine.ask("c", sampling)
    engine.run()
    assert all(engine.text(job)[1] for job in jobs)
    engine.ask("c", sampling, n=5)  # more than the queue's length, and it is empty: better than never
    engine.run()


def test_pages_bound_what_runs_at_once(alone):
    engine = Collected(alone, cache_tokens=CONTEXT + PAGE)  # 7 pages
    sampling = Sampling(max_new_tokens=30, temperature=1.0, seed=1)
    jobs = [engine.ask(letter * 10, sampling) for letter in "abc"]  # 3 pages each
    engine.step()
    assert (len(engine.rows), engine.n_pages_used) == (2, 6)
    engine.run()
    assert [engine.text(job) for job in jobs] == [expected(alone, letter * 10, sampling) for letter in "abc"]


def test_scores_are_the_models_own(alone):
    engine = Collected(alone)
    sampling = Sampling(max_new_tokens=6, temperature=0.5, seed=3, top_k=2)
    job = engine.ask("hello", sampling, top_logprobs=3)
    engine.run()
    scores = [score for event in engine.seen for score in event.scores]
    [completion] = alone.generate(["hello"], sampling)
    assert [score.token for score in scores] == completion.tokens
    tokens = torch.tensor([[*alone.tokenizer.encode("hello"), *completion.tokens]])
    logprobs = alone.model.logits(alone.model.hidden(tokens))[0].detach().log_softmax(-1)
    for i, score in enumerate(scores):
        want = logprobs[4 + i]
        assert score.logprob == pytest.approx(float(want[score.token]), abs=1e-4)
        assert [t for t, _ in score.top] == want.topk(3).indices.tolist()
    assert job.n_tokens == 6


def test_scores_end_where_a_stop_string_begins(alone):
    [whole] = alone.generate(["hello"], Sampling(max_new_tokens=30, temperature=0))
    stop = whole.text[4:6]
    engine = Collected(alone)
    job = engine.ask("hello", Sampling(max_new_tokens=30, temperature=0, stop=(stop,)), top_logprobs=0)
    engine.run()
    text, finish = engine.text(job)
    assert (text, finish) == (whole.text[:whole.text.find(stop)], "stop")
    shown = b"".join(engine.tokenizer.token_bytes(s.token) for e in engine.seen for s in e.scores)
    assert shown.decode(errors="replace").startswith(text)
    assert len(shown) <= len(text.encode()) + 3


def test_a_failing_row_ends_alone(alone, capsys):
    delivered = []
    engine = Engine(alone.model, alone.tokenizer, Limits(), delivered.extend)
    choose = engine._choose

    def broken(row, logits, sampling):
        if sampling.seed == 13:
            raise RuntimeError("thirteen")
        return choose(row, logits, sampling)

    engine._choose = broken
    bad, good = (engine.submit([[65]], Sampling(max_new_tokens=3, temperature=0, seed=seed)) for seed in (13, 14))
    engine.start()
    wait_for(lambda: any(e.job is good and e.finish for e in delivered))
    assert [e.error for e in delivered if e.job is bad] == ["failed"]
    engine.close()
    assert "thirteen" in capsys.readouterr().err
    assert (engine.failures, engine.n_pages_used) == (1, 0)


def test_a_failing_step_ends_its_rows_and_nothing_else(alone, capsys):
    delivered = []
    engine = Engine(alone.model, alone.tokenizer, Limits(), delivered.extend)
    forward = engine._forward

    def broken(*args):
        engine._forward = forward
        raise RuntimeError("thirteen")

    engine._forward = broken
    engine.start()
    bad = engine.submit([[65]], Sampling())
    wait_for(lambda: any(e.job is bad and e.error == "failed" for e in delivered))
    good = engine.submit([[65]], Sampling(max_new_tokens=3, temperature=0))
    wait_for(lambda: any(e.job is good and e.finish for e in delivered))
    engine.close()
    assert "thirteen" in capsys.readouterr().err
    assert (engine.failures, engine.n_pages_used) == (1, 0)
    with pytest.raises(BusyError):
        engine.submit([[65]], Sampling())


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "did not happen within a minute"
        time.sleep(0.005)


def test_prompts_that_leave_no_room_are_named(alone):
    engine = Collected(alone)
    with pytest.raises(UserError, match=r"the prompt has 96 tokens, the model's context is 96"):
        engine.ask("x" * 96, Sampling())
    with pytest.raises(UserError, match=r"a cache of 50 tokens is too small for one text"):
        Collected(alone, cache_tokens=50)
    with pytest.raises(UserError, match=r"limit of rows is 0"):
        Limits(rows=0)


def pool(alone, n_pages: int) -> SharedPool:
    return SharedPool(alone.model.config, n_pages, device=torch.device("cpu"), dtype=torch.float32)


def test_idle_pages_are_given_away_oldest_and_last_first(alone):
    p = pool(alone, 4)
    tokens = list(range(3 * PAGE))
    pages, n = p.join(tokens, len(tokens))
    assert n == 0
    assert SCRATCH not in pages
    p.remember(tokens, pages)
    p.leave(pages)
    assert p.available == 4
    taken, _ = p.join([7], 2 * PAGE)  # the free page, and the end of what is idle
    again, n = p.join([*tokens, 1], 2 * PAGE)
    assert (again, n) == (pages[:2], 2 * PAGE)
    assert p.join([8], 1) is None
    assert set(taken).isdisjoint(again)


def test_shared_pages_stay_while_anyone_uses_them(alone):
    p = pool(alone, 4)
    tokens = list(range(PAGE + 1))
    first, _ = p.join(tokens, 2 * PAGE)
    p.remember(tokens, first)
    second, n = p.join(tokens, 2 * PAGE)
    assert (n, second[0], p.available) == (PAGE, first[0], 1)
    p.leave(first)
    assert p.available == 2
    p.leave(second)
    assert p.available == 4


def test_equal_pages_after_different_beginnings_are_not_shared(alone):
    p = pool(alone, 6)
    same = list(range(PAGE))
    pages, _ = p.join([1] * PAGE + same, 2 * PAGE)
    p.remember([1] * PAGE + same, pages)
    assert p.join([2] * PAGE + same + [0], 3 * PAGE)[1] == 0
    assert p.join(same, PAGE)[1] == 0, "the last token of a prompt is always computed"
