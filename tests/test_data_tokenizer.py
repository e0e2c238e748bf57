"""Tokenizers: round trips, identity, files, training, bad input."""

import base64
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptdist.data import tokenizer_build
from gptdist.data.corpus import embedded_documents
from gptdist.data.tokenizer import EOT, StreamDecoder, Tokenizer, add_tokens, build_tokenizer, extend, parts_of_new
from gptdist.errors import UserError

BYTES = build_tokenizer("bytes")
TEXT = "Hello, world! It's 12345 naïve 日本語 🙂🙃\n\n  indented\tcode  <|endoftext|> end  "


@pytest.fixture(scope="module")
def corpus():
    return list(embedded_documents())[:120]


@pytest.fixture(scope="module")
def bpe(corpus):
    return build_tokenizer("bpe:1000", corpus)


@given(st.text())
def test_any_text_round_trips(text):
    assert BYTES.decode(BYTES.encode(text)) == text


@given(st.text(alphabet=st.sampled_from("ab \n🙂é"), max_size=60))
def test_stream_decoder_gives_the_text_and_never_half_a_character(text):
    decoder = StreamDecoder(BYTES)
    parts = [decoder.push(i) for i in BYTES.encode(text)]
    assert "".join(parts) + decoder.finish() == text
    assert not any("\ufffd" in part for part in parts)


def test_stream_decoder_replaces_what_stays_incomplete():
    decoder = StreamDecoder(BYTES)
    assert decoder.push("é".encode()[0]) == ""
    assert decoder.finish() == "\ufffd"


def test_bytes_vocabulary():
    assert BYTES.vocab_size == 257
    assert BYTES.eot == 256
    assert BYTES.encode("Aé") == [65, 0xC3, 0xA9]


def test_specials_in_text_are_plain_text_unless_asked(bpe):
    assert bpe.eot not in bpe.encode(TEXT)
    assert bpe.encode(TEXT, allow_special=True).count(bpe.eot) == 1
    assert bpe.decode(bpe.encode(TEXT)) == TEXT
    assert bpe.decode(bpe.encode(TEXT, allow_special=True)) == TEXT


@pytest.mark.parametrize("allow_special", [False, True])
def test_text_without_a_utf8_form(allow_special):
    with pytest.raises(UserError, match=r"lone surrogates, the first '\\udcff' at character 3"):
        BYTES.encode("abc\udcff", allow_special=allow_special)


def test_long_whitespace_does_not_panic(bpe):
    text = "a" + "\n" * 1_200_000 + "b"
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text


def test_decode_names_an_unknown_id(bpe):
    for bad in (1000, 10**6, -1):
        with pytest.raises(ValueError, match=f"token id {bad} is not in tokenizer"):
            bpe.decode([65, bad])


def test_trained_bpe_equals_hugging_face(corpus, bpe):
    """The ranks give tiktoken the same tokens that Hugging Face's encoder gives, through the map of ids."""
    trained = tokenizer_build.train_hugging_face(999, corpus)
    names = {i: name for name, i in trained.get_vocab().items()}
    assert bpe.vocab_size == 1000
    for text in [*corpus, *list(embedded_documents())[-20:], TEXT]:
        expected = [bpe.ranks[tokenizer_build.unicode_to_bytes(names[i])] for i in trained.encode(text).ids]
        assert bpe.encode(text) == expected


def test_save_and_load(tmp_path, bpe):
    bpe.save(tmp_path / "tokenizer")
    for path in (tmp_path / "tokenizer", tmp_path):  # the second as a prepared dataset has it
        loaded = build_tokenizer(str(path))
        assert loaded.hash == bpe.hash
        assert loaded.name == bpe.name
        assert loaded.encode(TEXT) == bpe.encode(TEXT)


def test_hash_depends_on_pattern_ranks_and_specials_but_not_on_name(bpe):
    same = Tokenizer(name="other", ranks=bpe.ranks, specials=bpe.specials, pattern=bpe.pattern)
    assert same.hash == bpe.hash
    ranks = dict(bpe.ranks)
    ranks[b"a"], ranks[b"b"] = ranks[b"b"], ranks[b"a"]
    others = [
        Tokenizer(name="x", ranks=ranks, specials=bpe.specials),
        Tokenizer(name="x", ranks=bpe.ranks, specials=bpe.specials, pattern=r"\S+|\s+"),
        extend(bpe, ["<|user|>"]),
    ]
    assert len({bpe.hash, *(other.hash for other in others)}) == 4


def test_extend_adds_after_the_last_id_and_is_idempotent(bpe):
    extended = extend(extend(bpe, ["<|user|>", "<|assistant|>"]), ["<|user|>"])
    assert extended.vocab_size == bpe.vocab_size + 2
    assert extended.specials == {EOT: 999, "<|user|>": 1000, "<|assistant|>": 1001}
    assert extended.encode("<|user|>hi", allow_special=True) == [1000, *bpe.encode("hi")]


def test_tiktoken_file(tmp_path, bpe):
    bpe.save(tmp_path)
    (tmp_path / "tokenizer.tiktoken").rename(tmp_path / "mine.tiktoken")
    assert build_tokenizer(str(tmp_path / "mine.tiktoken")).hash == bpe.hash


def write_gpt2_files(directory: Path, tokenizer: Tokenizer) -> None:
    """Write a tokenizer as GPT-2's two files, with GPT-2's order of the byte tokens."""
    characters = {byte: character for character, byte in tokenizer_build._BYTE_OF_CHARACTER.items()}
    order = list(tokenizer_build._BYTE_OF_CHARACTER.values())
    names = {token: "".join(characters[b] for b in token) for token in tokenizer.ranks}
    encoder = {characters[byte]: i for i, byte in enumerate(order)}
    merges = []
    for token, rank in sorted(tokenizer.ranks.items(), key=lambda item: item[1])[256:]:
        encoder[names[token]] = rank
        split = next(k for k in range(1, len(token)) if token[:k] in names and token[k:] in names)
        merges.append(f"{names[token[:split]]} {names[token[split:]]}")
    encoder[EOT] = tokenizer.eot
    (directory / "encoder.json").write_text(json.dumps(encoder))
    (directory / "vocab.bpe").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")


def test_gpt2_files(tmp_path, bpe):
    write_gpt2_files(tmp_path, bpe)
    loaded = build_tokenizer(str(tmp_path))
    assert loaded.eot == bpe.eot
    assert loaded.decode(loaded.encode(TEXT)) == TEXT
    assert [loaded.token_bytes(i) for i in loaded.encode(TEXT)] == [bpe.token_bytes(i) for i in bpe.encode(TEXT)]


def test_gpt2_files_agree_with_tiktokens_reader(tmp_path, bpe, monkeypatch):
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    write_gpt2_files(tmp_path, bpe)
    expected = data_gym_to_mergeable_bpe_ranks(str(tmp_path / "vocab.bpe"), str(tmp_path / "encoder.json"))
    assert build_tokenizer(str(tmp_path)).ranks == expected


@pytest.mark.skipif("GPTDIST_DATA" not in os.environ, reason="GPTDIST_DATA (directory of real data) is unset")
def test_real_gpt2_on_the_books_text():
    data = Path(os.environ["GPTDIST_DATA"])
    gpt2 = build_tokenizer(str(data / "gpt2"))
    assert (gpt2.vocab_size, gpt2.eot) == (50257, 50256)
    assert len(gpt2.encode((data / "the-verdict.txt").read_text())) == 5145


@pytest.mark.parametrize("spec", ["nonsense", "bpe:", "bpe:256", "bpe:-5", "bpe:x", "bpe:99999999999", "/no/such/path"])
def test_bad_specs(spec):
    with pytest.raises(UserError, match="expected"):
        build_tokenizer(spec, ["text"])


def test_too_little_text_to_train():
    with pytest.raises(UserError, match=r"give more text or ask for bpe:\d+"):
        build_tokenizer("bpe:5000", ["a few words only"])


def test_gpt2_without_network_says_what_to_do(monkeypatch):
    def fail(name):
        raise ConnectionError("no network")

    monkeypatch.setattr("tiktoken.get_encoding", fail)
    with pytest.raises(UserError, match=r"encoder\.json and vocab\.bpe"):
        build_tokenizer("gpt2")


def test_altered_files_are_refused(tmp_path, bpe):
    bpe.save(tmp_path)
    path = tmp_path / "tokenizer.tiktoken"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]))
    with pytest.raises(UserError, match="altered"):
        Tokenizer.load(tmp_path)
    path.write_bytes(b"".join(lines[1:]))
    with pytest.raises(UserError, match="byte tokens are missing"):
        Tokenizer.load(tmp_path)
    path.write_bytes(b"".join(lines) + b"garbage\n")
    with pytest.raises(UserError, match=r"tokenizer\.tiktoken:1000: expected"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("header", "message"), [("{", "JSON"), ("{}", "lacks"), ("[1]", "lacks"), (None, "not found"), (7, "format 7")]
)
def test_bad_headers(tmp_path, bpe, header, message):
    bpe.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    if header is None:
        path.unlink()
    else:
        path.write_text(header if isinstance(header, str) else path.read_text().replace('"format": 1', '"format": 7'))
    with pytest.raises(UserError, match=message):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        *({"specials": value} for value in ({}, [], "x", None, {EOT: 5}, {EOT: "5"}, {EOT: True}, {EOT: -1})),
        *({"specials": value} for value in ({EOT: 1 << 40}, {EOT: 1.5}, {EOT: [1]}, {EOT: 999, "": 1000})),
        {"specials": {EOT: 999, "<|a|>": 999}},
        *({"pattern": value} for value in ("(", "", 5, None, ["x"])),
        *({name: value} for name in ("name", "hash", "format") for value in (5, None, [1], {})),
    ],
)
def test_headers_of_the_wrong_type(tmp_path, bpe, change):
    bpe.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=r"tokenizer\.json: "):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("line", ["YQ== 300", "YWI= 65", "YWI= -1", "YWI= 4294967296", " 300", "Y 300", "YWI="])
def test_bad_lines_of_rank_files(tmp_path, line):
    BYTES.save(tmp_path)
    path = tmp_path / "tokenizer.tiktoken"
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(UserError, match=r"tokenizer\.tiktoken:257: expected"):
        build_tokenizer(str(path))


@pytest.mark.parametrize("ids", [{EOT: 5}, {EOT: "x"}, {"a": "65"}, {"a": None}])
def test_bad_ids_of_gpt2_files(tmp_path, bpe, ids):
    write_gpt2_files(tmp_path, bpe)
    path = tmp_path / "encoder.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | ids))
    with pytest.raises(UserError, match=r"encoder\.json"):
        build_tokenizer(str(tmp_path))


@pytest.mark.parametrize("damage", ["no merges", "other merges", "not json", "not bytes"])
def test_bad_gpt2_files(tmp_path, bpe, damage):
    write_gpt2_files(tmp_path, bpe)
    if damage == "no merges":
        (tmp_path / "vocab.bpe").unlink()
    elif damage == "other merges":
        lines = (tmp_path / "vocab.bpe").read_text().splitlines()
        (tmp_path / "vocab.bpe").write_text("\n".join([lines[0], lines[2], lines[1], *lines[3:]]))
    elif damage == "not json":
        (tmp_path / "encoder.json").write_text("{")
    else:
        (tmp_path / "encoder.json").write_text(json.dumps({"日本": 0}))
    with pytest.raises(UserError):
        build_tokenizer(str(tmp_path))


def test_directory_without_a_tokenizer(tmp_path):
    with pytest.raises(UserError, match="no tokenizer here"):
        build_tokenizer(str(tmp_path))


def test_rank_file_needs_all_bytes(tmp_path):
    path = tmp_path / "half.tiktoken"
    path.write_bytes(b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(100)))
    with pytest.raises(UserError, match="156 of the 256 byte tokens are missing"):
        build_tokenizer(str(path))


def test_added_tokens_are_found_in_the_text_and_saved(tmp_path):
    old = build_tokenizer("bytes")
    new = add_tokens(old, ["torch", "日本"])
    assert new.vocab_size == old.vocab_size + 2
    assert new.encode("a torch 日本!<|endoftext|>")[:4] == [97, 32, 257, 32]
    assert new.decode(new.encode("a torch 日本!")) == "a torch 日本!"
    assert new.encode_array("a torch 日本!").tolist() == new.encode("a torch 日本!") == [97, 32, 257, 32, 258, 33]
    assert EOT not in [new.decode([i]) for i in new.encode("x<|endoftext|>")]
    new.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.hash == new.hash != extend(old, ["torch", "日本"]).hash
    assert loaded.encode("torch") == [257]
    assert parts_of_new(old, loaded) == [list(b"torch"), list("日本".encode())]
    assert parts_of_new(old, old) == []
    assert parts_of_new(new, old) is None
    assert parts_of_new(build_tokenizer("bpe:260", ["abab abab"]), new) is None
    for bad in ([""], ["torch", "torch"], ["a"], [EOT]):
        with pytest.raises(UserError, match="is empty, given twice, or a token"):
            add_tokens(old, bad)
