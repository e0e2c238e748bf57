"""launch/train.sbatch under a real SLURM: munged, slurmctld and two slurmd of its own, in a temporary directory.

Nothing is installed or configured outside of it (Debian: apt-get install slurm-wlm munge).
"""

import os
import re
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from gptdist.errors import EXIT_REQUEUE, EXIT_USER
from gptdist.faults import STOPPED
from tests.conftest import ROOT
from tests.launching import ENV, assert_same_weights, exit_record, steps_done, wait_until, write_config
from tests.training import assert_same_curve, train_rows

pytestmark = pytest.mark.long
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
STEPS = 30

CONF = """\
ClusterName=gptdist
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
KillWait=5
SlurmdParameters=config_overrides
NodeName=n0 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


class Cluster:
    """Two nodes on this machine, and the jobs of a test."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.rendezvous_port = free_ports(1)[0]
        self._daemons: list[subprocess.Popen] = []
        self.env = os.environ | ENV | {"SLURM_CONF": str(folder / "slurm.conf")}

    def start(self) -> None:
        (self.folder / "state").mkdir()
        conf = CONF.format(folder=self.folder, host=socket.gethostname(), ports=free_ports(3))
        (self.folder / "slurm.conf").write_text(conf)
        version = float(re.search(r"\d+\.\d+", self("slurmd", "-V"))[0])
        (self.folder / "cgroup.conf").write_text(f"CgroupPlugin={'disabled' if version >= 23.02 else 'cgroup/v1'}\n")
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        self._daemon("munged", "--foreground", "--force", f"--key-file={key}",
                     f"--socket={self.folder}/munge.socket", f"--pid-file={self.folder}/munged.pid",
                     f"--log-file={self.folder}/munged.log", f"--seed-file={self.folder}/munged.seed")
        wait_until((self.folder / "munge.socket").exists, "munged", timeout_s=20, logs=self.logs())
        self._daemon("slurmctld", "-D", "-f", str(self.folder / "slurm.conf"))
        for node in ("n0", "n1"):
            self._daemon("slurmd", "-D", "-f", str(self.folder / "slurm.conf"), "-N", node)
        wait_until(lambda: self("sinfo", "-h", "-o", "%D %t", check=False) == "2 idle", "two idle nodes", timeout_s=60,
                   logs=self.logs())

    def _daemon(self, *words: str) -> None:
        with (self.folder / f"{words[0]}.out").open("ab") as out:
            self._daemons.append(subprocess.Popen(words, env=self.env, stdout=out, stderr=out, cwd=self.folder))

    def logs(self) -> list[Path]:
        return sorted([*self.folder.glob("*.log"), *self.folder.glob("*.out")])

    def stop(self) -> None:
        for job in self("squeue", "-h", "-o", "%i", check=False).split():
            self("scancel", job, check=False)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in reversed(self._daemons):
            daemon.wait(timeout=30)

    def __call__(self, *words: str, check: bool = True) -> str:
        done = subprocess.run(words, env=self.env, capture_output=True, text=True, cwd=ROOT, timeout=60)
        assert done.returncode == 0 or not check, f"{words}: {done.stderr}"
        return done.stdout.strip()

    def submit(self, *arguments: str) -> str:
        """The number of a job on two nodes with a process each. Their names do not resolve, so it gets an endpoint."""
        endpoint = f"127.0.0.1:{self.rendezvous_port}"
        return self("sbatch", "--parsable", "--nodes=2", f"--output={self.folder}/%j.out", "launch/train.sbatch",
                    "--endpoint", endpoint, *arguments)

    def job(self, number: str) -> dict[str, str]:
        return dict(re.findall(r"(\w+)=(\S*)", self("scontrol", "show", "job", number)))

    def wait(self, number: str) -> dict[str, str]:
        """The job after its end: for good, or back in the queue and through it."""
        logs = [self.folder / f"{number}.out"]
        wait_until(lambda: self.job(number)["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"),
                   f"the end of job {number}", timeout_s=900, logs=[*self.logs(), *logs])
        return self.job(number)

    def output(self, number: str) -> str:
        return (self.folder / f"{number}.out").read_text()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        pytest.skip(f"no {', '.join(missing)} here (Debian: apt-get install slurm-wlm munge)")
    if os.geteuid() != 0:
        pytest.skip("slurmd needs root")
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="module")
def undisturbed(cluster, dataset, tmp_path_factory):
    """(run directory, job) of a run that nothing happens to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    config = write_config(folder / "run.yaml", dataset, folder / "run", f"--train.steps={STEPS}")
    return folder / "run", cluster.submit(str(config))


def test_a_job_trains_to_the_end(cluster, undisturbed):
    run, number = undisturbed
    job = cluster.wait(number)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("COMPLETED", "0:0", "0"), cluster.output(number)
    assert "fsdp on 2 x cpu" in cluster.output(number)
    assert (exit_record(run)["code"], steps_done(run)) == (0, STEPS)


def test_a_warned_job_saves_is_requeued_and_ends_like_an_undisturbed_one(cluster, undisturbed, dataset, tmp_path):
    run = tmp_path / "run"
    cluster.wait(undisturbed[1])
    number = cluster.submit(str(write_config(tmp_path / "run.yaml", dataset, run, f"--train.steps={STEPS}")))
    out = cluster.folder / f"{number}.out"
    wait_until(lambda: steps_done(run) >= 7, "seven steps", logs=[out])
    cluster("scancel", "--signal=USR1", number)  # what --signal=USR1@120 sends, to the same processes
    wait_until(lambda: exit_record(run).get("message") == STOPPED, "a saved checkpoint", logs=[out])
    assert exit_record(run)["code"] == EXIT_REQUEUE
    stopped_at = steps_done(run)
    assert 7 <= stopped_at < STEPS
    job = cluster.wait(number)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("COMPLETED", "0:0", "1"), cluster.output(number)
    assert f"(step {stopped_at})" in cluster.output(number), "it goes on where it was stopped"
    assert_same_curve(train_rows(run), train_rows(undisturbed[0]), loss=0, norm=0)
    assert_same_weights(run, undisturbed[0], atol=0)


def test_bad_input_is_not_requeued(cluster, dataset, tmp_path):
    config = str(write_config(tmp_path / "run.yaml", dataset, tmp_path / "run"))
    for fault, message in (("--model.heads=3", "model.heads"),  # found before the workers start, and by them
                           ("--data.path=nowhere", "data.path=nowhere does not exist")):
        number = cluster.submit(config, fault)
        job = cluster.wait(number)
        assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", f"{EXIT_USER}:0", "0")
        assert message in cluster.output(number)
