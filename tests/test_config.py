import contextlib
import dataclasses

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from gptdist import config as config_module
from gptdist.config import SECTIONS, Config, load
from gptdist.errors import UserError


def write(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return str(path)


def test_yaml_then_overrides(tmp_path):
    config = load(write(tmp_path, "model: {width: 64}\noptim:\n  lr: 1e-4\n"), ["--model.width=128", "--run.seed", "7"])
    assert (config.model.width, config.optim.lr, config.run.seed) == (128, 1e-4, 7)
    assert isinstance(config.optim.lr, float)


def test_an_empty_file_means_the_defaults(tmp_path):
    assert load(write(tmp_path, "# nothing yet\n")) == Config()


def test_show_names_every_field_and_is_a_valid_configuration(tmp_path):
    text = config_module.show()
    assert load(write(tmp_path, text)) == Config()
    for name, section in SECTIONS.items():
        for field in dataclasses.fields(section):
            assert f"  {field.name}: " in text, f"{name}.{field.name}"
            assert field.metadata["doc"] in text


def test_resolved_configuration_round_trips():
    config = load(None, ["--data.skip=[[3,5]]", "--train.activation_checkpointing=2", "--checkpoint.init_from=x"])
    assert config_module.from_dict(yaml.safe_load(config_module.to_yaml(config)), "test") == config


@pytest.mark.parametrize(("text", "message"), [
    ("modle: {width: 3}", r"unknown section 'modle'; did you mean 'model'\?"),
    ("model: {widht: 3}", r"unknown key model\.widht; did you mean 'width'\?"),
    ("model: 3", "section 'model' is 3, expected keys"),
    ("model: {width: wide}", "model.width is 'wide', expected int"),
    ("train: {precision: fp8}", "train.precision is 'fp8', expected 'auto' | 'fp32' | 'bf16'"),
    ("[1, 2]", "holds a list, expected sections"),
    ("model: {width: [", "is not valid YAML"),
    ("train: {steps: 5}\nmodel: {width: 64}\ntrain: {batch: 2}\n", "'train' is given twice, first in line 1"),
    ("train: {steps: 5, steps: 6}", "'steps' is given twice"),
    ("model: {n_heads: 5}", "model.n_heads=5 does not divide model.width=256"),
    ("model: {n_kv_heads: 3}", "model.n_kv_heads=3 does not divide model.n_heads=4"),
    ("model: {positions: rope, width: 20}", "even head dimension"),
    ("model: {dropout: 1.0}", "model.dropout is 1.0"),
    ("train: {tokens_per_step: 1000}", "not a multiple of model.context=256: use 1024"),
    ("train: {activation_checkpointing: 0}", "expected none, full or n >= 1"),
    ("schedule: {warmup_steps: 2000}", "schedule.warmup_steps=2000 exceeds train.steps=1000"),
    ("optim: {lr: -1}", "optim.lr is -1.0"),
    ("optim: {name: moun}", "optim.name is 'moun', expected 'adamw' | 'muon'"),
    ("optim: {muon_lr: .inf}", "optim.muon_lr is inf, expected > 0 and finite"),
    ("optim: {momentum: 1}", "optim.momentum is 1.0, expected 0 <= momentum < 1"),
    ("optim: {newton_schulz_steps: 0}", "optim.newton_schulz_steps is 0, expected at least 1"),
    ("{optim: {name: muon}, parallel: {strategy: zero2}}", "optim.name=muon with parallel.strategy=zero2: Muon needs"),
    ("{optim: {name: muon}, parallel: {strategy: fsdp, tensor: 2}}", "optim.name=muon with parallel.tensor=2: Muon"),
    ("data: {skip: [[5, 3]]}", "data.skip has"),
    ("run: {seed: -1}", "run.seed is -1"),
])
def test_bad_values_are_named(tmp_path, text, message):
    with pytest.raises(UserError) as caught:
        load(write(tmp_path, text))
    assert message.replace("\\", "") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("overrides", "message"), [
    (["--model.widht=3"], "did you mean 'width'?"),
    (["--width=3"], "overrides are written --section.key=value"),
    (["width"], "unexpected argument 'width'"),
    (["--model.width"], "--model.width has no value"),
])
def test_bad_overrides_are_named(overrides, message):
    with pytest.raises(UserError) as caught:
        load(None, overrides)
    assert message in str(caught.value)


def test_missing_and_binary_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot read the configuration .*none\.yaml"):
        load(str(tmp_path / "none.yaml"))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\x00\x01")
    with pytest.raises(UserError, match="is not UTF-8 text"):
        load(str(tmp_path / "binary.yaml"))


json_like = st.recursive(
    st.none() | st.booleans() | st.integers(-10, 10**6) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=8), children, max_size=3),
    max_leaves=8)
names = [f"{section}.{field.name}" for section, cls in SECTIONS.items() for field in dataclasses.fields(cls)]


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(st.sampled_from(names), json_like, max_size=3))
def test_any_values_give_a_config_or_a_user_error(values):
    nested = {}
    for name, value in values.items():
        section, _, key = name.partition(".")
        nested.setdefault(section, {})[key] = value
    with contextlib.suppress(UserError):
        config = config_module.from_dict(nested, "test")
        assert config_module.from_dict(config_module.to_dict(config), "again") == config


def test_files_of_examples_may_name_variables(monkeypatch):
    options = ["--task.name=classify", "--task.train_data=$EXAMPLES/sms", "--task.test_data=plain"]
    monkeypatch.setenv("EXAMPLES", "/examples")
    task = config_module.load(None, options).task
    assert (task.train_data, task.val_data, task.test_data) == ("/examples/sms", "", "plain")
    monkeypatch.delenv("EXAMPLES")
    assert config_module.load(None, options).task.train_data == "$EXAMPLES/sms"  # which then is not found
