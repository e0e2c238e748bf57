"""benchmarks/serve.py at a tiny size: the report, and a server that is asked and stopped."""

import sys

import pytest

pytest.importorskip("fastapi", reason="pip install 'gptdist[serve]'")
pytest.importorskip("uvicorn", reason="pip install 'gptdist[serve]'")

from benchmarks import serve
from tests.conftest import ROOT

FOUND = {"tokens_per_s_alone": 100.4, "tokens_per_s_together": 512.0, "speed_up": 5.12, "cpu_speed_up": 4.9,
         "first_token_ms_alone": 8.13, "first_token_ms_together": 40.0, "crowd": 300, "crowd_tokens_per_s": 480.0,
         "crowd_first_token_s_max": 9.96, "peak_mib": 337.3, "peak_mib_after_crowd": 340.0}


def test_the_report_has_a_column_for_each_shape():
    lines = serve.report({"quickstart": FOUND, "medium": FOUND | {"speed_up": 3.0}})
    assert lines[0] == "| | quickstart | medium |"
    assert "| faster together | 5.1 | 3.0 |" in lines
    assert "| peak memory after it, MiB | 340 | 340 |" in lines
    assert len({line.count("|") for line in lines}) == 1


@pytest.mark.long
def test_a_server_is_measured(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["serve", "--tokens", "8", "--rounds", "1", "--crowd", "20", "--output",
                                      str(tmp_path / "serve.md")])
    assert serve.main() == 0
    assert (tmp_path / "serve.md").read_text() in capsys.readouterr().out
    assert "| requests of a crowd, all at once | 20 |" in (tmp_path / "serve.md").read_text()
