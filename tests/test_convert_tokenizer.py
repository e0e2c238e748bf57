"""Tokenizers in and out of Hugging Face's files: the same ids for any text."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptdist.convert.tokenizer import find_tokenizer, hugging_face_files, merges_of, named_tokenizer, read_hugging_face
from gptdist.data.tokenizer import EOT, Tokenizer, extend
from gptdist.data.tokenizer_build import build
from gptdist.errors import UserError
from tests.convert_models import TEXT, small_tokenizer

PATTERN = r"\p{N}{1,3}| ?\p{L}+|[^\p{L}\p{N}]"
SMALL = small_tokenizer()
KINDS = {
    "trained": SMALL,
    "bytes": build("bytes"),
    "chat": extend(SMALL, ["<|user|>", "<|assistant|>"]),
    "pattern": build("bpe:262", ["abc 123456 abc abcabc 1234 " * 9], pattern=PATTERN),
    "eot first": Tokenizer(name="x", ranks={token: i + 1 for token, i in SMALL.ranks.items()}, specials={EOT: 0}),
    # tiktoken takes "xyz" as a word though no pair makes it
    "whole words": Tokenizer(name="x", ranks=SMALL.ranks | {b"xyz": 299}, specials={EOT: 300}),
}


def write(tokenizer, folder):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in hugging_face_files(tokenizer, 64).items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_gives_the_same_ids(kind, tmp_path):
    transformers = pytest.importorskip("transformers", reason="the reference is transformers' AutoTokenizer")
    ours = KINDS[kind]
    theirs = transformers.AutoTokenizer.from_pretrained(write(ours, tmp_path))
    for text in (TEXT, "", " ", "xyz xyz", "a" * 300, "\x00\x7f", f"two{EOT}documents", "hi<|user|>there"):
        ids = ours.encode(text, allow_special=True)
        assert theirs(text)["input_ids"] == ids, text
        assert theirs.decode(ids) == text
    assert theirs.eos_token == EOT
    assert len(theirs) == ours.vocab_size


@pytest.mark.parametrize("kind", KINDS)
def test_reading_back_gives_the_same_tokenizer(kind, tmp_path):
    folder = write(KINDS[kind], tmp_path)
    assert read_hugging_face(folder).hash == KINDS[kind].hash
    if (folder / "merges.txt").exists():
        (folder / "tokenizer.json").unlink()
        assert read_hugging_face(folder).hash == KINDS[kind].hash


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_merges_give_tiktokens_ids_for_any_text(text):
    import tokenizers

    theirs = tokenizers.Tokenizer.from_str(hugging_face_files(SMALL, 64)["tokenizer.json"].decode())
    assert theirs.encode(text).ids == SMALL.encode(text)


def test_every_token_has_the_pair_that_makes_it():
    merges = merges_of(SMALL.ranks)
    assert [a + b for a, b in merges] == [token for token in SMALL.ranks if len(token) > 1]
    assert all(a in SMALL.ranks and b in SMALL.ranks for a, b in merges)


def test_where_a_tokenizer_is_looked_for(tmp_path):
    assert find_tokenizer([tmp_path]) is None
    SMALL.save(tmp_path / "tokenizer")
    assert find_tokenizer([tmp_path / "nowhere", tmp_path]).hash == SMALL.hash
    write(KINDS["bytes"], tmp_path / "hf")
    assert named_tokenizer(str(tmp_path / "hf")).hash == KINDS["bytes"].hash
    assert named_tokenizer(str(tmp_path / "hf" / "tokenizer.json")).hash == KINDS["bytes"].hash
    assert named_tokenizer(str(tmp_path)).hash == SMALL.hash
    assert named_tokenizer("bytes").hash == KINDS["bytes"].hash


def change(path, *keys, to):
    found = json.loads(path.read_text())
    table = found
    for key in keys[:-1]:
        table = table[key]
    table[keys[-1]] = to
    path.write_text(json.dumps(found))


@pytest.mark.parametrize(("keys", "to", "message"), [
    (("normalizer",), {"type": "Lowercase"}, "expected a byte-level BPE"),
    (("model", "type"), "WordPiece", "expected a byte-level BPE"),
    (("pre_tokenizer",), {"type": "Whitespace"}, "expected a byte-level BPE"),
    (("pre_tokenizer", "add_prefix_space"), True, "expected a byte-level BPE"),
    (("added_tokens",), [], "<|endoftext|>"),
    (("added_tokens",), ["x"], "expected a byte-level BPE"),
    (("model", "merges"), [], "ids do not follow the merges"),
    (("model", "merges"), ["t h e"], "ids do not follow the merges"),
    (("model", "vocab"), {"a": 0}, "of the 256 byte tokens are missing"),
    (("model", "vocab"), {"a": "b"}, "not a byte-level vocabulary"),
    (("model", "vocab"), {"東": 1}, "not a byte-level vocabulary"),
    (("model",), None, "expected a byte-level BPE"),
])
def test_other_tokenizers_are_refused(keys, to, message, tmp_path):
    change(write(SMALL, tmp_path) / "tokenizer.json", *keys, to=to)
    with pytest.raises(UserError) as error:
        read_hugging_face(tmp_path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_merges_of_another_vocabulary_are_refused(tmp_path):
    folder = write(SMALL, tmp_path)
    (folder / "tokenizer.json").unlink()
    lines = (folder / "merges.txt").read_text().splitlines()
    lines[1], lines[2] = lines[2], lines[1]
    (folder / "merges.txt").write_text("\n".join(lines))
    with pytest.raises(UserError, match="ids do not follow the merges"):
        read_hugging_face(folder)
