"""How conversations are written, and that no message can forge a turn."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptdist.data.instructions import ASSISTANT, USER, Conversation, Turn
from gptdist.data.templates import TEMPLATES, Segment, Template, encode, load_template, template_from
from gptdist.data.tokenizer import EOT, build_tokenizer, extend
from gptdist.errors import UserError

ONE = Conversation((Turn(USER, "Name a colour.", "not red"), Turn(ASSISTANT, "Blue.")))
TWO = Conversation((Turn(USER, "Hi"), Turn(ASSISTANT, "Hello."), Turn(USER, "Bye"), Turn(ASSISTANT, "See you.")), "Be.")


def written(template: Template, conversation: Conversation) -> str:
    return "".join(segment.text for segment in template.render(conversation))


def test_alpaca():
    """As Raschka (2024), chapter 7, writes it, and <|endoftext|> after the answer."""
    assert written(TEMPLATES["alpaca"], ONE) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nName a colour.\n\n### Input:\nnot red\n\n### Response:\nBlue.<|endoftext|>")
    assert written(TEMPLATES["alpaca"], TWO).startswith(
        "Be.\n\n### Instruction:\nHi\n\n### Response:\nHello.<|endoftext|>\n\n### Instruction:\nBye")


def test_phi3():
    assert written(TEMPLATES["phi3"], ONE) == (
        "<|user|>\nName a colour.\nnot red<|end|>\n<|assistant|>\nBlue.<|end|>")
    assert written(TEMPLATES["phi3"], TWO) == (
        "<|system|>\nBe.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\nHello.<|end|>\n"
        "<|user|>\nBye<|end|>\n<|assistant|>\nSee you.<|end|>")
    assert set(TEMPLATES["phi3"].specials) == {"<|system|>", "<|user|>", "<|assistant|>", "<|end|>"}


def test_chatml():
    template = TEMPLATES["chatml"]
    assert written(template, TWO.question()) == (
        "<|im_start|>system\nBe.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n"
        "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n")
    assert (template.specials, template.end, template.stops) == (
        ("<|im_start|>", "<|im_end|>"), "<|im_end|>", ("<|im_start|>", "<|im_end|>"))


def test_what_is_learned():
    segments = TEMPLATES["phi3"].render(TWO)
    assert [s.text for s in segments if s.is_answer] == ["Hello.", "<|end|>", "See you.", "<|end|>"]


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
fragments = st.lists(text | st.sampled_from(["<|im_end|>", "<|end|>", "<|user|>", EOT, "{answer}", "{prompt}"]),
                     max_size=4).map("".join)
CUSTOM = Template(name="custom", turn="[{prompt}] -> {answer} <|stop|>;", system="({system})", input="/{input}")


@pytest.mark.parametrize("template", [*TEMPLATES.values(), CUSTOM], ids=lambda t: t.name)
@given(turns=st.lists(st.tuples(fragments, fragments, fragments), min_size=1, max_size=3), system=st.none() | fragments)
def test_messages_come_back_and_forge_nothing(template, turns, system):
    """Whatever is said: the text round-trips, and the special tokens are those that the template itself writes."""
    tokenizer = extend(build_tokenizer("bytes"), template.specials)
    said = [turn for asked, given, told in turns for turn in (Turn(USER, asked, given), Turn(ASSISTANT, told))]
    plain = [turn for _, given, _ in turns for turn in (Turn(USER, "x", "y" * bool(given)), Turn(ASSISTANT, "z"))]
    conversation = Conversation(tuple(said), system)
    ids, learned = encode(template.render(conversation), tokenizer)
    assert tokenizer.decode(ids) == written(template, conversation)
    first_special = min(tokenizer.specials.values())
    wanted, _ = encode(template.render(Conversation(tuple(plain), "s" if system else system)), tokenizer)
    assert [i for i in ids if i >= first_special] == [i for i in wanted if i >= first_special]
    ends = [i for i, (token, answer) in enumerate(zip(ids, learned, strict=True))
            if answer and token == tokenizer.specials[template.end]]
    assert len(ends) == len(turns)
    assert ends[-1] == len(ids) - 1
    prompt, _ = encode(template.render(conversation.question()), tokenizer)
    assert ids[:len(prompt)] == prompt, "generation begins with exactly what training saw"
    answer = tokenizer.decode(ids[len(prompt):])
    assert answer.startswith(turns[-1][2])
    assert answer.endswith(template.end)


def test_the_prompts_last_turn_is_not_an_answer():
    assert TEMPLATES["alpaca"].render(ONE.question())[-1] == Segment(
        written(TEMPLATES["alpaca"], ONE).split("Blue.")[0])


def test_the_names():
    assert load_template("chatml") is TEMPLATES["chatml"]
    with pytest.raises(UserError, match="unknown template 'chatlm'; did you mean chatml"):
        load_template("chatlm")
    with pytest.raises(UserError, match="expected alpaca, phi3, chatml, a YAML file, or a text with"):
        load_template("zzz")


def test_ones_own_as_text():
    template = load_template("Q: {prompt}\nA: {answer}\n")
    assert written(template, Conversation(TWO.turns)) == (
        "Q: Hi\nA: Hello.<|endoftext|>\nQ: Bye\nA: See you.<|endoftext|>")
    with pytest.raises(UserError, match="has no place for a system prompt"):
        template.render(TWO)
    assert template.specials == ()
    template = load_template("<|q|>{prompt}<|a|>{answer}!<|z|>tail")
    assert (template.specials, template.end) == (("<|q|>", "<|a|>", "<|z|>"), "<|z|>")
    assert [s.text for s in template.render(ONE) if s.is_answer] == ["Blue.!", "<|z|>"]


def test_ones_own_as_yaml(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text('turn: "Q: {prompt}\\nA: {answer}"\nsystem: "{system}\\n"\ndefault_system: Hi.\nstop: ["\\nQ:"]\n')
    template = load_template(str(path))
    assert (template.name, template.stops) == ("mine", ("\nQ:",))
    assert written(template, ONE) == "Hi.\nQ: Name a colour.\n\nnot red\nA: Blue.<|endoftext|>"
    assert template_from(json.loads(template.to_json()), "x") == template


@pytest.mark.parametrize("name", TEMPLATES)
def test_saved_and_read(name):
    assert template_from(json.loads(TEMPLATES[name].to_json()), "x") == TEMPLATES[name]


@pytest.mark.parametrize(("content", "message"), [
    ("turn: 'Q: {prompt}'", r"has no \{answer\} in `turn`: without an answer slot"),
    ("turn: 'Q: {answer}'", r"has \{answer\} in `turn`, expected \{prompt\} and then \{answer\}"),
    ("turn: '{answer} {prompt}'", r"has \{answer\}, \{prompt\} in `turn`, expected"),
    ("turn: '{prompt} {answer} {answer}'", "each once"),
    ("turn: '{system} {prompt} {answer}'", "each once"),
    ("turn: '{prompt} {answer}'\nsystem: x", "has no slot in `system`"),
    ("turn: '{prompt} {answer}'\ninput: x", "has no slot in `input`"),
    ("turn: '{prompt} {answer}'\ndefault_system: x", "has a default_system but no `system`"),
    ("turn: '{prompt} {answer}'\nstop: ['']", "has an empty text in `stop`"),
    ("turn: '{prompt} {answer}'\nstop: x", "stop is 'x', expected a list of texts"),
    ("turn: '{prompt} {answer}'\nstop: [3]", r"stop is \[3\], expected a list of texts"),
    ("turn: 3", "turn is 3, expected a text"),
    ("trun: '{prompt} {answer}'", "unknown key 'trun'; did you mean turn?"),
    ("system: '{system}'", "has no `turn`"),
    ("3", "is a int, expected keys such as turn"),
    ("a: [", "is not valid YAML"),
])
def test_bad_templates_are_named(tmp_path, content, message):
    (tmp_path / "t.yaml").write_text(content)
    with pytest.raises(UserError, match=message):
        load_template(str(tmp_path / "t.yaml"))


def test_a_missing_file():
    with pytest.raises(UserError, match="cannot read the template nowhere"):
        load_template("nowhere.yaml")
