"""The embedded English corpus: documentation text that every Python installation carries.

`pydoc_data.topics` (the language reference as plain text) and the docstrings of the standard library, about
2.2 MB together. It lets every example and test run with no download. Sources are parsed, never imported. The docstrings
found are kept in the user's cache (XDG_CACHE_HOME or ~/.cache), gptdist/docstrings-*.json: a new file of 2 MB when a
source has changed; old ones may be deleted.
"""

import ast
import functools
import hashlib
import inspect
import json
import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from gptdist.files import replace_text

# Third-party code; test suites (strings written to break parsers, not English); demos and tables with little text;
# packages that newer Pythons have dropped, so that versions differ less.
_SKIPPED_DIRECTORIES = {
    *("site-packages", "dist-packages", "__pycache__", "pydoc_data"),
    *("test", "tests", "idle_test"),
    *("turtledemo", "encodings", "idlelib"),
    *("distutils", "lib2to3"),
}
_DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)

Docstrings = tuple[tuple[str, str], ...]  # (qualified name, docstring)


def embedded_documents() -> Iterator[str]:
    """Yield the documents of the embedded corpus: each pydoc topic, then each module's docstrings.

    The order is fixed (topics by name, modules by path), so the corpus is the same on every run of one Python
    version; another version of Python has slightly different text.
    """
    yield from _all_documents()


@functools.cache
def embedded_docstrings() -> Docstrings:
    """(qualified name, docstring) of every module, class and function of the standard library that has one."""
    return tuple(found for module in _modules() for found in module)


@functools.cache  # training a tokenizer on the corpus reads it twice
def _all_documents() -> tuple[str, ...]:
    """The topics; and of each module that has any all docstrings in source order, each under its qualified name."""
    modules = ("\n\n".join(f"{name}\n\n{docstring}" for name, docstring in module) for module in _modules() if module)
    return *_topic_documents(_root() / "pydoc_data" / "topics.py"), *modules


@functools.cache
def _modules() -> tuple[Docstrings, ...]:
    """The docstrings of each module, in the order of their paths."""
    sources = sorted(_source_files(_root()))
    cache = _cache_file(sources)
    if cache is not None:
        try:
            kept = json.loads(cache.read_text())
            return tuple(tuple((str(name), str(docstring)) for name, docstring in module)
                         for _, module in zip(sources, kept, strict=True))
        except (OSError, RecursionError, TypeError, ValueError):  # not there yet, or nothing that was written below
            pass
    modules = tuple(tuple(_module_docstrings(path, _root())) for path in sources)  # takes seconds
    if cache is not None:
        try:
            cache.parent.mkdir(parents=True, exist_ok=True)
            replace_text(cache, json.dumps(modules))
        except OSError:  # a home that is full or read-only costs the next start those seconds again
            pass
    return modules


def _cache_file(sources: list[Path]) -> Path | None:
    """What keeps the docstrings of these very files, found by this very program; None: there is no home."""
    found_by = sys.version, Path(__file__).read_bytes()
    files = [(str(path), status.st_size, status.st_mtime_ns) for path in sources for status in [path.stat()]]
    digest = hashlib.sha256(repr((found_by, files)).encode()).hexdigest()
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    except RuntimeError:
        return None
    return folder / "gptdist" / f"docstrings-{digest[:16]}.json"


def _root() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _source_files(root: Path) -> Iterator[Path]:
    for directory, subdirectories, names in os.walk(root):
        subdirectories[:] = [name for name in subdirectories if name not in _SKIPPED_DIRECTORIES]
        yield from (Path(directory, name) for name in names if name.endswith(".py"))


def _topic_documents(path: Path) -> Iterator[str]:
    """Yield the texts of the one dict literal that pydoc_data.topics assigns."""
    if not path.exists():  # Some distributions package it separately; the docstrings remain.
        return
    for statement in ast.parse(path.read_bytes()).body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
            topics = ast.literal_eval(statement.value)
            yield from (inspect.cleandoc(topics[name]) for name in sorted(topics))


def _module_docstrings(path: Path, root: Path) -> Iterator[tuple[str, str]]:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # lib2to3 and friends ship files that are deliberately not Python 3.
        return
    module = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
    yield from _docstrings(tree, module)


def _docstrings(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    """Yield (qualified name, cleaned docstring) of a module, class or function and of all it contains."""
    docstring = ast.get_docstring(node, clean=True)
    if docstring:
        yield name, docstring
    for child in node.body:
        if isinstance(child, _DEFINITIONS):
            yield from _docstrings(child, f"{name}.{child.name}")
