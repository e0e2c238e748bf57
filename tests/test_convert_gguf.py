"""GGUF out: read back with the gguf package's own reader."""

import sys

import numpy as np
import pytest
import torch

from gptdist.checkpoint.restore import load_model
from gptdist.convert.exporter import export_model
from gptdist.data.tokenizer import EOT
from gptdist.errors import MissingError, UserError
from tests.convert_models import gpt2, hf_logits, logits, random_checkpoint, small_tokenizer, some_tokens

gguf = pytest.importorskip("gguf", reason="the gguf package is not installed (the extra `convert`)")


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer()


def values(tensor) -> torch.Tensor:
    """A tensor of GGUFReader as fp32, in (out, in)."""
    data = torch.from_numpy(np.array(tensor.data))
    if tensor.tensor_type == gguf.GGMLQuantizationType.BF16:
        data = data.contiguous().view(torch.uint8).view(torch.bfloat16)
    return data.float().reshape(tuple(int(n) for n in tensor.shape[::-1]))


# gguf's name -> transformers' name
NAMES = {"token_embd": "wte", "position_embd": "wpe", "output_norm": "ln_f", "attn_norm": "ln_1",
         "attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj", "ffn_norm": "ln_2", "ffn_up": "mlp.c_fc",
         "ffn_down": "mlp.c_proj"}


def hf_name(name: str) -> str:
    if name == "output.weight":
        return "lm_head.weight"
    *block, module, kind = name.split(".")
    return ".".join(["transformer", *(["h", block[1]] if block else []), NAMES[module], kind])


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("options", [{}, {"tied": False, "qkv_bias": False, "mlp_ratio": 2.5}])
def test_a_model_built_from_the_file_gives_equal_logits(options, dtype, tokenizer, tmp_path):
    pytest.importorskip("transformers", reason="the reference is transformers")
    path = random_checkpoint(tmp_path / "checkpoint", tokenizer, **options)
    reader = gguf.GGUFReader(export_model(path, str(tmp_path / "m.gguf"), format="gguf", dtype=dtype))
    tied = options.get("tied", True)
    theirs = gpt2(tie_word_embeddings=tied, n_inner=int(32 * options.get("mlp_ratio", 4)))
    state = theirs.state_dict()
    if tied:
        del state["lm_head.weight"]
    assert sorted(hf_name(t.name) for t in reader.tensors) == sorted(state)
    for tensor in reader.tensors:
        target, value = state[hf_name(tensor.name)], values(tensor)
        is_conv1d = value.dim() == 2 and ".h." in hf_name(tensor.name)
        with torch.no_grad():
            target.copy_(value.t() if is_conv1d else value)
        exact = value.dim() == 1 or tensor.name == "position_embd.weight"
        assert tensor.tensor_type.name == ("F32" if exact else dtype.upper().replace("P", ""))
    tokens = some_tokens()
    tolerance = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 5e-2}[dtype]
    assert (logits(path, tokens) - hf_logits(theirs, tokens)).abs().max() < tolerance


def test_metadata_and_tokenizer(tokenizer, tmp_path):
    path = random_checkpoint(tmp_path / "checkpoint", tokenizer, mlp_ratio=3.0, norm_eps=1e-6)
    reader = gguf.GGUFReader(export_model(path, str(tmp_path / "m.gguf"), format="gguf", dtype="bf16"))
    found = {name: field.contents() for name, field in reader.fields.items()}
    expected = {
        "general.architecture": "gpt2", "gpt2.block_count": 2, "gpt2.context_length": 32, "gpt2.embedding_length": 32,
        "gpt2.feed_forward_length": 96, "gpt2.attention.head_count": 4, "gpt2.vocab_size": 300,
        "general.file_type": int(gguf.LlamaFileType.MOSTLY_BF16), "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.bos_token_id": 299, "tokenizer.ggml.eos_token_id": 299,
        "tokenizer.ggml.add_bos_token": False}
    assert {name: found[name] for name in expected} == expected
    assert found["gpt2.attention.layer_norm_epsilon"] == pytest.approx(1e-6)
    import tokenizers

    tokens, merges = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.merges"]
    assert len(tokens) == 300
    assert (tokens[299], found["tokenizer.ggml.token_type"][299]) == (EOT, int(gguf.TokenType.CONTROL))
    assert set(found["tokenizer.ggml.token_type"][:299]) == {int(gguf.TokenType.NORMAL)}
    again = tokenizers.Tokenizer(tokenizers.models.BPE(
        vocab={t: i for i, t in enumerate(tokens)}, merges=[tuple(m.split(" ")) for m in merges]))
    again.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    text = "the error of the function, is it 12 or 東京?"
    assert again.encode(text).ids == load_model(path)[1].encode(text)


def test_a_pattern_that_llama_cpp_does_not_know(tmp_path):
    from gptdist.data.tokenizer_build import build

    path = random_checkpoint(tmp_path / "checkpoint", build("bpe:262", ["abc abcabc 1234 " * 9], pattern=r"\s+|\S+"))
    with pytest.raises(UserError, match=r"its own split pattern, which llama.cpp does not know"):
        export_model(path, str(tmp_path / "m.gguf"), format="gguf")


def test_a_full_disk_names_the_file(tokenizer, tmp_path, monkeypatch):
    """numpy writes tensors, and says without an errno that not all of one was written."""
    path = random_checkpoint(tmp_path / "checkpoint", tokenizer)

    def short(*args):
        raise OSError("8192 requested and 4096 written")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", short)
    with pytest.raises(UserError, match=r"cannot save to .*m.gguf: 8192 requested and 4096 written .*free some disk"):
        export_model(path, str(tmp_path / "m.gguf"), format="gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


def test_without_the_package(tokenizer, tmp_path, monkeypatch):
    path = random_checkpoint(tmp_path / "checkpoint", tokenizer)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingError, match=r"pip install 'gptdist\[convert\]'"):
        export_model(path, str(tmp_path / "m.gguf"), format="gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]
