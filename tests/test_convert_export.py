"""Hugging Face directories out: transformers loads them with equal logits, equal tokens and equal bits."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptdist.checkpoint import load_tensors
from gptdist.checkpoint.restore import read_config
from gptdist.convert.exporter import export_model, parse_size
from gptdist.convert.importer import import_model
from gptdist.errors import UserError
from tests.convert_models import (
    TEXT,
    VOCAB,
    gpt2,
    hf_logits,
    imported,
    logits,
    random_checkpoint,
    save_hf,
    small_tokenizer,
    some_tokens,
)

pytest.importorskip("transformers", reason="the reference is transformers")


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer()


@pytest.fixture(scope="module")
def model():
    return gpt2()


@pytest.fixture(scope="module")
def checkpoint(model, tokenizer, tmp_path_factory):
    return imported(model, tmp_path_factory.mktemp("export"), tokenizer)


@pytest.mark.parametrize("options", [
    {}, {"tied": False}, {"mlp_ratio": 2.3}, {"qkv_bias": False}, {"norm_eps": 1e-3, "tied": False}])
def test_transformers_loads_the_export(options, tokenizer, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = random_checkpoint(tmp_path / "checkpoint", tokenizer, **options)
    out = export_model(path, str(tmp_path / "out"), format="hf", shard_size="30KB" if options else "5GB")
    assert (out / "model.safetensors.index.json").exists() == bool(options)
    theirs, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    assert theirs.dtype == torch.float32
    tokens = some_tokens()
    found = hf_logits(theirs.eval(), tokens)
    assert found.shape[-1] == tokenizer.vocab_size  # padding of the vocabulary is gone
    assert (found - logits(path, tokens)).abs().max() < 1e-4
    tied = theirs.lm_head.weight is theirs.transformer.wte.weight
    assert tied == options.get("tied", True)
    names = AutoTokenizer.from_pretrained(out)
    assert names(TEXT)["input_ids"] == tokenizer.encode(TEXT)
    assert names.decode(tokenizer.encode(TEXT)) == TEXT
    assert names.eos_token_id == theirs.generation_config.eos_token_id == tokenizer.eot


def test_shards_hold_every_tensor_once(tokenizer, tmp_path):
    path = random_checkpoint(tmp_path / "checkpoint", tokenizer)
    out = export_model(path, str(tmp_path / "out"), format="hf", shard_size="20KB")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    stored = [name for file in out.glob("*.safetensors") for name in load_file(file)]
    assert sorted(stored) == sorted(index["weight_map"])
    assert "lm_head.weight" not in stored  # the tied head is stored once
    assert all(file.stat().st_size < 25_000 for file in out.glob("*.safetensors")
               if "transformer.wte.weight" not in load_file(file))


def test_bf16_export(model, checkpoint, tmp_path):
    from transformers import AutoModelForCausalLM

    out = export_model(checkpoint, str(tmp_path / "out"), format="hf", dtype="bf16")
    theirs = AutoModelForCausalLM.from_pretrained(out)
    assert theirs.dtype == torch.bfloat16
    for (name, p), q in zip(model.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p.to(torch.bfloat16), q), name


@pytest.mark.parametrize("tied", [True, False])
def test_round_trips_are_bit_identical(tied, tokenizer, tmp_path):
    original = random_checkpoint(tmp_path / "a", tokenizer, tied=tied, mlp_ratio=3.0, dropout=0.25, norm_eps=1e-6)
    out = export_model(original, str(tmp_path / "hf"), format="hf", shard_size="40KB")
    back = import_model(str(out), str(tmp_path / "b")).path
    ours, again = load_tensors(original), load_tensors(back)
    assert ours.keys() == again.keys()
    for key, value in ours.items():
        n = VOCAB if key in ("model.wte.weight", "model.head.weight") else len(value)
        assert torch.equal(value[:n], again[key][:n]), key
        assert not again[key][n:].any(), "padding comes back as zeros"
    assert read_config(original).model == read_config(back).model
    second = export_model(back, str(tmp_path / "hf2"), format="hf", shard_size="40KB")
    for file in out.iterdir():
        assert file.read_bytes() == (second / file.name).read_bytes(), file.name


@pytest.mark.parametrize("format", ["hf", "gguf"])
@pytest.mark.parametrize(("options", "named"), [
    ({"positions": "rope"}, "model.positions=rope"), ({"n_kv_heads": 2}, "model.n_kv_heads=2"),
    ({"bias": False}, "model.bias=false")])
def test_what_gpt2_cannot_express_is_refused(format, options, named, tokenizer, tmp_path):
    path = random_checkpoint(tmp_path / "checkpoint", tokenizer, **options)
    with pytest.raises(UserError, match=named):
        export_model(path, str(tmp_path / "out"), format=format)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


def test_a_value_beyond_fp16_is_refused(tokenizer, tmp_path):
    folder = save_hf(gpt2(), tmp_path / "hf", tokenizer=tokenizer)
    state = load_file(folder / "model.safetensors")
    state["transformer.ln_f.weight"][3] = 1e5
    save_file(state, folder / "model.safetensors")
    path = import_model(str(folder), str(tmp_path / "checkpoint")).path
    with pytest.raises(UserError, match=r"ln_f.weight has values beyond 65504"):
        export_model(path, str(tmp_path / "out"), format="hf", dtype="fp16")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint", "hf"]


@pytest.mark.parametrize("format", ["hf", "gguf"])
def test_values_that_are_not_finite_are_not_exported(format, tokenizer, tmp_path, monkeypatch):
    if format == "gguf":
        pytest.importorskip("gguf", reason="the gguf package is not installed (the extra `convert`)")
    randn = torch.randn
    monkeypatch.setattr(torch, "randn", lambda shape: randn(shape).fill_(torch.nan) if shape == (96,) else randn(shape))
    path = random_checkpoint(tmp_path / "checkpoint", tokenizer)
    with pytest.raises(UserError, match=r"checkpoint: model.blocks.0.attn.qkv.bias has values that are not finite"):
        export_model(path, str(tmp_path / "out"), format=format, dtype="bf16")
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


def test_sizes():
    assert [parse_size(s) for s in ("5GB", "2 MiB", "1.5kb", "77")] == [5 * 10**9, 2 << 20, 1500, 77]
    for text in ("", "5 apples", "-1GB", "0"):
        with pytest.raises(UserError, match="expected a size"):
            parse_size(text)


def test_a_damaged_checkpoint_is_not_exported(checkpoint, tokenizer, tmp_path):
    path = random_checkpoint(tmp_path / "checkpoint", tokenizer)
    shard = path / "shard-00000.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(UserError, match=r"shard-00000.*: its checksum is wrong"):
        export_model(path, str(tmp_path / "out"), format="hf")
