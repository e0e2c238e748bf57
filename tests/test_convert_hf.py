"""Hugging Face directories in and out: equal logits, equal tokens, equal bits, and refusals."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptdist.checkpoint import load_tensors
from gptdist.checkpoint.restore import load_model
from gptdist.checkpoint.verify_values import verify_values
from gptdist.cli import main
from gptdist.convert import gpt2 as gpt2_layout
from gptdist.convert.exporter import export_model
from gptdist.convert.hf import model_config
from gptdist.convert.importer import import_model
from gptdist.data.tokenizer_build import build
from gptdist.errors import UserError
from tests.convert_models import (
    VOCAB,
    Evil,
    gpt2,
    hf_logits,
    imported,
    logits,
    save_hf,
    small_tokenizer,
    some_tokens,
)
from tests.training import run_tiny

pytest.importorskip("transformers", reason="the reference is transformers")


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer()


@pytest.fixture(scope="module")
def model():
    return gpt2()


@pytest.fixture(scope="module")
def checkpoint(model, tokenizer, tmp_path_factory):
    return imported(model, tmp_path_factory.mktemp("hf"), tokenizer)


# In

@pytest.mark.parametrize("form", ["safetensors", "safetensors-shards", "bin", "bin-shards", "bin-legacy"])
def test_import_gives_equal_logits(form, model, tokenizer, tmp_path):
    path = imported(model, tmp_path, tokenizer, form)
    tokens = some_tokens()
    assert (logits(path, tokens) - hf_logits(model, tokens)).abs().max() < 1e-4
    assert load_model(path)[1].hash == tokenizer.hash
    assert not verify_values(path).optimizer


@pytest.mark.parametrize("options", [{"tie_word_embeddings": False}, {"n_inner": 100}, {"layer_norm_epsilon": 0.01}])
def test_import_of_variants(options, tokenizer, tmp_path):
    model = gpt2(**options)
    path = imported(model, tmp_path, tokenizer)
    tokens = some_tokens()
    assert (logits(path, tokens) - hf_logits(model, tokens)).abs().max() < 1e-4


def test_import_of_the_bare_model_in_half_precision(model, tokenizer, tmp_path):
    """GPT2Model's names have no prefix `transformer.`, as in OpenAI's published files; old ones have mask buffers."""
    folder = save_hf(model, tmp_path / "hf", tokenizer=tokenizer)
    state = load_file(folder / "model.safetensors")
    state = {k.removeprefix("transformer."): v.to(torch.bfloat16) for k, v in state.items()}
    save_file(state | {"h.0.attn.bias": torch.ones(1, 1, 4, 4)}, folder / "model.safetensors")
    path = import_model(str(folder), str(tmp_path / "out")).path
    found = load_tensors(path)["model.wpe.weight"]
    assert torch.equal(found, model.transformer.wpe.weight.to(torch.bfloat16).float())


@pytest.mark.parametrize("ratio_of", [(100, 48), (3072, 768), (7, 3), (1001, 1000)])
def test_every_hidden_width_is_exact(ratio_of):
    inner, width = ratio_of
    found = {"model_type": "gpt2", "n_inner": inner, "n_embd": width, "n_head": 1}
    assert model_config(found, "config.json")[0].hidden == inner


def test_import_from_the_command_line_generates(model, tokenizer, tmp_path, capsys):
    folder = save_hf(model, tmp_path / "hf")
    tokenizer.save(tmp_path / "tok")
    command = ["import", str(folder), "--output", str(tmp_path / "out")]
    assert main(command) == 2
    assert "no tokenizer beside the model" in capsys.readouterr().err
    assert main([*command, "--tokenizer", str(tmp_path / "tok")]) == 0
    for words in (["inspect"], ["verify"], ["generate", "--prompt", "the", "--max-new-tokens", "3"]):
        assert main([words[0], str(tmp_path / "out"), *words[1:]]) == 0
    assert "weights only" in capsys.readouterr().out


def test_training_starts_from_it_but_does_not_resume_it(dataset, tmp_path):
    from gptdist.data.tokenizer_build import build

    sizes = {"vocab_size": 257, "bos_token_id": 256, "eos_token_id": 256}
    path = imported(gpt2(**sizes), tmp_path, build("bytes"))
    rows = run_tiny(dataset, tmp_path / "run", "--train.steps=1", "--schedule.warmup_steps=0",
                    f"--checkpoint.init_from={path}")
    assert len(rows) == 1
    with pytest.raises(UserError, match=r"(imported, not trained here|no optimizer state).*init_from"):
        run_tiny(dataset, tmp_path / "other", f"--checkpoint.resume={path}")


def test_import_holds_one_tensor_at_a_time(tokenizer, tmp_path):
    """An 88 MB model whose largest tensor has 4 MB; a process that held it once would need as much more."""
    model = gpt2(n_embd=512, n_layer=7, bos_token_id=None, eos_token_id=None)
    folder = save_hf(model, tmp_path / "hf", tokenizer=tokenizer)
    small = save_hf(gpt2(), tmp_path / "small", tokenizer=tokenizer)
    assert (folder / "model.safetensors").stat().st_size > 80 << 20
    # Not getrusage: its peak outlives exec, so that the parent's would be found.
    code = (
        "import sys; from gptdist.convert.importer import import_model; "
        "from gptdist.convert.exporter import export_model\n"
        "def kib(key): return int(open('/proc/self/status').read().split(key + ':')[1].split()[0])\n"
        "small = import_model(sys.argv[4], sys.argv[2] + '-s').path\n"  # loads the libraries
        "export_model(small, sys.argv[3] + '-s', format='hf')\n"
        "before = kib('VmRSS'); path = import_model(sys.argv[1], sys.argv[2]).path; middle = kib('VmHWM')\n"
        "export_model(path, sys.argv[3], format='hf'); print((middle - before) << 10, (kib('VmHWM') - middle) << 10)")
    done = subprocess.run([sys.executable, "-c", code, folder, tmp_path / "in", tmp_path / "out", small],
                          text=True, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    more_in, more_out = map(int, done.stdout.split())
    # Mapped pages of the files read count as resident until the kernel wants them, so one bound below the model's size
    # serves both ways: 24 to 64 MB were seen.
    assert more_in < 75 << 20, more_in
    assert more_out < 75 << 20, more_out


# Bad input: one line, and nothing is left behind

def truncate(folder, tmp_path):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def change_config(**values):
    def change(folder, tmp_path):
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return change


def code_instead_of_weights(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    torch.save({"transformer.wte.weight": Evil(tmp_path / "sentinel")}, folder / "pytorch_model.bin")


def edit_state(edit):
    def change(folder, tmp_path):
        state = load_file(folder / "model.safetensors")
        edit(state)
        save_file(state, folder / "model.safetensors")
    return change


def not_json(folder, tmp_path):
    (folder / "config.json").write_text("{")


def no_weights(folder, tmp_path):
    (folder / "model.safetensors").unlink()


def garbage_bin(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00garbage")


def index_beside_file(folder, tmp_path):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {}}')


def other_tokenizer(folder, tmp_path):
    for file in folder.glob("*.txt"):
        file.unlink()
    small = json.loads((folder / "tokenizer.json").read_text())
    merge = small["model"]["merges"].pop()
    del small["model"]["vocab"][merge.replace(" ", "")]
    eot = small["added_tokens"][0]
    eot["id"] -= 1
    small["model"]["vocab"][eot["content"]] -= 1
    (folder / "tokenizer.json").write_text(json.dumps(small))


@pytest.mark.parametrize(("spoil", "message"), [
    (truncate, "not a complete safetensors file"),
    (change_config(n_layer=3), "no tensor transformer.h.2.attn.c_attn.bias"),
    (change_config(n_layer=1), "is no part of the GPT-2 of config.json"),
    (change_config(n_embd=36), "they belong to different models"),
    (change_config(n_embd=33), r"hf/config.json: model.n_heads=4 does not divide"),
    (change_config(layer_norm_epsilon="x"), "config.json: layer_norm_epsilon is 'x', expected a number"),
    (change_config(resid_pdrop=[1]), r"config.json: resid_pdrop is \[1\], expected a number"),
    (edit_state(lambda state: state["transformer.wpe.weight"][3].fill_(float("inf"))),
     r"hf/model.safetensors: transformer.wpe.weight has values that are not finite"),
    (change_config(n_embd="wide"), "n_embd is 'wide'"),
    (change_config(vocab_size=301), r"transformer.wte.weight has shape \(300, 32\)"),
    (change_config(model_type="llama"), "model_type is 'llama', only 'gpt2'"),
    (change_config(activation_function="relu"), "activation_function is 'relu'"),
    (change_config(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx is True"),
    (change_config(tie_word_embeddings=False), "no tensor lm_head.weight"),
    (code_instead_of_weights, "refused, nothing of it was run"),
    (edit_state(lambda state: state.update({"lm_head.weight": torch.ones(VOCAB, 32)})), "config.json ties them"),
    (edit_state(lambda state: state.update({"score.weight": torch.ones(2, 32)})), "score.weight is no part of"),
    (edit_state(lambda s: s.update({"transformer.ln_f.bias": torch.ones(32, dtype=torch.int8)})), "floating-point"),
    (edit_state(lambda state: state.pop("transformer.ln_f.bias")), "no tensor transformer.ln_f.bias"),
    (edit_state(lambda state: state.update({"ln_f.bias": torch.ones(32)})), "are the same parameter"),
    (not_json, "config.json is not JSON"),
    (no_weights, "no weights: expected model.safetensors"),
    (garbage_bin, "pytorch_model.bin"),
    (index_beside_file, "files of two saves"),
    (other_tokenizer, r"the model's vocabulary has 300 rows, tokenizer hf has 299"),
])
def test_bad_directories(spoil, message, model, tokenizer, tmp_path):
    folder = save_hf(model, tmp_path / "hf", tokenizer=tokenizer)
    spoil(folder, tmp_path)
    with pytest.raises(UserError, match=message) as error:
        import_model(str(folder), str(tmp_path / "out"))
    assert "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]  # no output, no temporary, no sentinel


def test_a_tokenizer_that_is_not_the_models_own_is_noted(model, tokenizer, tmp_path):
    folder = save_hf(model, tmp_path / "hf", tokenizer=tokenizer)
    text = "other words give other tokens of the same number: quick brown foxes jump over lazy dogs "
    build(f"bpe:{VOCAB}", [text * 9]).save(tmp_path / "other")
    tokenizer.save(tmp_path / "same")
    notes = [import_model(str(folder), str(tmp_path / f"out-{name}"), tokenizer=str(tmp_path / name)).note
             for name in ("same", "other")]
    assert notes[0] == ""
    assert notes[1].endswith("other is not the tokenizer beside the model")


def shards(folder, number):
    return sorted(folder.glob("model-*.safetensors"))[number]


def lose_a_shard(folder):
    shards(folder, 1).unlink()


def add_a_shard(folder):
    shards(folder, 1).with_name("model-00001-of-00077.safetensors").write_bytes(shards(folder, 1).read_bytes())


def swap_shards(folder):
    a, b = shards(folder, 0), shards(folder, 1)
    a.rename(folder / "x")
    b.rename(a)
    (folder / "x").rename(b)


def extra_tensor(folder):
    file = shards(folder, 0)
    save_file(load_file(file) | {"transformer.more": torch.ones(2)}, file)


def escape(folder):
    file = folder / "model.safetensors.index.json"
    file.write_text(file.read_text().replace(shards(folder, 0).name, "../../etc/passwd"))


@pytest.mark.parametrize(("spoil", "message"), [
    (lose_a_shard, "names model-00002-of-.* which is not in"),
    (add_a_shard, "does not name: files of two saves"),
    (swap_shards, "places there; get all files of one save"),
    (extra_tensor, "transformer.more, which model.safetensors.index.json does not place there"),
    (escape, "expected a weight_map"),
    (lambda folder: (folder / "model.safetensors.index.json").unlink(), "but no model.safetensors.index.json"),
])
def test_shards_of_mixed_origin(spoil, message, model, tokenizer, tmp_path):
    folder = save_hf(model, tmp_path / "hf", "safetensors-shards", tokenizer)
    spoil(folder)
    with pytest.raises(UserError, match=message):
        import_model(str(folder), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten(checkpoint, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    (tmp_path / "out.gguf").write_text("keep")
    source = str(checkpoint.parent / "hf")
    for call in (lambda: import_model(source, str(tmp_path / "out")),
                 lambda: export_model(checkpoint, str(tmp_path / "out"), format="hf"),
                 lambda: export_model(checkpoint, str(tmp_path / "out.gguf"), format="gguf")):
        with pytest.raises(UserError, match="already exists and is never overwritten"):
            call()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "out.gguf"]
    assert (tmp_path / "out" / "mine").read_text() == (tmp_path / "out.gguf").read_text() == "keep"


def test_a_failure_half_way_leaves_nothing(checkpoint, tmp_path, monkeypatch):
    """The disk is full after the first tensors."""
    calls = []

    def fail(value, config):
        calls.append(value)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        return value

    monkeypatch.setattr(gpt2_layout, "ungroup_qkv", fail)
    for format in ("hf", "gguf"):
        calls.clear()
        with pytest.raises(UserError, match="No space left on device"):
            export_model(checkpoint, str(tmp_path / "out"), format=format)
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("make", "message"), [
    (lambda path: None, "does not exist"),
    (lambda path: path.mkdir(), "unknown format; expected a directory with config.json"),
    (lambda path: path.write_text("x"), "unknown format"),
])
def test_unknown_sources(make, message, tmp_path):
    make(tmp_path / "source")
    with pytest.raises(UserError, match=message):
        import_model(str(tmp_path / "source"), str(tmp_path / "out"))


def test_wrong_or_unknown_format_names(checkpoint, tmp_path):
    source = str(checkpoint.parent / "hf")
    for format, message in (("nanogpt", "expected ckpt.pt"), ("deepspeed", "expected mp_rank_00"), ("x", "unknown f")):
        with pytest.raises(UserError, match=message):
            import_model(source, str(tmp_path / "out"), format=format)
    with pytest.raises(UserError, match="unknown format 'onnx'"):
        export_model(checkpoint, str(tmp_path / "out"), format="onnx")
    with pytest.raises(UserError, match="of gptdist already"):
        import_model(str(checkpoint), str(tmp_path / "out"))
