"""The embedded corpus."""

from gptdist.data.corpus import embedded_documents


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
