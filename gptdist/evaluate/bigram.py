"""The bar that a language model has to clear: a bigram model of the same tokens with its best smoothing."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from gptdist.data.loader import Batch

DISCOUNTS = (0.3, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
WEIGHTS = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
UNIFORM = 1e-3  # share of the uniform distribution in the unigram that bigrams fall back to


@dataclass(frozen=True)
class BigramResult:
    loss: float  # nats per token
    smoothing: str


def bigram_loss(train: np.ndarray, contexts: np.ndarray, targets: np.ndarray, vocab_size: int) -> BigramResult:
    """Held-out loss of the best of three smoothings, each over a grid, chosen on the held-out tokens themselves.

    That choice favours the baseline. train: (N,) token ids; contexts, targets: (M,) held-out pairs.
    Smoothings: Kneser-Ney and absolute discounting interpolated with a lower order (Chen & Goodman 1999, sections 2.6
    and 2.7), and Jelinek-Mercer interpolation (section 2.3).
    """
    counts = _Counts.of(train.astype(np.int64), vocab_size)
    pairs = counts.pair_counts(contexts, targets)
    rows, distinct = counts.row[contexts], counts.distinct[contexts]
    candidates = []
    for name, lower in (("Kneser-Ney", counts.continuation()), ("absolute discounting", counts.unigram())):
        for d in DISCOUNTS:
            fallback = np.where(rows > 0, d * distinct / np.maximum(rows, 1), 1.0)
            p = np.maximum(pairs - d, 0) / np.maximum(rows, 1) + fallback * lower[targets]
            candidates.append(BigramResult(_nats(p), f"{name}, discount {d}"))
    unigram = counts.unigram()[targets]
    for weight in WEIGHTS:
        known = np.where(rows > 0, weight, 0.0)
        p = known * pairs / np.maximum(rows, 1) + (1 - known) * unigram
        candidates.append(BigramResult(_nats(p), f"Jelinek-Mercer, weight {weight}"))
    return min(candidates, key=lambda result: result.loss)


def _nats(p: np.ndarray) -> float:
    return float(-np.log(p).mean())


@dataclass(frozen=True)
class _Counts:
    """Bigram counts of a text, sparse: `pairs` are sorted codes context * vocab + target."""

    vocab: int
    pairs: np.ndarray
    counts: np.ndarray
    tokens: np.ndarray  # (V,) how often each token occurs
    row: np.ndarray  # (V,) bigrams that begin with the token
    distinct: np.ndarray  # (V,) different tokens seen after it

    @classmethod
    def of(cls, train: np.ndarray, vocab: int) -> "_Counts":
        pairs, counts = np.unique(train[:-1] * vocab + train[1:], return_counts=True)
        first = pairs // vocab
        return cls(vocab, pairs, counts, np.bincount(train, minlength=vocab),
                   np.bincount(first, weights=counts, minlength=vocab), np.bincount(first, minlength=vocab))

    def pair_counts(self, contexts: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """How often each (context, target) occurs in the text: (M,)."""
        codes = contexts.astype(np.int64) * self.vocab + targets
        at = np.minimum(np.searchsorted(self.pairs, codes), len(self.pairs) - 1)
        return np.where(self.pairs[at] == codes, self.counts[at], 0)

    def unigram(self) -> np.ndarray:
        return self._with_uniform(self.tokens)

    def continuation(self) -> np.ndarray:
        """Share of different bigrams that a token completes: Kneser-Ney's lower order."""
        return self._with_uniform(np.bincount(self.pairs % self.vocab, minlength=self.vocab))

    def _with_uniform(self, counts: np.ndarray) -> np.ndarray:
        return (1 - UNIFORM) * counts / counts.sum() + UNIFORM / self.vocab


def held_out_pairs(batches: Iterable[Batch]) -> tuple[np.ndarray, np.ndarray]:
    """(contexts, targets) of evaluation batches, without ignored targets: the very tokens the model is scored on."""
    contexts, targets = [], []
    for batch in batches:
        kept = batch.targets >= 0
        contexts.append(batch.tokens[kept].numpy())
        targets.append(batch.targets[kept].numpy())
    return np.concatenate(contexts), np.concatenate(targets)
