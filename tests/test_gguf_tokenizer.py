"""The tokenizer of a GGUF file, and the tokens that end generation."""

import re

import pytest
from gguf_files import model, vocabulary, write

import recyc_jax as rj
from recyc_jax.loading import gguf_convert, gguf_tokenizer, gguf_vocabulary, pretrained


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RECYC_JAX_CACHE", str(tmp_path / "cache"))


def with_tokens(*more, types=(), **fields):
    """Metadata with further tokens of the given types (control, where none is given)."""
    tokens, merges = vocabulary()
    kinds = [3 if token == "<eos>" else 1 for token in tokens] + [*types, *[3] * (len(more) - len(types))]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": [*tokens, *more],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.eos_token_id": 0,
        **{f"tokenizer.ggml.{key}": value for key, value in fields.items()},
    }


def ends(fields):
    return [fields["tokenizer.ggml.tokens"][number] for number in gguf_vocabulary.end_ids(fields)]


def test_ends_of_turns_and_messages_end_too():
    count = len(vocabulary()[0])
    more = with_tokens("<|one|>", "<|two|>", "<|three|>", eot_token_id=count, eom_token_id=count + 2)
    assert ends(more) == ["<eos>", "<|one|>", "<|three|>"]
    assert ends(more | {"tokenizer.ggml.eos_token_ids": [count + 1, 0]}) == ["<eos>", "<|one|>", "<|three|>", "<|two|>"]
    none = more | {f"tokenizer.ggml.{name}_token_id": (1 << 32) - 1 for name in ("eos", "eot", "eom")}
    assert ends(none) == ["<eos>"]  # by its text


@pytest.mark.parametrize(
    "texts",
    [
        ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|python_tag|>"],
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|file_sep|>"],
        ["<start_of_turn>", "<end_of_turn>"],
        ["<|user|>", "<|end|>", "</s>"],
        ["<｜User｜>", "<｜end▁of▁sentence｜>"],
        ["[EOT]", "<EOT>", "<end_of_utterance>"],
    ],
    ids=str,
)
def test_ends_are_found_by_their_texts(texts):
    """Files made before 2024 name one end alone, and their models end turns with another."""
    wanted = [text for text in texts if re.search("end|EOT|eot|eom|/s", text) and text != "<|python_tag|>"]
    assert ends(with_tokens(*texts)) == ["<eos>", *wanted]


def test_an_end_that_is_no_control_token_is_made_one(caplog):
    """As in llama.cpp. HTML's tag, which ordinary vocabularies hold, is left as it is."""
    fields = with_tokens("<|im_end|>", "</s>", "<|eot_id|>x", types=(1, 1, 3))
    assert ends(fields) == ["<eos>", "<|im_end|>"]
    assert "is <|im_end|>, but not of control type" in caplog.text
    tokenizer, _ = gguf_tokenizer.build(fields)
    assert "<|im_end|>" in tokenizer.encode("the<|im_end|>the").tokens
    assert "</s>" not in tokenizer.encode("the</s>the").tokens
    caplog.clear()
    assert ends(with_tokens("<|eot_id|>", types=(4,))) == ["<eos>", "<|eot_id|>"]
    assert "<|eot_id|>" in caplog.text
    del fields["tokenizer.ggml.token_type"]
    assert ends(fields) == ["<eos>", "<|im_end|>"]


def test_a_model_ends_with_all_of_them(tmp_path):
    fields = with_tokens("<|im_end|>", "<|other|>", pre="qwen2")
    lm = rj.load_pretrained(str(write(tmp_path / "m.gguf", *model(vocab_size=500), extra=fields)))
    assert lm.config.eos_token_ids == (0, len(vocabulary()[0]))


def byte_level(pre, **more):
    fields = with_tokens(pre=pre, bos_token_id=0, eos_token_id=None)
    return gguf_tokenizer.build({key: value for key, value in (fields | more).items() if value is not None})[0]


def pieces(tokenizer, text):
    return [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]


def test_pre_tokenizers():
    text = "It's 1234567 o'clock\n\nnow"
    assert pieces(byte_level("smollm"), text)[2:9] == ["Ġ", "1", "2", "3", "4", "5", "6"]
    assert pieces(byte_level("llama-bpe"), text)[2:6] == ["Ġ", "123", "456", "7"]
    assert pieces(byte_level("qwen2"), text)[2:6] == ["Ġ", "1", "2", "3"]
    assert pieces(byte_level("gpt-2"), text)[2] == "Ġ1234567"
    assert pieces(byte_level("llama-bpe"), text)[-2:] == ["ĊĊ", "now"]
    assert byte_level("llama-bpe").encode("is").ids[0] == 0  # BOS comes first
    assert byte_level("smollm").encode("is").ids[0] != 0
    assert byte_level("smollm", **{"tokenizer.ggml.add_bos_token": True}).encode("is").ids[0] == 0
    assert byte_level("smollm").encode("a<eos>b").ids[1] == 0
    with pytest.raises(ValueError, match="pre='deepseek'"):
        byte_level("deepseek")
    with pytest.raises(ValueError, match="model='bert'"):
        byte_level("smollm", **{"tokenizer.ggml.model": "bert"})


def test_a_splitting_that_is_not_named_is_warned_of(caplog):
    """Files of early 2024 do not name it: llama.cpp then splits punctuation, words, digits, and these in threes."""
    assert pieces(byte_level(None), "in 1850!") == ["in", "Ġ", "185", "0", "!"]
    assert "tokenizer.ggml.pre" in caplog.text


@pytest.mark.parametrize("begin", [True, False])
@pytest.mark.parametrize("end", [True, False])
def test_tokens_before_and_after_a_text(tmp_path, begin, end):
    """Also tokens whose texts hold what the tokenizers library's templates are made of."""
    fields = with_tokens("<|a $A:0 b|>", "<| : |>", add_bos_token=begin, add_eos_token=end, pre="llama-bpe")
    first = len(vocabulary()[0])
    fields |= {"tokenizer.ggml.bos_token_id": first, "tokenizer.ggml.eos_token_id": first + 1}
    tokenizer = gguf_tokenizer.build(fields)[0]
    before, after = [first] * begin, [first + 1] * end
    plain = tokenizer.encode("the", add_special_tokens=False).ids
    assert tokenizer.encode("the").ids == [*before, *plain, *after]
    assert tokenizer.encode("the", "the").ids == [*before, *plain, *after] * 2
    file = write(tmp_path / "m.gguf", *model(vocab_size=500), extra=fields)
    gguf_convert.convert(file, tmp_path / "converted")
    assert pretrained.load_tokenizer(tmp_path / "converted")("the")["input_ids"] == [*before, *plain, *after]


def test_added_tokens_are_found_in_texts():
    fields = with_tokens("<|mine|>", "<|yours|>", types=(1, 3), added_tokens=["<|mine|>", "<|yours|>"])
    tokenizer = gguf_tokenizer.build(fields)[0]
    assert [t for t in tokenizer.encode("the<|mine|>the<|yours|>").tokens if "<|" in t] == ["<|mine|>", "<|yours|>"]
    ordinary = gguf_tokenizer.build(fields | {"tokenizer.ggml.added_tokens": []})[0]
    assert "<|mine|>" not in ordinary.encode("the<|mine|>").tokens


def test_empty_tokens():
    """They get names, since no text yields them and names must differ."""
    tokenizer = gguf_tokenizer.build(with_tokens("", "", "<|last|>", types=(5, 5, 3)))[0]
    assert tokenizer.encode("<|last|>").ids == [len(vocabulary()[0]) + 2]
    assert tokenizer.get_vocab_size() == len(vocabulary()[0]) + 3


def sentencepiece(**more):
    letters = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"ehlotr"]
    words = {"he": -1.0, "ll": -2.0, "hell": -3.0, "hello": -4.0, "▁hello": -5.0, "▁t": -6.0, "lo": -0.5}
    fields = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [*letters, *words],
        "tokenizer.ggml.scores": [0.0] * len(letters) + list(words.values()),
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * (len(letters) - 259 + len(words)),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    fields |= {f"tokenizer.ggml.{key}": value for key, value in more.items()}
    return {key: value for key, value in fields.items() if value is not None}


def test_sentencepiece():
    """Merges by score, byte fallback, a space before the text, BOS first; decoding returns the text."""
    tokenizer, config = gguf_tokenizer.build(sentencepiece())
    assert config["bos_token"] == "<s>"
    # "lo" has the best score, so it is merged before "ll"
    assert tokenizer.encode("hello the").tokens == ["<s>", "▁", "he", "l", "lo", "▁t", "he"]
    assert tokenizer.encode("é").tokens == ["<s>", "▁", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(tokenizer.encode("hello thé").ids) == "hello thé"


def test_sentencepiece_options():
    plain = ["▁", "he", "l", "lo"]
    assert gguf_tokenizer.build(sentencepiece(add_bos_token=False))[0].encode("hello").tokens == plain
    assert gguf_tokenizer.build(sentencepiece(add_space_prefix=False))[0].encode("hello").tokens == ["<s>", *plain[1:]]
    both = sentencepiece(add_eos_token=True, eos_token_id=2)
    assert gguf_tokenizer.build(both)[0].encode("hello").tokens == ["<s>", *plain, "</s>"]
    # where the file names no ids, they are those of SentencePiece, as in llama.cpp
    fields = sentencepiece(bos_token_id=None, unknown_token_id=None)
    assert gguf_tokenizer.build(fields)[0].encode("hello").tokens == ["<s>", *plain]
    assert gguf_vocabulary.end_ids(fields) == [2]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (dict(scores=None), r"field 'tokenizer\.ggml\.scores' is missing"),
        (dict(scores=[0.0, 1.0]), r"scores has 2 entries for \d+ tokens"),
        (dict(scores=[float("nan")] * 273), "scores has an entry that is not a number"),
        (dict(scores=["0"] * 273), r"scores=\['0', "),
        (dict(unknown_token_id=273), r"unknown_token_id=273 is not the id of one of the 273 tokens"),
        (dict(bos_token_id=-2), "bos_token_id=-2 is not the id"),
        (dict(token_type=[1] * 272), "token_type has 272 entries for 273 tokens"),
        (dict(token_type=[7] * 273), "token_type has the entry 7"),
        (dict(tokens=[]), "tokens is empty"),
        (dict(remove_extra_whitespaces=True), "remove_extra_whitespaces=True"),
        (dict(add_space_prefix=1), "add_space_prefix=1 must be true or false"),
    ],
    ids=str,
)
def test_what_a_sentencepiece_vocabulary_cannot_be(more, message):
    with pytest.raises(ValueError, match=message):
        gguf_tokenizer.build(sentencepiece(**more))


def test_the_packaged_smollm2():
    """The alias resolves to a complete model, whose tokenizer splits digits one by one."""
    folder = pretrained.resolve("smollm2-135m")
    tokenizer = pretrained.load_tokenizer(folder)
    assert tokenizer.convert_ids_to_tokens(tokenizer("is 1234567")["input_ids"]) == ["is", "Ġ", *"1234567"]
    text = "Café №12\n\n\t«The magic number» is 55-01 … 🙂"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    chat = tokenizer.apply_chat_template([dict(role="user", content="Hi")], tokenize=False, add_generation_prompt=True)
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer(chat)["input_ids"].count(1) == 3


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("gpt-4o", ["Hello", "World", " isn't", " ", "123", "45", " [/]\n\n", "x"]),
        ("tekken", ["Hello", "World", " isn", "'t", " ", *"12345", " [/]\n\n", "x"]),
        ("dbrx", ["HelloWorld", " isn", "'t", " ", "123", "45", " [/]\n\n", "x"]),
        ("qwen2", ["HelloWorld", " isn", "'t", " ", *"12345", " [/]\n\n", "x"]),
        ("smollm", ["HelloWorld", " isn", "'t", " ", *"12345", " [/]", "\n", "\n", "x"]),
        ("gpt-2", ["HelloWorld", " isn", "'t", " 12345", " [/]", "\n", "\n", "x"]),
    ],
)
def test_how_texts_are_split(pre, expected):
    made = gguf_tokenizer.build(with_tokens(pre=pre))[0]
    split = made.pre_tokenizer.pre_tokenize_str("HelloWorld isn't 12345 [/]\n\nx")
    assert [piece.replace("Ġ", " ").replace("Ċ", "\n") for piece, _ in split] == expected
