"""Run in two processes (conftest.Workers): rank 1 is not like rank 0 in one thing after another.

OUT/results-RANK.json has by case what `gptdist train` or `gptdist doctor --distributed` ended with on that rank:
{"code", "err", "out", "seconds"}.
"""

import contextlib
import io
import json
import os
import time
from pathlib import Path
from unittest import mock

from gptdist import cluster, doctor_distributed, train_command
from gptdist import config as config_module
from gptdist.data.loader import PretrainSource
from gptdist.parallel import measure
from gptdist.tasks.pretrain import Pretrain
from tests.training import run_tiny, tiny_config

RANK = int(os.environ.get("RANK", "0"))
OTHER_CODE = "f" * 64
# Case -> (overrides on both ranks, on rank 1 alone). {out}: where there is no data.
TRAIN = {
    "config": ([], ["--optim.lr=0.5", "--train.steps=7"]),
    "path": ([], ["--data.path={out}/nowhere"]),
    "bad": ([], ["--model.n_heads=5"]),
    "both-bad": (["--model.n_heads=5"], []),
    "code": ([], []),
    "batch": (["--train.tokens_per_step=32"], []),
    "device": ([], ["--parallel.device=cuda"]),
}
DOCTOR = {"right": ([], []), "wrong": (["--train.tokens_per_step=32"], ["--data.path={out}/nowhere"]),
          "unreadable": ([], ["--model.n_heads=5"]), "clock": ([], []), "apart": ([], [])}


def main(data: Path, out: Path) -> None:
    results = {}
    for name, overrides in TRAIN.items():
        run = out / name
        path = out / f"{name}-{RANK}.yaml"
        path.write_text(config_module.to_yaml(tiny_config(data, run)))
        words = words_of(overrides, out)
        results[name] = ended(lambda path=path, words=words: train_command.train(str(path), words),
                              other_code=name == "code")
    for name, overrides in DOCTOR.items():
        path = out / f"doctor-{name}-{RANK}.yaml"
        path.write_text(config_module.to_yaml(tiny_config(data, out / "none")))
        skew = 30.0 if name == "clock" and RANK == 1 else 0.0
        words = words_of(overrides, out)
        broken = RuntimeError("connectFullMesh failed") if name == "apart" else None
        with (mock.patch.object(measure, "now_s", lambda skew=skew: time.time() + skew),
              mock.patch.object(doctor_distributed, "rates", side_effect=broken, wraps=measure.rates)):
            results[f"doctor-{name}"] = ended(lambda path=path, name=name, words=words: doctor_distributed.run(
                str(path), words, json=name == "clock"))
    (out / f"results-{RANK}.json").write_text(json.dumps(results))
    train_with_a_slow_rank(data, out / "slow")


SLOW_S = 0.4  # a step, on rank 1


def train_with_a_slow_rank(data: Path, run: Path) -> None:
    """Rank 1 waits for its data in steps 1 to 3, computes longer in steps 4 to 6, and is profiled in steps 2 and 3."""
    read, loss = PretrainSource.step, Pretrain.loss

    def slow_read(self, step, next_sample):
        time.sleep(SLOW_S if RANK == 1 and step < 3 else 0)
        return read(self, step, next_sample)

    def slow_loss(self, strategy, batch, key):
        began = time.thread_time()
        while RANK == 1 and self.slow_step >= 3 * 3 and time.thread_time() - began < SLOW_S / 3:  # 3 micro-batches
            pass
        self.slow_step += 1
        return loss(self, strategy, batch, key)

    with (mock.patch.object(PretrainSource, "step", slow_read), mock.patch.object(Pretrain, "loss", slow_loss),
          mock.patch.object(Pretrain, "slow_step", 0, create=True)):
        run_tiny(data, run, "--train.steps=6", "--run.log_every=3", "--data.workers=0", "--parallel.strategy=ddp",
                 "--profile.steps=[2, 3]", "--profile.ranks=[1]")


def words_of(overrides: tuple[list[str], list[str]], out: Path) -> list[str]:
    both, rank_1 = overrides
    return [word.format(out=out) for word in both + (rank_1 if RANK == 1 else [])]


def ended(command, other_code: bool = False) -> dict:
    out, err, began = io.StringIO(), io.StringIO(), time.monotonic()
    code_hash = contextlib.nullcontext()
    if other_code and RANK == 1:
        code_hash = mock.patch.object(cluster, "code_hash", return_value=OTHER_CODE)
    with (code_hash, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err),
          mock.patch.object(train_command, "end_process", return_value=None),
          mock.patch.object(train_command, "MAIN_RANK_FIRST_S", 0)):
        code = command()
    return {"code": code, "out": out.getvalue(), "err": err.getvalue(), "seconds": time.monotonic() - began}
