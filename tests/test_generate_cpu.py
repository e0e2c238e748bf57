"""benchmarks/generate_cpu.py at a tiny size: contenders run, the same weights give the same logits."""

import sys

import pytest
import torch

from benchmarks import generate_cpu
from benchmarks.generate_cpu import Size, Work
from gptdist.model import LanguageModel
from tests.conftest import ROOT

SIZE = Size(2, 64, 2, 250)


def test_weights_are_counted():
    model = generate_cpu.build_meta(generate_cpu.ModelConfig(
        context=generate_cpu.CONTEXT, width=64, n_layers=2, n_heads=2, vocab_size=250, vocab_multiple=1))
    read = sum(p.numel() for name, p in model.named_parameters() if name != "wpe.weight")
    assert generate_cpu.weight_bytes(SIZE) == 2 * read


def test_the_table():
    text = "\n".join(generate_cpu.table({"gptdist bf16": [0.2, 0.1, 0.4], "hf bf16": [0.6]},
                                        generate_cpu.weight_bytes(SIZE) / 0.01, SIZE, 8, 10))
    assert "The limit is 10.0 ms" in text
    assert "| gptdist bf16 | 20.0 | 400.0 | 1.00 | 50% |" in text
    assert "| hf bf16 | 60.0 | 133.3 | 3.00 | 17% |" in text


def test_a_larger_error_is_said():
    found = {"ours": 0.2, "hf": 0.1, "ours fp32": 1e-6, "logits": 1.0}
    assert "LARGER" in generate_cpu.logits_line(found)
    assert "no larger" in generate_cpu.logits_line(found | {"hf": 0.2})


def test_the_models_have_the_same_weights():
    pytest.importorskip("transformers")
    found = generate_cpu.compare_logits(SIZE, Work(2, 5, 0))
    assert found["ours fp32"] < 1e-5
    assert 0 < found["ours"] < 0.05 * found["logits"]
    model, tokens = generate_cpu.gptdist_model(SIZE, torch.float32), Work(2, 9, 0).prompts(SIZE.vocab)
    assert isinstance(model, LanguageModel)
    with torch.no_grad():
        whole = model.logits(model.hidden(tokens))[:, 4:]
    torch.testing.assert_close(generate_cpu.logits_of(model, tokens, 5), whole)


def test_contenders_run(monkeypatch, capsys, tmp_path):
    pytest.importorskip("transformers")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [
        "generate_cpu", "--batches", "2", "--layers", "1", "--width", "64", "--heads", "2", "--vocab", "250",
        "--prompt", "4", "--new", "5", "--rounds", "1", "--repeats", "1", "--only", "gptdist bf16", "hf tuned",
        "--output", str(tmp_path / "report.md")])
    monkeypatch.setattr(generate_cpu, "COPY_BYTES", 1 << 20)
    generate_cpu.main()
    assert (tmp_path / "report.md").read_text() in capsys.readouterr().out
    for wanted in ("## Batch 2", "| gptdist bf16 |", "| hf tuned |", "Logits of root mean square"):
        assert wanted in (tmp_path / "report.md").read_text()
