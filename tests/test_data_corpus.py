"""The embedded corpus."""

import pytest

from gptdist.data import corpus
from gptdist.data.corpus import embedded_documents

FIRST = ((("one", "First."),),)


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A standard library of one module, and an empty cache; the function gives the docstrings as a new process does."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(corpus, "_root", lambda: tmp_path / "lib")
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "one.py").write_text('"""First."""\n')
    return corpus._modules.__wrapped__


def test_docstrings_are_kept_until_a_file_changes(library, tmp_path, monkeypatch):
    assert library() == FIRST
    with monkeypatch.context() as patch:
        patch.setattr(corpus, "_module_docstrings", None)
        assert library() == FIRST
    (tmp_path / "lib" / "one.py").write_text('"""Second, longer."""\n')
    assert library() == ((("one", "Second, longer."),),)


@pytest.mark.parametrize("text", ["", "[]", "[[1]]", "[[[1]]]", "{}x", "[" * 99_999])
def test_a_damaged_cache_is_made_again(library, tmp_path, text):
    library()
    (kept,) = (tmp_path / "cache" / "gptdist").iterdir()
    kept.write_text(text)
    assert library() == FIRST
    assert kept.read_text() == '[[["one", "First."]]]'


def test_a_cache_that_cannot_be_written_is_no_error(library, tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file")
    assert library() == FIRST
    monkeypatch.setenv("XDG_CACHE_HOME", "~nobody-of-this-name")
    assert library() == FIRST


def test_size_order_and_content():
    documents = list(embedded_documents())
    assert documents == list(embedded_documents())
    assert 1_800_000 < sum(map(len, documents)) < 3_000_000
    assert len(documents) > 300
    assert all(document.strip() for document in documents)


def test_docstrings_stand_under_their_qualified_names():
    documents = {document.split("\n", 1)[0]: document for document in embedded_documents()}
    assert "\n\nargparse.ArgumentParser\n\nObject for parsing command line strings" in documents["argparse"]
    assert not any(name.startswith(("test.", "idlelib", "pydoc_data")) for name in documents)
