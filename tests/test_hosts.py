"""Several hosts, of which some vanish and come back: the run goes on, and no figure of it tells.

Hosts are network namespaces joined by a bridge, each with its own address and no name that resolves; where the rights
for that are missing, a pair of launchers on this host's loopback takes their place for all but the cut line.
"""

import contextlib
import os
import signal
import subprocess
from pathlib import Path

import pytest

from gptdist.errors import EXIT_REQUEUE
from tests.launching import (
    QUICK,
    SLOW,
    assert_same_weights,
    exit_record,
    kill_all,
    start,
    steps_done,
    tails,
    wait_until,
    write_config,
)
from tests.training import assert_same_curve, run_tiny, train_rows

ENDLESS = "--train.steps=100000"  # the tests end it, so that no timing matters


class Job:
    """A launcher for each host, and what they do together."""

    def __init__(self, dataset: Path, folder: Path, prefixes: list[list[str]], endpoint: str, nodes: str):
        self.run, self.dataset = folder / "run", dataset
        self.logs = [folder / f"host{i}.log" for i in range(len(prefixes))]
        self._prefixes = prefixes
        self._options = ("--nodes", nodes, "--endpoint", endpoint, *QUICK)
        self._config = str(write_config(folder / "run.yaml", dataset, self.run, ENDLESS))
        self._starts = 0  # that were waited for
        self.launchers: list[subprocess.Popen] = [self._start(i) for i in range(len(prefixes))]

    def _start(self, host: int) -> subprocess.Popen:
        return start("--node-rank", str(host), *self._options, self._config, prefix=self._prefixes[host],
                     log=self.logs[host])

    def start(self, host: int) -> None:
        self.launchers[host] = self._start(host)

    def wait_for_world(self, size: int) -> None:
        """Another start, on `size` processes, and a few steps on them, with a checkpoint."""
        at, starts = f"on {size} x cpu", []

        def goes_on() -> bool:
            nonlocal starts
            starts = self.logs[0].read_text().split("parameters, vocabulary")[1:]
            assert self.launchers[0].poll() is None, tails(self.logs)
            return len(starts) > self._starts and at in starts[-1] and starts[-1].count("\nstep ") >= 8

        wait_until(goes_on, f"eight steps {at}", logs=self.logs)
        self._starts = len(starts)

    def stop(self) -> list[int]:
        """The exit codes after a stop signal to all."""
        for launcher in self.launchers:
            launcher.send_signal(signal.SIGTERM)
        return [launcher.wait(timeout=300) for launcher in self.launchers]

    def end(self) -> None:
        for launcher in self.launchers:
            kill_all(launcher)

    def assert_undisturbed(self, folder: Path) -> None:
        """The curve and the weights are those of one process that was left alone."""
        steps = steps_done(self.run)
        rows = run_tiny(self.dataset, folder / "reference", *SLOW, ENDLESS, f"--train.stop_at={steps}")
        assert_same_curve(train_rows(self.run), rows, norm=1e-3)
        assert_same_weights(self.run, folder / "reference", atol=1e-3)


def ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")


class Network:
    """Three hosts on a bridge: 10.213.77.1 to .3."""

    def __init__(self) -> None:
        self.bridge = f"gd{os.getpid()}"
        self.hosts = [f"gptdist-{os.getpid()}-{i}" for i in range(3)]
        ip("link", "add", self.bridge, "type", "bridge")
        ip("link", "set", self.bridge, "up")
        for i, host in enumerate(self.hosts):
            ip("netns", "add", host)
            ip("link", "add", f"{self.bridge}v{i}", "type", "veth", "peer", "name", "eth0", "netns", host)
            ip("link", "set", f"{self.bridge}v{i}", "master", self.bridge, "up")
            ip("-n", host, "address", "add", f"10.213.77.{i + 1}/24", "dev", "eth0")
            ip("-n", host, "link", "set", "eth0", "up")
            ip("-n", host, "link", "set", "lo", "up")

    def cut(self, host: int) -> None:
        ip("link", "set", f"{self.bridge}v{host}", "down")

    def join(self, host: int) -> None:
        ip("link", "set", f"{self.bridge}v{host}", "up")

    def close(self) -> None:
        for host in self.hosts:
            with contextlib.suppress(OSError):
                ip("netns", "delete", host)
        with contextlib.suppress(OSError):
            ip("link", "delete", self.bridge)


@pytest.fixture
def network():
    network = Network.__new__(Network)
    try:
        network.__init__()
    except OSError as error:
        network.close()
        pytest.skip(f"no network namespaces here: {error}")
    yield network
    network.close()


@pytest.mark.long
def test_a_host_loses_power_and_comes_back(dataset, tmp_path, network):
    """Its line is cut first, so that no connection is closed: only the missing signs of life tell."""
    job = Job(dataset, tmp_path, [["ip", "netns", "exec", host] for host in network.hosts], "10.213.77.1:29400", "2:3")
    try:
        job.wait_for_world(3)
        network.cut(2)
        kill_all(job.launchers[2])
        job.wait_for_world(2)
        assert "a node is gone; starting again" in job.logs[0].read_text()
        network.join(2)
        job.start(2)
        job.wait_for_world(3)
        assert job.stop() == [EXIT_REQUEUE] * 3, tails(job.logs)
    finally:
        job.end()
    assert exit_record(job.run)["code"] == EXIT_REQUEUE
    job.assert_undisturbed(tmp_path)


@pytest.mark.long
def test_a_launcher_is_killed_and_started_again(dataset, tmp_path):
    """Two launchers on one host, from 2 processes to 1 and back to 2; without the first one the other gives up. Told to
    stop, one leaves the run to the other."""
    job = Job(dataset, tmp_path, [[], []], "127.0.0.1:29471", "1:2")
    try:
        job.wait_for_world(2)
        kill_all(job.launchers[1])
        job.wait_for_world(1)
        job.start(1)
        job.wait_for_world(2)
        kill_all(job.launchers[0])
        assert job.launchers[1].wait(timeout=300) == EXIT_REQUEUE, tails(job.logs)
        assert "the rendezvous at 127.0.0.1:29471 is gone: the first node died" in job.logs[1].read_text()
        for i in range(2):
            job.start(i)
        job.wait_for_world(2)
        job.launchers[1].send_signal(signal.SIGTERM)
        job.wait_for_world(1)
        assert "another node was stopped; starting again" in job.logs[0].read_text()
        assert job.stop() == [EXIT_REQUEUE] * 2, tails(job.logs)
    finally:
        job.end()
    job.assert_undisturbed(tmp_path)
