"""Conversation files, and conversations as training rows."""

import json
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptdist.data.answers import Answered, cut, encode_conversations, pack, packed_row, row_of
from gptdist.data.examples import eval_batches
from gptdist.data.instructions import ASSISTANT, USER, Conversation, Turn, read_conversations
from gptdist.data.questions import (
    ASKED,
    ASKED_COMMON,
    ASKED_HELD_OUT,
    COMMON_HELD_OUT,
    common_names,
    documented_names,
    first_sentence,
    python_questions,
)
from gptdist.data.templates import TEMPLATES
from gptdist.data.tokenizer import build_tokenizer, extend
from gptdist.errors import UserError
from gptdist.ops import cross_entropy

EXAMPLE = Conversation(
    (Turn(USER, "Hi?"), Turn(ASSISTANT, "Hello."), Turn(USER, "Bye?"), Turn(ASSISTANT, "Bye.")), "Be.")


def read(tmp_path, content: str | bytes):
    path = tmp_path / "x.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_conversations(path)


def as_messages(c: Conversation) -> dict:
    system = [{"role": "system", "content": c.system}] if c.system is not None else []
    return {"id": 3, "messages": system + [{"role": t.role, "content": t.text} for t in c.turns]}


def as_sharegpt(c: Conversation) -> dict:
    names = {USER: "human", ASSISTANT: "gpt"}
    system = [{"from": "system", "value": c.system}] if c.system is not None else []
    return {"conversations": system + [{"from": names[t.role], "value": t.text} for t in c.turns]}


def as_alpaca(c: Conversation) -> dict:
    return {"instruction": c.turns[0].text, "input": c.turns[0].input, "output": c.turns[1].text, "text": "other"}


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
said = text.filter(str.strip)
pairs = st.lists(st.tuples(text, said), min_size=1, max_size=3)
chats = st.builds(lambda pairs, system: Conversation(
    tuple(turn for a, b in pairs for turn in (Turn(USER, a), Turn(ASSISTANT, b))), system), pairs, st.none() | text)
single = st.builds(lambda a, i, b: Conversation((Turn(USER, a, i), Turn(ASSISTANT, b))), said, text, said)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), indent=st.sampled_from([None, 1]), lines=st.booleans(), escaped=st.booleans())
def test_what_is_written_is_read(tmp_path_factory, data, indent, lines, escaped):
    write, kind = data.draw(st.sampled_from([(as_messages, chats), (as_sharegpt, chats), (as_alpaca, single)]))
    wanted = data.draw(st.lists(kind, min_size=1, max_size=3))
    records = [write(c) for c in wanted]
    content = json.dumps(records, indent=indent, ensure_ascii=escaped)
    if lines:
        content = "\r\n\n".join(json.dumps(record, ensure_ascii=escaped) for record in records)
    found = read(tmp_path_factory.mktemp("c"), content)
    assert (found.items, found.left_out, found.note()) == (wanted, 0, "")


def test_kinds_may_be_mixed_and_a_byte_order_mark_is_no_error(tmp_path):
    lines = [json.dumps(as_messages(EXAMPLE)), json.dumps(as_sharegpt(EXAMPLE)), '{"instruction":"a","output":"b"}']
    found = read(tmp_path, "\ufeff" + "\n".join(lines))
    assert found.items == [EXAMPLE, EXAMPLE, Conversation((Turn(USER, "a"), Turn(ASSISTANT, "b")))]


def test_the_format_may_be_demanded(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(as_messages(EXAMPLE)))
    assert read_conversations(path, "messages").items == [EXAMPLE]
    with pytest.raises(UserError, match=r"keys id, messages; expected instruction and output \(alpaca\)"):
        read_conversations(path, "alpaca")


def test_empty_answers_are_left_out_and_counted(tmp_path):
    records = [{"instruction": "a", "output": o} for o in ("", "b", " \n")]
    found = read(tmp_path, "[" + ",\n".join(map(json.dumps, records)) + "]")
    assert [c.answer for c in found.items] == ["b"]
    assert found.left_out == 2
    assert "left out 2 of 3 conversations with an empty answer, the first at" in found.note()
    assert found.note().endswith("x.json:1")


def message(role: object, content: object = "x") -> dict:
    return {"role": role, "content": content}


@pytest.mark.parametrize(("content", "expected"), [
    ("", "no objects; expected"),
    ("[]", "no objects"),
    ("  \n ", "no objects"),
    ('{"instruction": "a", "output": ""}', "all 1 objects are conversations with an empty answer"),
    ('[\n{"instruction": "a", "output": "b"},\n{"instruction" "a"}]', "x.json:3: not JSON"),
    ('{"instruction": "a", "output": "b"}\n\n{"instruction": ', "x.json:3: not JSON"),
    ('[{"instruction": "a", "output": "b"}', "x.json:1: the list has no end; is the file cut off"),
    ('[{"instruction": "a", "output": "b"}\n{}]', "x.json:2: '{' after an item of the list"),
    ('[]\n[]', "more after the list"),
    ('[{"instruction": "a", "output": "b"}]\nx', "x.json:2: more after the list"),
    ('{"instruction": "a", "output": "b"} {}', "x.json:1: more after the JSON object"),
    ("[" * 100_000, "not JSON|cannot be read as JSON"),
    ("[3]", "x.json:1: 3, expected a JSON object"),
    (b"\xff\xfe[", "not UTF-8"),
    ('{"prompt": "a"}', "x.json:1: keys prompt; expected messages .messages. or conv"),
    ("{}", "keys none"),
    ('{"instruction": "a"}', "x.json:1: no output"),
    ('{"output": "a"}', "no instruction"),
    ('{"instruction": " ", "output": "a"}', "instruction is empty"),
    ('{"instruction": 3, "output": "a"}', "instruction is 3, expected a string"),
    ('{"instruction": "a", "input": [1], "output": "a"}', r"input is \[1\], expected a string"),
    ('{"instruction": "a", "output": "\\ud800"}', "half of a surrogate pair"),
    (json.dumps({"messages": 3}), "messages is 3, expected a list"),
    (json.dumps({"messages": []}), "ends with no turns"),
    (json.dumps({"messages": [message("user")]}), "ends with the user"),
    (json.dumps({"messages": [message("assistant")]}), r"messages\[0\] is the assistant's, expected the user's"),
    (json.dumps({"messages": [message("user"), message("user")]}), r"messages\[1\] is the user's, expected the assist"),
    (json.dumps({"messages": [message("tool")]}), r'messages\[0\]: unknown role "tool", expected user, human'),
    (json.dumps({"messages": [message(3)]}), "unknown role 3"),
    (json.dumps({"messages": [message("user"), message("system")]}), "is a system message, expected it first"),
    (json.dumps({"messages": [message("user", None)]}), "content is null, expected a string"),
    (json.dumps({"messages": [message("user", ["a"])]}), r'content is \["a"\]'),
    (json.dumps({"messages": [{"role": "user"}]}), r"messages\[0\] has no content; its keys: role"),
    (json.dumps({"messages": ["a"]}), r'messages\[0\] is "a", expected an object with role and content'),
    (json.dumps({"conversations": [{"from": "human"}]}), r"conversations\[0\] has no value"),
    (json.dumps({"conversations": [{"role": "user", "value": "a"}]}), "has no from; its keys: role, value"),
])
def test_bad_files_are_named(tmp_path, content, expected):
    with pytest.raises(UserError, match=expected):
        read(tmp_path, content)


def test_a_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*none\.json: No such file"):
        read_conversations(tmp_path / "none.json")


def test_long_lists_are_read_in_linear_time(tmp_path):
    records = [{"instruction": "a" * 100, "output": "b"}] * 20_000
    assert len(read(tmp_path, json.dumps(records, indent=1)).items) == 20_000


# Rows


def whole(*tokens: int) -> Answered:
    return Answered(np.array(tokens), np.ones(len(tokens), bool))


def test_the_books_collate():
    """Chapter 7's batch: the first <|endoftext|> after a text is a target, all further positions are ignored.

    There the padding that is read is <|endoftext|> too; here it is 0, which no target sees.
    """
    rows = [row_of(whole(0, 1, 2, 3, 4, 50256)), row_of(whole(5, 6, 50256)), row_of(whole(7, 8, 9, 50256))]
    lengths = np.array([len(row.tokens) for row in rows])
    [batch] = eval_batches(rows, lengths=lengths, micro_batch=3, context=5)
    assert dict(zip(batch.sample_ids.tolist(), batch.targets.tolist(), strict=True)) == {
        0: [1, 2, 3, 4, 50256], 1: [6, 50256, -100, -100, -100], 2: [8, 9, 50256, -100, -100]}
    assert batch.tokens[batch.targets != -100].tolist() == [5, 6, 7, 8, 9, 0, 1, 2, 3, 4]


def test_the_books_toy_loss_is_unchanged_by_ignored_targets():
    logits = torch.tensor([[-1.0, 1.0], [-0.5, 1.5], [-0.5, 1.5]])

    def mean_loss(rows: int, targets: list[int]) -> float:
        losses = cross_entropy(logits[:rows], torch.tensor(targets), ignore_index=-100)
        return losses.sum().item() / sum(t != -100 for t in targets)

    assert mean_loss(2, [0, 1]) == pytest.approx(1.1269, abs=5e-5)
    assert mean_loss(3, [0, 1, 1]) == pytest.approx(0.7936, abs=5e-5)
    assert mean_loss(3, [0, 1, -100]) == mean_loss(2, [0, 1])


def item(pattern: str) -> Answered:
    """p: prompt, a: answer, E: end of an answer; token i is i, E is 99."""
    tokens = [99 if c == "E" else i for i, c in enumerate(pattern)]
    return Answered(np.array(tokens), np.array([c != "p" for c in pattern]))


@pytest.mark.parametrize(("pattern", "context", "left"), [
    ("ppaaE", 4, "ppaaE"),
    ("ppaaE", 3, "ppaE"),
    ("ppaaE", 2, None),
    ("ppaaE", 1, None),
    ("pppppE", 4, None),
    ("ppaaEppaE", 8, "ppaaEppaE"),
    ("ppaaEppaaE", 8, "ppaaEppaE"),
    ("ppaaEppaaE", 7, "ppaaE"),
    ("ppaaEppaaE", 5, "ppaaE"),
    ("ppaaEppaaE", 4, "ppaaE"),
    ("ppaaEppaaE", 3, "ppaE"),
])
def test_cutting_keeps_an_end_token(pattern, context, left):
    result = cut(item(pattern), context)
    if left is None:
        assert result is None
        return
    assert result.length <= context
    assert result.tokens.tolist() == item(left).tokens.tolist()
    assert result.learned.tolist() == item(left).learned.tolist()


@pytest.fixture(scope="module")
def tokenizer():
    return extend(build_tokenizer("bytes"), TEMPLATES["chatml"].specials)


def short(asked: str, answer: str) -> Conversation:
    return Conversation((Turn(USER, asked), Turn(ASSISTANT, answer)))


def test_only_answers_are_learned(tokenizer):
    encoded = encode_conversations([short("ask", "tell")], TEMPLATES["chatml"], tokenizer, context=99, mask_prompt=True,
                                   where="x")
    [item] = encoded.items
    end = tokenizer.specials["<|im_end|>"]
    assert tokenizer.decode(item.tokens[item.learned]) == "tell<|im_end|>"
    row = row_of(item)
    assert row.targets[row.targets != -100].tolist() == [*tokenizer.encode("tell"), end]
    assert len(row.tokens) == len(row.targets) == item.length
    [item] = encode_conversations([short("ask", "tell")], TEMPLATES["chatml"], tokenizer, context=99, mask_prompt=False,
                                  where="x").items
    assert row_of(item).targets.tolist() == item.tokens[1:].tolist(), "without the mask everything is learned"


def test_what_does_not_fit_is_counted(tokenizer):
    conversations = [short("ask", "tell"), short("ask", "tell" * 50), short("ask" * 50, "tell")]
    encoded = encode_conversations(conversations, TEMPLATES["chatml"], tokenizer, context=60, mask_prompt=True,
                                   where="x")
    assert (len(encoded.items), encoded.kept, encoded.truncated, encoded.dropped) == (2, [0, 1], 1, 1)
    assert encoded.items[1].tokens[-1] == tokenizer.specials["<|im_end|>"]
    assert "longer than model.context=60: 1 cut, their end token kept and 1 left out" in encoded.note()
    with pytest.raises(UserError, match="none of 1 conversations has a part of an answer within"):
        encode_conversations(conversations[:1], TEMPLATES["chatml"], tokenizer, context=5, mask_prompt=True, where="x")


@given(st.lists(st.integers(1, 40), min_size=1, max_size=60))
def test_packing_places_every_item_once(lengths):
    items = [whole(*range(n + 1)) for n in lengths]
    rows = pack(items, 40)
    assert sorted(i for row in rows for i in row) == list(range(len(items)))
    assert all(sum(lengths[i] for i in row) <= 40 for row in rows)
    assert len(rows) <= 1 + 2 * sum(lengths) // 40, "no two rows would fit in one"
    for row in rows:
        packed = packed_row([items[i] for i in row])
        position = np.arange(len(packed.tokens)) - packed.doc_start
        assert (packed.tokens == position).all(), "the tokens of each item count from its own start"
        assert (packed.targets == position + 1).all()
        assert packed.doc_start.dtype == np.int32


# The embedded questions


@pytest.mark.parametrize(("kind", "asked", "held_out"), [
    ("library", ASKED, (ASKED_HELD_OUT,)), ("common", ASKED_COMMON, COMMON_HELD_OUT)])
def test_the_embedded_questions(kind, asked, held_out):
    """Held-out names are nowhere in training, held-out words neither; what they ask about, in other words, is."""
    questions = python_questions(kind)
    exchanges = [pair for c in questions.train for pair in zip(c.turns[::2], c.turns[1::2], strict=True)]
    train = {question.text: answer.text for question, answer in exchanges}
    names = {text.removeprefix("Explain ").removesuffix(".") for text in train if text.startswith("Explain ")}
    assert set(train) == {words.format(name=name) for words in asked for name in names}
    assert len(train) == len(exchanges)
    assert {len(c.turns) for c in questions.train} == ({2, 4} if kind == "common" else {2})
    assert min(len(questions.names), len(questions.phrasings)) > 20
    for c in questions.names:
        assert any(re.fullmatch(re.escape(words).replace(r"\{name\}", "(.+)"), c.turns[0].text) for words in asked)
        assert c.turns[0].text not in train
    for c in questions.phrasings:
        [name] = {found[1] for words in held_out
                  if (found := re.fullmatch(re.escape(words).replace(r"\{name\}", "(.+)"), c.turns[0].text))}
        assert c.answer == train[f"Explain {name}."]
    assert questions.held_out[:4] == [questions.names[0], questions.phrasings[0], questions.names[1],
                                      questions.phrasings[1]]


def test_common_names_are_called_as_in_a_program():
    names = dict(common_names())
    assert names["len"] == "Return the number of items in a container."
    assert names["math.sqrt"] == "Return the square root of x."
    assert names["str.lower"] == "Return a copy of the string converted to lowercase."
    assert names["shutil.copyfile"].startswith("Copy data from src to dst")
    assert "Create a new string object" in names["str"], "its docstring begins with signatures"
    assert not [name for name in names if name.startswith(("builtins", "_")) or "._" in name]
    assert len(documented := dict(documented_names())) > 3000
    assert names["json.dumps"] == documented["json.dumps"]


@pytest.mark.parametrize(("docstring", "sentence"), [
    ("One. Two.", "One."), ("One\ntwo.\n\nThree.", "One two."), ("x.y is z", "x.y is z"), ("Why? So.", "Why?"),
])
def test_first_sentence(docstring, sentence):
    assert first_sentence(docstring) == sentence
