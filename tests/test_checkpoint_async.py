"""Saves in the background: the same bytes as in the foreground, whatever training does meanwhile; no error is lost."""

import contextlib
import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from gptdist import checkpoint
from gptdist.checkpoint import files, layout
from gptdist.checkpoint.saver import Saver
from gptdist.checkpoint.share import HostBuffers, SharePlanner, own_share
from gptdist.errors import EXIT_REQUEUE, UserError
from gptdist.parallel.world import init_world
from gptdist.trainer import Trainer
from tests.conftest import ROOT
from tests.test_checkpoint_ranks import assert_all_equal, disk_full, fork, run_world, sharded, user_error
from tests.training import eval_losses, run_tiny, tiny_config, train_rows

FILES = {"train_state.json": b"{}"}


@contextlib.contextmanager
def slow_writes(delay_s):
    """Each block takes `delay_s`: a save that is long under way."""
    write_all = files._write_all

    def slowly(fd, view):
        time.sleep(delay_s)
        write_all(fd, view)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "_write_all", slowly)
        yield


def saver(root, keep_last=10):
    return Saver(root, keep_last=keep_last, keep_best=True, timeout_s=60)


def state():
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(40, 30))
    return {"model.w": weight, "model.t": torch.randn(6, 7).bfloat16().t(), "model.empty": torch.zeros(0, 3),
            "optim.w.exp_avg": torch.randn(40, 30), "optim.w.step": torch.tensor(3.0)}


def spoil(tensors):
    with torch.no_grad():
        for tensor in tensors.values():
            (tensor.to_local() if isinstance(tensor, DTensor) else getattr(tensor, "flat", tensor)).add_(1000)


def test_background_equals_foreground(tmp_path):
    tensors = state()
    expected = checkpoint.save(tmp_path / "plain", 7, tensors, FILES)
    with slow_writes(0.02), saver(tmp_path / "async") as saves:
        saves.save(7, tensors, FILES, background=True)
        spoil(tensors)
        assert checkpoint.latest(tmp_path / "async") is None, "the save was over before the tensors changed"
    path = tmp_path / "async" / "step-00000007"
    checkpoint.verify(path)
    assert checkpoint.complete(path) == checkpoint.complete(expected)  # every sha256


def test_one_save_at_a_time_in_buffers_that_are_kept(tmp_path):
    tensors = state()
    with slow_writes(0.02), saver(tmp_path) as saves:
        saves.save(1, tensors, FILES, background=True)
        buffers = {key: buffer.data_ptr() for key, buffer in saves._buffers._buffers.items()}
        expected = tensors["model.w"].detach().clone()
        spoil(tensors)
        saves.save(2, tensors, FILES, background=True)
        assert (tmp_path / "step-00000001").exists()
        assert {key: buffer.data_ptr() for key, buffer in saves._buffers._buffers.items()} == buffers
        saves.save(3, tensors, FILES, background=False)
        assert (tmp_path / "step-00000003").exists()
    loaded = [checkpoint.load_tensors(tmp_path / f"step-0000000{i}")["model.w"] for i in (1, 2, 3)]
    assert torch.equal(loaded[0], expected)
    assert torch.equal(loaded[1], expected + 1000)
    assert torch.equal(loaded[2], loaded[1])


def test_old_checkpoints_go_after_the_new_one_is_there(tmp_path):
    with saver(tmp_path, keep_last=2) as saves:
        for step, loss in enumerate((3.0, 1.0, 2.0, 2.5, 2.25)):
            saves.save(step, state(), {"train_state.json": f'{{"val_loss": {loss}}}'.encode()}, background=True)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["step-00000001", "step-00000003", "step-00000004"]
    assert checkpoint.best(tmp_path).name == "step-00000001"


def test_an_old_checkpoint_that_cannot_be_removed_fails_no_save(tmp_path, monkeypatch, capfd):
    with saver(tmp_path, keep_last=1) as saves:
        saves.save(1, state(), FILES, background=False)
        with monkeypatch.context() as patch:
            patch.setattr(layout.shutil, "rmtree", lambda path: (_ for _ in ()).throw(
                OSError(errno.EACCES, "Permission denied", str(path))))
            saves.save(2, state(), FILES, background=True)
            saves.settle()
        assert not saves.failed
    assert "an old checkpoint is still there: cannot remove " in capfd.readouterr().err
    checkpoint.verify(tmp_path / "step-00000002")


def test_an_error_is_raised_once_and_leaves_nothing(tmp_path):
    saves = saver(tmp_path)
    with disk_full(True):
        saves.save(1, state(), FILES, background=True)
        message = user_error(saves.wait)
    assert "No space left on device" in message
    saves.wait()
    with disk_full(True):
        saves.save(2, state(), FILES, background=True)
        saves.settle()
        assert "No space left" in user_error(saves.wait)
        assert "No space left" in user_error(lambda: save_in_block(saver(tmp_path)))
    assert list(tmp_path.iterdir()) == []


def test_after_a_failure_the_next_save_has_to_succeed(tmp_path, capfd):
    saves = saver(tmp_path)
    with disk_full(True):
        saves.save(1, state(), FILES, background=True)
        message = user_error(lambda: saves.save(2, state(), FILES, background=True))
    assert "No space left" in message
    assert list(tmp_path.iterdir()) == []
    with disk_full(True):
        saves.save(3, state(), FILES, background=True)
        saves._thread.join()
    assert saves.failed
    saves.save(4, state(), FILES, background=True)
    assert not saves.failed
    checkpoint.verify(tmp_path / "step-00000004")  # in the foreground: it is there already
    saves.save(5, state(), FILES, background=True)
    saves.wait()
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["step-00000004", "step-00000005"]
    assert capfd.readouterr().err.count("a checkpoint could not be saved: cannot save to") == 2


def save_in_block(saves, error=None):
    with saves:
        saves.save(1, state(), FILES, background=True)
        if error is not None:
            raise error


def test_a_failing_run_keeps_its_error_and_finishes_its_save(tmp_path, capfd):
    with slow_writes(0.02), pytest.raises(KeyError, match="the run's own"):
        save_in_block(saver(tmp_path), KeyError("the run's own"))
    checkpoint.verify(tmp_path / "step-00000001")
    with disk_full(True), pytest.raises(KeyError, match="the run's own"):
        save_in_block(saver(tmp_path / "full"), KeyError("the run's own"))
    assert "the checkpoint that was being saved failed too: cannot save to" in capfd.readouterr().err


def test_what_cannot_be_saved_is_refused(tmp_path):
    saves = saver(tmp_path)
    saves.save(1, {"x": object()}, FILES, background=True)
    with pytest.raises(TypeError, match="x is not a tensor"):
        saves.wait()


def test_plain_tensors_are_spread_by_size():
    tensors = {"small": torch.zeros(3), "large": torch.zeros(100), "middle": torch.zeros(60), "other": torch.zeros(40)}
    shares = [own_share(tensors, rank, 2) for rank in range(2)]
    assert [sorted(share) for share in shares] == [["large"], ["middle", "other", "small"]] or \
        [sorted(share) for share in shares] == [["large", "small"], ["middle", "other"]]


# Training

def test_training_in_background_saves_the_same_checkpoints(dataset, tmp_path):
    options = ["--eval.every=5", "--checkpoint.every=3", "--checkpoint.keep_last=100", "--model.dropout=0.1"]
    with slow_writes(0.005):
        rows = run_tiny(dataset, tmp_path / "async", *options, "--checkpoint.asynchronous=true")
    plain = run_tiny(dataset, tmp_path / "plain", *options, "--checkpoint.asynchronous=false")
    assert [r["loss"] for r in rows] == [r["loss"] for r in plain]
    assert eval_losses(tmp_path / "async") == eval_losses(tmp_path / "plain")
    found = [checkpoint.scan(tmp_path / run / "checkpoints")[0] for run in ("async", "plain")]
    assert [p.name for p in found[0]] == [p.name for p in found[1]]
    assert len(found[0]) >= 8
    for ours, theirs in zip(*found, strict=True):
        records = [{name: r for name, r in checkpoint.complete(p).files.items() if name != "config.yaml"}
                   for p in (ours, theirs)]
        assert records[0] == records[1], ours.name
    resumed = run_tiny(dataset, tmp_path / "async", *options)
    assert [r["loss"] for r in resumed] == [r["loss"] for r in plain]


def test_a_disk_that_stays_full_ends_the_run(dataset, tmp_path):
    run = tmp_path / "run"
    config = tiny_config(dataset, run, "--checkpoint.every=5", "--eval.every=0")
    with disk_full(True), pytest.raises(UserError, match="No space left on device"):
        Trainer(config, init_world(config.parallel)).run()
    assert list((run / "checkpoints").iterdir()) == []
    assert train_rows(run)[-1]["step"] == 10, "it is raised by the next save"


@pytest.mark.parametrize("stop", [False, True])
def test_a_disk_that_was_full_for_a_while_costs_one_checkpoint(stop, dataset, tmp_path, monkeypatch, capfd):
    """The failure at step 5 is told at once; the last save, or a stopped run's, is done all the same."""
    config = tiny_config(dataset, tmp_path / "run", "--checkpoint.every=5", "--eval.every=0", "--train.stop_at=9")
    trainer = Trainer(config, init_world(config.parallel))
    full, step = disk_full(True), trainer._step

    def counted(batch):
        if batch.step == 5:
            trainer.saver._thread.join()
            full.__exit__(None, None, None)
        trainer.stop.received = stop and batch.step == 6
        row = step(batch)
        assert ("could not be saved" in capfd.readouterr().err) == (batch.step == 5)
        return row

    monkeypatch.setattr(trainer, "_step", counted)
    full.__enter__()
    assert trainer.run() == (EXIT_REQUEUE if stop else 0)
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == [f"step-{7 if stop else 9:08d}"]


def test_a_bug_in_training_waits_for_the_save_under_way(dataset, tmp_path, monkeypatch):
    config = tiny_config(dataset, tmp_path / "run", "--checkpoint.every=5", "--eval.every=0")
    trainer = Trainer(config, init_world(config.parallel))
    step = trainer._step
    monkeypatch.setattr(trainer, "_step", lambda batch: step(batch) if batch.step < 5 else 1 / 0)
    with slow_writes(0.05), pytest.raises(ZeroDivisionError):
        trainer.run()
    checkpoint.verify(tmp_path / "run" / "checkpoints" / "step-00000005")
    assert not any(thread.name == "checkpoint" for thread in threading.enumerate())


# Two ranks. As in test_checkpoint_ranks, a helper process forks them.

class Rows(torch.Tensor):
    """A wrapper subclass as the flat partitions of ZeRO are: its values are in `flat`, it knows only DCP's protocol."""

    @staticmethod
    def __new__(cls, flat, start, shape):
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=flat.dtype)
        self.flat, self.start = flat, start
        return self

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(func)

    def _chunk(self):
        return ChunkStorageMetadata(torch.Size((self.start, 0)), torch.Size((len(self.flat), self.shape[1])))

    def __create_write_items__(self, fqn, obj):
        data = TensorWriteData(self._chunk(), TensorProperties(self.flat.dtype), torch.Size(self.shape))
        return [WriteItem(MetadataIndex(fqn, data.chunk.offsets), WriteItemType.SHARD, tensor_data=data)]

    def __create_chunk_list__(self):
        return [self._chunk()]

    def __get_tensor_shard__(self, index):
        return self.flat


def ranks_state(rank, world):
    mesh = init_device_mesh("cpu", (world,))
    tensors = sharded(world, mesh)
    tensors["model.rows"] = Rows(torch.full((4, 6), float(rank + 1)), 4 * rank, (4 * world, 6))
    tensors["model.large"] = distribute_tensor(torch.arange(70_000.0).view(700, 100), mesh, [Shard(0)],
                                               src_data_rank=None)
    return tensors


def in_background(root, rank, world):
    """Collectives of the default group go on while the save's group is at work."""
    tensors = ranks_state(rank, world)
    expected = checkpoint.save(root / "plain", 7, tensors, FILES)
    with slow_writes(0.05), saver(root / "async") as saves:
        saves.save(7, tensors, FILES, background=True)
        spoil(tensors)
        for _ in range(50):
            dist.all_reduce(total := torch.ones(1000))
            assert total[0] == world
        assert not (root / "async" / "step-00000007").exists(), "the save was over too early to prove anything"
    dist.barrier()
    assert checkpoint.complete(root / "async" / "step-00000007") == checkpoint.complete(expected)


def errors_in_background(root, rank, world):
    tensors = ranks_state(rank, world)
    saves = saver(root / "errors")
    for bad_rank in range(world):
        with disk_full(rank == bad_rank):
            saves.save(1, tensors, FILES, background=True)
            message = user_error(lambda: saves.save(2, tensors, FILES, background=True))
        assert f"shard-{bad_rank:05d}" in message, message
        assert list((root / "errors").iterdir()) == [], "a rank heard of it before all was cleaned away"
        assert_all_equal(message, world)
    with pytest.raises(RuntimeError, match="every rank must pass the same plain tensors"):
        checkpoint.save(root / "errors", 3, {f"x{i}.{rank}": torch.zeros(1) for i in range(4)})


def save_forever(root, rank, world):
    tensors = {f"p{i}": torch.zeros(20_000) for i in range(8)}
    mesh = init_device_mesh("cpu", (world,))
    tensors["sharded"] = distribute_tensor(torch.zeros(world, 20_000), mesh, [Shard(0)], src_data_rank=None)
    with saver(root / "killed") as saves:
        for step in range(1, 10_000):
            saves.save(step, tensors, FILES, background=True)
            for tensor in tensors.values():
                (tensor.to_local() if isinstance(tensor, DTensor) else tensor).add_(1)


def kill_while_saving(root, pause_s):
    """Kill both ranks by their process group."""
    def start():
        os.setpgid(0, 0)
        (root / f"store-save_forever-{2}").unlink(missing_ok=True)
        run_world(save_forever, root, 2)

    pid = fork(start)
    deadline = time.monotonic() + 60
    while len(list((root / "killed").glob("step-*"))) < 5 and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(pause_s)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def helper(root):
    run_world(in_background, root, 2)
    run_world(errors_in_background, root, 2)
    for pause_s in (0, 0.007, 0.02):
        kill_while_saving(root, pause_s)
        (root / "killed").rename(root / f"killed-{time.monotonic_ns()}")


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    root = tmp_path_factory.mktemp("async")
    command = [sys.executable, "-m", "tests.test_checkpoint_async", str(root)]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return root


def test_two_ranks_write_the_same_bytes_in_the_background(ran):
    path = ran / "async" / "step-00000007"
    checkpoint.verify(path)
    loaded = checkpoint.load_tensors(path)
    assert torch.equal(loaded["model.large"], torch.arange(70_000.0).view(700, 100))
    assert loaded["model.rows"][:, 0].tolist() == [1.0] * 4 + [2.0] * 4


def test_kill_leaves_only_complete_checkpoints(ran):
    roots = sorted(ran.glob("killed-*"))
    assert len(roots) == 3
    for root in roots:
        good, bad = checkpoint.scan(root)
        assert bad == []
        assert len(good) >= 4
        for path in good[-3:]:
            checkpoint.verify(path)
            step = float(checkpoint.complete(path).step)
            assert all(t.eq(step - 1).all() for t in checkpoint.load_tensors(path).values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is here")
def test_staging_from_a_gpu(tmp_path):
    tensors = {"model.w": torch.randn(1000, 1000, device="cuda"), "optim.w.step": torch.tensor(1.0)}
    expected = tensors["model.w"].cpu()
    planner, buffers = SharePlanner(tensors, 0, 1), HostBuffers()
    planner.stage(buffers)
    tensors["model.w"].zero_()
    torch.cuda.synchronize()
    [copy] = [buffer for (key, _), buffer in buffers._buffers.items() if key == "model.w"]
    assert copy.is_pinned()
    assert torch.equal(copy, expected)


if __name__ == "__main__":
    helper(Path(sys.argv[1]))
