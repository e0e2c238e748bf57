"""Whether a classifier's probabilities mean what they say: expected calibration error, Brier score, reliability table.

Confidence: the probability of the predicted class. The table has bins of equal width over [0, 1]; in a calibrated
classifier each bin's accuracy is its mean confidence. ECE: their mean distance, weighted by the bins' counts.
Brier: mean over texts of the squared distance between the probabilities and the right class's unit vector, 0 to 2.
Sources: Guo et al., "On calibration of modern neural networks" (2017), section 2; Brier (1950).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

BINS = 10


def calibration(probabilities: Sequence[Sequence[float]], answers: Sequence[int], *,
                bins: int = BINS) -> dict[str, Any]:
    """{"ece", "brier", "reliability": [{"from", "to", "n", "confidence", "accuracy"} of each bin that has texts]}.

    probabilities: of the classes of each text, whose number may differ between texts; rows sum to 1.
    """
    brier = [sum((p - (i == answer)) ** 2 for i, p in enumerate(row))
             for row, answer in zip(probabilities, answers, strict=True)]
    confidence = np.array([max(row) for row in probabilities])
    right = np.array([max(range(len(row)), key=row.__getitem__) == answer
                      for row, answer in zip(probabilities, answers, strict=True)])
    # (low, high], as Guo et al.; rounding may carry a probability past 1.
    bin_of = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    table = []
    for i in range(bins):
        inside = bin_of == i
        if inside.any():
            table.append({"from": i / bins, "to": (i + 1) / bins, "n": int(inside.sum()),
                          "confidence": float(confidence[inside].mean()), "accuracy": float(right[inside].mean())})
    ece = sum(row["n"] * abs(row["confidence"] - row["accuracy"]) for row in table) / len(answers)
    return {"ece": ece, "brier": float(np.mean(brier)), "reliability": table}


def print_reliability(console: Console, result: dict[str, Any], title: str) -> None:
    table = Table(title=f"{title}: ECE {result['ece']:.4f}, Brier score {result['brier']:.4f}")
    for column in ("confidence", "n", "mean confidence", "accuracy"):
        table.add_column(column, justify="right")
    for row in result["reliability"]:
        table.add_row(f"{row['from']:.1f} to {row['to']:.1f}", str(row["n"]), f"{row['confidence']:.4f}",
                      f"{row['accuracy']:.4f}")
    console.print(table)
