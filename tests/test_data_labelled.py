"""Labelled texts: file formats, what is wrong with them, balance and split."""

import numpy as np
import pytest

from gptdist.data.labelled import (
    LabelledText,
    check_labels,
    embedded_labelled,
    find_labels,
    read_labelled,
    read_texts,
    several_lines_note,
    split,
    undersample,
)
from gptdist.errors import UserError


def write(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8", newline="")
    return path


def pairs(rows):
    return [(row.label, row.text) for row in rows]


@pytest.mark.parametrize(("name", "text"), [
    ("a.csv", 'id,label,text\n1,ham,"Hi, you"\n2,spam,"WIN ""now""\nor never"\n'),
    ("a.csv", '\ufefftext,label\r\n"Hi, you",ham\r\n"WIN ""now""\nor never",spam\r\n'),
    ("a.tsv", 'label\tmore\ttext\nham\tx\tHi, you\nspam\ty\t"WIN ""now""\nor never"\n'),
    ("a.tsv", 'ham\tHi, you\nspam\t"WIN ""now""\nor never"\n'),
    ("SMSCollection", 'ham\tHi, you\n\nspam\t"WIN ""now""\nor never"\n'),
    ("a.jsonl", '{"text": "Hi, you", "label": "ham"}\n\n{"label": "spam", "text": "WIN \\"now\\"\\nor never"}\n'),
])
def test_formats(tmp_path, name, text):
    rows = read_labelled(write(tmp_path, name, text))
    assert pairs(rows) == [("ham", "Hi, you"), ("spam", 'WIN "now"\nor never')]


def test_columns_of_other_names_and_labels_that_are_numbers(tmp_path):
    table = write(tmp_path, "a.csv", "body,class\nyes,1\nno,0\n")
    lines = write(tmp_path, "a.jsonl", '{"body": "yes", "class": 1}\n{"body": "no", "class": 0}\n')
    for path in (table, lines):
        assert pairs(read_labelled(path, text_field="body", label_field="class")) == [("1", "yes"), ("0", "no")]


@pytest.mark.parametrize(("name", "text", "message"), [
    ("a.csv", "text,label\nhi,ham\nyou,\nme, \n", "2 rows have no label (lines 3, 4): expected a text and a label"),
    ("a.csv", "text,label\n ,ham\n", "1 row has an empty text (line 2)"),
    ("a.csv", "txt,label\nhi,ham\n", "has no column 'text', its first line names txt, label: columns are separated by "
                                     "commas, and named by classify.text_field and classify.label_field"),
    ("a.csv", "text;label\nhi;ham\n", "its first line names text;label: columns are separated by commas"),
    ("a.csv", 'text,label\n"hi,ham\nyou,spam\n', "names 2 columns: quote fields that have the separator in "
                                                   "them, and close every quote"),
    ("a.csv", "text,label\nhi, you,ham\n", "line 2 has 3 fields, its first line names 2 columns"),
    ("a.csv", "", "has no rows"),
    ("a.tsv", "one\ttwo\tthree\n", "has no column 'text'"),
    ("a.txt", "ham\thi\nspam you\n", "line 2 has 1 fields, expected label<TAB>text"),
    ("a.jsonl", '{"text": "hi", "label": "ham"}\n{"text": \n', "line 2 is not JSON"),
    ("a.jsonl", '{"txt": "hi", "label": "ham"}\n', "line 1 has no field 'text', it has keys txt, label"),
    ("a.jsonl", '["hi"]\n', "line 1 has no field 'text', it has a list"),
    ("a.jsonl", '{"text": 3, "label": "ham"}\n', "line 1: 'text' is a int, expected a text"),
    ("a.jsonl", '{"text": "hi", "label": 0.5}\n', "line 1: 'label' is a float"),
    ("a.jsonl", '{"text": "hi"}\n', "1 row has no label (line 1)"),
    ("a.jsonl", '{"text": "hi", "label": null}\n', "1 row has no label (line 1)"),
])
def test_what_is_wrong_is_named(tmp_path, name, text, message):
    path = write(tmp_path, name, text)
    with pytest.raises(UserError) as caught:
        read_labelled(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_line_numbers_count_lines_inside_quotes(tmp_path):
    path = write(tmp_path, "a.csv", 'text,label\n"two\nlines",ham\nhi,\n')
    with pytest.raises(UserError, match=r"no label \(line 4\)"):
        read_labelled(path)


def test_stray_quotes_are_reported(tmp_path):
    """csv's quoting makes one row of several lines: allowed, but not unsaid."""
    path = write(tmp_path, "sms", 'ham\tok\nham\t"hi there\nspam\tWIN\nham\tbye"\nspam\t"a\nb"\n')
    rows = read_labelled(path)
    assert [row.label for row in rows] == ["ham", "ham", "spam"]
    note = several_lines_note(path, rows)
    assert note.startswith(f"2 rows span several lines, the first at {path} line 2: ")
    assert several_lines_note(path, rows[:2]).startswith(f"1 row spans several lines, the first at {path} line 2: ")
    assert several_lines_note(path, rows[:1]) == ""
    lines = write(tmp_path, "a.jsonl", '{"text": "a\\nb", "label": "ham"}\n')
    assert several_lines_note(lines, read_labelled(lines)) == ""


@pytest.mark.parametrize("inside", ["\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\u2029"])
def test_only_line_ends_end_lines(tmp_path, inside):
    text = f"one{inside}and"
    for name, content in (("a.csv", f'text,label\r\n{text},ham\r\n"{text}",ham\r\n'),
                          ("a.tsv", f"text\tlabel\n{text}\tham\n{text}\tham\n"),
                          ("a.txt", f"ham\t{text}\nham\t{text}\n")):
        rows = read_labelled(write(tmp_path, name, content))
        assert pairs(rows) == [("ham", text)] * 2
        assert rows[1].where.endswith("line 3" if name != "a.txt" else "line 2")
    assert read_texts(write(tmp_path, "b.txt", f"{text}\r\n{text}\ntwo")) == [text, text, "two"]


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*none\.csv: No such file"):
        read_labelled(tmp_path / "none.csv")
    (tmp_path / "a.csv").write_bytes(b"text,label\n\xff,ham\n")
    with pytest.raises(UserError, match=r"is not UTF-8 text \(byte 11\)"):
        read_labelled(tmp_path / "a.csv")


def test_texts_without_labels(tmp_path):
    assert read_texts(write(tmp_path, "a.txt", "one\ntwo\tmore\n")) == ["one", "two\tmore"]
    assert read_texts(write(tmp_path, "a.csv", "id,text\n1,one\n2,two\n")) == ["one", "two"]
    assert read_texts(write(tmp_path, "b.jsonl", '{"text": "one"}\n')) == ["one"]
    with pytest.raises(UserError, match=r"1 row has an empty text \(line 2\)"):
        read_texts(write(tmp_path, "b.txt", "one\n\ntwo\n"))
    with pytest.raises(UserError, match=r"no column 'text', its first line names id, txt: .* named by --text-field$"):
        read_texts(write(tmp_path, "b.csv", "id,txt\n1,one\n"))
    with pytest.raises(UserError, match="has no texts"):
        read_texts(write(tmp_path, "c.txt", ""))


def labelled(*labels):
    return [LabelledText(f"text {i}", label, f"line {i}") for i, label in enumerate(labels)]


def test_labels_are_sorted_or_as_listed():
    rows = labelled("b", "a", "b", "c")
    assert find_labels(rows) == ["a", "b", "c"]
    assert find_labels(rows, ["c", "a", "b"]) == ["c", "a", "b"]
    with pytest.raises(UserError, match="3 has the label 'c', which training does not know: its labels are 'a', 'b'"):
        find_labels(rows, ["a", "b"])
    with pytest.raises(UserError, match="has 'd', which no training text has: they have 'a', 'b', 'c'"):
        find_labels(rows, ["a", "b", "c", "d"])
    with pytest.raises(UserError, match="have the label 'a' alone, expected two or more"):
        find_labels(labelled("a", "a"))
    check_labels(rows, ["a", "b", "c"])


def test_undersampling_and_split_are_those_of_the_book():
    """The draws of pandas' sample(n, random_state=123) and sample(frac=1, random_state=123), by their definition."""
    rows = labelled(*["spam", *["ham"] * 40, *["spam"] * 9])
    ham, spam = ([row for row in rows if row.label == label] for label in ("ham", "spam"))
    balanced = undersample(rows, 123)
    drawn = np.random.RandomState(123).choice(40, 10, replace=False)
    assert balanced == [ham[i] for i in drawn] + spam
    parts = split(balanced, [0.7, 0.1, 0.2], 123)
    order = np.random.RandomState(123).choice(20, 20, replace=False)
    assert [*parts.train, *parts.val, *parts.test] == [balanced[i] for i in order]
    assert [len(part) for part in (parts.train, parts.val, parts.test)] == [14, 2, 4]


def test_without_a_test_share_no_text_is_lost():
    parts = split(labelled(*"abcabcabcab"), [0.9, 0.1, 0.0], 1)
    assert [len(part) for part in (parts.train, parts.val, parts.test)] == [9, 2, 0]


def test_embedded_texts():
    rows = embedded_labelled()
    assert len(rows) > 3000
    assert len(find_labels(rows)) == 7
    docstrings = {row.text.partition("\n\n")[2] for row in rows if "." in row.where}
    assert len(docstrings) == sum("." in row.where for row in rows)
    [row] = [row for row in rows if row.where == "os.path.join" or row.where == "posixpath.join"]
    assert row.text.startswith("join\n\nJoin two or more pathname components")
