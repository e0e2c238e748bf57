"""What no file of this package may do, and what never lands in a run's directory."""

import ast
import json
import os
import types
from pathlib import Path

import pytest

from gptdist import config as config_module
from gptdist import doctor
from gptdist.config import expand_variables
from gptdist.errors import UserError
from gptdist.train_command import train
from tests.conftest import ROOT
from tests.training import run_tiny, tiny_config

PACKAGE = ROOT / "gptdist"
# (file, what it does) -> why that runs nothing that a file or another machine brought.
ALLOWED = {
    ("config.py", "yaml.load"): "its loader is a SafeLoader that refuses keys given twice",
    ("config.py", "yaml.MarkedYAMLError"): "the error that this loader raises",
    ("convert/files.py", "import pickle"): "names its exception, UnpicklingError",
    ("convert/deepspeed.py", "import pickle"): "raises its exception, UnpicklingError",
    ("checkpoint/ranks.py", "broadcast_object_list"): "between the processes of one run, over its own process group",
    ("tasks/__init__.py", "import_module"): "one of this package's own modules, by a task.name that the schema has",
    ("data/questions.py", "import_module"): "modules of Python's own library, by names that stand there",
    ("tasks/dpo.py", "load"): "safetensors.torch.load: a format without code",
}
PICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib", "code"}
OBJECT_COLLECTIVES = {"all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list",
                      "send_object_list", "recv_object_list"}


def findings(source: str) -> list[tuple[int, str]]:
    """(line, what) of everything in a module that can run what it reads."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [(node.lineno, f"import {name}") for name in names if name.split(".")[0] in PICKLERS]
        if isinstance(node, ast.Call) and (what := of_call(node)):
            found.append((node.lineno, what))
    return found


def of_call(call: ast.Call) -> str | None:
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    function = call.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    owner = ast.unparse(function.value) if isinstance(function, ast.Attribute) else ""

    def says(keyword: str, value: object) -> bool:
        return isinstance(keywords.get(keyword), ast.Constant) and keywords[keyword].value is value

    if owner == "" and name in ("eval", "exec", "compile", "__import__"):
        return name
    if owner.split(".")[0] in PICKLERS and name in ("load", "loads", "Unpickler", "open"):
        return f"{owner}.{name}"
    if owner in ("yaml", "ruamel.yaml"):
        return f"yaml.{name}" if name not in ("safe_load", "safe_dump") else None
    if name == "load" and not (owner == "torch" and says("weights_only", True)) and (
            owner in ("torch", "np", "numpy", "torch.jit", "torch.export") or "torch" in owner):
        return "load"
    if (name == "load" and owner in ("np", "numpy")) or says("allow_pickle", True) or says("trust_remote_code", True):
        return "load"
    if name in OBJECT_COLLECTIVES:
        return name
    if (owner == "os" and name in ("system", "popen")) or ("shell" in keywords and not says("shell", False)):
        return "shell"
    if name == "import_module" and not (call.args and isinstance(call.args[0], ast.Constant)):
        return "import_module"
    return None


def test_nothing_that_is_read_is_run():
    seen = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        for line, what in findings(path.read_text()):
            assert (name, what) in ALLOWED, f"gptdist/{name}:{line}: {what} can run what it reads; see ALLOWED here"
            seen.add((name, what))
    assert seen == set(ALLOWED), "reasons for what is no longer there"


@pytest.mark.parametrize("source", [
    "import pickle", "from pickle import loads", "import dill", "import marshal", "import joblib.numpy_pickle",
    "pickle.load(f)", "torch.load(f)", "torch.load(f, weights_only=False)", "torch.load(f, weights_only=w)",
    "np.load(f)", "np.load(f, allow_pickle=True)", "x.read(allow_pickle=True)", "yaml.load(f)", "yaml.unsafe_load(f)",
    "yaml.full_load(f)", "eval(x)", "exec(x)", "compile(x, '', 'exec')", "__import__(x)", "os.system(x)",
    "os.popen(x)", "subprocess.run(x, shell=True)", "subprocess.run(x, shell=s)", "dist.all_gather_object(a, b)",
    "dist.broadcast_object_list(a)", "importlib.import_module(x)", "torch.jit.load(f)",
    "AutoModel.from_pretrained(x, trust_remote_code=True)",
])
def test_the_check_notices(source):
    assert findings(source)


@pytest.mark.parametrize("source", [
    "torch.load(f, weights_only=True)", "yaml.safe_load(f)", "json.load(f)", "json.loads(x)", "ast.literal_eval(x)",
    "model.eval()", "re.compile(x)", "block.compile()", "subprocess.run(x)", "importlib.import_module('json')",
    "self._evaluate(x)", "Tokenizer.load(path)",
])
def test_the_check_lets_pass(source):
    assert findings(source) == []


# Secrets

SECRETS = {"WANDB_API_KEY": "wandb-3f1c", "HF_TOKEN": "hf_9aa7", "AWS_SECRET_ACCESS_KEY": "aws-77d0",
           "GPTDIST_API_KEY": "serve-51be", "DB_PASSWORD": "pass-02cc"}


@pytest.fixture
def secrets(monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    return [value.encode() for value in SECRETS.values()]


class Run:
    def log(self, *_, **__):
        pass

    finish = log


def leaks(folder: Path, secrets: list[bytes]) -> list[str]:
    return [str(path) for path in folder.rglob("*") if path.is_file()
            and any(secret in path.read_bytes() for secret in secrets)]


def test_no_secret_of_the_environment_lands_in_the_run_directory(dataset, tmp_path, secrets, monkeypatch, capsys):
    told = {}
    fake = types.SimpleNamespace(init=lambda **options: told.update(options) or Run(), errors=types.SimpleNamespace())
    monkeypatch.setitem(__import__("sys").modules, "wandb", fake)
    run = tmp_path / "run"
    run_tiny(dataset, run, "--train.steps=4", "--run.wandb=project", "--run.tensorboard=true", "--profile.steps=[2, 2]",
             "--profile.memory=true")
    assert list((run / "profile").iterdir())
    assert told["project"] == "project"
    assert not any(value in json.dumps(told) for value in SECRETS.values())
    # A run that ends with a bug leaves its message in exit.json.
    path = tmp_path / "run.yaml"
    path.write_text(config_module.to_yaml(tiny_config(dataset, tmp_path / "bug")))
    monkeypatch.setattr("gptdist.train_command.Trainer", lambda *_: 1 / 0)
    with pytest.raises(SystemExit):
        train(str(path), [])
    assert json.loads((tmp_path / "bug" / "exit.json").read_text())["code"] == 1
    assert leaks(tmp_path, secrets) == []
    doctor.run(json=True)
    said = "".join(capsys.readouterr())
    assert not any(value in said for value in SECRETS.values())
    (run / "note").write_text("x" + SECRETS["HF_TOKEN"])
    assert leaks(tmp_path, secrets) == [str(run / "note")]  # the search would find one


@pytest.mark.parametrize("path", ["$HF_TOKEN", "a/${WANDB_API_KEY}/b", "$DB_PASSWORD.txt"])
def test_paths_do_not_name_secrets(path, secrets):
    with pytest.raises(UserError, match="looks like a secret"):
        expand_variables(path)


def test_paths_name_other_variables(monkeypatch):
    monkeypatch.setenv("GPTDIST_DATA", "/data")
    assert expand_variables("$GPTDIST_DATA/x") == "/data/x"
    assert expand_variables(f"${{GPTDIST_DATA}}{os.sep}$UNKNOWN_THING") == "/data/$UNKNOWN_THING"
