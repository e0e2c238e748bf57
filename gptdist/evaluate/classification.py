"""How well labels are predicted: accuracy, precision, recall and F1 from the confusion matrix."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor


def scores(confusion: Tensor, labels: Sequence[str]) -> dict[str, Any]:
    """confusion (K, K): texts of label i (row) that were given label j (column). A share of nothing is 0."""
    counts = confusion.tolist()
    classes = {}
    for i, label in enumerate(labels):
        hits, given, there = counts[i][i], sum(row[i] for row in counts), sum(counts[i])
        classes[label] = {"precision": _share(hits, given), "recall": _share(hits, there),
                          "f1": _share(2 * hits, given + there), "texts": int(there)}
    total = sum(map(sum, counts))
    return {"accuracy": _share(sum(counts[i][i] for i in range(len(labels))), total),
            "macro_f1": sum(values["f1"] for values in classes.values()) / len(labels),
            "classes": classes, "confusion": [[int(n) for n in row] for row in counts]}


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def print_scores(console: Console, result: dict[str, Any], title: str) -> None:
    """`scores` as tables: one of the labels' figures, one of the confusion matrix."""
    labels = list(result["classes"])
    table = Table(title=f"{title}: accuracy {result['accuracy']:.2%}, macro F1 {result['macro_f1']:.4f}")
    for column in ("label", "precision", "recall", "F1", "texts"):
        table.add_column(column, justify="left" if column == "label" else "right")
    for label, values in result["classes"].items():
        table.add_row(label, *(f"{values[name]:.4f}" for name in ("precision", "recall", "f1")), str(values["texts"]))
    console.print(table)
    matrix = Table(title="confusion matrix (rows: true label, columns: predicted)")
    matrix.add_column("")
    for label in labels:
        matrix.add_column(label, justify="right")
    for label, row in zip(labels, result["confusion"], strict=True):
        matrix.add_row(label, *map(str, row))
    console.print(matrix)
