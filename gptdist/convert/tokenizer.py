"""Tokenizers as Hugging Face's files have them: tokenizer.json, or vocab.json and merges.txt, both ways.

Ours is tiktoken's form: the rank of a token is its id and its priority. Theirs lists the pairs that merge. One is the
other exactly when the ids follow the merges and every token is made by the merge that tiktoken would choose, which
reading checks.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from gptdist.checkpoint.files import user_errors
from gptdist.convert.files import read_json
from gptdist.data.tokenizer import EOT, GPT2_PATTERN, CharTokenizer, Tokenizer, check_has_all_bytes
from gptdist.data.tokenizer_build import build, unicode_to_bytes
from gptdist.errors import UserError

Merge = tuple[bytes, bytes]
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def find_tokenizer(folders: Iterable[Path]) -> Tokenizer | None:
    """The tokenizer of the first folder that has one."""
    for folder in folders:
        for path in (folder, folder / "tokenizer"):
            if (path / "tokenizer.tiktoken").is_file() or (path / "encoder.json").is_file():
                return build(str(path))
            if (path / "tokenizer.json").is_file() or (path / "merges.txt").is_file():
                return read_hugging_face(path)
    return None


def named_tokenizer(spec: str) -> Tokenizer:
    """The tokenizer of --tokenizer: what `gptdist prepare` takes, or a directory with Hugging Face's files."""
    path = Path(spec)
    if path.is_dir() and not (path / "tokenizer.tiktoken").exists() and (
            (path / "tokenizer.json").exists() or (path / "merges.txt").exists()):
        return read_hugging_face(path)
    if path.is_file() and path.name in ("tokenizer.json", "vocab.json", "merges.txt"):
        return named_tokenizer(str(path.parent))
    return build(spec)


def read_hugging_face(folder: Path) -> Tokenizer:
    """A byte-level BPE; tokenizer.json counts where both forms are there. UserError for other kinds of tokenizer."""
    if (folder / "tokenizer.json").exists():
        return _read_tokenizer_json(folder / "tokenizer.json")
    vocab_path, merges_path = folder / "vocab.json", folder / "merges.txt"
    vocab = read_json(vocab_path)
    try:
        with user_errors("read"):
            lines = merges_path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{merges_path} is not UTF-8 text (byte {error.start}); get the file again") from None
    merges = [line for line in lines if line and not line.startswith("#version")]
    added = read_json(folder / "added_tokens.json") if (folder / "added_tokens.json").exists() else {}
    return _build(vocab, merges, {EOT: vocab.get(EOT)} | added, GPT2_PATTERN, vocab_path)


def _read_tokenizer_json(path: Path) -> Tokenizer:
    found = read_json(path)
    model = found.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or found.get("normalizer") is not None:
        raise _unknown_kind(path)
    vocab, merges, added = model.get("vocab"), model.get("merges"), found.get("added_tokens") or []
    if not isinstance(vocab, dict) or not isinstance(merges, list) or not isinstance(added, list):
        raise _unknown_kind(path)
    try:
        specials = {token["content"]: token["id"] for token in added}
    except (TypeError, KeyError):
        raise _unknown_kind(path) from None
    return _build(vocab, merges, specials, _pattern(found.get("pre_tokenizer"), path), path,
                  whole_words=model.get("ignore_merges") is True)


def _pattern(pre_tokenizer: object, path: Path) -> str:
    """The split pattern of the two forms that byte-level BPEs have."""
    match pre_tokenizer:
        case {"type": "ByteLevel", "add_prefix_space": False} if pre_tokenizer.get("use_regex", True):
            return GPT2_PATTERN
        case {"type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated", **split},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]} if not split.get("invert"):
            return pattern
    raise _unknown_kind(path)


def _unknown_kind(path: Path) -> UserError:
    return UserError(f"{path}: expected a byte-level BPE such as GPT-2's (no normalizer, no prefix space); "
                     f"give another tokenizer with --tokenizer")


def _build(vocab: Mapping, merges: Sequence, specials: Mapping, pattern: str, path: Path,
           whole_words: bool = False) -> Tokenizer:
    """whole_words: a word that is a token is taken even if no pairs make it, as tiktoken does."""
    if not isinstance(specials.get(EOT), int):
        raise UserError(f"{path}: no {EOT} in it, which ends documents here; give another tokenizer with --tokenizer")
    try:
        ranks = {unicode_to_bytes(token): int(i) for token, i in vocab.items() if token not in specials}
        pairs = [tuple(map(unicode_to_bytes, m.split(" ") if isinstance(m, str) else m)) for m in merges]
        check_has_all_bytes(ranks, path)
        fits = all(len(pair) == 2 for pair in pairs) and pairs == merges_of(ranks)
        tokenizer = Tokenizer(name=path.parent.name or "imported", ranks=ranks, specials=dict(specials),
                              pattern=pattern)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a byte-level vocabulary with its merges ({type(error).__name__}: {error}); "
                        f"give another tokenizer with --tokenizer") from None
    if not fits or not (whole_words or len(pairs) + 256 == len(ranks)):
        raise UserError(f"{path}: the ids do not follow the merges, so that other tokens would come out; use the files "
                        f"of one tokenizer, or give another with --tokenizer")
    return tokenizer


def merges_of(ranks: Mapping[bytes, int]) -> list[Merge]:
    """The pair that makes each token of more than one byte, by rank; a token that no pair makes is left out."""
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1 and len(parts := _parts(token, rank, ranks)) == 2:
            merges.append((parts[0], parts[1]))
    return merges


def _parts(token: bytes, limit: int, ranks: Mapping[bytes, int]) -> list[bytes]:
    """`token` as far as tokens of lower rank than `limit` merge it."""
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 2:
        found = [(ranks.get(a + b, limit), i) for i, (a, b) in enumerate(pairwise(parts))]
        rank, i = min(found)
        if rank >= limit:
            break
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


def byte_characters() -> list[str]:
    """The printable character that GPT-2's files write for each byte."""
    from tokenizers.pre_tokenizers import ByteLevel

    characters = {unicode_to_bytes(character)[0]: character for character in ByteLevel.alphabet()}
    return [characters[b] for b in range(256)]


def printable(tokenizer: Tokenizer) -> tuple[dict[str, int], list[str]]:
    """(token -> id, specials included; merges "a b" by priority) in GPT-2's printable form."""
    characters = byte_characters()

    def text(token: bytes) -> str:
        return "".join(characters[b] for b in token)

    vocab = {text(token): i for token, i in tokenizer.ranks.items()} | tokenizer.specials
    return dict(sorted(vocab.items(), key=lambda item: item[1])), [
        f"{text(a)} {text(b)}" for a, b in merges_of(tokenizer.ranks)]


def hugging_face_files(tokenizer: Tokenizer, context: int) -> dict[str, bytes]:
    """The files that AutoTokenizer loads, by name. Raises UserError for a tokenizer of characters."""
    if isinstance(tokenizer, CharTokenizer):
        raise UserError(f"tokenizer {tokenizer.name} has characters for tokens, which Hugging Face's byte-level BPE is "
                        f"not: prepare the data with bytes, bpe:VOCAB or gpt2 for a model to export")
    vocab, merges = printable(tokenizer)
    added = [{"id": i, "content": name, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
              "special": True} for name, i in sorted(tokenizer.specials.items(), key=lambda item: item[1])]
    plain = tokenizer.pattern == GPT2_PATTERN
    split = {"type": "Split", "pattern": {"Regex": tokenizer.pattern}, "behavior": "Isolated", "invert": False}
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
             "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False,
             # tiktoken takes a whole word that is a token even if no pairs make it.
             "ignore_merges": len(merges) + 256 < len(tokenizer.ranks), "vocab": vocab, "merges": merges}
    whole = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
             "pre_tokenizer": _BYTE_LEVEL if plain else {
                 "type": "Sequence", "pretokenizers": [split, _BYTE_LEVEL | {"use_regex": False}]},
             "post_processor": None, "decoder": _BYTE_LEVEL, "model": model}
    # transformers builds GPT2Tokenizer from vocabulary and merges alone, with GPT-2's pattern.
    simple = plain and list(tokenizer.specials) == [EOT] and not model["ignore_merges"]
    settings = {"tokenizer_class": "GPT2Tokenizer" if simple else "PreTrainedTokenizerFast", "bos_token": EOT,
                "eos_token": EOT, "unk_token": EOT, "model_max_length": context, "add_prefix_space": False,
                "clean_up_tokenization_spaces": False}
    if extra := [name for name in tokenizer.specials if name != EOT]:
        settings["additional_special_tokens"] = extra
    files = {"tokenizer.json": _json(whole), "tokenizer_config.json": _json(settings)}
    if simple:
        files |= {"vocab.json": _json(vocab), "merges.txt": "\n".join(["#version: 0.2", *merges, ""]).encode()}
    return files


def _json(value: object) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode()
