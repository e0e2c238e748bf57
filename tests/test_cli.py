"""The command line as a user sees it: exit codes, one-line errors, output."""

import json
import os
import shutil
from pathlib import Path

import pytest
import yaml

from gptdist.cli import build_parser, main
from tests.conftest import run_gptdist
from tests.training import run_tiny


@pytest.fixture(scope="module")
def run(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "run"
    run_tiny(dataset, folder, "--train.stop_at=2")
    return folder


def test_every_command_has_help(capsys):
    for name, parser in build_parser()._subparsers._group_actions[0].choices.items():
        assert parser.description, name
        with pytest.raises(SystemExit) as end:
            main([name, "--help"])
        assert end.value.code == 0
    assert "--prompts-file" in capsys.readouterr().out


def test_ctrl_c_ends_with_130(monkeypatch, capsys):
    monkeypatch.setattr("gptdist.config.show", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(["config"]) == 130
    assert capsys.readouterr().err == "gptdist config: interrupted\n"


def test_help_does_not_import_torch():
    """Help and the configuration are there at once."""
    code = ("import sys; from gptdist.cli import main; main(['config']); "
            "assert 'torch' not in sys.modules and 'tiktoken' not in sys.modules")
    import subprocess
    import sys

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_generate(run, capsys):
    assert main(["generate", str(run), "--prompt", "def ", "--max-new-tokens", "5", "--temperature", "0"]) == 0
    assert capsys.readouterr().out.startswith("def ")


def test_generate_a_batch_as_json(run, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("one\ntwo\n")
    assert main(["generate", str(run), "--prompts-file", str(tmp_path / "prompts.txt"), "--max-new-tokens", "4",
                 "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["prompt"] for row in rows] == ["one", "two"]
    assert {row["finish"] for row in rows} <= {"length", "end"}


def test_generate_few_shot(run, tmp_path, capsys):
    (tmp_path / "shots.jsonl").write_text('{"input": "a", "output": "b"}\n')
    assert main(["generate", str(run), "--prompt", "c", "--examples", str(tmp_path / "shots.jsonl"),
                 "--max-new-tokens", "2"]) == 0
    assert capsys.readouterr().out.startswith("a -> b\nc ->")


def test_inspect(run, capsys):
    assert main(["inspect", str(run), "--verify", "--tensors"]) == 0
    text = capsys.readouterr().out
    assert "all correct" in text
    assert "model.wte.weight" in text
    assert main(["inspect", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["train_state"]["step"] == 2
    assert found["tensors"]["model.wte.weight"] == {"shape": [384, 32], "dtype": "float32"}


def test_config_shows_a_file_resolved(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("model: {width: 64}")
    assert main(["config", str(tmp_path / "run.yaml"), "--optim.lr=1e-4"]) == 0
    values = yaml.safe_load(capsys.readouterr().out)
    assert (values["model"]["width"], values["optim"]["lr"]) == (64, 1e-4)


def test_evaluate_and_plot(run, dataset, tmp_path, capsys):
    assert main(["evaluate", str(run), "--data", str(dataset), "--bigram"]) == 0
    assert "bigram model" in capsys.readouterr().out
    assert main(["plot", str(run), "--output", str(tmp_path / "x.png")]) == 0
    assert (tmp_path / "x.png").stat().st_size > 1000


def test_doctor(capsys):
    assert main(["doctor", "--json"]) == 0
    assert "bias_gelu" in capsys.readouterr().out


@pytest.mark.parametrize(("argv", "message"), [
    (["generate", "nowhere", "--prompt", "x"], "nowhere is not a directory"),
    (["generate", "{run}", "--prompt", "x", "--top-p", "2"], "top-p is 2.0"),
    (["generate", "{run}", "--prompt", "x", "--device", "abacus"], "--device abacus is not supported"),
    (["generate", "{run}", "--prompt", "x", "--device", "meta"], "--device meta is not supported"),
    (["evaluate", "{run}", "--device", "mps"], "--device mps is not supported"),
    (["generate", "{run}", "--prompt", "x", "--device", "cuda:-1"], "--device cuda:-1 is not supported"),
    (["generate", "{run}", "--prompts-file", "nowhere.txt"], "cannot read nowhere.txt"),
    (["generate", "{run}", "--prompt", "x", "--temperature", "1e-45"], "temperature is 1e-45"),
    (["generate", "{run}", "--prompt", "\udcff"], "lone surrogates"),
    (["inspect", "."], "holds no complete step-* directory"),
    (["evaluate", "{run}", "--data", "nowhere"], "nowhere does not exist"),
    (["plot", "{data}"], "has no metrics.jsonl"),
    (["train", "nowhere.yaml"], "cannot read the configuration nowhere.yaml"),
    (["train", "configs/quickstart.yaml", "--model.widht=3"], "did you mean 'width'?"),
    (["train", "configs/quickstart.yaml", "--model.width=wide"], "command line: model.width is 'wide', expected int"),
    (["train", "configs/quickstart.yaml", "--optim.lr=.inf"], "command line: optim.lr is inf"),
    (["train", "configs/quickstart.yaml", "--model.n_heads=7"], "command line: model.n_heads=7 does not divide"),
    (["train", "{tmp}/bad.yaml", "--optim.lr=1"], "bad.yaml: model.width is 'wide', expected int"),
    (["train", "{tmp}/bad.yaml", "--model.width=64"], "bad.yaml: model.width is 'wide', expected int"),
    (["config", "{tmp}/odd.yaml", "--optim.lr=1"], "odd.yaml: model.n_heads=5 does not divide model.width=256"),
    (["config", "--model.rope_theta=0"], "command line: model.rope_theta is 0.0, expected > 0"),
    (["config", "--model.norm_eps=-1e-5"], "command line: model.norm_eps is -1e-05, expected > 0"),
    (["config", "--run.dir="], "command line: run.dir is empty"),
    (["prepare", "--input", "nowhere.txt", "--output", "{tmp}/o", "--tokenizer", "bytes"], "nowhere.txt"),
    (["prepare", "--input", "{binary}", "--output", "{tmp}/o", "--tokenizer", "bytes"], "binary"),
    (["prepare", "--input", "{binary}", "--output", "{tmp}/o", "--tokenizer", "abc"], "abc"),
])
def test_user_errors_are_one_line_and_exit_code_2(argv, message, run, dataset, tmp_path, capsys):
    (tmp_path / "binary.txt").write_bytes(b"text\x00\x01\x02" * 100)
    (tmp_path / "bad.yaml").write_text("model: {width: wide}")
    (tmp_path / "odd.yaml").write_text("model: {n_heads: 5}")
    names = {"run": run, "data": dataset, "tmp": tmp_path, "binary": tmp_path / "binary.txt"}
    assert main([word.format(**names) for word in argv]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "o").exists()


def flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_verify_of_a_dataset_and_a_checkpoint(run, dataset, tmp_path, capsys):
    assert main(["verify", str(dataset)]) == 0
    assert main(["verify", str(dataset / "val")]) == 0
    assert main(["verify", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(": all right")[0] for line in lines] == [
        str(dataset / "train"), str(dataset / "val"), str(dataset / "val"), str(run / "checkpoints" / "step-00000002")]
    shutil.copytree(dataset, tmp_path / "bad")
    flip_last_byte(tmp_path / "bad" / "val" / "shard-00000.tokens.bin")
    assert main(["verify", str(tmp_path / "bad")]) == 2
    assert "val/shard-00000.tokens.bin: sha256" in capsys.readouterr().err
    for split in ("val", "train"):
        (tmp_path / "bad" / split / "meta.json").unlink()
        if split == "val":
            assert main(["verify", str(tmp_path / "bad")]) == 2, "its val/ is there, but is no split"
            assert "val: has no meta.json" in capsys.readouterr().err
    assert main(["verify", str(tmp_path / "bad")]) == 2


def test_damaged_weights_are_not_used(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    flip_last_byte(tmp_path / "run" / "checkpoints" / "step-00000002" / "shard-00000.safetensors")
    for argv in (["generate", str(tmp_path / "run"), "--prompt", "x", "--max-new-tokens", "1"],
                 ["evaluate", str(tmp_path / "run")]):
        assert main(argv) == 2
        error = capsys.readouterr().err
        assert "step-00000002/shard-00000.safetensors: its checksum is wrong" in error
        assert error.count("\n") == 1
        assert main([*argv, "--no-verify"]) == 0
        assert capsys.readouterr().err == ""


def test_a_skipped_checkpoint_is_named(run, tmp_path, capsys):
    """A later checkpoint that is incomplete is passed over, and one line says so."""
    root = tmp_path / "run" / "checkpoints"
    shutil.copytree(run, tmp_path / "run")
    for argv in (["generate", "--prompt", "x", "--max-new-tokens", "1"], ["evaluate"], ["inspect"]):
        shutil.copytree(root / "step-00000002", root / "step-00000004")
        (root / "step-00000004" / "index.json").unlink()
        argv.insert(1, str(tmp_path / "run"))
        assert main(argv) == 0
        note = capsys.readouterr().err
        assert note.startswith(f"gptdist {argv[0]}: using step-00000002, skipped step-00000004: not a complete")
        assert note.endswith("step-00000004: index.json: No such file or directory\n")
        assert note.count("\n") == 1
        (root / "step-00000004").rename(root / "step-00000001")
        assert main(argv) == 0
        argv[1] = str(root / "step-00000002")
        assert main(argv) == 0
        assert capsys.readouterr().err == "", "an earlier one does not matter, nor do others where one is given"
        shutil.rmtree(root / "step-00000001")


def test_verify_of_a_run_whose_newest_checkpoint_is_incomplete(run, tmp_path, capsys):
    root = tmp_path / "run" / "checkpoints"
    shutil.copytree(run, tmp_path / "run")
    shutil.copytree(root / "step-00000002", root / "step-00000004")
    (root / "step-00000004" / "index.json").unlink()
    assert main(["verify", str(tmp_path / "run")]) == 2
    done = capsys.readouterr()
    assert "step-00000002: all right" in done.out
    assert done.err.startswith("gptdist verify: only step-00000002 is all right, not step-00000004: not a complete")
    assert done.err.count("\n") == 1
    assert main(["verify", str(root / "step-00000002")]) == 0


def test_long_prompts_are_noted_once(run, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("x" * 40 + "\nshort\n" + "y" * 50 + "\n")
    argv = ["generate", str(run), "--max-new-tokens", "1", "--batch-size", "2"]
    assert main([*argv, "--prompts-file", str(tmp_path / "p.txt")]) == 0
    assert capsys.readouterr().err == ("gptdist generate: 2 prompts have up to 50 tokens, the context 32: "
                                       "only the last 16 are used\n")
    assert main([*argv, "--prompt", "z" * 33]) == 0
    assert "a prompt has 33 tokens" in capsys.readouterr().err
    assert main([*argv, "--prompt", "z" * 32]) == 0
    assert capsys.readouterr().err == ""


def test_generate_does_not_depend_on_the_batch_size(run, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("one\ntwo and\nthree\n")
    texts = []
    for size in ("1", "2", "16"):
        assert main(["generate", str(run), "--prompts-file", str(tmp_path / "p.txt"), "--max-new-tokens", "50",
                     "--batch-size", size]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] == texts[2]


def test_debug_shows_the_traceback(capsys):
    assert main(["inspect", "nowhere", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_missing_device_is_exit_code_3(run, capsys):
    import torch

    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    assert main(["generate", str(run), "--prompt", "x", "--device", "cuda"]) == 3
    assert "torch sees no GPU" in capsys.readouterr().err


def test_a_device_number_beyond_the_devices_is_exit_code_3(run, monkeypatch, capsys):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert main(["evaluate", str(run), "--device", "cuda:2"]) == 3
    assert "--device cuda:2, but torch sees 2 GPUs: use cuda:0 to cuda:1" in capsys.readouterr().err


def test_python_dash_m_returns_the_exit_code():
    done = run_gptdist("train", "nowhere.yaml")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1


def test_other_ranks_do_not_repeat_an_error_all_see():
    done = run_gptdist("train", "nowhere.yaml", RANK="1", WORLD_SIZE="2")
    assert (done.returncode, done.stderr) == (2, "")


def test_a_closed_pipe_is_no_error(run):
    import subprocess
    import sys

    command = f"{sys.executable} -m gptdist config --show | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, env=os.environ)
    assert "Traceback" not in done.stderr
