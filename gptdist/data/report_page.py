"""The report of `prepare` as one HTML page that needs no other file."""

from collections.abc import Iterable
from html import escape
from typing import Any

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; } th, td { padding: .2rem .8rem .2rem 0; text-align: right; vertical-align: top; }
th:first-child, td:first-child { text-align: left; } tr { border-bottom: 1px solid #ddd; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f5f5f5; padding: .5rem; margin: .2rem 0 1rem; }
.bar { display: inline-block; height: .7rem; background: #c55; vertical-align: middle; } .quiet { color: #777; }
"""


def report_page(report: dict[str, Any]) -> str:
    """report: as `prepare` returns it. Everything from the input is escaped."""
    speed = report["speed"]
    parts = [
        f"<p>{report['documents']:,} documents, {report['characters']:,} characters, {report['tokens']:,} tokens of "
        f"tokenizer {escape(report['tokenizer']['name'])} ({report['tokenizer']['vocab_size']:,} ids); "
        f"{speed['seconds']:.1f} s, {speed['tokens_per_s']:,.0f} tokens/s"
        + (f"; went on {report['resumed']} times after a stop" if report["resumed"] else "") + "</p>",
        _section("Splits", _table(["split", "documents", "tokens"], [
            [name, counts["documents"], counts["tokens"]] for name, counts in report["split"].items()
            if isinstance(counts, dict)]) + f"<p class=quiet>held out: {escape(report['split']['method'])}</p>"),
        _section("Sources and tokenizer", _sources(report["sources"])),
        _section("Filters", _filters(report["filters"])),
        _near(report["near_duplicates"]),
        _pairs("Scrubbed", report["scrubbed"]),
        _bad(report["bad"]),
        _section("Samples of what was dropped", _samples(report["samples"])) if report["samples"] else "",
        _pairs("Settings", report["settings"]),
    ]
    return (f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(report['settings']['output'])}</title>"
            f"<style>{_STYLE}</style><h1>{escape(report['settings']['output'])}</h1>{''.join(parts)}</html>\n")


def _section(title: str, content: str) -> str:
    return f"<h2>{escape(title)}</h2>{content}"


def _table(head: list[str], rows: Iterable[list[Any]]) -> str:
    """Cells are text, which is escaped, numbers, or (HTML,)."""
    body = "".join(f"<tr>{''.join(f'<td>{_cell(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><tr>{''.join(f'<th>{escape(name)}</th>' for name in head)}</tr>{body}</table>"


def _cell(value: Any) -> str:
    if isinstance(value, tuple):
        return value[0]
    if isinstance(value, float):
        return f"{value:,.3f}"
    return f"{value:,}" if isinstance(value, int) else escape(str(value))


def _sources(sources: list[dict[str, Any]]) -> str:
    head = ["source", "tokenizer", "documents", "bytes", "tokens", "bytes per token", "ids used", "of the vocabulary",
            "bytes in tokens of two or more"]

    def row(name: str, documents: Any, use: dict[str, Any]) -> list[Any]:
        return [name, use["tokenizer"], documents, use["bytes"], use["tokens"], use["bytes_per_token"],
                use["ids_used"], f"{use['vocabulary_used']:.1%}", f"{use['coverage']:.1%}"]

    rows = []
    for source in sources:
        rows.append(row(source["name"], source["documents"], source))
        rows += [row("  the same first bytes", "", use) for use in source.get("compared", [])]
    return _table(head, rows)


def _filters(filters: dict[str, dict[str, int]]) -> str:
    rows = []
    for name, counts in filters.items():
        dropped = counts["documents_in"] - counts["documents_out"]
        share = dropped / max(1, counts["documents_in"])
        bar = f"<span class=bar style='width:{12 * share:.2f}rem'></span>"
        rows.append([name, counts["documents_in"], dropped, f"{share:.2%}", (bar,),
                     counts["characters_in"] - counts["characters_out"]])
    return _table(["filter", "documents in", "dropped", "share", "", "characters less"], rows)


def _near(near: dict[str, Any] | None) -> str:
    return _pairs("Near-duplicates: word 5-grams, MinHash and LSH", near)


def _pairs(title: str, values: dict[str, Any] | None) -> str:
    if not values:
        return ""
    return _section(title, _table(["", ""], ([name, str(value)] for name, value in values.items())))


def _bad(bad: dict[str, Any]) -> str:
    if not bad["count"]:
        return ""
    lines = "".join(f"<li>{escape(message)}</li>" for message in bad["examples"])
    return _section("Bad input", f"<p>{bad['count']:,} records, row groups or rests of files left out; the first:</p>"
                                 f"<ul>{lines}</ul>")


def _samples(samples: dict[str, list[dict[str, str]]]) -> str:
    def one(sample: dict[str, str]) -> str:
        reason = f": {sample['reason']}" if sample["reason"] else ""
        return f"<div class=quiet>{escape(sample['where'] + reason)}</div><pre>{escape(sample['text'])}</pre>"

    return "".join(f"<details><summary>{escape(name)}</summary>{''.join(map(one, found))}</details>"
                   for name, found in samples.items())
