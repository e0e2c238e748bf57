import errno
import json
import sys
import types

import pytest

from gptdist import metrics
from gptdist.config import RunConfig
from gptdist.errors import MissingError, UserError
from gptdist.metrics import Metrics, peak_flops, plot_losses, read_rows


@pytest.mark.parametrize(("name", "peak"), [
    ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA A100-SXM4-80GB", 312e12),
    ("NVIDIA L4", 121e12), ("NVIDIA L40S", 362e12), ("NVIDIA L40", None), ("AMD EPYC", None),
])
def test_peak_rates_are_known_or_absent(name, peak):
    assert peak_flops(name) == peak


def test_rows_past_the_start_are_dropped(tmp_path):
    for start in (0, 2):
        writer = Metrics(tmp_path, RunConfig(tensorboard=False), start_step=start, resolved={})
        for step in range(start + 1, start + 4):
            writer.write("train", step, loss=float(step))
        writer.close()
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]


def test_disk_full_is_named(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    writer = Metrics(tmp_path, RunConfig(tensorboard=False), start_step=0, resolved={})
    monkeypatch.setattr(metrics.json, "dumps", full)
    with pytest.raises(UserError, match=r"cannot write to .*metrics\.jsonl: No space left on device"):
        writer.write("train", 1, loss=1.0)


def test_wandb_that_is_not_installed_is_named(tmp_path):
    try:
        import wandb  # noqa: F401
    except ImportError:
        with pytest.raises(MissingError, match=r"pip install 'gptdist\[wandb\]'"):
            Metrics(tmp_path, RunConfig(tensorboard=False, wandb="x"), start_step=0, resolved={})
    else:
        pytest.skip("wandb is installed here")


class FakeWandb(types.ModuleType):
    """What Metrics asks of the wandb package."""

    class errors:
        class Error(Exception):
            pass

    def __init__(self, fails: str = ""):
        super().__init__("wandb")
        self.fails, self.options, self.logged, self.finished = fails, {}, [], False

    def init(self, **options):
        if self.fails:
            raise self.errors.Error(self.fails)
        self.options = options
        return self

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished = True


def test_wandb_gets_the_configuration_and_every_row(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    writer = Metrics(tmp_path, RunConfig(tensorboard=False, wandb="project"), start_step=0, resolved={"a": {"b": 1}})
    writer.write("train", 1, loss=2.0, tokens=3)
    writer.write("ranks", 1, own_s_max=0.5, slowest_host="b")
    writer.close()
    assert fake.options == {"project": "project", "dir": str(tmp_path), "config": {"a": {"b": 1}}, "resume": "allow"}
    assert fake.logged == [(1, {"train/loss": 2.0}), (1, {"ranks/own_s_max": 0.5})]
    assert fake.finished


def test_wandb_that_does_not_start_is_the_users_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb("api_key not configured"))
    with pytest.raises(UserError, match=r"run.wandb=x: .*\(api_key not configured\): set WANDB_API_KEY"):
        Metrics(tmp_path, RunConfig(tensorboard=False, wandb="x"), start_step=0, resolved={})


@pytest.mark.parametrize("line", ["garbage", "{}", "[1]", '{"kind": "train", "step": "x"}'])
def test_rows_that_are_none_are_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 1, "loss": 1.0}\n' + line + "\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl line 2 is not a row of metrics"):
        read_rows(path)


@pytest.mark.parametrize("name", ["nowhere/x.png", "x.foo"])
def test_plots_that_cannot_be_written_are_named(tmp_path, name):
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "loss": 1.0}\n')
    with pytest.raises(UserError, match="cannot write the plot"):
        plot_losses(tmp_path, tmp_path / name)


@pytest.mark.parametrize("loss", ["", ', "loss": [1]', ', "loss": "x"'])
def test_a_loss_that_is_no_number_is_named(tmp_path, loss):
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 2' + loss + "}\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl line 1 has no number as loss"):
        plot_losses(tmp_path, tmp_path / "x.png")


def test_what_is_not_finite_is_null(tmp_path):
    """NaN is no JSON. The plot leaves such steps out."""
    writer = Metrics(tmp_path, RunConfig(tensorboard=False), start_step=0, resolved={})
    for step, loss in enumerate((float("nan"), 2.0, float("inf"), 1.0), 1):
        writer.write("train", step, loss=loss, tokens=3)
    writer.close()
    path = tmp_path / "metrics.jsonl"
    rows = [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]
    assert [row["loss"] for row in rows] == [None, 2.0, None, 1.0]
    assert metrics._points(path, read_rows(path), "train", "loss") == [(2, 2.0), (4, 1.0)]
    plot_losses(tmp_path, tmp_path / "x.png")


def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("broken", ["pathlib.Path.write_text", "os.replace"])
def test_a_full_disk_at_the_start(tmp_path, monkeypatch, broken):
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "loss": 1.0}\n')
    monkeypatch.setattr(broken, no_space)
    with pytest.raises(UserError, match=r"cannot write to .*: No space left on device: "):
        Metrics(tmp_path, RunConfig(tensorboard=False), start_step=0, resolved={})
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_full_disk_under_tensorboard_and_at_the_end(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    writer = Metrics(tmp_path, RunConfig(tensorboard=True), start_step=0, resolved={})
    with monkeypatch.context() as patch:
        patch.setattr(writer._board, "add_scalar", no_space)
        patch.setattr(writer._board, "close", no_space)
        for write in (lambda: writer.write("train", 1, loss=1.0), writer.close):
            with pytest.raises(UserError, match=r"cannot write to .*: No space left on device: "):
                write()
    writer.close()
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter", no_space)
    with pytest.raises(UserError, match=r"cannot write to .*: No space left on device: "):
        Metrics(tmp_path, RunConfig(tensorboard=True), start_step=0, resolved={})
