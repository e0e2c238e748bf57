"""What `prepare` counts of each source: documents, bytes, tokens, and how its tokenizer suits it."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gptdist.data.tokenizer import Tokenizer

COMPARED_BYTES = 4_000_000  # of each source go through the tokenizer that is only compared


class TokenizerUse:
    """How one tokenizer writes the texts of one source."""

    def __init__(self, tokenizer: Tokenizer):
        self.name = tokenizer.name
        self.bytes = self.tokens = 0
        self._longer = 0  # bytes in tokens of two bytes or more
        self._used = np.zeros(tokenizer.vocab_size, bool)
        self._lengths = token_lengths(tokenizer)

    def add(self, ids: np.ndarray, n_bytes: int) -> None:
        """Count texts of `n_bytes` UTF-8 bytes, whose ids, without eot, are one array (n,)."""
        self.bytes += n_bytes
        self.tokens += len(ids)
        self._used[ids] = True
        lengths = self._lengths[ids]
        self._longer += int(lengths[lengths > 1].sum())

    def report(self) -> dict[str, Any]:
        used = int(self._used.sum())
        return {
            "tokenizer": self.name,
            "bytes": self.bytes,
            "tokens": self.tokens,
            "bytes_per_token": self.bytes / max(1, self.tokens),
            "ids_used": used,
            "vocabulary_used": used / len(self._used),  # share of the ids that occur
            "coverage": self._longer / max(1, self.bytes),  # share of the bytes not written byte by byte
        }

    def state(self) -> dict[str, Any]:
        return {"bytes": self.bytes, "tokens": self.tokens, "longer": self._longer,
                "used": np.packbits(self._used).tobytes().hex()}

    def restore(self, state: dict[str, Any]) -> None:
        self.bytes, self.tokens, self._longer = state["bytes"], state["tokens"], state["longer"]
        bits = np.unpackbits(np.frombuffer(bytes.fromhex(state["used"]), np.uint8))
        self._used = bits[: len(self._used)].astype(bool)


def token_lengths(tokenizer: Tokenizer) -> np.ndarray:
    """Bytes of each id, int32 (vocab_size,); 0: no such id, or <|endoftext|> and its like."""
    lengths = np.zeros(tokenizer.vocab_size, np.int32)
    for token, rank in tokenizer.ranks.items():
        lengths[rank] = len(token)
    for word in tokenizer.added:
        lengths[tokenizer.specials[word]] = len(word.encode())
    return lengths


@dataclass
class SourceStats:
    """Counts of one source; `compared` is another tokenizer's use, on the first COMPARED_BYTES."""

    name: str
    files: int
    use: TokenizerUse
    compared: TokenizerUse | None
    documents: int = 0
    same_sample: TokenizerUse | None = field(default=None)  # the dataset's tokenizer on what `compared` saw

    def report(self) -> dict[str, Any]:
        both = [use.report() for use in (self.same_sample, self.compared) if use is not None]
        return {"name": self.name, "files": self.files, "documents": self.documents, **self.use.report(),
                **({"compared": both} if both else {})}

    def state(self) -> dict[str, Any]:
        uses = {"use": self.use, "compared": self.compared, "same_sample": self.same_sample}
        return {"documents": self.documents, **{name: use.state() for name, use in uses.items() if use is not None}}

    def restore(self, state: dict[str, Any]) -> None:
        self.documents = state["documents"]
        for name in ("use", "compared", "same_sample"):
            if name in state:
                getattr(self, name).restore(state[name])
