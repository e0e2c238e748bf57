import json

import pytest
import torch

from gptdist.data.tokenizer import build_tokenizer
from gptdist.errors import UserError
from gptdist.generate import (
    Generator,
    PagedCache,
    Sampling,
    few_shot_prompt,
    filter_logits,
    read_examples,
    read_prompts,
)
from tests.test_model import small_model

BYTES = {"vocab_size": 257, "context": 32}
GREEDY = Sampling(max_new_tokens=12, temperature=0)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer("bytes")


def generator(tokenizer, **options) -> Generator:
    model = small_model(**(BYTES | options)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(p.numel()))
    return Generator(model, tokenizer)


def greedy_without_cache(gen: Generator, text: str, n: int) -> list[int]:
    tokens = gen.tokenizer.encode(text)
    for _ in range(n):
        tokens.append(int(gen.model.logits(gen.model.hidden(torch.tensor([tokens])))[0, -1].argmax()))
    return tokens[-n:]


@pytest.mark.parametrize("options", [{}, {"positions": "rope", "n_kv_heads": 2}])
def test_the_cache_gives_the_same_tokens_as_no_cache(tokenizer, options):
    gen = generator(tokenizer, **options)
    for text in ("a", "hello there", "x" * 17):
        assert gen.generate([text], GREEDY)[0].tokens == greedy_without_cache(gen, text, 12)


def test_rows_of_a_batch_do_not_depend_on_each_other(tokenizer):
    gen = generator(tokenizer)
    prompts = ["a", "hello there", "x" * 19, "", "the same"]
    sampling = Sampling(max_new_tokens=10, temperature=0.9, top_k=20, seed=5)
    together = gen.generate(prompts, sampling)
    first_alone = gen.generate(prompts[:1], sampling)[0]
    assert together[0] == first_alone
    assert [c.tokens for c in gen.generate(prompts, GREEDY)] == [gen.generate([p], GREEDY)[0].tokens for p in prompts]


def test_the_seed_decides(tokenizer):
    gen = generator(tokenizer)
    texts = {gen.generate(["ab"], Sampling(max_new_tokens=8, seed=seed))[0].text for seed in (1, 1, 2, 3)}
    assert len(texts) == 3


def test_goes_on_past_the_context(tokenizer):
    """Past the end of the context the text goes on from its last half."""
    gen = generator(tokenizer)
    completion = gen.generate(["hello"], Sampling(max_new_tokens=100, temperature=0))[0]
    assert (len(completion.tokens), completion.finish) == (100, "length")
    whole = tokenizer.encode("hello") + completion.tokens

    def likeliest(tokens):
        return int(gen.model.logits(gen.model.hidden(torch.tensor([tokens])))[0, -1].argmax())

    assert whole[32] == likeliest(whole[:32])
    assert whole[33] == likeliest(whole[17:33])
    assert whole[34] == likeliest(whole[17:34])


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("options", [{}, {"positions": "rope", "n_kv_heads": 2}])
def test_rows_do_not_depend_on_each_other_past_the_context(tokenizer, options, temperature):
    """Every row alone (a batch of 1 keeps its seed) is what it is beside rows that fill up at other times."""
    gen = generator(tokenizer, **options)
    prompts = ["x" * 19, "hello there", "y" * 31, "a", "z" * 50, "w" * 32]
    sampling = Sampling(max_new_tokens=100, temperature=temperature, seed=4)
    alone = gen.generate(prompts, sampling, batch_size=1)
    assert sum(len(c.tokens) > 32 for c in alone) >= 4, "most rows are drawn past the context"
    for batch_size in (2, 3, len(prompts)):
        assert gen.generate(prompts, sampling, batch_size=batch_size) == alone


def test_the_batch_size_changes_nothing(tokenizer):
    gen = generator(tokenizer)
    prompts = ["a", "bc", "def", "g", "h" * 9]
    sampling = Sampling(max_new_tokens=9, temperature=0.9, seed=2)
    alone = gen.generate(prompts, sampling, batch_size=1)
    assert len({tuple(c.tokens) for c in alone}) == len(prompts)
    for batch_size in (2, 4, 16):
        assert gen.generate(prompts, sampling, batch_size=batch_size) == alone
    with pytest.raises(UserError, match="batch size is 0"):
        gen.generate(prompts, sampling, batch_size=0)


def test_a_prompt_longer_than_the_context_is_cut_from_the_left(tokenizer):
    gen = generator(tokenizer)  # its context is 32: the last half stays
    long = "".join(chr(97 + i % 26) for i in range(90))
    assert gen.generate([long], GREEDY)[0].tokens[0] == greedy_without_cache(gen, long[-16:], 1)[0]


def test_streaming_gives_the_text_of_the_completion(tokenizer):
    gen = generator(tokenizer)
    sampling = Sampling(max_new_tokens=30, temperature=0.8, seed=3, stop=("zz",))
    assert "".join(gen.stream("ab", sampling)) == gen.generate(["ab"], sampling)[0].text


class Scripted(Generator):
    """A generator whose model says a given text."""

    def __init__(self, tokenizer, text: str):
        super().__init__(small_model(**BYTES).eval(), tokenizer)
        self.script = [*tokenizer.encode(text), tokenizer.eot]

    def _choose(self, row, logits, sampling):
        return self.script[len(row.tokens) - row.n_prompt]


@pytest.mark.parametrize(("stop", "text", "finish"), [
    ((), "one two three", "end"),
    (("two",), "one ", "stop"),
    (("three", " two"), "one", "stop"),
    (("e t",), "on", "stop"),
    (("absent", "threef"), "one two three", "end"),
])
def test_stop_strings(tokenizer, stop, text, finish):
    gen = Scripted(tokenizer, "one two three")
    sampling = Sampling(max_new_tokens=50, stop=stop)
    completion = gen.generate(["p"], sampling)[0]
    assert (completion.text, completion.finish) == (text, finish)
    assert "".join(gen.stream("p", sampling)) == text


def test_streaming_never_shows_half_a_character_or_part_of_a_stop_string(tokenizer):
    pieces = list(Scripted(tokenizer, "éñx STO STOP later").stream("p", Sampling(max_new_tokens=50, stop=("STOP",))))
    assert "".join(pieces) == "éñx STO "
    assert all("\ufffd" not in piece for piece in pieces)


def test_max_new_tokens(tokenizer):
    completion = Scripted(tokenizer, "abcdefgh").generate(["p"], Sampling(max_new_tokens=3))[0]
    assert (completion.text, completion.finish) == ("abc", "length")


def test_filters():
    logits = torch.tensor([1.0, 2.0, 3.0, 4.0])
    kept = filter_logits(logits, [], Sampling(top_k=2))
    assert kept.isinf().tolist() == [True, True, False, False]
    p = logits.softmax(0)  # 0.03 0.09 0.24 0.64
    kept = filter_logits(logits, [], Sampling(top_p=0.7))
    assert kept.isinf().tolist() == [True, True, False, False], p
    for top_p in (0.01, 5e-324):  # the smallest number, which fp32 does not have
        assert filter_logits(logits, [], Sampling(top_p=top_p)).isinf().tolist() == [True, True, True, False]
    assert filter_logits(logits, [], Sampling(temperature=0.5)).tolist() == [2.0, 4.0, 6.0, 8.0]
    penalised = filter_logits(torch.tensor([2.0, -2.0, 1.0]), [0, 1, 1], Sampling(repetition_penalty=2.0))
    assert penalised.tolist() == [1.0, -4.0, 1.0]
    assert logits.tolist() == [1.0, 2.0, 3.0, 4.0], "the model's logits are not changed"


def test_pages_are_given_back():
    config = small_model(**BYTES).config
    cache = PagedCache(config, 3, 32, device=torch.device("cpu"), dtype=torch.float32)
    cache.reserve(17)
    cache.advance(torch.tensor([17, 2, 9]))
    used = {page for pages in cache._pages for page in pages}
    assert len(used) == 6, "no two rows share a page"
    cache.keep([1])
    assert len(cache._free) == 6 - 2
    assert cache.lengths.tolist() == [2]


def test_the_smallest_temperature_and_largest_penalty_still_choose(tokenizer):
    gen = generator(tokenizer)
    sampling = Sampling(max_new_tokens=5, temperature=1e-3, repetition_penalty=1e3, top_p=1e-30)
    gen.model.wte.weight.data *= 1e6  # logits of some millions
    assert len(gen.generate(["ab"], sampling)[0].tokens) <= 5


@pytest.mark.parametrize(("options", "message"), [
    ({"temperature": -1}, "temperature is -1"), ({"top_p": 0}, "top-p is 0"), ({"top_k": -2}, "top-k is -2"),
    ({"max_new_tokens": 0}, "max new tokens is 0"), ({"stop": ("",)}, "a stop string is empty"),
    ({"repetition_penalty": 0}, "repetition penalty is 0"),
    ({"repetition_penalty": 1e-45}, "repetition penalty is 1e-45"),
    ({"repetition_penalty": float("inf")}, "repetition penalty is inf"),
    ({"temperature": 1e-45}, "temperature is 1e-45"), ({"temperature": float("nan")}, "temperature is nan"),
    ({"temperature": float("inf")}, "temperature is inf"),
    ({"seed": -1}, "seed is -1"),
])
def test_bad_sampling_is_named(options, message):
    with pytest.raises(UserError, match=message):
        Sampling(**options)


def test_few_shot_prompt():
    examples = [{"input": "2+2", "output": "4"}, {"input": "3+3", "output": "6"}]
    prompt = few_shot_prompt(examples, "5+5", "Q: {input}\nA: {output}\n")
    assert prompt == "Q: 2+2\nA: 4\nQ: 3+3\nA: 6\nQ: 5+5\nA:"
    with pytest.raises(UserError, match="needs both"):
        few_shot_prompt(examples, "x", "{input}")


def test_prompt_and_example_files(tmp_path):
    (tmp_path / "p.txt").write_text("one\n\ntwo\n")
    assert read_prompts(str(tmp_path / "p.txt")) == ["one", "two"]
    (tmp_path / "p.jsonl").write_text('"one\\ntwo"\n{"prompt": "three"}\n')
    assert read_prompts(str(tmp_path / "p.jsonl")) == ["one\ntwo", "three"]
    (tmp_path / "u.jsonl").write_text('"one\u2028two"\n"\x85"\r\n', encoding="utf-8", newline="")
    assert read_prompts(str(tmp_path / "u.jsonl")) == ["one\u2028two", "\x85"]
    (tmp_path / "u.txt").write_bytes("a\u2028b\rc\r\n\r\nd".encode())
    assert read_prompts(str(tmp_path / "u.txt")) == ["a\u2028b\rc", "d"]
    (tmp_path / "e.jsonl").write_text(json.dumps({"input": "a", "output": "b"}) + "\n")
    assert read_examples(str(tmp_path / "e.jsonl")) == [{"input": "a", "output": "b"}]


@pytest.mark.parametrize(("reader", "name", "content", "message"), [
    (read_prompts, "none.txt", None, "cannot read"),
    (read_prompts, "p.txt", b"\n", "holds no prompts"),
    (read_prompts, "p.txt", b"\xff\xfe", "is not UTF-8"),
    (read_prompts, "p.jsonl", b'"a"\n{bad', "line 2 is not JSON"),
    (read_prompts, "p.jsonl", b'"a"\n\n \n{bad', "line 4 is not JSON"),
    (read_prompts, "p.jsonl", b"[" * 100_000, "line 1 is not JSON"),
    (read_prompts, "p.jsonl", b"9" * 5000, "line 1 is not JSON"),
    (read_prompts, "p.jsonl", b"3", "line 1: expected a string"),
    (read_examples, "e.jsonl", b'\n\n{"input": "\xe2\x80\xa8", "output": "b"}\n{}', "line 4: expected an object"),
    (read_examples, "e.jsonl", b'{"input": "a"}', "line 1: expected an object with the strings input and output"),
    (read_examples, "e.jsonl", b"", "holds no examples"),
])
def test_bad_files_are_named(tmp_path, reader, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        reader(str(tmp_path / name))
