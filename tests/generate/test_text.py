"""Text of tokens that come one by one: characters of several bytes, spaces of tokenizers, stop strings."""

from __future__ import annotations

import random

import pytest

from internlm_lite.data.tokenizer import Tokenizer, train_tokenizer
from internlm_lite.errors import DataError
from internlm_lite.generate.prompts import Defaults, PromptLine, end_ids, read_prompts
from internlm_lite.generate.request import Growing, Request, TextStream

TEXT = "你好，世界 naïve café 🙂🙃 def f(x):\n\treturn  x + 1\n"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    """Few pieces, so that most characters are bytes."""
    lines = [f"def f{n}(x):\n    return x + {n} the café\n" for n in range(300)]
    return train_tokenizer(lines, tmp_path_factory.mktemp("text") / "small.model", 300, 1)


@pytest.fixture(scope="module")
def spaced(tmp_path_factory) -> Tokenizer:
    """As InternLM's and Llama's: the first piece of a text has a space that decoding takes away."""
    import io

    import sentencepiece

    model = io.BytesIO()
    sentences = iter([f"the word {n} and the other" for n in range(300)])
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences,
        model_writer=model,
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("text") / "spaced.model"
    path.write_bytes(model.getvalue())
    assert Tokenizer(path).model.adds_space
    return Tokenizer(path)


def pieces_of(stream: TextStream, tokens: list[int]) -> list[str]:
    return [*(stream.add(token) for token in tokens), stream.finish()]


def test_no_piece_ends_inside_a_character(tokenizer):
    ids = tokenizer.encode(TEXT)
    assert len(ids) > len(TEXT), "characters of several tokens"
    for cut in range(0, len(ids), 7):
        stream = TextStream(tokenizer.decode, ids[:cut], ())
        pieces = pieces_of(stream, ids[cut:])
        whole = tokenizer.decode(ids)[len(tokenizer.decode(ids[:cut])) :]
        assert "".join(pieces) == stream.text == whole
    pieces = pieces_of(TextStream(tokenizer.decode, [], ()), ids)
    assert "".join(pieces) == TEXT and "\ufffd" not in "".join(pieces) and len([p for p in pieces if p]) > 20


def test_random_tokens_stream_to_the_text_that_decoding_them_at_once_gives(tokenizer, spaced):
    """Broken bytes, control tokens and ids beyond the vocabulary included."""
    generator = random.Random(4)
    for model in (tokenizer, spaced):
        prompt = model.encode("the word")
        for _ in range(100):
            ids = [generator.randrange(generator.choice((10, 259, 320))) for _ in range(25)]
            stream = TextStream(model.decode, prompt, ())
            assert "".join(pieces_of(stream, ids)) == model.decode([*prompt, *ids])[len("the word") :]


def test_the_space_of_the_first_word_is_kept(spaced):
    ids = spaced.encode("the word and the other")
    start = spaced.encode("the word")
    assert ids[: len(start)] == start and spaced.decode(ids[len(start) :]) == "and the other"
    assert "".join(pieces_of(TextStream(spaced.decode, [1, *start], ()), ids[len(start) :])) == " and the other"


STOPS = [
    ("abcabd", ("abd",), "abc"),  # a false start that is also the beginning of the right one
    ("aabaab", ("aab",), ""),
    ("xaaay", ("aaay", "zz"), "x"),
    ("hello\n\nrest", ("\n\n",), "hello"),
    ("hello\n", ("\n\n",), "hello\n"),  # held back, and given at the end
    ("one two", ("three", "two"), "one "),
    ("abcd", ("abcx", "bc"), "a"),
    ("abcd", ("abcd", "b"), "a"),  # the one that is complete first, however the text is divided
    ("é你é", ("你",), "é"),
    ("nothing", ("z",), "nothing"),
]


@pytest.mark.parametrize(("text", "stops", "expected"), STOPS)
def test_a_stop_string_is_found_however_tokens_divide_it(text, stops, expected):
    """Tokens are the bytes, pairs of them, and so on; the prompt ends in what would make a stop string of it."""
    data = text.encode()
    for size in (1, 2, 3, 4, 50):
        tokens = [data[at : at + size] for at in range(0, len(data), size)]
        vocab = [stops[0][:-1].encode(), *tokens]
        decode = lambda ids, vocab=vocab: b"".join(vocab[token] for token in ids).decode("utf-8", "replace")  # noqa: E731
        row = Growing(Request([0], 100, stop_strings=stops), decode)
        pieces = []
        for token in range(1, len(vocab)):
            pieces.append(row.add(token))
            if row.ended_by:
                break
        assert (row.ended_by == "stop") == (expected != text)
        rest = row._stream.finish() if not row.ended_by else ""
        assert "".join(pieces) + rest == row.result().text == expected
        assert all(not "".join(pieces[: n + 1]).startswith(expected + stops[0][:1]) for n in range(len(pieces)))


def test_what_was_held_back_comes_when_the_length_ends_a_text():
    row = Growing(Request([0], 3, stop_strings=("bbbb",)), lambda ids: "".join("ab"[token] for token in ids))
    assert [row.add(token) for token in (0, 1, 1)] == ["a", "", "bb"]
    assert row.result().text == "abb" and row.result().ended_by == "length"


def test_forks_of_a_text_grow_apart():
    row = Growing(Request([0], 9), lambda ids: "".join("ab"[token] for token in ids))
    row.add(0)
    other = row.fork()
    row.add(1), other.add(0), other.add(0)
    assert (row.result().text, other.result().text, row.tokens, other.tokens) == ("ab", "aaa", [0, 1], [0, 0, 0])


def test_end_ids_are_the_tokenizers_and_those_of_generation_config(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(tokenizer.path.read_bytes())
    beside = tmp_path / "generation_config.json"
    assert end_ids(Tokenizer(path)) == {tokenizer.eos}
    for value, expected in (("[7, 9]", {7, 9}), ("7", {7}), ("0", {0}), ("null", set()), ("[]", set())):
        beside.write_text(f'{{"eos_token_id": {value}}}')
        assert end_ids(Tokenizer(path)) == {tokenizer.eos} | expected
    for text, found in (("{", "no JSON object"), ("[]", "no JSON object"), ('{"eos_token_id": ["a"]}', "eos_token_id")):
        beside.write_text(text)
        with pytest.raises(DataError, match=f"generation_config.json: .*{found}"):
            end_ids(Tokenizer(path))


def test_lines_of_a_file_become_requests(tokenizer):
    defaults = Defaults(16, frozenset({2}), ("\n",), 5)
    lines = [b"\xef\xbb\xbfdef f\r\n", "é \u2028x".encode()]
    plain = [defaults.request(line, tokenizer) for line in read_prompts(lines, "p", as_json=False)]
    assert [tokenizer.decode(request.prompt) for request in plain] == ["def f", "é \u2028x"]
    assert all(r.prompt[0] == tokenizer.bos and (r.max_new_tokens, r.seed) == (16, 5) for r in plain)
    assert all(r.stop_ids == {2} and r.stop_strings == ("\n",) for r in plain)
    own = b'{"prompt": "a\\nb", "max_new_tokens": 3, "stop": ["x", "yz"], "stop_ids": [4, 6], "seed": 9}'
    (request,) = (defaults.request(line, tokenizer) for line in read_prompts([own], "p", as_json=True))
    assert request == Request([tokenizer.bos, *tokenizer.encode("a\nb")], 3, frozenset({4, 6}), ("x", "yz"), seed=9)
    (given,) = read_prompts([b'{"source": "x = 3", "seed": 2}'], "p", as_json=True)
    translated = defaults.request(given, tokenizer)
    assert translated.prompt == [tokenizer.bos] and translated.seed == 2
    assert translated.source == [tokenizer.bos, *tokenizer.encode("x = 3"), tokenizer.eos]
    one = defaults.request(PromptLine(prompt="a", stop="ab", stop_ids=[]), tokenizer)
    assert one.stop_strings == ("ab",) and one.stop_ids == frozenset()


BAD_LINES = [
    (b"\n", False, "p:2: an empty line"),
    (b"caf\xe9\n", False, "p:2: byte 0xe9: expected UTF-8"),
    (b"def f\n", True, "p:2: Invalid JSON"),
    (b'["a"]\n', True, "p:2: .*expected a JSON object"),
    (b'{"text": "a"}\n', True, "p:2: key 'prompt': Field required"),
    (b'{"prompt": "a", "stops": "b"}\n', True, "p:2: key 'stops': Extra inputs are not permitted"),
    (b'{"prompt": "a", "stop": 5}\n', True, "p:2: key 'stop': Input should be a valid string"),
    (b'{"prompt": "a", "stop": ["b", 5]}\n', True, "p:2: key 'stop': "),
    (b'{"prompt": "a", "seed": "1"}\n', True, "p:2: key 'seed': Input should be a valid integer"),
    (b'{"prompt": "a", "max_new_tokens": 0}\n', True, "p:2: key 'max_new_tokens': .* greater than or equal to 1"),
    (b'{"prompt": 5}\n', True, "p:2: key 'prompt': Input should be a valid string"),
]


@pytest.mark.parametrize(("line", "as_json", "found"), BAD_LINES)
def test_a_bad_line_is_named(line, as_json, found):
    good = b'{"prompt": "a"}\n' if as_json else b"a\n"
    with pytest.raises(DataError, match=found):
        list(read_prompts([good, line], "p", as_json=as_json))
