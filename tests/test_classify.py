"""Fine-tuning for classification: what is trained, from where, under every strategy; metrics, results, using it."""

import json

import pytest
import torch
import yaml
from torch.nn import functional as F

from gptdist import config as config_module
from gptdist.checkpoint import layout, store
from gptdist.checkpoint.restore import load_classifier, read_config
from gptdist.checkpoint.verify_values import verify_values
from gptdist.cli import main
from gptdist.config import ModelConfig
from gptdist.data.labelled import embedded_labelled
from gptdist.errors import UserError
from gptdist.evaluate.baselines import bag_of_words_accuracy, majority_accuracy
from gptdist.evaluate.classification import scores
from gptdist.metrics import read_rows
from gptdist.model import Classifier
from gptdist.parallel.world import init_world
from gptdist.tasks.classify import Classify, Labeller, load_splits
from tests import finetune_worker
from tests.conftest import run_gptdist
from tests.finetune_worker import CASES, CLASSIFY, classify_config, options, run_classify
from tests.ranks import Ranks
from tests.training import assert_same_curve, eval_losses, run_tiny, train_rows


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """90 short docstrings of three kinds, in a JSONL file."""
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    kept = {label: [row for row in embedded_labelled() if row.label == label and len(row.text) < 75][:30]
            for label in ("graphics", "mail", "numbers")}
    path.write_text("".join(json.dumps({"text": row.text, "label": row.label}) + "\n"
                            for rows in kept.values() for row in rows))
    return path


@pytest.fixture(scope="module")
def base(dataset, tmp_path_factory):
    """A pretrained model of the size that the tests classify with."""
    run = tmp_path_factory.mktemp("base") / "run"
    run_tiny(dataset, run, "--train.steps=4", "--model.context=48", "--train.tokens_per_step=528",
             "--schedule.warmup_steps=0", "--eval.every=0")
    return run


@pytest.fixture(scope="module")
def references(texts, base, tmp_path_factory):
    """One process, for both sets of settings."""
    out = tmp_path_factory.mktemp("runs")
    for name in ("plain", "frozen"):
        run_classify(texts, out / name, *options(name, base))
    return out


def weights(run):
    return store.load_tensors(layout.resolve(run))


# Every strategy


@pytest.fixture(scope="module")
def world2(two_processes, references, texts, base):
    run_classify(texts, references / "chain", "--train.stop_at=2")
    two_processes.run("tests.finetune_worker", texts, base, references)
    return references


def assert_as_single(out, name, world):
    reference = out / name.partition("-")[0]
    assert_same_curve(train_rows(out / f"{name}-{world}"), train_rows(reference))
    assert eval_losses(out / f"{name}-{world}") == pytest.approx(eval_losses(reference), abs=1e-5)
    ours, theirs = (json.loads((run / "results.json").read_text()) for run in (out / f"{name}-{world}", reference))
    assert ours["test"]["confusion"] == theirs["test"]["confusion"]


@pytest.mark.parametrize("name", CASES[2])
def test_every_strategy_gives_the_single_curve(world2, name):
    assert_as_single(world2, name, 2)


def test_a_run_goes_on_under_another_strategy(world2):
    rows = train_rows(world2 / "chain")
    assert_same_curve(rows, train_rows(world2 / "plain")[:len(rows)])
    assert len(rows) > 2


@pytest.mark.long
def test_four_processes_give_the_single_curve(world2, texts, base):
    run_classify(texts, world2 / "chain", "--train.stop_at=2")
    Ranks(4, world2 / "world-4", finetune_worker.main, texts, base, world2).wait()
    for name in CASES[4]:
        assert_as_single(world2, name, 4)


# What is trained


def test_the_loss_falls_and_the_test_texts_are_scored(references):
    rows = train_rows(references / "plain")
    assert sum(row["loss"] for row in rows[3:]) / 3 < rows[0]["loss"]
    assert all(0 <= row["padding_share"] < 0.5 and row["tokens"] == 11 for row in rows)
    result = json.loads((references / "plain" / "results.json").read_text())
    assert result["labels"] == ["graphics", "mail", "numbers"]
    assert result["texts"] == {"train": 62, "val": 9, "test": 19}
    assert sum(map(sum, result["test"]["confusion"])) == 19
    evals = [row for row in read_rows(references / "plain" / "metrics.jsonl") if row["kind"] == "eval"]
    assert all(0 <= row["accuracy"] <= 1 and set(row["classes"]) == set(result["labels"]) for row in evals)


def test_frozen_parts_keep_their_weights(references, base):
    before, after = weights(base), weights(references / "frozen")
    changed = {key for key in after if key.startswith("model.") and not
               (key in before and torch.equal(before[key], after[key]))}
    assert {key.split(".")[1] for key in changed} == {"blocks", "ln_f", "score"}
    assert {key.split(".")[2] for key in changed if ".blocks." in key} == {"1"}
    assert not any(key.startswith(("optim.wte", "optim.blocks.0")) for key in after)
    assert verify_values(layout.resolve(references / "frozen")).optimizer


def test_the_head_alone(texts, base, tmp_path):
    run_classify(texts, tmp_path / "run", "--task.freeze=head", f"--checkpoint.init_from={base}", "--train.steps=2")
    assert {key.split(".")[1] for key in weights(tmp_path / "run") if key.startswith("optim.")} == {"score"}


def test_more_blocks_than_there_are(texts, tmp_path):
    with pytest.raises(UserError, match=r"task\.freeze=last:3, but the model has 2 blocks"):
        run_classify(texts, tmp_path / "run", "--task.freeze=last:3")


@pytest.mark.parametrize("pool", ["last", "first", "mean"])
def test_padding_changes_nothing(pool):
    torch.manual_seed(0)
    model = Classifier(ModelConfig(vocab_size=50, context=16, width=32, n_layers=2, n_heads=4), 3, pool)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    tokens, lengths = torch.randint(0, 50, (4, 16)), torch.tensor([1, 5, 9, 12])
    logits = model(tokens, lengths)
    for row, n in enumerate(lengths.tolist()):
        alone = model(tokens[row:row + 1, :n], lengths[row:row + 1])
        torch.testing.assert_close(logits[row:row + 1], alone, atol=1e-5, rtol=1e-5)
    hidden = model.hidden(tokens)
    wanted = {"last": hidden[1, 4], "first": hidden[1, 0], "mean": hidden[1, :5].mean(0)}[pool]
    torch.testing.assert_close(logits[1], model.score(wanted))


def test_long_texts_are_cut_and_keep_their_end(texts, tmp_path):
    task = Classify(classify_config(texts, tmp_path, "--model.context=20"), init_world(classify_config(
        texts, tmp_path).parallel))
    assert task.train.lengths.max() == 20
    assert all(example.tokens[-1] == task.tokenizer.eot for example in task.train.examples)
    assert task.train.truncated == sum(len(row.text.encode()) > 19 for row in task.texts.train)


def test_weights_make_labels_count_alike(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("".join(f"{label}\ttext number {i}\n" for i, label in enumerate(["a"] * 9 + ["b"] * 3)))
    config = classify_config(path, tmp_path, "--classify.balance=weights", "--classify.split=[1.0,0.0,0.0]")
    task = Classify(config, init_world(config.parallel))
    assert task.weights.tolist() == pytest.approx([12 / 18, 12 / 6])
    batch = task.source.step(0, 0).micro_batches[0]
    logits = torch.randn(len(batch.tokens), 2)
    losses, _ = task._losses(lambda *args, **kwargs: logits, batch)
    plain = F.cross_entropy(logits, batch.targets, reduction="none", ignore_index=-100)
    factors = torch.tensor([12 / 18, 12 / 6])[batch.targets.clamp(min=0)]
    torch.testing.assert_close(losses, plain * factors)


def test_rows_of_several_lines_are_said_at_the_start(tmp_path, capsys):
    path = tmp_path / "texts.txt"
    path.write_text('ham\t"hi there\nspam\twin\nham\tsee you"\n' + "ham\thello\nspam\tprize\n" * 6)
    run_classify(path, tmp_path / "run", "--train.steps=1", "--train.batch=2", "--classify.balance=undersample")
    assert f"1 row spans several lines, the first at {path} line 1" in capsys.readouterr().out


def test_which_file_is_split(tmp_path):
    """Test data of its own leaves training data to be split in two, in the proportion of classify.split."""
    paths = {}
    for name, n in (("train", 747), ("val", 5), ("test", 7)):
        paths[name] = tmp_path / f"{name}.txt"
        paths[name].write_text("".join(f"{label}\t{name} {i}\n" for i in range(n) for label in ("ham", "spam")))

    def sizes(*names):
        config = classify_config(paths["train"], tmp_path, *(f"--task.{name}_data={paths[name]}" for name in names))
        parts = load_splits(config)
        texts = [row.text + row.label for part in (parts.train, parts.val, parts.test) for row in part]
        assert len(set(texts)) == len(texts), "no text is in two of them"
        return len(parts.train), len(parts.val), len(parts.test)

    assert sizes() == (1045, 149, 300)
    assert sizes("test") == (1307, 187, 14)
    assert sizes("val") == (1494, 10, 0)
    assert sizes("val", "test") == (1494, 10, 14)


def test_epochs_make_the_steps(texts, tmp_path):
    run_classify(texts, tmp_path / "run", "--train.epochs=0.5")
    assert len(train_rows(tmp_path / "run")) == 3  # ceil(0.5 x 62 / 11)
    with pytest.raises(UserError, match=r"schedule\.warmup_steps=9 exceeds the 3 steps of train\.epochs=0\.5"):
        run_classify(texts, tmp_path / "other", "--train.epochs=0.5", "--schedule.warmup_steps=9")


# Where it starts from


def test_model_and_tokenizer_come_from_the_base(references, base):
    tuned, pretrained = (read_config(layout.resolve(run)) for run in (references / "frozen", base))
    assert tuned.model.width == pretrained.model.width == 32
    assert tuned.model.dropout == 0.1
    assert (layout.resolve(references / "frozen") / "tokenizer" / "tokenizer.json").read_bytes() == (
        layout.resolve(base) / "tokenizer" / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(("override", "message"), [
    ("--model.width=64", "has model.width=32, this run model.width=64: the model comes from the checkpoint"),
    ("--model.context=32", "has model.context=48, this run model.context=32"),
])
def test_another_model_than_the_bases_is_refused(texts, base, tmp_path, override, message):
    with pytest.raises(UserError) as caught:
        run_classify(texts, tmp_path / "run", f"--checkpoint.init_from={base}", override)
    assert message in str(caught.value)


def test_a_classifier_goes_on_with_its_labels_only(references, texts, tmp_path):
    start = f"--checkpoint.init_from={references / 'plain'}"
    run_classify(texts, tmp_path / "same", start, "--train.steps=1", "--optim.lr=1e-9")
    before, after = weights(references / "plain"), weights(tmp_path / "same")
    torch.testing.assert_close(after["model.score.weight"], before["model.score.weight"])
    other = tmp_path / "other.txt"
    other.write_text("ham\thello\nspam\twin\n" * 9)
    with pytest.raises(UserError, match="classifies graphics, mail, numbers, but the labels of this run are ham, spam"):
        run_classify(other, tmp_path / "other", start)


@pytest.mark.parametrize(("override", "message"), [
    ("--classify.pool=mean", "has classify.pool=last, this run classify.pool=mean: its head is kept"),
    ("--classify.end_token=false", "has classify.end_token=True, this run classify.end_token=False: its head is kept")])
def test_a_kept_head_sees_what_it_was_trained_with(references, texts, tmp_path, override, message):
    with pytest.raises(UserError) as caught:
        run_classify(texts, tmp_path / "run", f"--checkpoint.init_from={references / 'plain'}", override)
    assert message in str(caught.value)


@pytest.mark.parametrize("task", ["instruct", "dpo"])
def test_a_classifier_is_no_start_for_text(references, texts, tmp_path, task):
    path = tmp_path / "data.jsonl"
    record = {"instruction": "Q", "output": "yes", "chosen": "yes", "rejected": "no"}
    path.write_text("".join(json.dumps(record | {"instruction": f"Q{i}"}) + "\n" for i in range(20)))
    with pytest.raises(UserError) as caught:
        run_classify(path, tmp_path / "run", f"--checkpoint.init_from={references / 'plain'}", f"--task.name={task}",
                     "--instruct.template={prompt}={answer}")
    assert f"is a classifier, which writes no text: start task.name={task} from a model that does" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_labels_that_training_does_not_know(texts, tmp_path):
    other = tmp_path / "val.txt"
    other.write_text("mail\thello\nspam\twin\n")
    with pytest.raises(UserError, match=r"val\.txt line 2 has the label 'spam', which training does not know"):
        run_classify(texts, tmp_path / "run", f"--task.val_data={other}")


def test_resuming_is_bitwise_and_keeps_the_task(references, texts, tmp_path):
    run = tmp_path / "run"
    run_classify(texts, run, "--train.stop_at=3")
    assert not (run / "results.json").exists()
    for override, message in (("--task.freeze=head", "has task.freeze=none, this run task.freeze=head"),
                              ("--train.batch=5", "has train.batch=11, this run train.batch=5"),
                              ("--classify.split_seed=5", "was trained on other data than"),
                              ("--classify.labels=[numbers,mail,graphics]", "classifies graphics, mail, numbers")):
        with pytest.raises(UserError) as caught:
            run_classify(texts, run, override)
        assert message in str(caught.value)
    rows = run_classify(texts, run)
    assert [row["loss"] for row in rows] == [row["loss"] for row in train_rows(references / "plain")]
    after, reference = weights(run), weights(references / "plain")
    assert all(torch.equal(after[key], reference[key]) for key in reference)


@pytest.mark.parametrize(("overrides", "message"), [
    (["--task.name=clasify"], "task.name is 'clasify', expected 'pretrain' | 'classify'"),
    (["--task.train_data=x.csv"], "are for fine-tuning, but task.name=pretrain"),
    (["--task.name=classify", "--task.freeze=most"], "task.freeze is 'most', expected none, head, or last:N"),
    (["--task.name=classify", "--task.freeze=head", "--lora.rank=4"], "task.freeze=head with lora.rank=4"),
    (["--task.name=classify", "--lora.targets=("], "lora.targets is '(', expected a regular expression"),
    (["--classify.split=[0.5,0.1,0.1]"], "expected [train, validation, test] with sum 1"),
    (["--classify.labels=[a,a]"], "classify.labels has a label twice"),
    (["--train.epochs=-1"], "train.epochs is -1.0, expected 0 (off) or more"),
    (["--train.batch=0"], "train.batch is 0, expected at least 1"),
])
def test_bad_settings_are_named(overrides, message):
    with pytest.raises(UserError) as caught:
        config_module.load(None, overrides)
    assert message in str(caught.value)


def test_a_configuration_of_before_there_were_tasks_is_one_of_pretraining():
    old = {name: values for name, values in config_module.to_dict(config_module.Config()).items()
           if name not in ("task", "classify", "instruct", "dpo", "lora")}
    assert config_module.from_dict(old, "test") == config_module.Config()


# Scores and baselines


def test_scores_by_hand():
    result = scores(torch.tensor([[3, 1, 0], [2, 4, 0], [0, 0, 0]]), ["a", "b", "c"])
    assert result["accuracy"] == 0.7
    assert result["classes"]["a"] == {"precision": 0.6, "recall": 0.75, "f1": 6 / 9, "texts": 4}
    assert result["classes"]["c"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "texts": 0}
    assert result["macro_f1"] == pytest.approx((6 / 9 + 8 / 11) / 3)


def test_baselines():
    assert majority_accuracy([0, 1, 1], [1, 1, 0, 1]) == 0.75
    train = ["win a prize", "a prize for you", "see you at home", "home at six"] * 5
    test = ["prize", "at home you see", "nothing known"]
    assert bag_of_words_accuracy(train, [0, 0, 1, 1] * 5, test, [0, 1, 1]) >= 2 / 3


def test_logistic_regression_finds_the_minimum():
    """Against torch's autograd on the same objective, dense."""
    train, labels = ["a b", "b c c", "c a", "d", "d a"], [0, 1, 1, 2, 2]
    from gptdist.evaluate import baselines

    words = {word: i for i, word in enumerate("abcd")}
    inputs = baselines._vectors(train, words).to_dense()
    weight, bias = (torch.zeros(shape, requires_grad=True) for shape in ((4, 3), (3,)))
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def objective():
        optimizer.zero_grad()
        loss = F.cross_entropy(inputs @ weight + bias, torch.tensor(labels), reduction="sum")
        loss = loss + weight.square().sum() / 2
        loss.backward()
        return loss

    optimizer.step(objective)
    wanted = ((inputs @ weight + bias).argmax(1) == torch.tensor(labels)).float().mean().item()
    assert bag_of_words_accuracy(train, labels, train, labels) == wanted


# Using it


def test_probabilities_do_not_depend_on_the_company(references, texts):
    labeller = Labeller(references / "plain" / "checkpoints" / layout.step_name(CLASSIFY["train"]["steps"]))
    sentences = [json.loads(line)["text"] for line in texts.read_text().splitlines()[:7]]
    together = labeller.probabilities(sentences, batch_size=3)
    torch.testing.assert_close(together.sum(1), torch.ones(7))
    for i, sentence in enumerate(sentences):
        torch.testing.assert_close(labeller.probabilities([sentence])[0], together[i], atol=1e-6, rtol=1e-5)


def test_no_texts_have_no_probabilities(references):
    labeller = Labeller(layout.resolve(references / "plain"))
    assert labeller.probabilities([]).shape == (0, 3)
    assert list(labeller.lines([])) == []


def test_commands(references, base, texts, tmp_path, capsys):
    run = str(references / "plain")
    assert main(["classify", run, "--file", str(texts), "--json"]) == 0
    out, err = capsys.readouterr()
    cut = sum(len(json.loads(line)["text"].encode()) > 47 for line in texts.read_text().splitlines())
    assert err == f"gptdist classify: {cut} of 90 texts cut to the model's context of 48 tokens\n"
    lines = [json.loads(line) for line in out.splitlines()]
    assert len(lines) == 90
    assert all(line["probability"] == max(line["probabilities"].values()) for line in lines)
    path = tmp_path / "pretrain.yaml"
    path.write_text(yaml.safe_dump({"run": {"dir": str(tmp_path / "run")}}))
    for arguments, message in ((["generate", run, "--prompt", "x"], "is a classifier, which writes no text"),
                               (["classify", str(base), "--text", "x"], "is no classifier, its task.name is pretrain"),
                               (["classify", run, "--text", "x", "--batch-size=0"], "batch size is 0"),
                               (["classify", run, "--text", "x", "--text", " "], "text 2 is empty"),
                               (["finetune", str(path)], "has task.name=pretrain: set task.name to classify")):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_a_configuration_runs_by_the_command(texts, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(CLASSIFY | {"run": {"dir": str(tmp_path / "run"), "tensorboard": False}}))
    done = run_gptdist("finetune", str(path), f"--task.train_data={texts}", "--train.steps=2",
                       "--classify.baselines=true")
    assert done.returncode == 0, done.stderr
    for words in ("11 texts per step; 62 texts per epoch", "labels graphics, mail, numbers", "confusion matrix",
                  "test accuracy of the commonest label", "test accuracy of logistic regression on words"):
        assert words in done.stdout


def test_adapters_are_merged_for_use(texts, base, tmp_path):
    run_classify(texts, tmp_path / "run", f"--checkpoint.init_from={base}", "--lora.rank=2", "--train.steps=4")
    checkpoint = layout.resolve(tmp_path / "run")
    saved = weights(tmp_path / "run")
    assert "model.blocks.0.attn.qkv.lora_A" in saved
    assert torch.equal(saved["model.wte.weight"], weights(base)["model.wte.weight"])
    assert "optim.score.weight.step" in saved
    model, _, _ = load_classifier(checkpoint)
    assert not any("lora" in name for name, _ in model.named_parameters())
    assert not torch.equal(model.blocks[0].attn.qkv.weight, saved["model.blocks.0.attn.qkv.weight"])
