"""launch/: what is started again and what is not, what is refused before anything starts, and what the files say."""

import contextlib
import json
import os
import re
import socket
import subprocess
import threading
import time

import pytest
import yaml

from gptdist import config as config_module
from gptdist import launcher
from gptdist.errors import (
    EXIT_BUG,
    EXIT_INTERRUPTED,
    EXIT_MISSING,
    EXIT_REQUEUE,
    EXIT_USER,
    LockedError,
    MissingError,
    UserError,
)
from gptdist.faults import STOPPED, lock_run_dir
from gptdist.parallel import meeting
from gptdist.train_command import LOST_RANK
from tests.conftest import ROOT
from tests.launching import ENV, SLOW, exit_record, start, steps_done, tails, wait_until, write_config
from tests.training import assert_same_curve, run_tiny, tiny_config, train_rows


def job(tmp_path, low=2, high=2):
    return launcher.Job(tmp_path, low, high, max_restarts=3, grace_s=1)


@pytest.mark.parametrize(("exit_code", "code", "message", "reason"), [
    (-9, None, "", "killed by SIGKILL"),
    (-9, EXIT_REQUEUE, LOST_RANK, "killed by SIGKILL"),
    (-9, EXIT_BUG, "RuntimeError: the connection broke", "killed by SIGKILL"),  # the others' error is a consequence
    (EXIT_REQUEUE, EXIT_REQUEUE, LOST_RANK, "connection to another rank is gone"),
    (EXIT_REQUEUE, None, "", "exit code 75"),
])
def test_what_is_started_again(tmp_path, exit_code, code, message, reason):
    record = None if code is None else {"code": code, "message": message}
    assert reason in launcher.judge(job(tmp_path), exit_code, record)


@pytest.mark.parametrize(("exit_code", "code", "message", "ends_with"), [
    (EXIT_USER, None, "", EXIT_USER),
    (EXIT_MISSING, EXIT_MISSING, "no GPU", EXIT_MISSING),
    (EXIT_BUG, EXIT_BUG, "KeyError", EXIT_BUG),
    (EXIT_INTERRUPTED, None, "", EXIT_INTERRUPTED),
    (EXIT_REQUEUE, EXIT_USER, "bad token", EXIT_USER),  # this node's workers lost the rank that failed
    (-9, EXIT_USER, "bad token", EXIT_USER),
    (EXIT_REQUEUE, EXIT_REQUEUE, STOPPED, EXIT_REQUEUE),
])
def test_what_is_not(tmp_path, exit_code, code, message, ends_with):
    record = None if code is None else {"code": code, "message": message}
    with pytest.raises(launcher.Ended) as caught:
        launcher.judge(job(tmp_path), exit_code, record)
    assert caught.value.code == ends_with


def test_an_elastic_job_goes_on_where_another_node_was_stopped(tmp_path):
    record = {"code": EXIT_REQUEUE, "message": STOPPED}
    assert launcher.judge(job(tmp_path, 1, 2), EXIT_REQUEUE, record) == "another node was stopped"


def test_a_record_of_an_earlier_job_is_not_read(tmp_path):
    ours = job(tmp_path)
    assert ours.record() is None
    (tmp_path / "exit.json").write_text(json.dumps({"code": 2, "message": "", "time": ours.began - 1}))
    assert ours.record() is None
    (tmp_path / "exit.json").write_text(json.dumps({"code": 2, "message": "", "time": ours.began + 1}))
    assert ours.record()["code"] == 2


@pytest.mark.parametrize(("text", "expected"), [
    ("node-1", ("node-1", 29400)), ("10.0.0.1:2000", ("10.0.0.1", 2000)), ("[fe80::1]:2000", ("fe80::1", 2000))])
def test_endpoints(text, expected):
    assert launcher.split_endpoint(text) == expected


@pytest.mark.parametrize("text", ["", "a b", "node:port", "node:99999", "node:0", ":29400"])
def test_bad_endpoints(text):
    with pytest.raises(UserError, match="is no HOST:PORT"):
        launcher.split_endpoint(text)


@pytest.mark.parametrize("nodes", ["0", "3:2", "two", "1:2:3", ""])
def test_bad_numbers_of_nodes(nodes):
    with pytest.raises(UserError, match="--nodes"):
        launcher.parse_nodes(nodes)


def test_negative_times_and_counts(capsys):
    with pytest.raises(SystemExit) as ended:
        launcher.parse(["--max-restarts", "-1", "c.yaml"])
    assert ended.value.code == EXIT_USER
    assert "--max-restarts is -1, expected 0 or more" in capsys.readouterr().err


@pytest.mark.parametrize(("options", "nodes", "message"), [
    ([], range(1, 13), "--nodes 1:12 with 1 processes per node: world size 12 is larger than the 11 sequences"),
    (["--parallel.strategy=single"], range(1, 3), "may have 2 processes, but parallel.strategy=single"),
    (["--parallel.strategy=fsdp", "--parallel.tensor=2"], range(2, 4), "may have 3 processes, which"),
    (["--parallel.strategy=hsdp", "--parallel.replicas=4"], range(4, 6), "may have 5 processes, which"),
])
def test_every_world_size_of_the_range_must_do(tmp_path, options, nodes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        launcher.check_worlds(tiny_config(tmp_path, tmp_path, *options), nodes, 1)


def test_world_sizes_that_do(tmp_path):
    launcher.check_worlds(tiny_config(tmp_path, tmp_path), range(1, 12), 1)
    launcher.check_worlds(tiny_config(tmp_path, tmp_path, "--parallel.strategy=fsdp", "--parallel.tensor=2"),
                          range(1, 12), 2)


@contextlib.contextmanager
def listener(answer=b""):
    """A program on a port that is no rendezvous: it accepts, and answers `answer` or nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        held = []

        def serve():
            with contextlib.suppress(OSError):
                while True:
                    held.append(server.accept()[0])
                    held[-1].sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1]
        for connection in held:
            connection.close()


def test_a_port_that_another_program_has_is_named(monkeypatch):
    monkeypatch.setattr(meeting, "HANDSHAKE_S", 0.2)
    with listener() as port:
        for rank in (0, None, 1):  # the first node, one that asks if it is it, and another
            with pytest.raises(UserError, match=rf"port {port} of 127\.0\.0\.1 is taken by another program: give all"):
                launcher.meet("127.0.0.1", port, rank, timeout_s=5)
    with listener(b"HTTP/1.1 400 Bad Request\r\n\r\n") as port, pytest.raises(UserError, match="is taken by another"):
        launcher.meet("127.0.0.1", port, 1, timeout_s=5)


def test_a_first_node_that_does_not_come_up_is_named(capsys):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert launcher.meet("127.0.0.1", port, 0, timeout_s=0)
    with pytest.raises(launcher.Ended, match=rf"127\.0\.0\.1:{port}: nothing answered within 0 s \(") as caught:
        launcher.meet("127.0.0.1", port, 1, timeout_s=0)
    assert caught.value.code == EXIT_REQUEUE
    with pytest.raises(launcher.Ended, match="is the first node up, and --endpoint right"):
        launcher.meet("no-such-host.invalid", 1, 1, timeout_s=0)


def test_a_first_node_whose_name_is_a_loopback_address_gives_the_others_another(monkeypatch, capsys):
    """Debian's /etc/hosts has 127.0.1.1 for the machine's own name."""
    ways = {"node-1": "127.0.0.1", "node-2": "10.0.0.8", "localhost": "127.0.0.1", launcher.OUTSIDE: "10.0.0.7"}
    monkeypatch.setattr(launcher, "address_towards", lambda host, port: ways[host])
    found = {host: launcher.address_for_others(host, 29400) for host in ways}
    assert found == ways | {"node-1": "10.0.0.7"}
    assert "node-1 is a loopback address here, so the other nodes get 10.0.0.7" in capsys.readouterr().err


def test_an_endpoint_that_the_first_node_does_not_know_is_named():
    with pytest.raises(UserError, match=r"no way from this node to no-such-host\.invalid \(.*\): give"):
        launcher.address_towards("no-such-host.invalid", 29400)


def test_what_is_found_before_there_are_workers_is_recorded(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(config_module.to_yaml(tiny_config(tmp_path, tmp_path / "run")))
    words = ["--nodes", "40", "--endpoint", "127.0.0.1:29400", str(config)]
    assert launcher.main(words) == EXIT_USER
    record = exit_record(tmp_path / "run")
    assert record["code"] == EXIT_USER
    assert "world size 40 is larger" in record["message"]
    (tmp_path / "run" / "exit.json").unlink()
    with lock_run_dir(tmp_path / "run"):  # a run is up there
        assert launcher.main(words) == EXIT_USER
    assert not (tmp_path / "run" / "exit.json").exists()


def test_a_node_does_not_wait_for_one_that_cannot_begin(tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text(config_module.to_yaml(tiny_config(tmp_path, tmp_path / "run")))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = ["--nodes", "2", "--endpoint", f"127.0.0.1:{port}"]
    other = threading.Timer(0.5, launcher.note, (tmp_path / "run", MissingError("no GPU on node 0")))
    other.start()
    assert launcher.main([*words, "--node-rank", "1", str(config)]) == EXIT_MISSING
    assert "another node ended: no GPU on node 0" in capsys.readouterr().err
    other.join()
    # Nor does the first, at its rendezvous.
    first = start(*words, "--node-rank", "0", config, log=tmp_path / "log")
    wait_until(lambda: first.poll() is not None or meeting.is_store("127.0.0.1", port), "the rendezvous",
               logs=[tmp_path / "log"])
    assert launcher.main([*words, "--node-rank", "1", "--interface", "none0", str(config)]) == EXIT_USER
    assert first.wait(timeout=60) == EXIT_USER
    assert "another node ended: --interface none0 has no IPv4 address" in (tmp_path / "log").read_text()


def test_this_machine_knows_itself():
    assert launcher.is_this_machine("127.0.0.1")
    assert launcher.is_this_machine(socket.gethostname())
    assert not launcher.is_this_machine("192.0.2.1")  # RFC 5737: an address of documents
    assert launcher.interfaces()["lo"] == "127.0.0.1"


def test_the_lock_of_the_same_job_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job-1")
    entered, left = threading.Event(), []

    def hold():
        with lock_run_dir(tmp_path):
            entered.set()
            time.sleep(0.7)
            left.append(True)

    holder = threading.Thread(target=hold)
    holder.start()
    entered.wait()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job-2")
    with pytest.raises(LockedError), lock_run_dir(tmp_path):
        pass
    assert not left
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job-1")
    with lock_run_dir(tmp_path):
        assert left
    holder.join()


# launch/multinode.sh


def multinode(*arguments, **env):
    return subprocess.run(["bash", "launch/multinode.sh", *map(str, arguments)], cwd=ROOT, capture_output=True,
                          text=True, timeout=120, stdin=subprocess.DEVNULL, env=os.environ | ENV | env)


@pytest.fixture
def fake_ssh(tmp_path):
    """`ssh HOST COMMAND` for hosts of which all but nowhere are this machine."""
    path = tmp_path / "ssh"
    path.write_text('#!/bin/bash\n[ "$1" != nowhere ] || { echo "ssh: unknown host $1" >&2; exit 255; }\n'
                    'shift\nexec bash -c "$*"\n')
    path.chmod(0o755)
    return str(path)


def test_an_unknown_host_is_named_before_anything_starts(tmp_path, fake_ssh):
    hostfile = tmp_path / "hosts"
    hostfile.write_text("# two hosts\nlocalhost slots=1\n\nnowhere slots=1")  # whose last line has no end
    done = multinode("--hosts", hostfile, "configs/debug.yaml", f"--run.dir={tmp_path}", GPTDIST_SSH=fake_ssh)
    assert (done.returncode, done.stdout) == (EXIT_USER, "")
    message = "cannot reach host nowhere: ssh: unknown host nowhere: check its name, and that ssh needs no password"
    assert done.stderr.endswith(f": {message}\n")
    assert (exit_record(tmp_path)["code"], exit_record(tmp_path)["message"]) == (EXIT_USER, message)


def test_a_host_is_named_once(fake_ssh, tmp_path):
    done = multinode("--hosts", "localhost,me,localhost", "configs/debug.yaml", f"--run.dir={tmp_path}",
                     GPTDIST_SSH=fake_ssh)
    assert done.returncode == EXIT_USER
    assert "--hosts names localhost twice: give it once" in done.stderr


@pytest.mark.parametrize("host", ["-oProxyCommand=touch_me", "node-1\r"])
def test_what_is_no_host_is_not_given_to_ssh(fake_ssh, tmp_path, host):
    done = multinode("--hosts", f"localhost,{host}", "configs/debug.yaml", f"--run.dir={tmp_path}",
                     GPTDIST_SSH=fake_ssh)
    assert done.returncode == EXIT_USER
    assert "is no name of a host" in done.stderr


def test_a_host_that_cannot_begin_ends_the_job_for_the_others(tmp_path):
    """Those would wait for it, for ten minutes. Nor do command lines have secrets in them."""
    log, ssh, node = tmp_path / "words", tmp_path / "ssh", tmp_path / "bash"
    ssh.write_text(f'#!/bin/bash\nshift\necho "$*" >> {log}\nPATH={tmp_path}:$PATH\nexec /bin/bash -c "$*"\n')
    node.write_text('#!/bin/sh\ncase "$*" in *"--node-rank 1"*) exit 127 ;; esac\ncat\nexit 75\n')
    for path in (ssh, node):
        path.chmod(0o755)
    done = multinode("--hosts", "me@one,me@two", "c.yaml", GPTDIST_SSH=str(ssh), GPTDIST_API_KEY="hush", NCCL_DEBUG="I")
    assert done.returncode == EXIT_MISSING, done.stderr
    assert "host me@one ended with exit code 75" in done.stderr
    assert "host me@two ended with exit code 3" in done.stderr
    words = log.read_text()
    assert words.count("--endpoint one:29400") == 2
    assert "NCCL_DEBUG=I" in words
    assert "hush" not in words


def test_bad_input_that_workers_find_ends_the_job_with_its_code(dataset, tmp_path):
    """torchrun would start them again, and end with 1."""
    config = write_config(tmp_path / "run.yaml", dataset, tmp_path / "run")
    done = multinode("--processes-per-node", "1", config, "--data.path=nowhere")
    assert done.returncode == EXIT_USER, done.stderr
    assert "data.path=nowhere does not exist" in done.stderr
    assert "starting again" not in done.stderr


@pytest.mark.parametrize(("options", "code", "message"), [
    (("--max-restarts", "1"), EXIT_BUG, "gave up after 1 restarts without a new checkpoint: a worker was killed by"),
    pytest.param(("--max-restarts", "0", "--retry-code", "138"), 138, "a worker was killed by SIGK",
                 marks=pytest.mark.long),
])
def test_a_worker_that_dies_every_time(dataset, tmp_path, options, code, message):
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\nif sys.orig_argv[1:5] == ['-u', '-m', 'gptdist', 'train']: os.kill(os.getpid(), 9)\n")
    config = write_config(tmp_path / "run.yaml", dataset, tmp_path / "run")
    done = multinode(*options, "--processes-per-node", "1", config, PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert exit_record(tmp_path / "run").get("code", EXIT_REQUEUE) == (code if code == EXIT_BUG else EXIT_REQUEUE)


@pytest.mark.long
def test_a_killed_worker_starts_again(dataset, tmp_path, fake_ssh):
    """Over `--hosts`: the run goes on from its checkpoint and ends like one that was left alone."""
    run, log = tmp_path / "run", tmp_path / "log"
    config = str(write_config(tmp_path / "run.yaml", dataset, run, "--train.steps=40"))
    process = start("--hosts", "localhost", "--processes-per-node", "2", config, log=log, GPTDIST_SSH=fake_ssh)
    wait_until(lambda: process.poll() is not None or steps_done(run) >= 6, "six steps", logs=[log])
    workers = [pid for pid in os.listdir("/proc") if pid.isdecimal() and is_worker(pid, config)]
    assert len(workers) == 2, tails([log])
    os.kill(int(workers[1]), 9)
    assert process.wait(timeout=300) == 0, tails([log])
    assert "starting again, 1 of 3 restarts" in log.read_text()
    assert exit_record(run)["code"] == 0
    rows = run_tiny(dataset, tmp_path / "reference", *SLOW, "--train.steps=40")
    assert_same_curve(train_rows(run), rows, norm=1e-3)


def is_worker(pid, config):
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            words = file.read().decode().split("\0")
    except OSError:
        return False
    return words[1:5] == ["-u", "-m", "gptdist", "train"] and config in words


# launch/pytorchjob.yaml


def test_the_kubernetes_job_has_what_the_operator_and_the_launcher_need(monkeypatch):
    """The fields are those of kubeflow.org/v1's PyTorchJob (pytorch_types.go, common_types.go and their validation)."""
    claim, pytorch_job = yaml.safe_load_all((ROOT / "launch" / "pytorchjob.yaml").read_text())
    assert (claim["apiVersion"], claim["kind"]) == ("v1", "PersistentVolumeClaim")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert (pytorch_job["apiVersion"], pytorch_job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    spec = pytorch_job["spec"]
    assert set(spec) <= {"runPolicy", "elasticPolicy", "pytorchReplicaSpecs", "nprocPerNode"}
    assert set(spec["runPolicy"]) <= {"cleanPodPolicy", "ttlSecondsAfterFinished", "activeDeadlineSeconds",
                                      "backoffLimit", "schedulingPolicy", "suspend"}
    assert spec["runPolicy"]["cleanPodPolicy"] in ("All", "Running", "None")
    elastic = spec["elasticPolicy"]
    assert set(elastic) <= {"minReplicas", "maxReplicas", "rdzvBackend", "rdzvPort", "rdzvHost", "rdzvId", "rdzvConf",
                            "standalone", "nProcPerNode", "maxRestarts", "metrics"}
    assert set(spec["pytorchReplicaSpecs"]) == {"Worker"}, "an elastic job has no master"
    worker = spec["pytorchReplicaSpecs"]["Worker"]
    assert elastic["minReplicas"] <= worker["replicas"] <= elastic["maxReplicas"]
    assert worker["restartPolicy"] == "ExitCode"
    pod = worker["template"]["spec"]
    assert "restartPolicy" not in pod, "the operator overwrites it"
    [container] = pod["containers"]
    assert container["name"] == "pytorch"
    assert container["image"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
    assert volumes["shared"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert container["command"] == ["bash", "launch/multinode.sh"]
    monkeypatch.setenv("PET_NNODES", f"{elastic['minReplicas']}:{elastic['maxReplicas']}")
    monkeypatch.setenv("PET_RDZV_ENDPOINT", f"{pytorch_job['metadata']['name']}-worker-0:23456")
    monkeypatch.setenv("PET_MAX_RESTARTS", str(elastic["maxRestarts"]))
    args = launcher.parse(container["args"])
    assert (args.nodes, args.max_restarts) == ("1:2", 3)
    assert launcher.split_endpoint(args.endpoint) == ("gptdist-worker-0", 23456)
    assert args.retry_code in range(128, 256), "others are permanent failures"
    assert args.grace < pod["terminationGracePeriodSeconds"]
    assert (ROOT / args.config).exists()
    shared = next(m["mountPath"] for m in container["volumeMounts"] if m["name"] == "shared")
    assert all(value.partition("=")[2].startswith(shared) for value in args.overrides)


@pytest.mark.parametrize(("code", "after_s", "requeued"), [
    (0, 700, False), (1, 700, False), (2, 700, False), (75, 0, True), (137, 0, False), (137, 700, True)])
def test_what_the_slurm_job_is_requeued_for(tmp_path, code, after_s, requeued):
    (tmp_path / "srun").write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/srun-words\nexit {code}\n')
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\n[ $1 = show ] && echo n0 || echo $@ > {tmp_path}/requeued\n')
    for name in ("srun", "scontrol"):
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "30007", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "n[0-1]", "SECONDS": str(after_s),
             "SLURM_SUBMIT_DIR": str(ROOT), "PATH": f"{tmp_path}:{os.environ['PATH']}"}

    def sbatch(**more):
        return subprocess.run(["bash", "launch/train.sbatch", "c d.yaml"], cwd=ROOT, env=slurm | more,
                              capture_output=True, text=True)

    done = sbatch()
    assert done.returncode == code, done.stderr
    assert (tmp_path / "requeued").exists() == requeued
    assert "--nodes 2 --endpoint n0:20007 c d.yaml" in (tmp_path / "srun-words").read_text()
    done = sbatch(SLURM_NTASKS_PER_NODE="8")  # a habit: a process for each GPU
    assert done.returncode == EXIT_USER
    assert "leave --ntasks-per-node out" in done.stderr


def test_the_slurm_job_saves_before_its_time_limit():
    text = (ROOT / "launch" / "train.sbatch").read_text()
    directives = re.findall(r"^#SBATCH --(\S+)", text, re.MULTILINE)
    assert {"signal=USR1@120", "requeue"} <= set(directives)
    assert launcher.parse(["c.yaml"]).grace < 120
