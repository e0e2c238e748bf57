"""Evaluation tasks: scores against the model's own logits, under every strategy; measures against published values."""

import json
import math
from pathlib import Path

import pytest
import torch

from gptdist import trainer
from gptdist.checkpoint.layout import latest
from gptdist.checkpoint.restore import load_model
from gptdist.cli import main
from gptdist.data.prepare import PrepareConfig, prepare
from gptdist.errors import UserError
from gptdist.evaluate.batches import CALL, divide, share_contexts
from gptdist.evaluate.calibration import calibration
from gptdist.evaluate.embedded_sets import SETS, embedded_set
from gptdist.evaluate.items import KINDS, Item, TaskSet, read_task
from gptdist.evaluate.scorer import Request, Score, evaluation_config, open_scorer
from gptdist.evaluate.suite import Options, open_tasks, rolling, run_task
from gptdist.evaluate.text_metrics import bleu, token_f1
from gptdist.generate import PAGE, Generator
from gptdist.metrics import read_rows
from gptdist.tasks.pretrain import SAMPLING
from tests.evaluate_worker import STRATEGIES, run_all
from tests.training import eval_losses, run_tiny, tiny_config, train_rows

# Scores are fp32 sums of at most 32 tokens' losses: another batch shape or world size rounds otherwise, no more.
TOLERANCE = 1e-4

LINES = {
    "choice": [{"ctx": "A man walks", "endings": ["on the road.", "blue", "seven of them, and then some"], "label": 0},
               {"question": "Which?", "choices": ["one", "two"], "answer": "B"},
               {"question": "Q", "choices": {"text": ["x", "yy"], "label": ["1", "2"]}, "answerKey": "2"},
               {"ctx": "x", "endings": ["one", "two"], "label": "1"}],
    "cloze": [{"text": "The function returns the value"}, {"prompt": "a b", "target": "c"}],
    "text": [{"text": "Return the number of items in a container.\n" * 5}, {"text": "ab"}],
    "classify": [{"text": "open a file", "label": "files"}, {"text": "send a mail", "label": "mail"},
                 {"text": "close a file", "label": "files"}, {"text": "7", "label": 1}],
    "qa": [{"question": "What?", "answers": {"text": ["a thing", "one"]}}, {"question": "Who?", "answer": "me"}],
    "translate": [{"source": "Hund", "target": "dog"}, {"source": "Katze", "target": ["cat", "a cat"]}],
    "summarize": [{"document": "A long story. " * 3, "summary": "A story."}, {"article": "b", "highlights": "b"}],
}


@pytest.fixture(scope="module")
def checkpoint(dataset, tmp_path_factory):
    run = tmp_path_factory.mktemp("evaluated") / "run"
    run_tiny(dataset, run, "--train.stop_at=6", "--eval.tokens=0")
    return latest(run / "checkpoints")


@pytest.fixture(scope="module")
def scorer(checkpoint):
    return open_scorer(checkpoint)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    for kind, records in LINES.items():
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def requests(scorer, count=23):
    text = scorer.tokenizer.encode("Return a list of the lines of the file, each with its number before it.")
    return [Request(text[i % 5:i % 5 + 3 * (i % 4)], text[20 + i % 3:21 + i % 3 + i % 7]) for i in range(count)] + [
        Request(text[:19 + i % 2], text[30 + i:32 + 2 * i]) for i in range(6)]  # two contexts that three have


def test_scores_are_the_models_log_likelihoods(checkpoint, scorer):
    model, tokenizer, _ = load_model(checkpoint)
    for request, score in zip(requests(scorer), scorer.score(requests(scorer), greedy=True), strict=True):
        tokens = [*(request.context or [tokenizer.eot]), *request.continuation]
        n = len(request.continuation)
        with torch.no_grad():
            logits = model.logits(model.hidden(torch.tensor([tokens[:-1]])))[0, -n:].double().log_softmax(-1)
        expected = sum(logits[i, token].item() for i, token in enumerate(tokens[-n:]))
        assert score.logprob == pytest.approx(expected, abs=TOLERANCE)
        assert score.greedy == (logits.argmax(-1).tolist() == tokens[-n:])


def test_scores_do_not_depend_on_the_batch(checkpoint, scorer):
    together = scorer.score(requests(scorer))
    for batch_tokens in (1, 40):
        other = open_scorer(checkpoint, batch_tokens=batch_tokens).score(requests(scorer))
        assert [s.logprob for s in other] == pytest.approx([s.logprob for s in together], abs=TOLERANCE)
    assert [s.logprob for s in scorer.score(requests(scorer))] == [s.logprob for s in together]


def test_batches_hold_all_requests_and_rows_of_like_length(scorer):
    nodes = [scorer._node(i, request) for i, request in enumerate(requests(scorer, 200))]
    packed, chunks = scorer.plan(nodes, limits := scorer.limits(greedy=False))
    batches = [*packed, *(batch for batches in chunks for batch in batches)]
    assert sorted(node.request for batch in batches for node in batch if node.targets) == list(range(206))
    for batch in packed:
        assert sum(node.positions for node in batch) <= limits.packed
    for batch in (batch for batches in chunks for batch in batches):
        width = batch[0].positions
        assert width == max(node.positions for node in batch)
        assert sum(width - node.positions for node in batch) <= CALL
        assert len(batch) * width <= limits.positions
    computed = set()
    for batch in batches:
        assert all(node.parent is None or node.parent in computed for node in batch)
        computed.update(batch)


def test_ranks_get_whole_families_and_like_shares(scorer):
    nodes = [scorer._node(i, request) for i, request in enumerate(requests(scorer, 200))]
    share_contexts(nodes)
    shares = divide(nodes, 3)
    assert sorted(node.request for share in shares for node in share) == list(range(206))
    parents = [{node.parent for node in share} - {None} for share in shares]
    assert sum(map(len, parents)) == len(set.union(*parents)) >= 2
    loads = [sum(node.positions for node in share) for share in shares]
    assert max(loads) - min(loads) <= 2 * scorer.model.context


@pytest.fixture
def computed(scorer, monkeypatch):
    """The shapes of the tokens of each forward pass."""
    shapes, call = [], type(scorer.strategy).__call__
    monkeypatch.setattr(type(scorer.strategy), "__call__", lambda self, tokens, *args, **more: (
        shapes.append(tuple(tokens.shape)), call(self, tokens, *args, **more))[1])
    return shapes


def assert_alike(scorer, together):
    """The scores of requests together are those of each alone."""
    for greedy in (False, True):
        found = scorer.score(together, greedy=greedy)
        alone = [scorer.score([request], greedy=greedy)[0] for request in together]
        assert [s.logprob for s in found] == pytest.approx([s.logprob for s in alone], abs=TOLERANCE)
        assert [s.greedy for s in found] == [s.greedy for s in alone]


@pytest.mark.parametrize("length", [3, PAGE - 1, PAGE, PAGE + 1, 20])
def test_a_context_that_requests_have_in_common_is_computed_once(scorer, computed, length):
    context = list(range(length))
    together = [Request(context, [1, 2, i]) for i in range(4)]
    scorer.score(together)
    assert computed == [(1, length - 1), (4, 3)]  # each row has the last token of the context, and two of its own
    computed.clear()
    scorer.score(together[:1])
    assert computed == [(1, length + 2)]
    assert_alike(scorer, together)


def test_what_contexts_begin_with_is_computed_once(scorer, computed):
    beginning = list(range(40, 40 + PAGE + 2))
    together = [Request([*beginning, 7 + question, 8, 9], [answer, 3]) for question in range(4) for answer in range(3)]
    together.append(Request([*beginning, 99], [1, 2, 3]))
    scorer.score(together)
    # What all begin with; the four questions, but for their last tokens, and the request that has its own; answers.
    assert computed == [(1, PAGE + 2), (5, 3), (12, 2)]
    assert_alike(scorer, together)
    computed.clear()
    scorer.score([Request([], beginning), Request([], [*beginning, 5])])
    assert computed == [(1, 2 * len(beginning) + 1)]  # all of it is asked for, in both


def test_a_row_that_ends_with_the_context_is_padded_at_its_beginning(scorer, computed):
    long, short = list(range(30)), list(range(50, 70))
    together = [Request(context, [i] * n) for context, n in ((long, 3), (short, 8)) for i in range(4)]
    scorer.score(together)
    assert computed == [(2, 29), (8, 8)]
    assert scorer.model.context < 29 + 8
    assert_alike(scorer, together)


def test_contexts_that_differ_in_length_share_what_they_can_in_one_batch(checkpoint, scorer, monkeypatch):
    contexts = [list(range(17)), list(range(50, 68)), list(range(5, 24))]
    mixed = [Request(context, [i] * (1 + i)) for context in contexts for i in range(3)]
    for batch_tokens in (20, 8192):
        assert_alike(open_scorer(checkpoint, batch_tokens=batch_tokens), mixed)
    monkeypatch.setattr("gptdist.evaluate.scorer.MAX_CACHE", 1)  # a context and a row at a time
    assert len(scorer.plan([scorer._node(i, r) for i, r in enumerate(mixed)], scorer.limits(False))[1]) == 3
    assert_alike(scorer, mixed)


def test_every_strategy_gives_the_scores_of_one_process(two_processes, checkpoint, tasks, tmp_path):
    alone = run_all(checkpoint, tasks, "auto")
    assert alone.keys() == KINDS.keys()
    two_processes.run("tests.evaluate_worker", checkpoint, tasks, tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text())
    for strategy in STRATEGIES:
        for name, metrics in alone.items():
            assert found[strategy][name] == pytest.approx(metrics, rel=TOLERANCE, abs=TOLERANCE), (strategy, name)
    held_out = eval_losses(checkpoint.parent.parent)[-1]
    assert found["held-out"]["loss"] == pytest.approx(held_out, abs=1e-5)
    assert found["held-out"]["margin"] == pytest.approx(found["held-out"]["bigram_loss"] - held_out, abs=1e-5)


def test_greedy_answers_are_those_of_the_model_alone(checkpoint, scorer):
    from gptdist.generate import Generator, Sampling

    model, tokenizer, _ = load_model(checkpoint)
    prompts = [tokenizer.encode(text) for text in ("Return", "A", "The list of all files", "x" * 50)]
    texts = scorer.continue_greedily(prompts, max_new_tokens=8)
    for prompt, text in zip(prompts, texts, strict=True):
        own = Generator(model, tokenizer).generate([prompt[-24:]], Sampling(max_new_tokens=8, temperature=0))[0].text
        assert text == own


def test_rolling_windows_score_every_token_once(scorer):
    tokens = scorer.tokenizer.encode("Every byte of this text is scored once, in windows. " * 3)
    windows = rolling(tokens, scorer)
    assert [t for window in windows for t in window.continuation] == tokens
    assert windows[0].context == [scorer.tokenizer.eot]
    read = [len(w.context) + len(w.continuation) - 1 for w in windows]
    assert read == [scorer.model.context] * len(windows), "every window is full"
    assert windows[-1].context == tokens[-scorer.model.context - 1:-len(windows[-1].continuation)]


def test_bits_per_byte_of_bytes_are_the_loss_in_bits(scorer):
    """Here a token is a byte."""
    result = run_task(scorer, TaskSet("t", "text", [Item("a", "Return the value. " * 9)]), Options())
    assert result["metrics"]["bits_per_byte"] == pytest.approx(result["metrics"]["loss"] / math.log(2))
    assert result["tokens"] == result["bytes"] == 18 * 9


class Known:
    """A scorer whose log-likelihood of a continuation is given."""

    def __init__(self, scorer, logprobs):
        self.tokenizer, self.model, self.is_cut, self.logprobs = scorer.tokenizer, scorer.model, scorer.is_cut, logprobs

    def score(self, requests, greedy=False):
        return [Score(self.logprobs[self.tokenizer.decode(r.continuation).strip()], True) for r in requests]


def test_choices_are_compared_raw_and_per_byte(scorer):
    choices = ("short", "long right")
    items = [Item("a", "q", ("long right",), choices), Item("b", "q", ("short",), choices)]
    result = run_task(Known(scorer, {"short": -3.0, "long right": -5.0}), TaskSet("t", "choice", items), Options())
    # -3 > -5, but per byte -3/5 < -5/10.
    assert result["metrics"]["accuracy"] == result["metrics"]["accuracy_norm"] == result["metrics"]["chance"] == 0.5
    result = run_task(Known(scorer, {"short": -3.0, "long right": -5.0}), TaskSet("t", "choice", items[:1]), Options())
    assert (result["metrics"]["accuracy"], result["metrics"]["accuracy_norm"]) == (0, 1)


def test_examples_stand_before_the_question_and_are_not_scored(scorer, monkeypatch):
    seen = []
    monkeypatch.setattr(scorer, "continue_greedily",
                        lambda prompts, **_: seen.extend(prompts) or [" me"] * len(prompts))
    items = [Item("a", "Who?", ("you",)), Item("b", "Why?", ("me",))]
    result = run_task(scorer, TaskSet("t", "qa", items), Options(shots=1))
    assert scorer.tokenizer.decode(seen[0]) == "Question: Who?\nAnswer: you\nQuestion: Why?\nAnswer:"
    assert result["n"] == 1
    assert result["metrics"] == {"exact_match": 1, "f1": 1}


def test_a_long_prompt_is_cut_from_the_left_and_counted(scorer):
    item = Item("a", "z" * 500 + " the end", ("one",), ("one", "two"))
    result = run_task(scorer, TaskSet("t", "choice", [item, Item("b", "x", ("one",), ("one", "two"))]), Options())
    assert result["truncated"] == 1
    tail, continuation = scorer.tokenizer.encode(item.query)[-29:], scorer.tokenizer.encode(" one")
    whole, cut = scorer.score([Request(scorer.tokenizer.encode(item.query), continuation), Request(tail, continuation)])
    assert whole.logprob == pytest.approx(cut.logprob, abs=TOLERANCE)


def test_an_answer_longer_than_the_context_is_named_or_counted(scorer):
    task = TaskSet("t", "choice", [Item("f line 3", "q", ("a",), ("a", "b" * 40)), Item("x", "q", ("a",), ("a", "b"))])
    with pytest.raises(UserError, match=r"f line 3: an answer has 41 tokens, the model's context 32; remove.*skip-bad"):
        run_task(scorer, task, Options())
    result = run_task(scorer, task, Options(skip_bad=True))
    assert (result["n"], result["skipped"]) == (1, 1)


BAD = {
    '{"ctx": "x", "endings": ["a", "b"]}': r"has no label or answer",
    '{"ctx": "x", "endings": ["a", "b"], "label": 2}': r"the label is 2, expected 0 to 1, a letter",
    '{"ctx": "x", "endings": ["a", "b"], "label": -1}': r"the label is -1, expected 0 to 1",
    '{"ctx": "x", "endings": ["a", "b"], "label": true}': r"the label is true",
    '{"ctx": "x", "endings": ["a", "b"], "label": "C"}': r"the label is \"C\", expected",
    '{"ctx": "x", "endings": ["a"], "label": 0}': r"expected a list of two or more texts",
    '{"endings": ["a", "b"], "label": 0}': r"has no ctx or context or question",
    '{"ctx": "x", "endings": ["a", "b"], "label"': r"is not JSON",
    "[1, 2]": r"is \[1, 2\], expected a JSON object",
    '{"ctx": 7, "endings": ["a", "b"], "label": 0}': r"is 7, expected a text",
}


@pytest.mark.parametrize("line", BAD)
def test_a_bad_line_is_named_with_file_and_line(line, tmp_path):
    path = tmp_path / "set.jsonl"
    path.write_text(json.dumps(LINES["choice"][0]) + "\n\n" + line + "\n")
    with pytest.raises(UserError, match=rf"set\.jsonl line 3.*({BAD[line]}).*--skip-bad"):
        read_task(str(path))
    task = read_task(str(path), skip_bad=True)
    assert (len(task.items), task.skipped) == (1, 1)
    assert "line 3" in task.first_skipped


@pytest.mark.parametrize(("kind", "line", "message"), [
    ("qa", '{"question": "Who?"}', "has no answers or answer"),
    ("qa", '{"question": "Who?", "answers": []}', r"is \[\], expected the right answer"),
    ("cloze", '{"text": "one"}', "expected two words or more"),
    ("classify", '{"text": "one"}', "has no label"),
    ("translate", '{"source": "one", "target": ""}', "expected the right answer"),
    ("summarize", '{"text": "one"}', "has no summary or highlights"),
    (None, '{"text": "one two"}', "has only a text"),
    (None, '{"a": 1}', "has the keys a, which no kind of task has"),
])
def test_bad_lines_of_other_kinds(kind, line, message, tmp_path):
    (tmp_path / "set.jsonl").write_text(line)
    with pytest.raises(UserError, match=rf"set\.jsonl line 1.*{message}"):
        read_task(str(tmp_path / "set.jsonl"), kind)
    with pytest.raises(UserError, match="holds nothing to evaluate on: none of its 1 lines"):
        read_task(str(tmp_path / "set.jsonl"), kind, skip_bad=True)


def test_a_line_of_another_encoding_is_named_or_counted(tmp_path):
    path = tmp_path / "set.jsonl"
    good = json.dumps(LINES["choice"][0]).encode()
    path.write_bytes(b"\xef\xbb\xbf" + good + b"\n" + good.replace(b"man", "m\xe4n".encode("latin-1")) + b"\n")
    with pytest.raises(UserError, match=r"set\.jsonl line 2 is not UTF-8 text \(its byte 12\); mend the line"):
        read_task(str(path))
    task = read_task(str(path), skip_bad=True)
    assert (len(task.items), task.skipped) == (1, 1)


def test_bad_names(tmp_path):
    (tmp_path / "bad.jsonl").write_bytes(b"\xff\xfe")
    (tmp_path / "empty.jsonl").write_text("\n")
    for name, message in (("stdlib-chess", "no embedded set is called stdlib-chess"), ("quiz=x", "'quiz' is no kind"),
                          (str(tmp_path / "none"), "cannot read .*none"), (str(tmp_path / "bad.jsonl"), "not UTF-8"),
                          (str(tmp_path / "empty.jsonl"), "holds nothing to evaluate on: it has no lines")):
        with pytest.raises(UserError, match=message):
            open_tasks([name])
    with pytest.raises(UserError, match="t: all texts have the label x"):
        run_task(None, TaskSet("t", "classify", [Item("a", "b", ("x",))]), Options())
    with pytest.raises(UserError, match="expected more than the 9 of --shots"):
        run_task(None, TaskSet("t", "qa", [Item("a", "b", ("c",))]), Options(shots=9))


def test_the_command_writes_a_table_or_json(checkpoint, tasks, capsys):
    files = [str(tasks / "choice.jsonl"), f"text={tasks / 'text.jsonl'}"]
    assert main(["evaluate", str(checkpoint), "--tasks", *files, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [task["kind"] for task in result["tasks"]] == ["choice", "text"]
    assert main(["evaluate", str(checkpoint), "--tasks", *files]) == 0
    table = capsys.readouterr().out
    assert "accuracy_norm" in table
    assert "bits_per_byte" in table
    assert main(["evaluate", str(checkpoint), "--tasks", "nowhere.jsonl"]) == 2
    assert "cannot read nowhere.jsonl" in capsys.readouterr().err


def test_embedded_sets_have_items_whose_answers_are_among_their_choices():
    for name in SETS:
        task = embedded_set(name)
        assert len(task.items) >= 40, name
        assert all(item.answers or task.kind == "text" for item in task.items)
        if task.kind == "choice":
            assert all(item.answer in item.choices and len(set(item.choices)) == 4 for item in task.items)
            places = [item.choices.index(item.answer) for item in task.items]
            assert all(20 <= places.count(i) <= 80 for i in range(4)), "the right one has a favourite place"


def test_a_classifier_is_scored_and_calibrated(tmp_path, capsys):
    labelled = tmp_path / "texts.jsonl"
    labelled.write_text("".join(json.dumps({"text": f"{word} number {i}", "label": word}) + "\n"
                                for i in range(12) for word in ("spam", "ham")))
    run = tmp_path / "run"
    run_tiny(tmp_path, run, "--task.name=classify", f"--task.train_data={labelled}", "--train.epochs=1",
             "--train.batch=4", "--schedule.warmup_steps=0", "--classify.baselines=false")
    own = json.loads((run / "results.json").read_text())["test"]
    capsys.readouterr()
    assert main(["evaluate", str(run), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)["tasks"][0]
    assert result["metrics"]["accuracy"] == pytest.approx(own["accuracy"])
    assert sum(row["n"] for row in result["reliability"]) == result["n"]
    assert main(["evaluate", str(run), "--tasks", str(labelled)]) == 0
    assert "Brier" in capsys.readouterr().out
    labelled.write_text('{"text": "a", "label": "eggs"}\n')
    assert main(["evaluate", str(run), "--tasks", str(labelled)]) == 2
    assert "row 1 has the label 'eggs'" in capsys.readouterr().err


# Measures


def test_bleu_is_sacrebleus():
    """The example of sacrebleu's README: BLEU = 48.53."""
    references = [["The dog bit the man.", "The dog had bit the man."],
                  ["It was not unexpected.", "No one was surprised."],
                  ["The man bit him first.", "The man had bitten the dog."]]
    candidates = ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."]
    assert bleu(candidates, references) == pytest.approx(48.530827009929865)
    assert bleu(["the cat sat on the mat"], [["the cat sat on the mat"]]) == pytest.approx(100)
    assert bleu(["cat"], [["cat"]]) == 0  # no 4-gram


def test_bleu_beside_the_package():
    sacrebleu = pytest.importorskip("sacrebleu", reason="pip install sacrebleu: the peer that BLEU is compared with")
    candidates = ["Prices rose 3.5% to $1,000.50 -- a record!", 'He said: "no, never"; (twice)', "It is don't-know"]
    references = ["Prices rose 3.5% to $1,000.50, a record!", 'He said: "no, never" (twice)',
                  "It was a don't-know &amp; so"]
    assert bleu(candidates, [[r] for r in references]) == pytest.approx(
        sacrebleu.corpus_bleu(candidates, [references]).score)


def test_f1_counts_common_words():
    assert token_f1("the cat sat", "The cat, the dog") == pytest.approx(2 * 2 / (3 + 4))
    assert token_f1("", "x") == 0
    assert token_f1("?", "?") == 1


def test_calibration_of_known_probabilities():
    # 4 texts at confidence 0.8, 3 right: |0.8 - 0.75|. 2 at 0.6, none right: 0.6. Weighted: (4 * 0.05 + 2 * 0.6) / 6.
    rows = [[0.8, 0.2]] * 4 + [[0.4, 0.6]] * 2
    result = calibration(rows, [0, 0, 0, 1, 0, 0])
    assert result["ece"] == pytest.approx((4 * 0.05 + 2 * 0.6) / 6)
    assert result["brier"] == pytest.approx((3 * 2 * 0.04 + 2 * 0.64 + 2 * 2 * 0.36) / 6)
    assert [(row["n"], row["accuracy"]) for row in result["reliability"]] == [(2, 0.0), (4, 0.75)]
    assert calibration([[1.0, 0.0]], [0])["ece"] == 0


# During training


def test_tasks_during_training_change_nothing_that_it_computes(dataset, checkpoint, tasks, tmp_path):
    """The same losses and gradient norms bit for bit; the figures of the last step are those of its checkpoint."""
    named = [f"{kind}={tasks / f'{kind}.jsonl'}" for kind in ("choice", "cloze", "qa")]
    run_tiny(dataset, tmp_path / "run", "--train.stop_at=6", "--eval.tokens=0", f"--eval.tasks={json.dumps(named)}",
             "--eval.tasks_every=2", "--run.tensorboard=true", "--eval.prompt=The")
    with_tasks, without = train_rows(tmp_path / "run"), train_rows(checkpoint.parent.parent)
    assert [(r["loss"], r["grad_norm"]) for r in with_tasks] == [(r["loss"], r["grad_norm"]) for r in without]
    rows = rows_of(tmp_path / "run", "tasks")
    assert [row["step"] for row in rows] == [2, 4, 6]
    scorer = open_scorer(latest(tmp_path / "run" / "checkpoints"))
    for task in open_tasks(named):
        for name, value in run_task(scorer, task, Options())["metrics"].items():
            if not name.endswith("_stderr") and name != "chance":
                assert rows[-1][f"{task.name}/{name}"] == pytest.approx(value, rel=TOLERANCE, abs=TOLERANCE)
    boards = list((tmp_path / "run" / "tensorboard").iterdir())
    assert any(b"tasks/choice/accuracy" in board.read_bytes() for board in boards)
    sample = rows_of(tmp_path / "run", "eval")[-1]["sample"]
    assert sample == continued(latest(tmp_path / "run" / "checkpoints"), "The")
    assert any(sample.splitlines()[-1].encode() in board.read_bytes() for board in boards)


def rows_of(run_dir: Path, kind: str) -> list[dict]:
    return [row for row in read_rows(run_dir / "metrics.jsonl") if row["kind"] == kind]


def continued(checkpoint: Path, prompt: str) -> str:
    model, tokenizer, _ = load_model(checkpoint, verify=False)
    return prompt + Generator(model, tokenizer).generate([prompt], SAMPLING)[0].text


@pytest.mark.parametrize(("setting", "override", "message"), [
    ("--eval.tasks=[stdlib]", "--task.name=classify", "eval.tasks is for models that write text"),
    ("--eval.tasks=[stdlib]", "--parallel.tensor=2", "eval.tasks with parallel.tensor=2"),
    ("--eval.prompt=The", "--task.name=instruct", "eval.prompt is for pretraining"),
    ("--eval.prompt=The", "--parallel.tensor=2", "eval.prompt with parallel.tensor=2"),
])
def test_where_no_tasks_can_run_and_no_prompt_is_continued(setting, override, message, tmp_path):
    with pytest.raises(UserError, match=message):
        tiny_config(tmp_path, tmp_path, setting, override, "--parallel.strategy=fsdp")


def test_a_task_that_is_not_there_fails_before_the_first_step(dataset, tmp_path):
    with pytest.raises(UserError, match="cannot read nowhere"):
        run_tiny(dataset, tmp_path / "run", "--eval.tasks=[nowhere]")
    (tmp_path / "long.jsonl").write_text(json.dumps({"ctx": "x", "endings": ["a" * 40, "b"], "label": 0}))
    with pytest.raises(UserError, match=r"no item is left to score: .*long\.jsonl line 1: an answer has 41 tokens"):
        run_tiny(dataset, tmp_path / "run", f"--eval.tasks=[{tmp_path / 'long.jsonl'}]")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_items_that_the_tokenizer_lacks_are_left_out_and_tasks_come_after_the_save(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 100)
    prepare(PrepareConfig(inputs=[str(tmp_path / "text.txt")], output=str(tmp_path / "data"), tokenizer="char",
                          split="tail", workers=1))
    records = [{"ctx": "the cat", "endings": ["sat", "on"], "label": 0},
               {"ctx": "Ünd", "endings": ["sat", "on"], "label": 0},
               {"ctx": "the", "endings": ["mat", "ZZ"], "label": 0}]
    (tmp_path / "choice.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "text.jsonl").write_text('{"text": "the mat"}\n{"text": "THE"}\n')
    named = [f"{kind}={tmp_path / f'{kind}.jsonl'}" for kind in ("choice", "text")]
    saved = []
    monkeypatch.setattr(trainer.Trainer, "_run_tasks", lambda self, run=trainer.Trainer._run_tasks: (
        saved.append((self.run_dir / "checkpoints").exists()), run(self)))
    run_tiny(tmp_path / "data", tmp_path / "run", "--train.stop_at=2", "--eval.tokens=0",
             f"--eval.tasks={json.dumps(named)}")
    assert saved == [True]
    assert [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if row["kind"] == "tasks"]
    scorer = open_scorer(latest(tmp_path / "run" / "checkpoints"))
    choice, text = open_tasks(named)
    for task, skipped, line in ((choice, 2, 2), (text, 1, 2)):
        result = run_task(scorer, task, Options(skip_bad=True))
        assert (result["skipped"], result["n"]) == (skipped, 1)
        with pytest.raises(UserError, match=rf"{task.name}\.jsonl line {line}: character .* remove the item, or count"):
            run_task(scorer, task, Options())


@pytest.mark.parametrize(("words", "name"), [
    (["--tasks", "stdlib", "--lm-eval", "x"], "--tasks"), (["--lm-eval", "x", "--skip-bad"], "--skip-bad"),
    (["--lm-eval", "x", "--max-new-tokens", "5"], "--max-new-tokens"), (["--tasks", "stdlib", "--bigram"], "--bigram"),
    (["--shots", "1"], "--shots"), (["--limit", "-1"], "--limit"), (["--lm-eval", "x", "--shots", "-1"], "--shots")])
def test_options_without_effect_are_refused(checkpoint, words, name, capsys):
    assert main(["evaluate", str(checkpoint), *words]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"gptdist evaluate: {name} ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3", "fsdp"])
def test_a_model_trained_with_muon_is_evaluated_under_every_strategy(strategy, tmp_path):
    config = tiny_config(tmp_path, tmp_path, "--optim.name=muon")
    assert evaluation_config(config, strategy, "fp32").parallel.strategy == strategy
