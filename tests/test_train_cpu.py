"""benchmarks/train_cpu.py at a tiny size: every number is there, and the limit is made of the products' time."""

import argparse

import pytest

from benchmarks import train_cpu
from benchmarks.train_cpu import Result, Shape, Size
from tests.conftest import ROOT

SIZE, SHAPE = Size(2, 64, 2, 256), Shape(2, 32)


@pytest.mark.parametrize("text", ["4", "4x", "x4", "0x4", "4x0", "axb", "4x4x4"])
def test_a_wrong_shape_is_named(text):
    with pytest.raises(argparse.ArgumentTypeError, match="BATCHxCONTEXT"):
        Shape.parse(text)


def test_operations_are_counted():
    assert SIZE.matrix_flops(SHAPE) == 6 * 64 * (2 * 64 * 64 * 12 + 64 * 256)
    assert SIZE.attention_flops(SHAPE) == 7 * 2 * (2 * 2 * 64 * 32 * 32) / 2


def test_the_table():
    results = {"gptdist bf16": Result([0.2, 0.1, 0.4], [], 10**9), "hf fp32": Result([0.6], [], 2 * 10**9),
               "products bf16": Result([0.1], [], 0)}
    text = "\n".join(train_cpu.table(results, SIZE, SHAPE))
    share = 0.1 * (1 + SIZE.attention_flops(SHAPE) / SIZE.matrix_flops(SHAPE)) / 0.2
    assert f"| gptdist bf16 | 320 | 200 | 1.00 | {share:.0%} | 1.00 |" in text
    assert "| hf fp32 | 107 | 600 | 3.00 |  | 2.00 |" in text


def test_contenders_run(monkeypatch, capsys):
    """In processes of their own; ours learn."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["train_cpu", "--shapes", "2x32", "--layers", "1", "--width", "64", "--heads", "2",
                                     "--vocab", "64", "--rounds", "1", "--steps", "9", "--only", "gptdist bf16",
                                     "products bf16"])
    train_cpu.main()
    said = capsys.readouterr()
    assert "| gptdist bf16 |" in said.out
    assert "| products bf16 |" in said.out
    first, last = (float(x) for x in said.err.partition("losses ")[2].split("\n")[0].split(" to "))
    assert last < first
