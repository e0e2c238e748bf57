"""benchmarks/train_cpu_scale.py at a tiny size: points, refusals, table and plots."""

import argparse
import sys

import pytest

from benchmarks import train_cpu_scale
from benchmarks.train_cpu_scale import Point
from tests.conftest import ROOT

POINTS = {"gptdist bf16": [Point(128, 0.1, 10**9), Point(256, 0.4, 2 * 10**9)],
          "hf tuned bf16": [Point(128, 0.2, 2 * 10**9), Point(256, refusal="takes more than 9 s")]}


def test_the_table_says_what_did_not_fit():
    text = "\n".join(train_cpu_scale.table("T", [128, 256], POINTS))
    columns = " | ".join(f"{name}, {unit}" for name in POINTS for unit in ("tokens/s", "GB"))
    assert f"| T | {columns} | ratio |" in text
    assert "| 128 | 1280 | 1.00 | 640 | 2.00 | 2.00 |" in text
    assert "| 256 | 640 | 2.00 | takes more than 9 s |  |  |" in text


def test_rounds_are_joined_by_their_median():
    rounds = [Point(128, 0.3, 5), Point(128, 0.1, 7), Point(128, 0.2, 6)]
    assert train_cpu_scale.joined(rounds) == Point(128, 0.2, 7)
    refused = Point(128, refusal="takes more than 9 s")
    assert train_cpu_scale.joined([*rounds, refused]) == refused


def test_contenders_take_turns(monkeypatch):
    order = []

    def point(name, args, context, width):
        order.append(name)
        return Point(context, len(order), 1)

    monkeypatch.setattr(train_cpu_scale, "point", point)
    found = train_cpu_scale.sweep(argparse.Namespace(only=["a", "b"], rounds=3), [(128, 64)])
    assert order == ["a", "b"] * 3
    assert found == {"a": [Point(128, 3, 1)], "b": [Point(128, 4, 1)]}


def test_the_plot(tmp_path):
    train_cpu_scale.plot("T", [128, 256], POINTS, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def args():
    return argparse.Namespace(steps=1, layers=1, vocab=64, limit_s=300.0)


def test_a_size_that_takes_too_long_is_said(args):
    args.limit_s = 0.1
    assert train_cpu_scale.point("products fp32", args, 32, 64).refusal == "takes more than 0.1 s"


def test_a_size_that_does_not_fit_is_said(args, monkeypatch):
    monkeypatch.setattr(train_cpu_scale, "free_memory", lambda: 3 << 29)
    assert train_cpu_scale.point("products fp32", args, 1 << 17, 1024).refusal == "does not fit in 1 GB"


def test_an_error_is_one(args):
    with pytest.raises(SystemExit, match="failed at 1x32"):
        train_cpu_scale.point("gptdist bf16", args, 32, 0)


def test_both_sweeps(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [
        "train_cpu_scale", "--contexts", "32", "--widths", "64", "--width", "64", "--context", "16", "--layers", "1",
        "--vocab", "64", "--steps", "1", "--rounds", "1", "--only", "gptdist bf16",
        "--output", str(tmp_path / "scale.md")])
    train_cpu_scale.main()
    text = (tmp_path / "scale.md").read_text()
    assert text in capsys.readouterr().out
    for name in ("contexts", "widths"):
        assert f"![{name}](scale-{name}.png)" in text
        assert (tmp_path / f"scale-{name}.png").exists()
    monkeypatch.setattr(sys, "argv", ["train_cpu_scale", "--widths", "100"])
    with pytest.raises(SystemExit):
        train_cpu_scale.main()
    assert "width 100 is no multiple of 64" in capsys.readouterr().err
