"""Ranks that are not alike: named on every rank before step 0, and shown by `gptdist doctor --distributed`."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from gptdist import cluster, doctor_distributed
from gptdist import config as config_module
from gptdist.cli import main
from gptdist.cluster import comparable, data_facts, differences, facts_of, judge_start
from gptdist.errors import LostError, MissingError, UserError
from gptdist.metrics import read_rows
from gptdist.parallel import meeting
from gptdist.parallel.rank_times import RankTimes
from gptdist.parallel.world import World
from tests import cluster_worker
from tests.conftest import ROOT, free_port
from tests.training import tiny_config

HOST = re.escape(socket.gethostname())


@pytest.fixture(scope="module")
def results(dataset, two_processes, tmp_path_factory):
    """case -> [what rank 0 and rank 1 ended with]; and the folder of their runs."""
    out = tmp_path_factory.mktemp("cluster")
    two_processes.run("tests.cluster_worker", dataset, out)
    ranks = [json.loads((out / f"results-{rank}.json").read_text()) for rank in range(2)]
    return {name: [rank[name] for rank in ranks] for name in ranks[0]}, out


TRAIN = {
    "config": rf"optim\.lr is 0\.5 for rank 1 on {HOST}, 0\.003 for rank 0 on {HOST}: start every rank with the same "
              rf"configuration \(and 1 more differences: see `gptdist doctor --distributed`\)",
    "path": rf"rank 1 on {HOST} cannot read data\.path=.*/nowhere \(.*/nowhere/train/meta\.json: No such file or "
            rf"directory\), which rank 0 on {HOST} can: put the data where every node sees it",
    "bad": rf"rank 1 on {HOST}: command line: model\.n_heads=5 does not divide",
    "code": rf"code is f{{12}} for rank 1 on {HOST}, {cluster.code_hash()[:12]} for rank 0 on {HOST}: give every node",
    "batch": r"world size 2 is larger than the 1 sequences of a step",
}


@pytest.mark.parametrize("name", TRAIN)
def test_what_ranks_do_not_share_is_named_before_the_first_step(results, name):
    cases, out = results
    ends = cases[name]
    assert [end["code"] for end in ends] == [2, 2]
    said = [rank for rank in range(2) if re.search(TRAIN[name], ends[rank]["err"])]
    assert said == ([0] if name == "batch" else [0, 1])  # what each rank finds by itself, one of them says
    record = json.loads((out / name / "exit.json").read_text())
    assert record["code"] == 2
    assert re.search(TRAIN[name], record["message"])
    assert not (out / name / "metrics.jsonl").exists()


def test_a_fault_that_all_ranks_find_is_said_once(results):
    ends = results[0]["both-bad"]
    assert [end["code"] for end in ends] == [2, 2]
    assert ends[0]["err"].startswith("gptdist train: command line: model.n_heads=5 does not divide")
    assert ends[1]["err"] == ""


def test_a_missing_device_of_one_rank_is_named_by_both(results):
    ends = results[0]["device"]
    assert [end["code"] for end in ends] == [3, 3]
    assert all(f"rank 1 on {socket.gethostname()}: parallel.device=cuda, but torch sees no GPU" in end["err"]
               for end in ends)


def test_doctor_shows_all_ranks_their_clocks_and_rates(results):
    ends = results[0]["doctor-right"]
    assert [end["code"] for end in ends] == [0, 0]
    assert ends[1]["out"] == ""
    text = ends[0]["out"]
    assert text.count(socket.gethostname()[:20]) >= 2
    assert "all right: every rank is like rank 0" in text
    for expected in (cluster.code_hash()[:8], "5 of 11", "6 of 11", "all-reduce", "all-gather", "16,777,216", "GB/s",
                     "nccl-tests", "tokens in 2 shards"):
        assert expected in text, text


def test_doctor_names_every_fault(results):
    ends = results[0]["doctor-wrong"]
    assert [end["code"] for end in ends] == [2, 2]
    assert "world size 2 is larger than the 1 sequences" in ends[0]["out"]
    assert re.search(TRAIN["path"], ends[0]["out"])
    assert "all-gather" in ends[0]["out"]  # it goes on as far as it can


def test_doctor_where_a_rank_cannot_begin(results):
    ends = results[0]["doctor-unreadable"]
    assert [end["code"] for end in ends] == [2, 2]
    assert re.search(f"fault: {TRAIN['bad']}", ends[0]["out"])
    assert "all-gather" not in ends[0]["out"]


def test_doctor_shows_what_it_has_where_no_collective_works(results):
    ends = results[0]["doctor-apart"]
    assert [end["code"] for end in ends] == [2, 2]
    assert "fault: the ranks meet at MASTER_ADDR, but no collective works between them (connectF" in ends[0]["out"]
    assert ends[0]["out"].count(socket.gethostname()[:20]) >= 2


def test_clocks_are_compared_by_round_trips(results):
    ends = results[0]["doctor-clock"]
    assert [end["code"] for end in ends] == [2, 2]
    found = json.loads(ends[0]["out"])
    offset, wrong = found["clock"][1]
    assert offset == pytest.approx(30, abs=wrong + 0.01)
    assert 0 < wrong < 1
    assert [line for line in found["faults"] if "clock of rank 1" in line and "ahead of" in line] == found["faults"]
    for rate in found["rates"]:
        n = 2
        share = {"all_reduce": 2 * (n - 1) / n, "all_gather": (n - 1) / n}[rate["op"]]
        assert rate["bus_bytes_per_s"] == pytest.approx(share * rate["size_bytes"] / rate["seconds"])


# Time by rank


def test_the_rank_that_others_wait_for_is_named(results):
    rows = [row for row in read_rows(results[1] / "slow" / "metrics.jsonl") if row["kind"] == "ranks"]
    assert [(row["step"], row["steps"]) for row in rows] == [(3, 3), (6, 3)]
    for row in rows:
        assert (row["slowest_rank"], row["slowest_host"]) == (1, socket.gethostname())
        assert row["own_s_max"] == pytest.approx(max(row["own_s_of_ranks"]), abs=1e-5)
        assert row["own_s_max"] >= cluster_worker.SLOW_S
        assert row["own_s_max"] > row["own_s_min"]
        assert row["step_s_min"] <= row["step_s_median"] <= row["step_s_max"]
        assert row["step_s_min"] >= cluster_worker.SLOW_S  # all ranks wait for the slow one
    in_data, in_computing = rows
    assert in_data["data_wait_s_max"] >= cluster_worker.SLOW_S
    assert in_data["data_wait_s_max"] > in_data["data_wait_s_min"]
    assert in_data["sync_wait_s_max"] > in_data["sync_wait_s_min"]
    assert in_computing["data_wait_s_max"] < in_data["data_wait_s_max"]


def test_the_chosen_rank_is_profiled(results):
    [trace] = (results[1] / "slow" / "profile").iterdir()
    assert trace.name == "rank00001-steps2-3.trace.json"
    assert any("gloo" in event.get("name", "") for event in json.loads(trace.read_text())["traceEvents"])


# The launcher's environment alone


def start(rank: int, port: int, *words: str) -> subprocess.Popen:
    env = os.environ | {"OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                        "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    return subprocess.Popen([sys.executable, "-m", "gptdist", *words], cwd=ROOT, stderr=subprocess.PIPE,
                            stdout=subprocess.PIPE, text=True, env=env)


def test_two_processes_of_different_configurations_end_and_the_store_is_this_hosts_alone(dataset, tmp_path):
    path, port = tmp_path / "run.yaml", free_port()
    path.write_text(config_module.to_yaml(tiny_config(dataset, tmp_path / "run")))
    first = start(0, port, "train", str(path))
    listening = []
    while not listening and first.poll() is None:
        listening = listeners(port)
        time.sleep(0.02)
    second = start(1, port, "train", str(path), "--run.seed=2")
    for process in (first, second):
        _, err = process.communicate(timeout=60)
        assert process.returncode == 2, err
        assert f"run.seed is 2 for rank 1 on {socket.gethostname()}, 1337 for rank 0 on" in err
        assert "Traceback" not in err
    assert json.loads((tmp_path / "run" / "exit.json").read_text())["code"] == 2
    assert listening == ["0100007F"]  # 127.0.0.1


def listeners(port: int) -> list[str]:
    """The addresses, as the kernel writes them, on which some process listens at a port."""
    rows = [line.split() for name in ("tcp", "tcp6") if Path(f"/proc/net/{name}").exists()
            for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return [row[1].partition(":")[0] for row in rows if row[1].endswith(f":{port:04X}") and row[3] == "0A"]


@pytest.mark.parametrize(("environment", "message"), [
    ({}, "MASTER_ADDR and MASTER_PORT do not say where the processes meet"),
    ({"MASTER_ADDR": "localhost", "MASTER_PORT": "x"}, "the processes cannot meet at localhost:x"),
    ({"MASTER_ADDR": "localhost", "MASTER_PORT": "{taken}"}, "Address already in use"),
])
def test_a_store_that_cannot_be_opened_is_named(environment, message, monkeypatch):
    for name in ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for name, value in environment.items():
            monkeypatch.setenv(name, value.format(taken=taken.getsockname()[1]))
        with pytest.raises(UserError, match=message):
            meeting.open_store.__wrapped__(0, 2, 5)


def test_a_port_of_a_program_that_says_nothing_is_named(monkeypatch):
    """torch's client would wait for its answer without end."""
    monkeypatch.setattr(meeting, "HANDSHAKE_S", 0.2)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(port))
        with pytest.raises(UserError, match=rf"port {port} of 127\.0\.0\.1 .* is taken by another program"):
            meeting.open_store.__wrapped__(1, 2, 5)
    with pytest.raises(LostError, match=r"nothing answered within 1 s \(.*\): give the launcher a host and a free"):
        meeting.open_store.__wrapped__(1, 2, 1)


# One process


def test_doctor_in_one_process(dataset, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(config_module.to_yaml(tiny_config(dataset, tmp_path / "run")))
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--distributed", str(path)])
    assert ended.value.code == 0
    assert "one process: start it with the launcher" in capsys.readouterr().out
    (dataset_copy := tmp_path / "data").mkdir()
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--distributed", str(path), f"--data.path={dataset_copy}"])
    assert ended.value.code == 2
    assert re.search(r"fault: no rank can read data\.path=.*/data: .*meta\.json: No such file",
                     capsys.readouterr().out)


def test_doctor_takes_a_configuration_for_the_cluster_alone(capsys):
    assert main(["doctor", "configs/debug.yaml"]) == 2
    assert "a configuration is for --distributed alone" in capsys.readouterr().err


def test_missing_shards_and_altered_data_are_seen(dataset, tmp_path):
    import shutil

    ours, copy = tiny_config(dataset, tmp_path), tmp_path / "copy"
    shutil.copytree(dataset, copy)
    theirs = tiny_config(copy, tmp_path)
    everyone = [facts_of(ours, thorough=True), facts_of(theirs, thorough=True) | {"rank": 1, "host": "b"}]
    assert differences(everyone) == []  # elsewhere, but the same
    [shard] = (copy / "train").glob("*.tokens.bin")
    shard.write_bytes(shard.read_bytes()[:-2])
    everyone[1] = facts_of(theirs, thorough=True) | {"rank": 1, "host": "b"}
    [line] = differences(everyone)
    assert re.match(r"rank 1 on b cannot read data\.path=.*/copy \(.*tokens\.bin: .* bytes, expected .*\), which rank ",
                    line)
    assert differences([facts_of(ours), facts_of(theirs) | {"rank": 1}]) == []  # before training meta.json alone
    (copy / "train" / "meta.json").write_text((copy / "train" / "meta.json").read_text() + " ")
    [line] = differences([facts_of(ours), facts_of(theirs) | {"rank": 1, "host": "b"}])
    assert re.match(r"data\.path=.*/copy is train \w{12}, val \w{12}, tokenizer \w{12} for rank 1 on b, train ", line)


def test_data_that_one_rank_has_elsewhere_is_not_said_to_be_nowhere(dataset, tmp_path):
    there = tiny_config(dataset, tmp_path)
    everyone = [facts_of(tiny_config(tmp_path / "nowhere", tmp_path)), facts_of(there) | {"rank": 1, "host": "b"}]
    [line] = doctor_distributed._faults(everyone, there, 2)
    assert line.startswith("rank 0 on ")
    assert "cannot read data.path=" in line


def test_nodes_with_unlike_numbers_of_processes_need_replicas(dataset, tmp_path, monkeypatch):
    def fault(*options):
        config = tiny_config(dataset, tmp_path, "--parallel.strategy=hsdp", *options)
        everyone = []
        for rank, processes in enumerate("84"):
            monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
            everyone.append(facts_of(config) | {"rank": rank, "host": "ab"[rank]})
        return differences(everyone)

    monkeypatch.setenv("WORLD_SIZE", "12")
    assert fault() == ["replicas of hsdp is 3 for rank 1 on b, 1 for rank 0 on a: set parallel.replicas, for the nodes "
                       "do not have equally many processes"]
    assert fault("--parallel.replicas=2") == []


def test_files_of_examples_are_compared_by_content(tmp_path):
    base = ["--task.name=classify", "--data.path="]
    for name in ("a", "b"):
        (tmp_path / name).write_text("ham\thello\n")
    configs = [tiny_config("", tmp_path, *base, f"--task.train_data={tmp_path / name}") for name in ("a", "b")]
    assert comparable(configs[0]) == comparable(configs[1])
    one, other = [list(data_facts(config, thorough=False).values()) for config in configs]
    assert one == other
    (tmp_path / "b").write_text("ham\thellO\n")
    everyone = [facts_of(config) | {"rank": rank, "host": "ab"[rank]} for rank, config in enumerate(configs)]
    [line] = differences(everyone)
    assert re.match(r"task\.train_data=.*/b is 10 bytes, \w{12} for rank 1 on b, 10 bytes, \w{12} for rank 0 on a: ",
                    line)


def test_every_version_counts(dataset, tmp_path):
    mine = facts_of(tiny_config(dataset, tmp_path))
    for name in cluster.SAME_EVERYWHERE:
        other = mine | {"rank": 2, "host": "c", "same": mine["same"] | {name: "other"}}
        code, message, agreed = judge_start([mine, other, other])
        assert (code, agreed) == (2, False)
        assert message.startswith(f"{name} is other for rank 2 on c, ")
        assert "(2 ranks differ)" in message
    assert judge_start([mine, mine]) is None
    missing = mine | {"fault": [MissingError.__name__, "no GPU"]}
    assert judge_start([mine, missing])[0] == 3


def test_paths_and_threads_may_differ(tmp_path):
    ones = ["--data.mixture=[{path: a, weight: 1}]", "--parallel.threads=1"]
    others = ["--data.mixture=[{path: b, weight: 1}]", "--parallel.threads=2"]
    configs = [tiny_config("", tmp_path, "--data.path=", *words) for words in (ones, others)]
    assert comparable(configs[0]) == comparable(configs[1])
    other = tiny_config("", tmp_path, "--data.path=", "--data.mixture=[{path: b, weight: 2}]")
    assert comparable(other) != comparable(configs[0])


def test_names_are_those_of_the_worker():
    assert set(TRAIN) < set(cluster_worker.TRAIN)


def test_rank_times_are_nothing_for_one_process():
    import torch

    times = RankTimes(World(0, 1, torch.device("cpu"), "single", None))
    with times.synchronising():
        pass
    times.end_step(0.0)
    assert times.row() == {}


def test_nodes_that_were_started_again_unlike_often_meet(monkeypatch):
    """torchrun's count of restarts is each node's own: of one that comes back it is 0 again."""
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=20))
    monkeypatch.setattr(meeting, "open_store", lambda *_: store)
    monkeypatch.setattr(meeting, "_CALLS", iter([0, 0]))  # the first call of each process
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with ThreadPoolExecutor(1) as pool:
        stayed = pool.submit(meeting.roll_call, "stayed", sorted, rank=1, size=2, timeout_s=20)
        while not store.num_keys():
            time.sleep(0.01)
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
        came_back = meeting.roll_call("came back", sorted, rank=0, size=2, timeout_s=20)
        assert stayed.result() == came_back == ["came back", "stayed"]
