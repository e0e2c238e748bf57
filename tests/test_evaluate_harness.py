"""The lm-evaluation-harness on tasks and data of this machine: its figures are those of our own tasks."""

import json

import pytest

from gptdist.checkpoint.layout import latest
from gptdist.cli import main
from gptdist.evaluate.items import read_task
from gptdist.evaluate.scorer import open_scorer
from gptdist.evaluate.suite import Options, run_task
from tests.training import run_tiny

pytest.importorskip("lm_eval", reason="pip install lm_eval: the harness is an optional extra")

TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: {kind}
doc_to_text: "{question}"
doc_to_target: {target}
metric_list:
"""


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """A directory of three tasks."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"ctx": f"Return the {word}", "endings": [f"{word} of the list", "blue", "x" * i], "label": i % 3}
            for i, word in enumerate(("first", "last", "name", "value", "number", "file"), 1)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tmp_path / "tasks"
    folder.mkdir()
    known = dict(file=tmp_path / "rows.jsonl", question="{{ctx}}")
    (folder / "choice.yaml").write_text(
        TASK.format(name="local_choice", kind="multiple_choice", target="label", **known)
        + '  - metric: acc\n  - metric: acc_norm\ndoc_to_choice: "{{endings}}"\n')
    (folder / "text.yaml").write_text(
        TASK.format(name="local_text", kind="loglikelihood_rolling", target='"{{ctx}}"', **known | {"question": ""})
        + "  - metric: bits_per_byte\n")
    (folder / "generate.yaml").write_text(
        TASK.format(name="local_generate", kind="generate_until", target='"{{endings[0]}}"', **known)
        + "  - metric: bleu\ngeneration_kwargs:\n  until: ['.']\n  max_gen_toks: 8\n  do_sample: false\n")
    return folder


def test_the_harness_gives_our_own_figures(dataset, tasks, tmp_path, capsys):
    run_tiny(dataset, tmp_path / "run", "--train.stop_at=4", "--eval.tokens=0")
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "run"), "--lm-eval", "local_choice", "local_text", "local_generate",
                 "--include-path", str(tasks), "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = {task["task"]: task for task in json.loads(lines[-1])["tasks"]}
    scorer = open_scorer(latest(tmp_path / "run" / "checkpoints"))
    own = run_task(scorer, read_task(str(tmp_path / "rows.jsonl")), Options())["metrics"]
    assert found["local_choice"]["n"] == 6
    assert found["local_choice"]["metrics"]["acc"] == pytest.approx(own["accuracy"])
    assert found["local_choice"]["metrics"]["acc_norm"] == pytest.approx(own["accuracy_norm"])
    texts = [json.loads(line)["ctx"] for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    own = run_task(scorer, read_task(str(tmp_path / "text.jsonl"), "text"), Options())["metrics"]
    assert found["local_text"]["metrics"]["bits_per_byte"] == pytest.approx(own["bits_per_byte"], rel=1e-5)
    assert "bleu" in found["local_generate"]["metrics"]
    assert main(["evaluate", str(tmp_path / "run"), "--lm-eval", "local_chess", "--include-path", str(tasks)]) == 2
    assert "knows no task 'local_chess'" in capsys.readouterr().err
