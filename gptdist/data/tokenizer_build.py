"""Where tokenizers come from: bytes, GPT-2's files, tiktoken's download, a rank file, or training.

`build(spec)` accepts
    bytes       256 byte tokens and <|endoftext|> (257 ids)
    char        the characters of `texts` and <|endoftext|>; no other text can be encoded
    gpt2        GPT-2's, from tiktoken's download or cache
    bpe:VOCAB   byte-level BPE of VOCAB ids trained on `texts`
    PATH        a directory with encoder.json and vocab.bpe; a `.tiktoken` file; a directory written by
                `Tokenizer.save`; a prepared dataset (it has `tokenizer/`)
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path

import tiktoken

from gptdist.data.tokenizer import (
    EOT,
    GPT2_PATTERN,
    MAX_VOCAB,
    CharTokenizer,
    Tokenizer,
    check_has_all_bytes,
    read_ranks,
    tokenizer_from,
)
from gptdist.errors import UserError

_EXPECTED = "expected bytes, char, gpt2, bpe:VOCAB (such as bpe:8192), or the path of a tokenizer"


def build(spec: str, texts: Iterable[str] | None = None, pattern: str = GPT2_PATTERN) -> Tokenizer:
    """Build the tokenizer that `spec` names (see the module's docstring).

    texts: what `bpe:VOCAB` trains on, or `char` takes its characters from; read once, and only then.
    pattern: split pattern of `bpe:` and of `.tiktoken` files, which do not carry one.
    Raises UserError for a spec, file or training text that cannot give a tokenizer.
    """
    if spec == "bytes":
        return Tokenizer(name="bytes", ranks={bytes([i]): i for i in range(256)}, specials={EOT: 256})
    if spec == "char":
        return char_tokenizer(texts)
    if spec.startswith("bpe:"):
        return train_bpe(_vocab_size(spec), texts, pattern)
    if Path(spec).exists():
        return _from_path(Path(spec), pattern)
    if spec == "gpt2":
        return _download_gpt2()
    raise UserError(f"tokenizer {spec!r}: no such name or path; {_EXPECTED}")


def char_tokenizer(texts: Iterable[str] | None) -> CharTokenizer:
    """The characters of `texts`, their ids in the order of their code points."""
    if texts is None:
        raise ValueError("char_tokenizer needs texts")
    characters = sorted(set().union(*texts))
    if not characters:
        raise UserError("tokenizer char: the text is empty, so there is no character to make a token of")
    return CharTokenizer(name="char", ranks={character.encode(): i for i, character in enumerate(characters)},
                         specials={EOT: len(characters)})


def train_bpe(vocab_size: int, texts: Iterable[str] | None, pattern: str = GPT2_PATTERN) -> Tokenizer:
    """Train a byte-level BPE of `vocab_size` ids, the 256 bytes and <|endoftext|> included.

    Hugging Face `tokenizers` counts the pairs; the result becomes ranks, ids 0..255 being the bytes in their order
    and merges following in the order they were learned, as tiktoken needs.
    """
    if texts is None:
        raise ValueError("train_bpe needs texts")
    trained = train_hugging_face(vocab_size - 1, texts, pattern)
    ranks = {bytes([i]): i for i in range(256)}
    for first, second in json.loads(trained.to_str())["model"]["merges"]:
        ranks.setdefault(unicode_to_bytes(first) + unicode_to_bytes(second), len(ranks))
    if len(ranks) + 1 < vocab_size:
        raise UserError(
            f"tokenizer bpe:{vocab_size}: the text has pairs for {len(ranks) + 1} ids only; "
            f"give more text or ask for bpe:{len(ranks) + 1}"
        )
    return Tokenizer(name=f"bpe:{vocab_size}", ranks=ranks, specials={EOT: len(ranks)}, pattern=pattern)


def train_hugging_face(n_mergeable: int, texts: Iterable[str], pattern: str = GPT2_PATTERN):
    """Return a `tokenizers.Tokenizer`, byte-level BPE with `n_mergeable` tokens, trained on `texts`."""
    import tokenizers
    from tokenizers import models, pre_tokenizers, trainers

    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=n_mergeable, initial_alphabet=alphabet, show_progress=sys.stderr.isatty())
    trained.train_from_iterator(texts, trainer)
    return trained


def read_gpt2_files(directory: Path) -> Tokenizer:
    """Read `encoder.json` and `vocab.bpe` as OpenAI published them for GPT-2.

    Equal to `tiktoken.load.data_gym_to_mergeable_bpe_ranks`, which is not used because it keeps copies of local
    files in a cache by path, and asserts where the user needs to be told what is wrong.
    """
    encoder_path, merges_path = directory / "encoder.json", directory / "vocab.bpe"
    try:
        encoder = json.loads(encoder_path.read_text(encoding="utf-8"))
        merges = [line.split() for line in merges_path.read_text(encoding="utf-8").splitlines()[1:] if line]
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{directory}: cannot read GPT-2's encoder.json and vocab.bpe ({error})") from error
    try:
        merged = [unicode_to_bytes(first + second) for first, second in merges]
        specials = {name: i for name, i in encoder.items() if name == EOT}
        ranks = {unicode_to_bytes(name): i for name, i in encoder.items() if name not in specials}
    except (KeyError, ValueError, AttributeError) as error:
        raise UserError(f"{directory}: not GPT-2's byte-level files ({error!r})") from error
    check_has_all_bytes(ranks, encoder_path)
    # tiktoken takes an id for the priority of its merge, so the two files must agree on the order.
    if [ranks.get(token) for token in merged] != list(range(256, 256 + len(merged))) or len(ranks) != len(merged) + 256:
        raise UserError(f"{encoder_path}: ids do not follow the merges of {merges_path.name}; use a matching pair")
    return tokenizer_from(encoder_path, name="gpt2", ranks=ranks, specials=specials or {EOT: len(ranks)})


def unicode_to_bytes(token: str) -> bytes:
    """Undo GPT-2's writing of bytes as printable characters (openai/gpt-2, encoder.py, bytes_to_unicode)."""
    return bytes(_BYTE_OF_CHARACTER[character] for character in token)


def _byte_of_character() -> dict[str, int]:
    printable = [b for b in range(256) if chr(b).isprintable() and b != 32]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_of_character()


def _vocab_size(spec: str) -> int:
    text = spec.removeprefix("bpe:")
    if not text.isascii() or not text.isdigit() or len(text) > 8 or not 257 <= int(text) <= MAX_VOCAB:
        raise UserError(
            f"tokenizer {spec!r}: expected bpe:VOCAB with VOCAB from 257 (256 bytes and {EOT}) to {MAX_VOCAB}"
        )
    return int(text)


def _from_path(path: Path, pattern: str) -> Tokenizer:
    if path.is_file():
        ranks = read_ranks(path)
        specials = {EOT: max(ranks.values()) + 1}
        return tokenizer_from(path, name=path.stem, ranks=ranks, specials=specials, pattern=pattern)
    if (path / "encoder.json").exists() or (path / "vocab.bpe").exists():
        return read_gpt2_files(path)
    for directory in (path, path / "tokenizer", path.parent / "tokenizer"):
        if (directory / "tokenizer.tiktoken").exists():
            return Tokenizer.load(directory)
    raise UserError(
        f"tokenizer {path}: no tokenizer here; expected encoder.json and vocab.bpe, tokenizer.tiktoken, or tokenizer/"
    )


def _download_gpt2() -> Tokenizer:
    try:
        encoding = tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:  # requests' errors are OSErrors
        raise UserError(
            f"tokenizer gpt2: tiktoken could not download it ({type(error).__name__}); pass the path of a directory "
            "with encoder.json and vocab.bpe, or of a .tiktoken file"
        ) from error
    return Tokenizer(name="gpt2", ranks=encoding._mergeable_ranks, specials=encoding._special_tokens)
