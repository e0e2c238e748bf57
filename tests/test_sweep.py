"""The loss-compute curve, the sizes' budgets, and a sweep that is stopped and goes on."""

import io
import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from rich.console import Console

from benchmarks.chaos import children
from gptdist import sweep
from gptdist.cli import main
from gptdist.errors import EXIT_REQUEUE, UserError
from gptdist.metrics import flops_per_token
from gptdist.sweep import fit_curve, plan_size
from tests.conftest import ROOT
from tests.launching import wait_until
from tests.training import TINY, tiny_config


def test_the_curve_of_a_power_law_is_found():
    flops = np.array([1e12, 4e12, 2e13, 9e13])
    curve = fit_curve(flops, 1.7 + 2.5 * (flops / 1e12) ** -0.31)
    assert (curve.a, curve.b, curve.alpha) == pytest.approx((1.7, 2.5, 0.31), abs=1e-3)
    assert curve.loss(1e15) == pytest.approx(1.7 + 2.5 * 1e3 ** -0.31, abs=1e-3)
    assert curve.rms < 1e-4
    assert not curve.at_border


def test_noise_moves_the_curve_little():
    flops = np.geomspace(1e12, 1e15, 7)
    noise = np.random.default_rng(0).normal(0, 0.005, 7)
    assert fit_curve(flops, 2 + (flops / 1e12) ** -0.2 + noise).loss(4e15) == pytest.approx(2 + 4e3 ** -0.2, abs=0.05)


def test_the_range_of_a_prediction_is_what_the_curves_without_one_point_say():
    flops = [1e12, 4e12, 2e13, 9e13]
    losses = [1.7 + 2.5 * (c / 1e12) ** -0.31 for c in flops]
    assert sweep.prediction_range(flops, losses, 1e15) == pytest.approx([1.7 + 2.5 * 1e3 ** -0.31] * 2, abs=1e-3)
    losses[2] += 0.05
    least, most = sweep.prediction_range(flops, losses, 1e15)
    assert least < fit_curve(flops, losses).loss(1e15) < most
    assert sweep.prediction_range(flops[:3], losses[:3], 1e15) is None


def test_losses_that_are_no_power_law_are_said_to_be_none():
    assert fit_curve([1e12, 1e13, 1e14], [2.0, 2.5, 3.0]).at_border  # rises
    ever_faster = fit_curve([1e12, 1e13, 1e14], [3.0, 2.9, 2.0])
    assert ever_faster.a == 0
    assert ever_faster.rms > 0.1
    assert sweep.falls_faster(ever_faster)
    assert not sweep.falls_faster(fit_curve([1e12, 1e13, 1e14], [3.0, 2.5, 2.2]))
    with pytest.raises(UserError, match="needs 3 sizes or more, got 2"):
        fit_curve([1e12, 1e12, 1e13], [3, 3, 2])


def test_a_size_has_its_budget(tmp_path):
    config = tiny_config(tmp_path, tmp_path, "--model.vocab_size=257")  # heads of 8, 352 tokens a step
    size = plan_size(config, "64x3", tokens_per_parameter=2.0)
    assert (size.width, size.n_layers, size.n_heads) == (64, 3, 8)
    assert size.steps == -(-2 * size.parameters // 352)
    assert size.tokens == size.steps * 352
    assert plan_size(config, "32x2", tokens=1000).tokens == 3 * 352
    assert plan_size(config, "32x2", tokens=352).flops == pytest.approx(
        352 * flops_per_token(config.model, plan_size(config, "32x2", tokens=1).parameters))
    for name, message in (("64", "expected WIDTHxLAYERS"), ("60x2", "no multiple of 8"), ("0x2", "expected WIDTHxL")):
        with pytest.raises(UserError, match=message):
            plan_size(config, name, tokens=1)


@pytest.fixture
def config_file(dataset, tmp_path):
    values = TINY | {"data": {"path": str(dataset)}, "eval": {"every": 0}, "schedule": {"warmup_steps": 2}}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def ended(code, stopped=False):
    return SimpleNamespace(run=lambda: code, stopped=stopped)


class Trained:
    """In place of the processes that train (sweep.Child): writes the loss that a curve has, or stops one size once."""

    def __init__(self, stop: str = "", loss=lambda width: 2 + 8 / width):
        self.started, self.stop, self.loss = [], stop, loss

    def __call__(self, command, log):
        options = dict(word[2:].split("=", 1) for word in command if word.startswith("--") and "=" in word)
        run = sweep.Path(options["run.dir"])
        self.started.append(run.name)
        run.mkdir(exist_ok=True)
        code = EXIT_REQUEUE if run.name == self.stop and self.started.count(run.name) == 1 else 0
        if not code:
            loss = self.loss(int(options["model.width"]))
            row = {"kind": "eval", "step": int(options["train.steps"]), "val_loss": loss}
            (run / "metrics.jsonl").write_text(json.dumps(row) + "\n")
        return ended(code)


def test_a_sweep_predicts_the_next_size_and_goes_on_after_a_stop(config_file, tmp_path, monkeypatch, capsys):
    trained = Trained(stop="24x1")
    monkeypatch.setattr(sweep, "Child", trained)
    command = ["sweep", config_file, "--sizes", "24x1", "16x1", "32x2", "--next", "48x2", "--tokens-per-parameter", "1",
               "--output", str(tmp_path / "sweep")]
    assert main(command) == EXIT_REQUEUE
    assert main([*command, "--json"]) == 0
    assert trained.started == ["16x1", "24x1", "24x1", "32x2", "48x2"], "the smallest first, each to its end once"
    record = json.loads(capsys.readouterr().out)
    ahead = record["next"]
    assert ahead["loss"] == pytest.approx(2 + 8 / 48)
    assert ahead["error"] == pytest.approx(ahead["predicted"] - ahead["loss"])
    assert abs(ahead["error"]) < 0.1
    assert json.loads((tmp_path / "sweep" / "sweep.json").read_text()) == record
    assert (tmp_path / "sweep" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert main(command) == 0
    assert len(trained.started) == 5
    out = capsys.readouterr().out
    assert "48x2 (next)" in out
    assert "predicted" in out
    assert main([*command, "--optim.lr=0.1"]) == 2
    assert "another configuration or budget: choose another --output" in capsys.readouterr().err


def test_a_real_sweep(config_file, tmp_path, capsys):
    assert main(["sweep", config_file, "--sizes", "8x1", "16x1", "24x1", "--tokens", "1500", "--json", "--output",
                 str(tmp_path / "sweep"), "--train.precision=fp32"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert [run["steps"] for run in record["runs"].values()] == [5, 5, 5]
    assert all(4 < run["loss"] < 6 for run in record["runs"].values())


@pytest.mark.parametrize(("arguments", "message"), [
    (["--sizes", "8x1", "8x1", "16x1"], "needs 3 sizes or more, got 8x1 16x1"),
    (["--sizes", "8x1", "12x1", "16x1"], "size 12x1: the width is no multiple of 8"),
    (["--sizes", "8x1", "16x1", "24x1", "--tokens", "-1"], "the token budget is -1"),
    (["--sizes", "8x1", "16x1", "24x1", "--task.name=classify"], "a sweep pretrains"),
    (["--sizes", "8x1", "16x1", "24x1", "--optim.lr=-1"], "optim.lr"),
])
def test_bad_sweeps(arguments, message, config_file, tmp_path, capsys):
    assert main(["sweep", config_file, *arguments, "--output", str(tmp_path / "sweep")]) == 2
    assert message in capsys.readouterr().err


def test_losses_that_do_not_fall_are_said_to(config_file, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "Child", Trained(loss=lambda width: {8: 4.0, 16: 3.0, 24: 3.5}[width]))
    _, record = sweep.run_sweep(config_file, [], output=tmp_path / "s", sizes=["8x1", "16x1", "24x1"], tokens=1000)
    sweep.print_sweep(Console(file=(out := io.StringIO()), soft_wrap=True), record)
    assert "24x1 has no lower loss than 16x1, which took less compute" in out.getvalue()
    assert "16x1 has no lower loss" not in out.getvalue()


def test_a_loss_that_is_not_finite_is_named(config_file, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "Child", Trained(loss=lambda width: None))
    with pytest.raises(UserError, match=r"8x1 ends with a validation loss that is not finite: lower optim\.lr"):
        sweep.run_sweep(config_file, [], output=tmp_path / "s", sizes=["8x1", "16x1", "24x1"], tokens=1000)


def test_a_size_that_fails_is_named(config_file, tmp_path, monkeypatch):
    def fail(command, log):
        log.write_text("gptdist train: no room\n")
        return ended(2)

    monkeypatch.setattr(sweep, "Child", fail)
    with pytest.raises(UserError, match=r"size 8x1 ended with exit code 2: gptdist train: no room \(see .*8x1\.log"):
        sweep.run_sweep(config_file, [], output=tmp_path / "s", sizes=["8x1", "16x1", "24x1"], tokens=1000)


def test_a_sweep_takes_mixtures_and_prepares_its_text(dataset, tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 200)
    common = {name: value for name, value in TINY.items() if name != "data"} | {"eval": {"every": 0}}
    common["model"] = common["model"] | {"n_kv_heads": 1}
    commands = []
    trained = Trained()
    monkeypatch.setattr(sweep, "Child", lambda command, log: (commands.append(command), trained(command, log))[1])
    text = {"path": str(tmp_path / "prepared"), "input": str(tmp_path / "text.txt"), "tokenizer": "bytes"}
    for name, data in (("a", text), ("b", {"mixture": [{"path": str(dataset), "weight": 1}]})):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(common | {"data": data}))
        code, record = sweep.run_sweep(str(tmp_path / f"{name}.yaml"), [], output=tmp_path / name, tokens=1000,
                                       sizes=["8x1", "16x1", "24x1"])
        assert code == 0
        assert record["settings"]["config"]["train"]["precision"] in ("fp32", "bf16")
    assert (tmp_path / "prepared" / "train").is_dir()
    assert all("--model.n_kv_heads=null" in command for command in commands)
    for more in ("epochs: 1", "weight: 1}, {path: x, weight: 1, from_step: 3"):
        override = f"--data.mixture=[{{path: {dataset}, {more}}}]"
        with pytest.raises(UserError, match="but a sweep gives every size its own tokens"):
            sweep.run_sweep(str(tmp_path / "b.yaml"), [override], output=tmp_path / "c", sizes=["8x1"], tokens=1)


CHILD = """\
import pathlib, signal, sys, time
path = pathlib.Path(sys.argv[1])
signal.signal(signal.SIGTERM, lambda *_: (path.with_name("saved").touch(), sys.exit(75)))
path.touch()
time.sleep(60)
"""
PARENT = """\
import pathlib, sys
from gptdist.faults.child import Child
child = Child([sys.executable, "-c", sys.argv[1], sys.argv[2]], pathlib.Path(sys.argv[2]).with_name("log"))
print(child.run(), child.stopped)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_a_run_is_stopped_with_the_sweep_that_started_it(number, tmp_path):
    """A child in place of the run: it gets SIGTERM, has the time to save, and its parent has waited for it."""
    parent = subprocess.Popen([sys.executable, "-c", PARENT, CHILD, str(tmp_path / "up")], cwd=ROOT, text=True,
                              stdout=subprocess.PIPE)
    wait_until((tmp_path / "up").exists, "the child is up", timeout_s=60, logs=[tmp_path / "log"])
    (child,) = children(parent.pid)
    parent.send_signal(number)
    out, _ = parent.communicate(timeout=30)
    if number == signal.SIGKILL:  # whoever inherits the child takes its exit code
        wait_until((tmp_path / "saved").exists, "the child was stopped", timeout_s=30)
    else:
        assert (out, parent.returncode) == ("75 True\n", 0)
        assert (tmp_path / "saved").exists()
        assert not os.path.exists(f"/proc/{child}")


def test_a_sweep_that_is_stopped_asks_to_be_started_again(config_file, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "Child", lambda command, log: ended(-signal.SIGTERM, stopped=True))
    code, record = sweep.run_sweep(config_file, [], output=tmp_path / "s", sizes=["8x1", "16x1", "24x1"], tokens=1000)
    assert (code, record["runs"]) == (EXIT_REQUEUE, {})
