"""What a classifier has to beat: the commonest label, and logistic regression on bags of words."""

import re
import warnings
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

_WORD = re.compile(r"\w+")


def majority_accuracy(train_labels: Sequence[int], test_labels: Sequence[int]) -> float:
    """Share of the test texts that have the commonest training label."""
    commonest = Counter(train_labels).most_common(1)[0][0]
    return sum(label == commonest for label in test_labels) / len(test_labels)


def bag_of_words_accuracy(train: Sequence[str], train_labels: Sequence[int], test: Sequence[str],
                          test_labels: Sequence[int], *, penalty: float = 1.0) -> float:
    """Test accuracy of multinomial logistic regression on unit vectors of log(1 + word count), fitted by L-BFGS.

    penalty: the squared weights are added to the summed losses with half this factor, as scikit-learn's C = 1/penalty.
    """
    words = {word: i for i, word in enumerate(sorted({word for text in train for word in _words(text)}))}
    inputs, targets = _vectors(train, words), torch.tensor(train_labels)
    transposed = _compressed(inputs.t())
    inputs = _compressed(inputs)
    n_labels = max(train_labels) + 1
    wanted = F.one_hot(targets, n_labels).float()
    weight, bias = torch.zeros(len(words), n_labels), torch.zeros(n_labels)

    def objective() -> Tensor:
        logits = inputs @ weight + bias
        errors = logits.softmax(1) - wanted  # (texts, labels): by hand, a sparse matrix has no fast backward
        weight.grad, bias.grad = transposed @ errors + penalty * weight, errors.sum(0)
        return F.cross_entropy(logits, targets, reduction="sum") + penalty / 2 * weight.square().sum()

    torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe").step(objective)
    predicted = (_vectors(test, words) @ weight + bias).argmax(1)
    return (predicted == torch.tensor(test_labels)).float().mean().item()


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _vectors(texts: Sequence[str], words: dict[str, int]) -> Tensor:
    """(texts, words) sparse COO: unit rows."""
    places, values = [], []
    for row, text in enumerate(texts):
        counts = Counter(words[word] for word in _words(text) if word in words)
        weights = torch.tensor(list(counts.values())).log1p()
        places += [(row, word) for word in counts]
        values.append(weights / weights.norm() if counts else weights)
    where = torch.tensor(places, dtype=torch.int64).reshape(-1, 2).T
    return torch.sparse_coo_tensor(where, torch.cat(values), (len(texts), len(words)),
                                   check_invariants=False).coalesce()


def _compressed(matrix: Tensor) -> Tensor:
    """As CSR, whose products are ten times as fast as COO's; torch warns that it is in beta."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        return matrix.coalesce().to_sparse_csr()
