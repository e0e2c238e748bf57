"""The held-out split: which documents go to validation."""

import hashlib

import numpy as np

from gptdist.data.writer import DatasetWriter

# Hashing must be expected to put this many documents on each side (then none on one side has probability 5e-5);
# if the input has fewer, the end of the text is held out instead.
MIN_EXPECTED_DOCUMENTS = 10
_MAX_HELD_TOKENS = 32_000_000  # bounds memory (128 MB) when the first documents are huge


class Splitter:
    """Sends documents to the train and validation writers.

    By document: a keyed hash of the cleaned text decides, so the split depends on neither the order of the input nor
    the number of workers, and a document stays on its side when others are added. If the whole input has too few
    documents for that (200 at a val_fraction of 0.05), its last `val_fraction` of tokens is held out, cutting one
    document in two.
    """

    def __init__(self, train: DatasetWriter, val: DatasetWriter | None, *, val_fraction: float, seed: int, eot: int):
        """val: None when val_fraction is 0."""
        self._train = train
        self._val = val
        self._threshold = int(val_fraction * 2**64)
        self._val_fraction = val_fraction
        self._key = seed.to_bytes(16, "little", signed=True)
        self._eot = eot
        self._min_documents = MIN_EXPECTED_DOCUMENTS / max(min(val_fraction, 1 - val_fraction), 1e-9)
        self._held: list[tuple[bytes, np.ndarray]] | None = [] if val is not None else None
        self._held_tokens = 0
        self.method = "by document" if val is not None else "none"

    def add(self, digest: bytes, tokens: np.ndarray) -> None:
        """digest: of the cleaned text. tokens: (n_tokens,), ending in eot."""
        if self._held is None:
            self._writer(digest).add(tokens)
            return
        self._held.append((digest, tokens))
        self._held_tokens += len(tokens)
        if len(self._held) >= self._min_documents or self._held_tokens > _MAX_HELD_TOKENS:
            held, self._held = self._held, None
            for document in held:
                self.add(*document)

    @property
    def has_decided(self) -> bool:
        """Whether all that was added has gone to a writer; from then on this holds nothing."""
        return self._held is None

    def restore(self) -> None:
        """Go on where another one had decided."""
        self._held = None

    def finish(self) -> None:
        """Write what is still held, when the input had few documents."""
        held, self._held = self._held, None
        if held:
            self.method = f"last tokens (fewer than {self._min_documents:.0f} documents)"
            self._hold_out_tail([tokens for _, tokens in held])

    def _writer(self, digest: bytes) -> DatasetWriter:
        if self._val is None:
            return self._train
        keyed = hashlib.blake2b(digest, key=self._key, digest_size=8).digest()
        return self._val if int.from_bytes(keyed, "little") < self._threshold else self._train

    def _hold_out_tail(self, documents: list[np.ndarray]) -> None:
        n_train = self._held_tokens - max(1, round(self._held_tokens * self._val_fraction))
        for tokens in documents:
            head, tail = tokens[:n_train], tokens[n_train:]
            n_train -= len(head)
            if len(tail) == 0 or len(head) == 0:
                (self._train if len(head) else self._val).add(tokens)
            else:
                self._train.add(np.append(head, np.array([self._eot], head.dtype)))
                self._val.add(tail)
