"""Direct preference optimisation: reading pairs, what counts, the loss against the formula, the reference, resuming.

Strategies and world sizes: test_lora.py, which starts processes for both."""

import json
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from gptdist.checkpoint import resolve
from gptdist.checkpoint.restore import load_model
from gptdist.checkpoint.template import stored_template
from gptdist.data.instructions import USER, Conversation, Turn
from gptdist.data.preference import (
    Preference,
    encode_preferences,
    python_preferences,
    read_preferences,
    split_preferences,
)
from gptdist.data.questions import documented_names, name_hash
from gptdist.data.templates import TEMPLATES, encode, load_template
from gptdist.data.tokenizer import build_tokenizer
from gptdist.errors import UserError
from gptdist.metrics import read_rows
from gptdist.parallel.world import World
from gptdist.tasks.dpo import REFERENCE_FILE, Dpo
from tests.lora_data import base_run, pairs_file
from tests.training import run_tiny, tiny_config, train_rows

TEMPLATE = load_template("{prompt}={answer}")
QUESTION = {"role": "user", "content": "Q"}
YES, NO = {"role": "assistant", "content": "yes"}, {"role": "assistant", "content": "no"}
EARLIER = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}, NO]


def read(tmp_path, *records, text: str | None = None):
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, records)) if text is None else text)
    return read_preferences(path)


@pytest.mark.parametrize("record", [
    {"prompt": "Q", "chosen": "yes", "rejected": "no"},
    {"instruction": "Q", "input": "", "output": "yes", "chosen": "yes", "rejected": "no"},
    {"prompt": [QUESTION], "chosen": [YES], "rejected": [NO]},
    {"prompt": "Q", "chosen": [YES], "rejected": "no"},
    {"prompt": "Q", "chosen": [QUESTION, YES], "rejected": [QUESTION, NO]},
    {"chosen": [QUESTION, YES], "rejected": [QUESTION, NO]}])
def test_all_forms_of_a_pair_are_the_same(tmp_path, record):
    [pair] = read(tmp_path, record).items
    assert (pair.chosen, pair.rejected) == ("yes", "no")
    assert [turn.text for turn in pair.question.turns] == ["Q"]
    assert pair.question.system is None


def test_earlier_turns_the_system_prompt_and_alpacas_input_are_part_of_the_prompt(tmp_path):
    first, second, third = read(
        tmp_path, {"prompt": [*EARLIER, QUESTION], "chosen": [YES], "rejected": [NO]},
        {"chosen": [*EARLIER, QUESTION, YES], "rejected": [*EARLIER, QUESTION, NO]},
        {"instruction": "Q", "input": "text", "chosen": "yes", "rejected": "no"}).items
    assert first == second
    assert first.question.system == "Be brief."
    assert [turn.text for turn in first.question.turns] == ["Hi", "no", "Q"]
    assert third.question.turns[0].input == "text"


def test_pairs_that_prefer_nothing_are_left_out_and_counted(tmp_path):
    good = {"prompt": "Q", "chosen": "yes", "rejected": ""}
    found = read(tmp_path, good, {**good, "rejected": "yes"}, {**good, "chosen": " "})
    assert len(found.items) == 1
    assert found.note() == (f"left out 2 of 3 pairs whose answers are equal or whose chosen one is empty, the first at "
                            f"{tmp_path}/pairs.jsonl:2")


@pytest.mark.parametrize(("record", "message"), [
    ({"prompt": "Q", "chosen": "yes"}, "no rejected; a pair has prompt .* this one has prompt, chosen"),
    ({"chosen": "yes", "rejected": "no"}, "no prompt or instruction for the text in chosen"),
    ({"prompt": "", "chosen": "yes", "rejected": "no"}, "the prompt is empty"),
    ({"prompt": 3, "chosen": "yes", "rejected": "no"}, "prompt is 3, expected a string"),
    ({"prompt": "Q", "chosen": "yes", "rejected": None}, "rejected is null, expected a string"),
    ({"chosen": [QUESTION, YES], "rejected": [*EARLIER, QUESTION, NO]}, "chosen and rejected answer different prompts"),
    ({"prompt": "P", "chosen": [QUESTION, YES], "rejected": "no"}, "chosen is a conversation that does not begin with"),
    ({"prompt": [QUESTION], "chosen": [], "rejected": [NO]}, "ends with"),
    (["Q"], "expected a JSON object"),
    ({"prompt": "Q", "chosen": "yes", "rejected": "yes"}, "all 1 objects are pairs whose answers are equal")])
def test_what_is_no_pair_is_refused_with_its_line(tmp_path, record, message):
    with pytest.raises(UserError, match=rf"pairs.jsonl.*{message}"):
        read(tmp_path, record)


@pytest.mark.parametrize(("text", "message"), [("", "no objects"), ("[1", "pairs.jsonl:1"), ("{", "not JSON")])
def test_what_is_no_file_of_pairs_is_refused(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        read(tmp_path, text=text)
    with pytest.raises(UserError, match="cannot read"):
        read_preferences(tmp_path / "none.jsonl")


def test_only_the_last_answer_counts(tmp_path):
    tokenizer = build_tokenizer("bytes")
    [pair] = read(tmp_path, {"prompt": [*EARLIER[1:], QUESTION], "chosen": [YES], "rejected": [NO]}).items
    encoded = encode_preferences([pair], TEMPLATE, tokenizer, context=64, where="here")
    chosen, rejected = encoded.rows
    whole, _ = encode(TEMPLATE.render(pair.answered("yes")), tokenizer)
    assert chosen.tokens.tolist() == whole[:-1]
    assert chosen.targets[chosen.targets >= 0].tolist() == [*b"yes", tokenizer.eot]
    assert rejected.targets[rejected.targets >= 0].tolist() == [*b"no", tokenizer.eot]
    assert np.array_equal(chosen.targets[chosen.targets >= 0], np.array(whole[-4:]))


def test_answers_beyond_the_context_are_left_out(tmp_path):
    tokenizer = build_tokenizer("bytes")
    pairs = read(tmp_path, {"prompt": "Q", "chosen": "yes", "rejected": "no"},
                 {"prompt": "Q" * 40, "chosen": "yes", "rejected": "no"},
                 {"prompt": "Q", "chosen": "a" * 40 + "b", "rejected": "a" * 40 + "c"}).items
    encoded = encode_preferences(pairs, TEMPLATE, tokenizer, context=16, where="here")
    assert len(encoded) == 1
    assert encoded.note() == "left out 2 of 3 pairs whose answers do not differ within model.context=16 tokens"
    with pytest.raises(UserError, match=r"here: none of 2 pairs has answers that differ within model\.context=16"):
        encode_preferences(pairs[1:], TEMPLATE, tokenizer, context=16, where="here")


def test_cut_answers_are_counted():
    """A pair counts once, however many of its answers are cut."""
    question = Conversation((Turn(USER, "Q"),))
    pairs = [Preference(question, *answers) for answers in (("yes", "no"), ("a" * 40, "no"), ("a" * 40, "b" * 40))]
    encoded = encode_preferences(pairs, TEMPLATE, build_tokenizer("bytes"), context=16, where="here")
    assert (len(encoded), encoded.truncated) == (3, 2)
    assert encoded.note() == "2 of 3 pairs have an answer cut to model.context=16 tokens, its end token kept"
    both = [*pairs, Preference(Conversation((Turn(USER, "Q" * 40),)), "yes", "no")]
    encoded = encode_preferences(both, TEMPLATE, build_tokenizer("bytes"), context=16, where="here")
    assert encoded.note() == ("left out 1 of 4 pairs whose answers do not differ within model.context=16 tokens; "
                              "2 of 4 pairs have an answer cut to model.context=16 tokens, its end token kept")


def test_the_shorter_answer_as_a_preference():
    question = Conversation((Turn(USER, "Q"),))
    pairs = [Preference(question, *answers) for answers in (("a", "bcd"), ("bcd", "a"), ("b", "c"))]
    encoded = encode_preferences(pairs, TEMPLATE, build_tokenizer("bytes"), context=16, where="here")
    assert [encoded.shorter_chosen([i]) for i in range(3)] == [1.0, 0.0, 0.5]
    assert encoded.shorter_chosen([0, 2]) == 0.75


def test_the_embedded_pairs():
    """In a fixed order, of any template's making; nothing of a held-out pair is trained on but a shared answer."""
    train, held_out = python_preferences()
    assert len(train) > 3000
    assert 100 < len(held_out) < 500
    firsts = {answer for _, answer in documented_names()}
    for pair in train + held_out:
        assert len(pair.chosen.split()) == len(pair.rejected.split())
        assert pair.chosen in firsts
        assert pair.rejected not in firsts
    for part in ("question", "rejected"):
        seen = [{getattr(pair, part) for pair in pairs} for pairs in (train, held_out)]
        assert seen[0].isdisjoint(seen[1])
    asked = [pair.question.turns[0].text for pair in train]
    assert asked == sorted(asked, key=lambda text: name_hash(text.removeprefix("What does ").removesuffix(" do?")))
    assert len(encode_preferences(train[:50], TEMPLATES["alpaca"], build_tokenizer("bytes"), context=512,
                                  where="here")) == 50


def test_the_split_depends_on_the_prompt_alone():
    """Pairs of a held-out prompt are not in training, wherever they stand and whatever is added."""
    pairs = [Preference(Conversation((Turn(USER, f"Q{i % 200}"),)), f"yes {i}", "no") for i in range(600)]
    train, held_out = split_preferences(pairs, 0.1)
    asked = [{pair.question for pair in part} for part in (train, held_out)]
    assert asked[0].isdisjoint(asked[1])
    assert len(asked[0] | asked[1]) == 200
    assert 8 < len(asked[1]) < 40
    assert len(held_out) == 3 * len(asked[1])
    assert split_preferences(pairs[300:], 0.1)[1] == [pair for pair in pairs[300:] if pair.question in asked[1]]
    assert split_preferences(pairs, 0.0) == (pairs, [])


# Training


STEPS = 8


def options(base, pairs, *further: str) -> list[str]:
    return ["--task.name=dpo", f"--task.train_data={pairs}", f"--checkpoint.init_from={base}", f"--train.steps={STEPS}",
            "--train.batch=5", "--train.micro_batch=2", "--schedule.warmup_steps=0", "--schedule.name=constant",
            "--optim.lr=3e-3", "--instruct.template={prompt}={answer}", "--train.grad_clip=0", "--eval.every=4",
            "--checkpoint.keep_last=100", "--checkpoint.every=1", "--task.val_fraction=0.25", *further]


@pytest.fixture(scope="module")
def runs(dataset, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    base, pairs = base_run(dataset, out / "base"), pairs_file(out / "pairs.jsonl")
    run_tiny(dataset, out / "full", *options(base, pairs))
    run_tiny(dataset, out / "lora", *options(base, pairs, "--lora.rank=4", "--optim.lr=1e-2"))
    return out


@pytest.fixture
def common(runs):
    return options(runs / "base" / "checkpoints" / "step-00000006", runs / "pairs.jsonl")


@pytest.mark.parametrize("run", ["full", "lora"])
def test_it_starts_at_ln_2_and_comes_to_prefer_the_chosen_answers(runs, run):
    rows = train_rows(runs / run)
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert rows[0]["margin"] == pytest.approx(0, abs=1e-6)
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.002
    assert rows[-1]["margin"] > 0
    last = [row for row in read_rows(runs / run / "metrics.jsonl") if row["kind"] == "eval"][-1]
    assert last["val_accuracy"] == 1.0
    assert last["val_margin"] > 0
    assert last["val_loss"] < math.log(2)


def answer_log_prob(model, tokenizer, prompt: str, answer: str) -> float:
    """By hand: the sum of log softmax over the answer's bytes and the end token."""
    begin, rest = list(f"{prompt}=".encode()), [*answer.encode(), tokenizer.eot]
    with torch.no_grad():
        hidden = model.hidden(torch.tensor([[*begin, *rest[:-1]]]))
        scores = F.log_softmax(model.logits(hidden)[0], -1)
    return sum(scores[len(begin) - 1 + i, token].item() for i, token in enumerate(rest))


@pytest.mark.parametrize(("run", "step"), [("full", 2), ("full", STEPS), ("lora", STEPS)])
def test_the_loss_is_the_papers(dataset, runs, common, run, step):
    """Loss and margin of a step from the weights before it, by plain log-probabilities one answer at a time."""
    before, tokenizer, _ = load_model(runs / run / "checkpoints" / f"step-{step - 1:08d}")
    reference, _, _ = load_model(runs / "base" / "checkpoints" / "step-00000006")
    config = tiny_config(dataset, runs / run, *common)
    task = Dpo(config, World(0, 1, torch.device("cpu"), "single", None))
    train, _ = split_preferences(read_preferences(runs / "pairs.jsonl").items, 0.25)
    margins = []
    for i in task.source.examples((step - 1) * 5):
        pair = train[i]
        prompt = pair.question.turns[0].text
        gains = [answer_log_prob(before, tokenizer, prompt, answer)
                 - answer_log_prob(reference, tokenizer, prompt, answer) for answer in (pair.chosen, pair.rejected)]
        margins.append(0.1 * (gains[0] - gains[1]))
    row = train_rows(runs / run)[step - 1]
    assert row["loss"] == pytest.approx(np.mean([math.log1p(math.exp(-m)) for m in margins]), abs=1e-5)
    assert row["margin"] == pytest.approx(np.mean(margins), abs=1e-5)
    assert row["accuracy"] == pytest.approx(np.mean(np.array(margins) > 0))
    assert row["tokens"] == 5


def test_adapters_switched_off_are_the_reference(dataset, runs, common, tmp_path, monkeypatch):
    """The same curve as with log-probabilities that were computed once."""
    monkeypatch.setattr(Dpo, "_has_adapters", False)
    rows = run_tiny(dataset, tmp_path / "run", *common, "--lora.rank=4", "--optim.lr=1e-2")
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in train_rows(runs / "lora")], abs=1e-6)


@pytest.mark.parametrize(("run", "further"), [("full", []), ("lora", ["--lora.rank=4", "--optim.lr=1e-2"])])
def test_resuming_is_exact(dataset, runs, common, tmp_path, run, further):
    run_tiny(dataset, tmp_path / "run", *common, *further, "--train.stop_at=3")
    run_tiny(dataset, tmp_path / "run", *common, *further)
    resumed, straight = train_rows(tmp_path / "run"), train_rows(runs / run)
    assert [(r["loss"], r["grad_norm"], r["margin"]) for r in resumed] == [
        (r["loss"], r["grad_norm"], r["margin"]) for r in straight]


def test_checkpoints_have_the_template_and_the_reference(runs):
    full, adapted = resolve(runs / "full"), resolve(runs / "lora")
    assert stored_template(full) == stored_template(adapted) == TEMPLATE
    assert (full / REFERENCE_FILE).exists()
    assert not (adapted / REFERENCE_FILE).exists()


def test_without_a_given_template_it_is_the_starting_models(dataset, runs, common, tmp_path):
    common = [o for o in common if not o.startswith(("--instruct.template", "--checkpoint.init_from"))]
    run_tiny(dataset, tmp_path / "run", *common, f"--checkpoint.init_from={runs / 'lora'}", "--train.steps=1")
    assert stored_template(resolve(tmp_path / "run")) == TEMPLATE
    [row] = train_rows(tmp_path / "run")
    assert row["loss"] == pytest.approx(math.log(2), abs=1e-6)  # the reference is the merged model, not its base


def test_a_given_template_wins(dataset, runs, common, tmp_path, capsys):
    common = [o for o in common if not o.startswith(("--instruct.template", "--checkpoint.init_from"))]
    run_tiny(dataset, tmp_path / "run", *common, f"--checkpoint.init_from={runs / 'full'}", "--train.steps=1",
             "--instruct.template={prompt}:{answer}")
    assert stored_template(resolve(tmp_path / "run")) == load_template("{prompt}:{answer}")
    assert "instruct.template={prompt}:{answer} is used as given, though" in capsys.readouterr().out


@pytest.mark.parametrize(("further", "message"), [
    (["--train.steps=40"], r"train.steps or data.skip of this run asks for \d+ pairs that .* has no reference of"),
    (["--eval.examples=0"], r"eval.examples of this run asks for 2 pairs"),
    (["--task.val_fraction=0.2"], r"has task.val_fraction=0.25, this run task.val_fraction=0.2"),
    (["--dpo.beta=0.2"], r"has dpo.beta=0.1, this run dpo.beta=0.2")])
def test_a_run_keeps_what_its_reference_is_for(dataset, common, tmp_path, further, message):
    common = [*common, "--train.batch=2"]
    run_tiny(dataset, tmp_path / "run", *common, "--train.steps=3", "--train.stop_at=1", "--eval.examples=1")
    with pytest.raises(UserError, match=message):
        run_tiny(dataset, tmp_path / "run", *common, "--train.steps=3", "--eval.examples=1", *further)


@pytest.mark.parametrize(("further", "message"), [
    (["--task.test_data=x.jsonl"], "task.test_data is not for task.name=dpo"),
    (["--instruct.template=phi3"], r"tokenizer has no <\|system\|>, .* fine-tune with it and task.name=instruct"),
    (["--task.train_data=none.jsonl"], "cannot read none.jsonl")])
def test_settings_that_do_not_fit_are_refused(dataset, common, tmp_path, further, message):
    with pytest.raises(UserError, match=message):
        run_tiny(dataset, tmp_path / "run", *common, *further)


def test_without_held_out_pairs_nothing_is_evaluated(dataset, common, tmp_path):
    run_tiny(dataset, tmp_path / "run", *common, "--task.val_fraction=0", "--train.steps=1")
    assert [row["kind"] for row in read_rows(tmp_path / "run" / "metrics.jsonl")] == ["train"]
