"""Low-rank adapters: the arithmetic, what is trained, dropout, merging, checkpoints with and without the base, peft;
and training with them, and with preferences (test_dpo.py has the rest), under every strategy at world size 2."""

import dataclasses
import json
import math
import os

import pytest
import torch
from torch import nn

from gptdist import config as config_module
from gptdist import lora, ops
from gptdist.checkpoint import load_tensors, resolve
from gptdist.checkpoint.base import BASE_NAME, describe_base
from gptdist.checkpoint.restore import load_classifier, load_model
from gptdist.checkpoint.shards import Part
from gptdist.checkpoint.stream import write_checkpoint
from gptdist.checkpoint.verify_values import verify_values
from gptdist.config import ClassifyConfig, Config, LoRAConfig, ModelConfig, TaskConfig, to_yaml
from gptdist.convert.exporter import export_model
from gptdist.convert.importer import checkpoint_files
from gptdist.errors import UserError
from gptdist.model import Classifier, Dropout, LanguageModel, build, build_meta, initial_values
from gptdist.parallel.init import fill_initial_values
from gptdist.parallel.world import World
from gptdist.tasks.pretrain import Pretrain
from tests.convert_models import hf_logits, logits, random_checkpoint, small_tokenizer, some_tokens
from tests.lora_data import base_run, pairs_file
from tests.lora_worker import ADAPTERS, CASES, REFERENCES, overrides_of
from tests.training import assert_same_curve, eval_losses, run_tiny, train_rows

os.environ["HF_HUB_OFFLINE"] = "1"

TINY = ModelConfig(vocab_size=300, vocab_multiple=1, context=32, width=32, n_layers=2, n_heads=4)
ALL = "attn.qkv|attn.proj|mlp.fc|mlp.proj"


def adapted(model: ModelConfig = TINY, *, seed: int | None = None, **options) -> LanguageModel:
    """A model with its initial values and adapters; with a seed their B are random, so that they do something."""
    built = build_meta(model)
    lora.apply(built, LoRAConfig(**{"rank": 4, "alpha": 8} | options))
    built.to_empty(device="cpu")
    fill_initial_values(built, seed=1)
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        for layer in lora.adapters(built).values():
            nn.init.normal_(layer.lora_B, std=0.1, generator=generator)
    return built.eval()


def plain(model: ModelConfig = TINY) -> LanguageModel:
    built = build_meta(model)
    built.to_empty(device="cpu")
    fill_initial_values(built, seed=1)
    return built.eval()


@torch.no_grad()
def run(model: LanguageModel, tokens: torch.Tensor, dropout: Dropout | None = None) -> torch.Tensor:
    return model.logits(model.hidden(tokens, dropout=dropout))


def trainable(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(("split_qkv", "expected"), [(True, 2_666_528), (False, 2_371_616)])
def test_the_books_parameter_counts(split_qkv, expected):
    """Raschka 2024, appendix E: GPT-2 124M with qkv bias and a head of two classes, r = 16 on every linear layer."""
    config = ModelConfig(vocab_size=50257, vocab_multiple=1, context=1024, width=768, n_layers=12, n_heads=12)
    with torch.device("meta"):
        model = Classifier(config, 2, "last")
    assert sum(p.numel() for p in model.parameters()) == trainable(model) == 124_441_346
    model.requires_grad_(False)
    assert trainable(model) == 0
    lora.apply(model, LoRAConfig(rank=16, alpha=16, targets=".*", split_qkv=split_qkv))
    assert trainable(model) == expected


def test_the_base_keeps_its_names_and_is_frozen():
    model, base = adapted(), build_meta(TINY)
    names = {name: p.requires_grad for name, p in model.named_parameters()}
    assert {name for name, trained in names.items() if not trained} == {name for name, _ in base.named_parameters()}
    assert [name for name, trained in names.items() if trained][:2] == [
        "blocks.0.attn.qkv.lora_A", "blocks.0.attn.qkv.lora_B"]
    assert sum(names.values()) == 2 * 4 * TINY.n_layers


def test_initial_values_are_kaiming_uniform_and_zero_and_come_in_slices():
    """The bound of kaiming_uniform_(a=sqrt(5)) over `in` inputs is 1 / sqrt(in)."""
    name, shape = "blocks.0.mlp.proj.lora_A", (8, 128)
    values = initial_values(name, shape, 0, 1024, n_layers=2, seed=1)
    assert values.abs().max() <= 1 / math.sqrt(128)
    assert values.std() == pytest.approx(1 / math.sqrt(128) / math.sqrt(3), rel=0.05)
    assert torch.equal(initial_values(name, shape, 100, 50, n_layers=2, seed=1), values[100:150])
    assert not torch.equal(initial_values(name, shape, 0, 1024, n_layers=2, seed=2), values)
    assert not initial_values("blocks.0.mlp.proj.lora_B", (32, 8), 0, 256, n_layers=2, seed=1).any()


@pytest.mark.parametrize("split_qkv", [False, True])
def test_the_output_is_unchanged_before_training(split_qkv):
    tokens = some_tokens()
    assert torch.equal(run(adapted(split_qkv=split_qkv), tokens), run(plain(), tokens))


MODELS = {"gpt2": TINY, "grouped": dataclasses.replace(TINY, n_heads=8, n_kv_heads=2, positions="rope", bias=False)}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("split_qkv", [False, True])
def test_merged_and_unmerged_and_switched_off(model, split_qkv):
    tokens, config = some_tokens(), MODELS[model]
    built, base = adapted(config, seed=1, split_qkv=split_qkv), run(plain(config), tokens)
    unmerged = run(built, tokens)
    assert (unmerged - base).abs().max() > 0.1
    with lora.without_adapters(built):
        assert torch.equal(run(built, tokens), base)
    assert torch.equal(run(built, tokens), unmerged)
    lora.merge(built)
    assert not lora.adapters(built)
    assert {name for name, _ in built.named_parameters()} == {name for name, _ in plain(config).named_parameters()}
    torch.testing.assert_close(run(built, tokens), unmerged, atol=1e-5, rtol=0)


def test_apart_adapted_queries_keys_and_values_have_an_adapter_each():
    """Against the plain formula: per kv head [its queries, k, v], each with the A of its kind."""
    config = MODELS["grouped"]
    layer = lora.adapters(adapted(config, seed=1, split_qkv=True))["blocks.0.attn.qkv"]
    x = torch.randn(2, 5, config.width)
    (q, k, v), D, rows = layer.lora_A.split(4), config.head_dim, layer.lora_B
    per_row = [(q, q, q, q, k, v)[row // D % 6] for row in range(len(rows))]
    change = torch.stack([2.0 * b @ a for a, b in zip(per_row, rows, strict=True)])  # alpha / rank = 2
    torch.testing.assert_close(layer(x), x @ (layer.weight + change).T)


def test_the_adapters_dropout_is_by_sample_and_off_without_a_key():
    model, tokens = adapted(seed=1, dropout=0.5), some_tokens()
    ids = torch.tensor([7, 3])
    dropped = run(model, tokens, Dropout(0.0, ops.dropout_key(1, 2), ids))
    assert not torch.allclose(dropped, run(model, tokens))
    one_by_one = [run(model, tokens[i:i + 1], Dropout(0.0, ops.dropout_key(1, 2), ids[i:i + 1])) for i in range(2)]
    torch.testing.assert_close(torch.cat(one_by_one), dropped, atol=1e-5, rtol=0)
    assert not torch.allclose(run(model, tokens, Dropout(0.0, ops.dropout_key(1, 3), ids)), dropped)
    sites = [layer.site for layer in lora.adapters(model).values()]
    assert len(set(sites)) == len(sites)
    assert min(sites) > 3 * TINY.n_layers
    partial = adapted(seed=1, targets="mlp.proj")
    assert lora.adapters(partial)["blocks.1.mlp.proj"].site == lora.adapters(model)["blocks.1.mlp.proj"].site


def test_recomputed_activations_have_the_same_gradient():
    gradients = []
    for every in (0, 1):
        model = adapted(seed=1, dropout=0.5)
        model.checkpoint_blocks(every)
        dropout = Dropout(0.1, ops.dropout_key(1, 2), torch.tensor([7, 3]))
        model(some_tokens(), some_tokens(), dropout=dropout).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@pytest.mark.parametrize(("targets", "expected"), [
    ("attn.qkv", ["blocks.0.attn.qkv", "blocks.1.attn.qkv"]),
    (r"blocks\.1\.mlp\..*", ["blocks.1.mlp.fc", "blocks.1.mlp.proj"]),
    ("proj", ["blocks.0.attn.proj", "blocks.0.mlp.proj", "blocks.1.attn.proj", "blocks.1.mlp.proj"])])
def test_targets_are_whole_names_or_their_ends(targets, expected):
    assert lora.targets_of(build_meta(TINY), LoRAConfig(rank=4, targets=targets)) == expected


@pytest.mark.parametrize(("targets", "message"), [
    ("c_attn", r"lora.targets='c_attn' matches no linear layer of the model: it has attn.qkv, attn.proj, mlp.fc, "
               r"mlp.proj"),
    (".*", r"names the language model's head, .* leave `head` out of lora.targets")])
def test_targets_that_cannot_be_adapted(targets, message):
    with pytest.raises(UserError, match=message):
        lora.apply(build_meta(dataclasses.replace(TINY, tied=False)), LoRAConfig(rank=4, targets=targets))


# Checkpoints


def write_adapted(path, tokenizer, base=None, *, alone: bool = False, task: str = "instruct", **options):
    """A checkpoint of adapters with random values, on `base` or random weights, with its base or without (`alone`)."""
    config = ModelConfig(vocab_size=tokenizer.vocab_size, context=32, width=32, n_layers=2, n_heads=4)
    run_config = Config(model=config, task=TaskConfig(name=task), classify=ClassifyConfig(labels=["a", "b", "c"]),
                        lora=LoRAConfig(**{"rank": 4, "alpha": 8} | options))
    model = build(run_config)
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(5)
    for p in model.parameters():
        nn.init.normal_(p, std=0.12, generator=generator)
    if base is not None:
        model.load_state_dict(load_model(base)[0].state_dict(), strict=False)
    parts = [Part(f"model.{name}", p.dtype, tuple(p.shape), lambda p=p: p.detach())
             for name, p in model.named_parameters() if p.requires_grad or not alone]
    files = checkpoint_files(config, tokenizer) | {"config.yaml": to_yaml(run_config).encode()}
    write_checkpoint(path, 0, parts, files | ({BASE_NAME: describe_base(base)} if alone else {}))
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer()


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("split_qkv", [False, True])
def test_a_checkpoint_with_adapters_loads_merged(tmp_path, tokenizer, alone, split_qkv):
    base = random_checkpoint(tmp_path / "base", tokenizer)
    model = write_adapted(tmp_path / "adapters", tokenizer, base, alone=alone, split_qkv=split_qkv)
    tokens = some_tokens()
    assert (run(model, tokens) - logits(base, tokens)).abs().max() > 0.03
    torch.testing.assert_close(logits(tmp_path / "adapters", tokens), run(model, tokens), atol=1e-5, rtol=0)


def test_adapters_on_adapters(tmp_path, tokenizer):
    """A base that is itself a checkpoint of adapters alone."""
    base = random_checkpoint(tmp_path / "base", tokenizer)
    write_adapted(tmp_path / "first", tokenizer, base, alone=True)
    model = write_adapted(tmp_path / "second", tokenizer, tmp_path / "first", alone=True, targets="mlp.fc")
    tokens = some_tokens()
    torch.testing.assert_close(logits(tmp_path / "second", tokens), run(model, tokens), atol=1e-5, rtol=0)


@pytest.mark.parametrize("targets", [ALL, ".*"])
def test_a_classifier_with_adapters_loads_merged(tmp_path, tokenizer, targets):
    """Its new head is trained as a whole, or has an adapter as well."""
    model = write_adapted(tmp_path / "classifier", tokenizer, task="classify", targets=targets)
    assert model.score.weight.requires_grad == (targets == ALL)
    tokens, lengths = some_tokens(), torch.tensor([32, 7])
    merged, _, _ = load_classifier(tmp_path / "classifier")
    with torch.no_grad():
        torch.testing.assert_close(merged(tokens, lengths), model(tokens, lengths), atol=1e-5, rtol=0)


def test_adapters_for_another_base_are_refused(tmp_path, tokenizer):
    base = random_checkpoint(tmp_path / "base", tokenizer)
    write_adapted(tmp_path / "adapters", tokenizer, base, alone=True)
    base.rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"holds adapters alone, and their base .*base is not there"):
        load_model(tmp_path / "adapters")
    random_checkpoint(base, tokenizer, dropout=0.1)
    with pytest.raises(UserError, match=r"holds adapters for another base: the MANIFEST.json of .*base has the sha256"):
        load_model(tmp_path / "adapters")


@pytest.fixture(scope="module")
def exported(tmp_path_factory, tokenizer):
    """name -> (model with adapters, its checkpoint), and the HF directory of their base."""
    folder = tmp_path_factory.mktemp("exported")
    base = random_checkpoint(folder / "base", tokenizer)
    cases = {"packed": {}, "split": {"split_qkv": True}, "some": {"targets": r"attn.qkv|blocks\.1\.mlp\..*"}}
    models = {name: write_adapted(folder / name, tokenizer, base, **options) for name, options in cases.items()}
    export_model(base, str(folder / "hf"), format="hf")
    return folder, models


@pytest.mark.parametrize("case", ["packed", "split", "some"])
def test_peft_loads_the_exported_adapter(exported, tmp_path, case):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    folder, models = exported
    export_model(folder / case, str(tmp_path / "adapter"), format="peft")
    hf = AutoModelForCausalLM.from_pretrained(folder / "hf")
    hf = peft.PeftModel.from_pretrained(hf, tmp_path / "adapter").eval()
    tokens = some_tokens()
    torch.testing.assert_close(hf_logits(hf, tokens), run(models[case], tokens), atol=1e-4, rtol=0)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    some = ["attn.c_attn", "transformer.h.1.mlp.c_fc", "transformer.h.1.mlp.c_proj"]
    assert config["target_modules"] == (
        some if case == "some" else ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"])


def test_hf_exports_are_merged_unless_asked_otherwise(exported, tmp_path):
    from transformers import AutoModelForCausalLM

    folder, models = exported
    tokens = some_tokens()
    export_model(folder / "split", str(tmp_path / "merged"), format="hf")
    merged = hf_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), tokens)
    torch.testing.assert_close(merged, run(models["split"], tokens), atol=1e-4, rtol=0)
    export_model(folder / "split", str(tmp_path / "base"), format="hf", merge=False)
    without = hf_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tokens)
    torch.testing.assert_close(without, logits(folder / "base", tokens), atol=1e-4, rtol=0)


def test_there_are_no_adapters_to_export(exported, tmp_path):
    folder, _ = exported
    with pytest.raises(UserError, match=r"base has no adapters \(lora.rank=0\): export it with --format hf"):
        export_model(folder / "base", str(tmp_path / "adapter"), format="peft")


# Training


@pytest.fixture(scope="module")
def runs(two_processes, dataset, tmp_path_factory):
    """The single-process references, then all cases of the worker; chains begin and end in a single process."""
    out = tmp_path_factory.mktemp("runs")
    base, pairs = base_run(dataset, out / "base"), pairs_file(out / "pairs.jsonl")
    for name in REFERENCES:
        run_tiny(dataset, out / name, *overrides_of(name, base, pairs))
    chains = {"lora": ADAPTERS, "dpo": []}
    for name, further in chains.items():
        run_tiny(dataset, out / f"chain-{name}", *overrides_of(name, base, pairs), *further, "--train.stop_at=2")
    two_processes.run("tests.lora_worker", dataset, base, pairs, out)
    for name, further in chains.items():
        run_tiny(dataset, out / f"chain-{name}", *overrides_of(name, base, pairs), *further)
    return out


@pytest.mark.parametrize("case", CASES)
def test_every_strategy_gives_the_curve_of_one_process(runs, case):
    reference = runs / CASES[case][0]
    assert_same_curve(train_rows(runs / case), train_rows(reference))
    assert eval_losses(runs / case) == pytest.approx(eval_losses(reference), abs=1e-5)


@pytest.mark.parametrize("kind", ["lora", "dpo"])
def test_a_run_goes_on_under_every_strategy(runs, kind):
    """single, fsdp, zero3, single; the adapters are saved without their base, the reference with the weights."""
    assert_same_curve(train_rows(runs / f"chain-{kind}"), train_rows(runs / kind))


@pytest.mark.parametrize("case", ["lora", "zero3", "fsdp"])
def test_the_base_stays_what_it_was(runs, case):
    """Bit for bit where a checkpoint has it, and the adapters alone where it has not."""
    base, saved = load_tensors(runs / "base" / "checkpoints" / "step-00000006"), load_tensors(resolve(runs / case))
    if "lora.save=adapters" in " ".join(CASES.get(case, ("", []))[1]):
        assert {key.rpartition(".")[2] for key in saved if key.startswith("model.")} == {"lora_A", "lora_B"}
    else:
        assert all(torch.equal(saved[key], value) for key, value in base.items() if key.startswith("model."))
    assert {key for key in saved if key.startswith("optim.") and "lora_" not in key} == set()
    assert "all right" in str(verify_values(resolve(runs / case)))


@pytest.mark.parametrize("strategy", ["fsdp", "zero2", "zero3"])
def test_a_new_run_starts_from_the_merged_weights(runs, strategy):
    """Merged into whatever part of them a process has: the loss goes on from where the adapters have brought it."""
    first = train_rows(runs / f"merged-{strategy}")[0]
    model, _, config = load_model(resolve(runs / "fsdp"))
    config = dataclasses.replace(config, lora=LoRAConfig(), model=dataclasses.replace(config.model, dropout=0.0))
    source = Pretrain(config, World(0, 1, torch.device("cpu"), "single", None)).source
    batch = source.step(0, 0)
    with torch.no_grad():
        losses = [model(b.tokens, b.targets).sum().item() for b in batch.micro_batches]
    assert first["loss"] == pytest.approx(sum(losses) / batch.n_targets, abs=1e-5)


@pytest.mark.parametrize(("overrides", "message"), [
    (["--lora.save=adapters"], "lora.save=adapters needs checkpoint.init_from"),
    (["--lora.targets=("], "expected a regular expression"),
    (["--lora.dropout=0.1", "--parallel.strategy=fsdp", "--parallel.tensor=2"],
     "lora.dropout=0.1 with parallel.tensor=2: .* use lora.dropout=0, or parallel.tensor=1"),
    (["--lora.rank=-1"], "lora.rank is -1, expected 0")])
def test_settings_that_do_not_fit_are_refused(overrides, message):
    with pytest.raises(UserError, match=message):
        config_module.load(None, ["--lora.rank=4", *overrides])


def test_adapters_saved_alone_need_a_run_that_had_a_base(runs, dataset, tmp_path):
    base, pairs = runs / "base" / "checkpoints" / "step-00000006", runs / "pairs.jsonl"
    whole = [*overrides_of("lora", base, pairs), "--train.stop_at=1"]
    run_tiny(dataset, tmp_path / "run", *whole)
    with pytest.raises(UserError, match=r"step-00000001 was saved with lora.save=all, so there is no base to refer to"):
        run_tiny(dataset, tmp_path / "run", *whole[:-1], *ADAPTERS)
