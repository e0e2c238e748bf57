"""N-grams in common, against a search of the text; chunk borders, document borders, bad input."""

import itertools
import json

import pytest

from gptdist.cli import main
from gptdist.data.format import TokenDataset
from gptdist.data.tokenizer import Tokenizer
from gptdist.errors import UserError
from gptdist.evaluate.contamination import _training_words, _words, contamination
from gptdist.evaluate.items import Item, TaskSet


def text_of(dataset) -> str:
    tokens = TokenDataset.open(dataset / "train")
    return Tokenizer.load(dataset / "tokenizer").decode(tokens.window(0, len(tokens)).tolist())


def test_items_of_the_training_text_are_found_and_others_are_not(dataset):
    words = _words(text_of(dataset).split("<|endoftext|>")[0])
    inside = " ".join(words[40:60])
    shuffled = " ".join(reversed(words[40:60]))
    texts = (inside.upper().replace(" ", ",\n"), shuffled, "too short", f"A question? {inside}")
    task = TaskSet("t", "qa", [Item(f"line {i}", text, ("x",)) for i, text in enumerate(texts, 1)])
    (result,) = contamination(dataset, [task])
    assert (result["items"], result["too_short"], result["contaminated"]) == (4, 1, 2)
    assert result["found"] == 2 * (20 - 13 + 1)
    assert [example["where"] for example in result["examples"]] == ["line 1", "line 4"]
    assert result["examples"][1]["words"] == " ".join(words[40:53])


@pytest.mark.parametrize("chunk", [1, 7, 1000, 1 << 20])
def test_chunks_neither_lose_nor_repeat_an_ngram(dataset, chunk):
    dataset_, tokenizer = TokenDataset.open(dataset / "train"), Tokenizer.load(dataset / "tokenizer")

    class Part:  # the first tokens of the data
        def __len__(self):
            return 3000

        def window(self, start, n):
            return dataset_.window(start, n)

    n = 5
    expected = _words(tokenizer.decode(dataset_.window(0, 3000).tolist()))
    grams = [tuple(part[i:i + n]) for part in _training_words(Part(), tokenizer, n, chunk)
             for i in range(len(part) - n + 1)]
    assert grams == [tuple(expected[i:i + n]) for i in range(len(expected) - n + 1)]


def test_no_ngram_crosses_the_border_of_documents(dataset):
    documents = text_of(dataset).split("<|endoftext|>")
    crossing = " ".join([*_words(documents[0])[-8:], *_words(documents[1])[:8]])
    (result,) = contamination(dataset, [TaskSet("t", "text", [Item("a", crossing)])])
    assert result["found"] == 0
    assert result["ngrams"] == 4


def test_the_command_reports(dataset, tmp_path, capsys):
    words = list(itertools.islice(_words(text_of(dataset)), 30))
    path = tmp_path / "set.jsonl"
    path.write_text(json.dumps({"text": " ".join(words), "label": "x"}) + '\n{"text": "b", "label": "y"}\n')
    assert main(["contamination", str(dataset), "--tasks", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["contaminated"] == 1
    assert main(["contamination", str(dataset / "train"), "--tasks", str(path), "--ngram", "8"]) == 0
    assert "1 (100.0%)" in capsys.readouterr().out
    assert main(["contamination", str(tmp_path), "--tasks", str(path)]) == 2
    assert "expected a split directory" in capsys.readouterr().err
    with pytest.raises(UserError, match="n is 0, expected at least 1 word"):
        contamination(dataset, [], n=0)
