"""Fine-tuning for instructions, from a pretrained checkpoint to a chat, in one process and in two."""

import json
import math

import pytest
import torch

from gptdist import config as config_module
from gptdist.chat import open_chat
from gptdist.checkpoint import layout, store
from gptdist.checkpoint.restore import load_model, read_config
from gptdist.checkpoint.template import stored_template
from gptdist.cli import main
from gptdist.data.instructions import ASSISTANT, USER, Conversation, Turn
from gptdist.data.templates import TEMPLATES, load_template
from gptdist.errors import UserError
from gptdist.generate import Sampling
from gptdist.metrics import read_rows
from gptdist.parallel.strategies import make_strategy
from gptdist.parallel.world import init_world
from gptdist.tasks.instruct import Instruct, read_data, split
from gptdist.trainer import Trainer
from tests.conftest import run_gptdist
from tests.training import assert_same_curve, run_tiny, train_rows

STEPS = 6
# Odd sizes: 7 examples a step are shared by 2 ranks as 3 and 4, in micro-batches of 2.
TINY = {
    "task": {"name": "instruct", "val_fraction": 0.2, "bucket": 4},
    "instruct": {"template": "chatml", "mask_prompt": True, "samples": 3, "max_new_tokens": 8},
    "train": {"steps": STEPS, "batch": 7, "micro_batch": 2, "grad_clip": 0.5, "precision": "fp32"},
    "model": {"dropout": 0.1},
    "optim": {"lr": 3e-3},
    "schedule": {"warmup_steps": 2},
    "eval": {"every": 3, "micro_batch": 4},
    "checkpoint": {"every": 0},
    "run": {"tensorboard": False},
    "parallel": {"threads": 1},
}
# Strategies of two processes, by directory name -> overrides.
CASES = {"fsdp": [], "zero2": [], "zero3": ["--train.stop_at=3"], "ddp": ["--train.stop_at=3"],
         "fsdp-bf16": ["--train.stop_at=3", "--train.precision=bf16"],
         "fsdp-packed": ["--train.stop_at=3", "--instruct.packing=pack"],
         "fsdp-tensor": ["--train.stop_at=3", "--parallel.tensor=2"]}


def config_of(data, base, run_dir, *overrides):
    values = TINY | {"run": TINY["run"] | {"dir": str(run_dir)},
                     "checkpoint": TINY["checkpoint"] | {"init_from": str(base)},
                     "task": TINY["task"] | {"train_data": str(data)}}
    return config_module.from_dict(values, "the tests' configuration", list(overrides))


def finetune(data, base, run_dir, *overrides):
    config = config_of(data, base, run_dir, *overrides)
    assert Trainer(config, init_world(config.parallel)).run() == 0


@pytest.fixture(scope="module")
def base(dataset, tmp_path_factory):
    """A run of a few steps of next words: 257 ids in 384 rows."""
    run_dir = tmp_path_factory.mktemp("base")
    run_tiny(dataset, run_dir, "--model.context=64", "--train.tokens_per_step=704", "--train.steps=5", "--eval.every=0",
             "--eval.tokens=500")
    return run_dir


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """60 short sums, as chat messages."""
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    path.write_text("\n".join(json.dumps({"messages": [
        {"role": "user", "content": f"{a}+{b}" + " please" * (a % 3)},
        {"role": "assistant", "content": f"is {a + b}"}]}) for a in range(10) for b in range(6)))
    return path


@pytest.fixture(scope="module")
def single(base, data, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("single")
    finetune(data, base, run_dir)
    return run_dir


@pytest.fixture(scope="module")
def two(two_processes, base, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("two")
    return out, two_processes.run("tests.instruct_worker", data, base, out)


def samples(run_dir):
    return read_rows(run_dir / "samples.jsonl")


def evals(run_dir):
    return [row for row in read_rows(run_dir / "metrics.jsonl") if row["kind"] == "eval"]


def test_the_checkpoint_has_all_that_a_chat_needs(single, base):
    checkpoint = layout.resolve(single)
    config = read_config(checkpoint)
    assert config.model.vocab_size == 259
    shapes = store.read_index(checkpoint)
    assert shapes["model.wte.weight"][0] == (384, 32)
    _, tokenizer, _ = load_model(checkpoint)
    assert {tokenizer.specials[name] for name in TEMPLATES["chatml"].specials} == {257, 258}
    chat = open_chat(checkpoint, Sampling(max_new_tokens=5, temperature=0))
    assert chat.template == TEMPLATES["chatml"]
    assert len("".join(chat.say("1+1"))) <= 5
    base_chat = open_chat(layout.resolve(base), Sampling(max_new_tokens=5))
    assert base_chat.template is None


def test_what_an_evaluation_measures(single):
    rows, said = evals(single), samples(single)
    assert [row["step"] for row in rows] == [3, 6]
    for row in rows:
        mine = [s for s in said if s["step"] == row["step"]]
        assert len(mine) == 3
        assert row["perplexity"] == pytest.approx(math.exp(row["val_loss"]))
        assert row["rouge_l"] == pytest.approx(sum(s["rouge_l"] for s in mine) / 3, abs=1e-4)
        assert row["exact_match"] == pytest.approx(sum(s["exact_match"] for s in mine) / 3)
        assert all(s["reference"].startswith("is ") and "+" in s["question"] for s in mine)
    assert rows[1]["val_loss"] < rows[0]["val_loss"]
    trained = train_rows(single)
    assert all(0 < row["padding_share"] < 1 for row in trained)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_give_the_curve_of_one(two, single, name, base, data, tmp_path):
    """The grown vocabulary, the loss over answers, its division by all ranks' answer tokens, and what is sampled."""
    if name == "fsdp-packed":
        finetune(data, base, tmp_path / "packed", *CASES[name])
        single = tmp_path / "packed"
    run_dir, last = two[0] / name, STEPS if name in ("fsdp", "zero2") else 3
    rows, reference = train_rows(run_dir), train_rows(single)[:last]
    loose = dict(loss=0.02, norm=0.1) if "bf16" in name else {}
    assert_same_curve(rows, reference, **loose)
    ours, theirs = evals(run_dir), evals(single)
    assert [row["val_loss"] for row in ours] == pytest.approx([row["val_loss"] for row in theirs[:last // 3]],
                                                              abs=loose.get("loss", 1e-5))
    if "tensor" in name:
        assert samples_file_missing(run_dir)
        assert "rouge_l" not in ours[0]
        assert "no answers are sampled with parallel.tensor=2" in two[1]
    elif "bf16" not in name:
        assert [s["answer"] for s in samples(run_dir)] == [s["answer"] for s in samples(single) if s["step"] <= last]
    else:
        assert len(samples(run_dir)) == 3


def samples_file_missing(run_dir) -> bool:
    return not (run_dir / "samples.jsonl").exists()


def test_one_run_goes_on_with_another_strategy(two, single, base, data):
    """zero3 in two processes stopped after 3 steps; one process does the rest. Later samples are not doubled."""
    run_dir = two[0] / "zero3"
    finetune(data, base, run_dir)
    assert_same_curve(train_rows(run_dir), train_rows(single))
    assert [s["step"] for s in samples(run_dir)] == [3, 3, 3, 6, 6, 6]


def test_packed_rows_have_the_loss_of_padded_ones(base, data, tmp_path):
    """Attention stays within a conversation and positions count from its start, so packing changes no loss."""
    losses, rows = [], []
    for packing in ("none", "pack"):
        config = config_of(data, base, tmp_path / packing, f"--instruct.packing={packing}", "--model.dropout=0",
                           "--train.batch=1", "--train.micro_batch=1")
        world = init_world(config.parallel)
        task = Instruct(config, world)
        strategy = make_strategy(world, task.config)
        strategy.prepare(task.build(), None)
        task.load_base(layout.resolve(base), strategy.model_state())
        total = torch.zeros(2, dtype=torch.float64)
        for number in range(task.source.n_samples):
            step = task.source.step(0, number)
            with torch.no_grad():
                total += torch.tensor([task.loss(strategy, step.micro_batches[0], None).item(), step.n_targets])
        losses.append(total)
        rows.append(task.source.n_samples)
    assert rows[1] < 0.8 * rows[0], "conversations share a row"
    assert losses[0][1] == losses[1][1], "the same targets"
    assert losses[0][0].item() == pytest.approx(losses[1][0].item(), rel=1e-5)


def test_a_row_without_targets_gives_no_nan(base, data, tmp_path):
    config = config_of(data, base, tmp_path)
    world = init_world(config.parallel)
    task = Instruct(config, world)
    strategy = make_strategy(world, task.config)
    strategy.prepare(task.build(), lambda parameters: torch.optim.SGD([p for _, p in parameters]))
    batch = task.source.step(0, 0).micro_batches[0]
    batch.targets.fill_(-100)
    loss = task.loss(strategy, batch, None)
    assert loss.item() == 0.0
    strategy.backward(loss, 0)
    assert strategy.grad_norm().item() == 0.0


def test_a_run_that_has_seen_other_data_or_templates_is_not_continued(single, base, data, tmp_path):
    with pytest.raises(UserError, match=r"has instruct\.mask_prompt=True, this run instruct\.mask_prompt=False"):
        finetune(data, base, single, "--instruct.mask_prompt=false", "--train.steps=9")
    other = tmp_path / "other.json"
    other.write_text(json.dumps([{"instruction": f"say {i}", "output": f"{i}"} for i in range(30)]))
    with pytest.raises(UserError, match="was trained on other data than"):
        finetune(other, base, single, "--train.steps=9")


def test_alpaca_needs_no_new_tokens(base, data, tmp_path, capsys):
    finetune(data, base, tmp_path, "--instruct.template={prompt}={answer}", "--train.stop_at=1", "--eval.every=0")
    assert read_config(layout.resolve(tmp_path)).model.vocab_size == 257
    assert "special tokens" not in capsys.readouterr().out


@pytest.fixture(scope="module")
def untied(dataset, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("untied")
    run_tiny(dataset, run_dir, "--model.context=64", "--train.tokens_per_step=704", "--train.steps=1", "--eval.every=0",
             "--eval.tokens=500", "--schedule.warmup_steps=0", "--model.tied=false")
    return run_dir


@pytest.mark.parametrize("freeze", ["head", "last:1"])
def test_frozen_embeddings_are_said_where_they_are_frozen(base, untied, data, tmp_path, freeze, capsys):
    """A tied head is the embedding, and learns; of an untied one the embeddings of the new tokens stay."""
    for start in (base, untied):
        run_dir = tmp_path / start.name
        finetune(data, start, run_dir, f"--task.freeze={freeze}", "--train.stop_at=1", "--schedule.warmup_steps=0",
                 "--eval.every=0", "--instruct.samples=0", "--optim.weight_decay=0")
        said = capsys.readouterr().out
        assert "2 special tokens of the template chatml added" in said
        sentence = (f"their embeddings are frozen with the others (task.freeze={freeze}) and learn nothing; their rows "
                    f"of the head are trained")
        assert (sentence in said) == (start == untied)
        assert ("frozen" in said) == (start == untied)
        before, after = (store.load_tensors(layout.resolve(run))["model.wte.weight"][:257] for run in (start, run_dir))
        assert torch.equal(before, after) == (start == untied)


@pytest.mark.parametrize("save", ["all", "adapters"])
def test_adapters_on_a_grown_vocabulary(base, data, tmp_path, save, capsys):
    finetune(data, base, tmp_path / "lora", "--lora.rank=2", f"--lora.save={save}", "--train.stop_at=2")
    assert "their embeddings are frozen with the others (lora.rank=2)" in capsys.readouterr().out
    chat = open_chat(layout.resolve(tmp_path / "lora"), Sampling(max_new_tokens=3))
    list(chat.say("1+1"))
    finetune(data, tmp_path / "lora", tmp_path / "next", "--train.stop_at=1")
    assert "special tokens" not in capsys.readouterr().out, "they are there already"
    assert train_rows(tmp_path / "next")[0]["loss"] < train_rows(tmp_path / "lora")[0]["loss"], "what it learned stays"


def test_the_template_of_the_starting_model_is_kept(single, data, tmp_path, capsys, monkeypatch):
    """Without instruct.template; one that is given wins, and the run says so."""
    monkeypatch.setitem(TINY, "instruct", {"samples": 0})
    short = ["--train.stop_at=1", "--eval.every=0"]
    finetune(data, single, tmp_path / "kept", *short)
    assert stored_template(layout.resolve(tmp_path / "kept")) == TEMPLATES["chatml"]
    assert "is used as given" not in capsys.readouterr().out
    finetune(data, single, tmp_path / "kept", "--train.stop_at=2", "--eval.every=0")
    assert len(train_rows(tmp_path / "kept")) == 2
    finetune(data, single, tmp_path / "given", *short, "--instruct.template={prompt}={answer}")
    assert stored_template(layout.resolve(tmp_path / "given")) == load_template("{prompt}={answer}")
    assert (f"instruct.template={{prompt}}={{answer}} is used as given, though {layout.resolve(single)} was fine-tuned "
            f"with chatml") in capsys.readouterr().out


@pytest.mark.parametrize("embedded", [True, False])
def test_what_is_left_out_of_validation_data_is_said(data, tmp_path, embedded):
    val = tmp_path / "val.jsonl"
    val.write_text('{"instruction": "a", "output": "b"}\n{"instruction": "c", "output": ""}\n')
    train_data = "" if embedded else str(data)
    config = config_module.from_dict(TINY, "test", [f"--task.train_data={train_data}", f"--task.val_data={val}"])
    train, held_out, notes = read_data(config)
    assert (len(train) == 60) == (not embedded)
    assert [c.answer for c in held_out] == ["b"]
    assert notes == [f"left out 1 of 2 conversations with an empty answer, the first at {val}:2"]


def test_test_data_is_refused(base, data, tmp_path):
    with pytest.raises(UserError, match=r"task\.test_data is not for task\.name=instruct"):
        finetune(data, base, tmp_path, f"--task.test_data={data}")


def test_no_validation_data(base, data, tmp_path, capsys):
    finetune(data, base, tmp_path, "--task.val_fraction=0", "--train.stop_at=1")
    assert "no validation data: nothing is evaluated" in capsys.readouterr().out
    assert not evals(tmp_path)


def test_the_split_depends_on_the_conversation_alone():
    said = [Conversation((Turn(USER, str(i)), Turn(ASSISTANT, "x"))) for i in range(400)]
    train, val = split(said, 0.25)
    assert 60 < len(val) < 140
    assert split([*reversed(said), *said], 0.25)[1] == [*reversed(val), *val]
    assert split(said, 0.0)[1] == []
    assert len(train) + len(val) == 400


def test_the_command_over_a_pipe(single):
    done = run_gptdist("chat", str(single), "--max-new-tokens", "4", "--temperature", "0", stdin="1+1\n/quit\n2+2\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("\n")
    assert not done.stderr


def test_the_command_names_what_it_cannot_do(single, base, capsys):
    assert main(["chat", str(base), "--system", "x"]) == 2
    assert "a base model has no system prompt" in capsys.readouterr().err
    assert main(["chat", str(single), "--template", "phi3"]) == 2
    assert "the model's tokenizer has no <|system|>, <|end|>, <|user|>, <|assistant|>" in capsys.readouterr().err
    assert main(["chat", str(single), "--temperature", "-1"]) == 2
    assert "temperature is -1" in capsys.readouterr().err
