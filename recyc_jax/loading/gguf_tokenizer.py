"""Converts the tokenizer of a GGUF file to one of Hugging Face's tokenizers library."""

from __future__ import annotations

import logging
from typing import Any

from recyc_jax.loading import gguf_fields, gguf_vocabulary
from recyc_jax.loading.gguf_vocabulary import Vocabulary

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
_GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN_WORDS = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN_SPLIT = rf"{_TEKKEN_WORDS}|\p{{N}}|{_REST}"
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_GPT4O_SPLIT = rf"{_TEKKEN_WORDS.replace('|', _CONTRACTIONS + '|')}{_CONTRACTIONS}|\p{{N}}{{1,3}}|{_REST}"

_SPLITS = {
    "gpt-2": [_GPT2_SPLIT],
    "olmo": [_GPT2_SPLIT],
    "smollm": [r"\p{N}", _GPT2_SPLIT],
    "llama-bpe": [_LLAMA3_SPLIT],
    "dbrx": [_LLAMA3_SPLIT],
    "smaug-bpe": [_LLAMA3_SPLIT],
    "qwen2": [_QWEN2_SPLIT],
    "tekken": [_TEKKEN_SPLIT],
    "gpt-4o": [_GPT4O_SPLIT],
    "default": [r"[\p{P}\$\+<=>\^~\|]+", _GPT2_SPLIT, r"\p{N}+", "[0-9][0-9][0-9]"],
}
"""By `tokenizer.ggml.pre`, the expressions that texts are split by, one after the other, as in llama.cpp (where that
approximates letter cases, the tokenizers' own). `default` is llama.cpp's rule for files that do not say."""
_WHOLE_FIRST = ("llama-bpe", "tekken")
"""Words that are tokens are taken as they are, without merges."""
_BEGIN_WITH_BOS = ("llama-bpe", "tekken")

# keys of tokenizer.ggml
_USED = {
    *("model", "pre", "tokens", "token_type", "scores", "merges", "added_tokens", "eos_token_ids"),
    *("add_bos_token", "add_eos_token", "add_space_prefix"),
    *(f"{role}_token_id" for role in gguf_vocabulary.ROLES),
}
_IRRELEVANT = {
    **dict.fromkeys(("seperator_token_id", "separator_token_id", "cls_token_id", "mask_token_id"), "of encoders"),
    **dict.fromkeys(("prefix_token_id", "suffix_token_id", "middle_token_id"), "for filling in the middle of a text"),
    **{f"fim_{part}_token_id": "for the same" for part in ("pre", "suf", "mid", "pad", "rep", "sep")},
}
# supported where they are 0, false or empty, and what they ask for otherwise
_OFF = {
    **{
        f"add_{role}_token": "more special tokens" for role in ("sep", "seperator", "cls", "mask", "padding", "unknown")
    },
    **dict.fromkeys(("remove_extra_whitespaces", "precompiled_charsmap"), "T5's normalisation"),
    **dict.fromkeys(("normalizer.lowercase", "normalizer.strip_accents"), "BERT's normalisation"),
    "token_type_count": "BERT's segments",
    "suppress_tokens": "tokens that must not be generated",
}


def build(fields: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The tokenizer and its `tokenizer_config.json`, from a GGUF file's metadata.

    For `gpt2` vocabularies (byte-level BPE), `tokenizer.ggml.pre` names how texts are split (`_SPLITS`): `smollm` splits
    digits one by one, which transformers' own conversion does not do. `llama` vocabularies are SentencePiece BPE.
    Raises ValueError naming the key for others, and for metadata that are malformed or ask for more.
    """
    from tokenizers import AddedToken

    gguf_fields.refuse_others(fields, "tokenizer.ggml.", _USED, _IRRELEVANT, _OFF)
    vocabulary = gguf_vocabulary.read(fields)
    tokenizer = (_byte_level if vocabulary.kind == "gpt2" else _sentencepiece)(fields, vocabulary)
    for special, wanted in ((True, gguf_vocabulary.CONTROL), (False, gguf_vocabulary.USER_DEFINED)):
        added = [token for token, its in zip(vocabulary.tokens, vocabulary.types, strict=True) if its == wanted]
        add = tokenizer.add_special_tokens if special else tokenizer.add_tokens
        add([AddedToken(token, normalized=False, special=special) for token in added])
    _add_ends(fields, vocabulary, tokenizer)
    return tokenizer, _config(fields, vocabulary)


def _byte_level(fields: dict[str, Any], vocabulary: Vocabulary) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    if gguf_fields.flag(fields, "tokenizer.ggml.add_space_prefix", False):
        raise ValueError("tokenizer.ggml.add_space_prefix=True is not supported for gpt2 vocabularies")
    pre = _pre(fields)
    if pre not in _SPLITS:
        said = gguf_fields.shown("tokenizer.ggml.pre", pre)
        raise ValueError(f"{said} is not supported; {', '.join(_SPLITS)} are")
    if "tokenizer.ggml.pre" not in fields:
        message = (
            "tokenizer.ggml.pre is not set: texts are split by llama.cpp's default, which may not be the model's way"
        )
        logging.getLogger(__name__).warning(message)
    vocab = {token: number for number, token in enumerate(vocabulary.tokens)}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=_stated_merges(fields, vocab), ignore_merges=pre in _WHOLE_FIRST)
    )
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    splits: list[Any] = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in _SPLITS[pre]]
    bytes_alone = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, bytes_alone])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _pre(fields: dict[str, Any]) -> str:
    """What names the splitting of texts; `default` in files made before 2024, which do not name it."""
    return gguf_fields.text(fields, "tokenizer.ggml.pre", "default")


def _stated_merges(fields: dict[str, Any], vocab: dict[str, int]) -> list[tuple[str, str]]:
    key = "tokenizer.ggml.merges"
    merges = []
    for merge in gguf_fields.entries(fields, key, str):
        left, _, right = merge.partition(" ")
        if not (left in vocab and right in vocab and left + right in vocab):
            raise ValueError(
                f"{key} has {gguf_fields.quoted(merge)}, whose parts or whole are not in tokenizer.ggml.tokens"
            )
        merges.append((left, right))
    return merges


def _sentencepiece(fields: dict[str, Any], vocabulary: Vocabulary) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocab = {token: number for number, token in enumerate(vocabulary.tokens)}
    model = models.BPE(
        vocab=vocab,
        merges=_merges(vocab, _scores(fields, vocab)),
        unk_token=vocabulary.tokens[vocabulary.special["unknown"]],
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    spaces: list[Any] = [normalizers.Replace(" ", "▁")]
    trim: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if gguf_fields.flag(fields, "tokenizer.ggml.add_space_prefix", True):
        spaces.insert(0, normalizers.Prepend("▁"))
        trim.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(spaces)
    tokenizer.decoder = decoders.Sequence(trim)
    return tokenizer


def _scores(fields: dict[str, Any], vocab: dict[str, int]) -> list[float]:
    key = "tokenizer.ggml.scores"
    scores = gguf_fields.entries(fields, key, float, int)
    if len(scores) != len(vocab):
        raise ValueError(f"{key} has {len(scores)} entries for {len(vocab)} tokens")
    if any(score != score for score in scores):  # a NaN has no place in the order of merges
        raise ValueError(f"{key} has an entry that is not a number")
    return scores


def _merges(vocab: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """BPE merges from SentencePiece scores: the pairs that form each piece, those of the best-scored piece first."""
    ranked = []
    for piece, number in vocab.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocab and right in vocab:
                ranked.append((-scores[number], number, vocab[left], vocab[right], left, right))
    return [(left, right) for *_, left, right in sorted(ranked)]


def _add_ends(fields: dict[str, Any], vocabulary: Vocabulary, tokenizer: Any) -> None:
    """Make the tokenizer put BOS before each text and EOS after it, where the metadata or llama.cpp's defaults say so:
    SentencePiece, Llama 3 and Mistral's vocabularies begin with BOS."""
    from tokenizers import processors

    begins = vocabulary.kind == "llama" or _pre(fields) in _BEGIN_WITH_BOS
    before = ["bos"] if _adds(fields, vocabulary, "bos", begins) else []
    after = ["eos"] if _adds(fields, vocabulary, "eos", False) else []
    if before or after:
        first, second = (
            [f"{each}:{kind}" for each in (*before, text, *after)] for text, kind in (("$A", 0), ("$B", 1))
        )
        tokenizer.post_processor = processors.TemplateProcessing(
            single=first,
            pair=first + second,
            special_tokens=[_template_token(vocabulary, role) for role in before + after],  # pyright: ignore
        )


def _adds(fields: dict[str, Any], vocabulary: Vocabulary, role: str, default: bool) -> bool:
    key = f"tokenizer.ggml.add_{role}_token"
    wanted = gguf_fields.flag(fields, key, default)
    if wanted and key in fields and role not in vocabulary.special:
        raise ValueError(f"{key}=True, but tokenizer.ggml.{role}_token_id names no token")
    return wanted and role in vocabulary.special


def _template_token(vocabulary: Vocabulary, role: str) -> dict[str, Any]:
    number = vocabulary.special[role]
    return {"id": role, "ids": [number], "tokens": [vocabulary.tokens[number]]}


def _config(fields: dict[str, Any], vocabulary: Vocabulary) -> dict[str, Any]:
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for role, name in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        if name in vocabulary.special:
            config[f"{role}_token"] = vocabulary.tokens[vocabulary.special[name]]
    if "tokenizer.chat_template" in fields:
        config["chat_template"] = gguf_fields.text(fields, "tokenizer.chat_template")
    return config
