"""benchmarks/book.py: the stages that train nothing, the bands, and that a finished stage is not run again."""

import math
import os
from pathlib import Path

import pytest

from benchmarks import book
from benchmarks.book import DIFFERS, OK, OUTSIDE, Book, Results, Row, Stage

DATA = os.environ.get("GPTDIST_DATA")
CHEAP = [stage for stage in book.STAGES.values() if not stage.trains]


@pytest.mark.parametrize("stage", CHEAP, ids=lambda stage: stage.name)
def test_stages_that_train_nothing(stage, tmp_path):
    if stage.files and not (DATA and all((Path(DATA) / name).exists() for name in stage.files)):
        pytest.skip(f"set GPTDIST_DATA to a directory with {', '.join(stage.files)}")
    rows = list(stage.run(Book(Path(DATA or tmp_path), tmp_path), tmp_path))
    assert rows
    assert [row for row in rows if row.verdict not in (OK, DIFFERS)] == []


# Bands


@pytest.mark.parametrize(("got", "verdict"), [(10.98, OK), (11.02, OK), (10.94, OK), (11.04, OUTSIDE),
                                              (10.92, OUTSIDE), (math.nan, OUTSIDE)])
def test_a_loss_before_training_is_within_0_05(got, verdict):
    assert book.near("loss", 10.98, got, absolute=book.INITIAL).verdict == verdict


@pytest.mark.parametrize(("got", "verdict"), [(0.57, OK), (0.65, OK), (0.49, OK), (0.66, OUTSIDE), (0.48, OUTSIDE)])
def test_a_loss_after_training_is_within_15_percent(got, verdict):
    assert book.near("loss", 0.57, got, share=book.FINAL).verdict == verdict


@pytest.mark.parametrize(("got", "verdict"), [([0.2, 0.94, 0.95], OK), ([0.95, 0.97, 0.98], OUTSIDE),
                                              ([0.90, 0.91, 0.95], OUTSIDE)])
def test_an_accuracy_is_the_median_within_2_points(got, verdict):
    row = book.accuracy("test", 0.9367, got)
    assert row.verdict == verdict
    assert all(f"{value:.2%}" in row.got for value in got)


def test_counts_are_exact():
    assert book.exact("n", 5145, 5145) == Row("n", "5,145", "5,145", OK)
    assert book.exact("n", 5145, 5146).verdict == OUTSIDE
    assert book.at_most("difference", 1e-5, math.inf).verdict == OUTSIDE
    assert book.holds("it works", False) == Row("it works", "yes", "no", OUTSIDE)


# Running


@pytest.fixture
def stages(monkeypatch):
    """Two stages in place of the book's: name -> how often it ran. The second fails until `broken` is cleared."""
    ran = {"good": 0, "frail": 0, "broken": True}

    def good(book, folder):
        ran["good"] += 1
        (folder / "checkpoint").touch()
        yield book_row("fine", OK)

    def frail(book, folder):
        ran["frail"] += 1
        yield book_row("first", OK)
        if ran["broken"]:
            raise RuntimeError("killed | half-way\nthere")
        yield book_row("second", OUTSIDE)

    def book_row(what, verdict):
        return Row(what, "1", "1", verdict)

    monkeypatch.setattr(book, "STAGES", {
        "good": Stage("good", "one that works", "1", good),
        "frail": Stage("frail", "one that fails", "2", frail),
        "big": Stage("big", "one with weights", "3", good, weights=True),
        "slow": Stage("slow", "one that takes hours", "4", good, long=True),
        "reader": Stage("reader", "one that reads", "5", good, files=("no-such-file.txt",))})
    return ran


@pytest.fixture
def run(tmp_path, capsys):
    """main() with a work directory of the test's own; returns (exit code, report)."""

    def call(*arguments: str) -> tuple[int, str]:
        output = tmp_path / "results" / "book.md"
        code = book.main(["--data", str(tmp_path), "--work", str(tmp_path / "work"), "--output", str(output),
                          *arguments])
        assert output.read_text() in capsys.readouterr().out
        return code, output.read_text()

    return call


def test_a_finished_stage_is_kept_and_a_failed_one_runs_again(stages, run):
    code, text = run()
    assert code == 1
    assert "| good | fine | 1 | 1 | ok |" in text
    assert "| frail | one that fails | 2 |  | failed: killed \\| half-way there |" in text
    assert "| big | one with weights | 3 |  | needs weights |" in text
    assert "| slow | one that takes hours | 4 |  | skipped: takes hours, --long runs it |" in text
    assert "| reader | one that reads | 5 |  | skipped: --data has no no-such-file.txt |" in text
    stages["broken"] = False
    code, text = run()
    assert stages == {"good": 1, "frail": 2, "broken": False}
    assert code == 1  # a value is outside its band
    assert "| frail | second | 1 | 1 | outside the band |" in text
    run()
    assert stages["frail"] == 2


def test_only_leaves_other_stages_and_their_results(stages, run):
    code, text = run("--only", "good")
    assert (code, stages["good"], stages["frail"]) == (0, 1, 0)
    assert "| frail | one that fails | 2 |  | skipped: not in --only |" in text
    _, text = run("--only", "slow", "--long")
    assert "| good | fine | 1 | 1 | ok |" in text
    assert "| slow | fine | 1 | 1 | ok |" in text


def test_again_begins_with_an_empty_folder(stages, run, tmp_path):
    run("--only", "good")
    left = tmp_path / "work" / "good" / "old"
    left.touch()
    run("--only", "good", "--again", "good")
    assert stages["good"] == 2
    assert not left.exists()


def test_weights_run_what_needs_them(stages, run, tmp_path):
    _, text = run("--only", "big", "--weights", str(tmp_path))
    assert "| big | fine | 1 | 1 | ok |" in text


def test_results_of_two_processes_are_both_kept(tmp_path):
    first, second = Results(tmp_path / "book.json"), Results(tmp_path / "book.json")
    first.add("a", [Row("x", "1", "1", OK)], 1.0)
    second.add("b", [Row("y", "2", "3", OUTSIDE)], 2.0)
    assert list(first.stages) == ["a", "b"]
    assert first.rows("b") == [Row("y", "2", "3", OUTSIDE)]
    assert first.rows("c") == []


def test_data_are_asked_for(monkeypatch, capsys):
    monkeypatch.delenv("GPTDIST_DATA", raising=False)
    with pytest.raises(SystemExit):
        book.main([])
    assert "--data DIR" in capsys.readouterr().err


def test_every_stage_says_what_it_expects():
    assert all(stage.what and stage.expected for stage in book.STAGES.values())
    assert book.STAGES["ch06-random"].long
    assert {name for name, stage in book.STAGES.items() if stage.weights} == {"ch05-pretrained", "ch06-pretrained"}
