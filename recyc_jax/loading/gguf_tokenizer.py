"""Converts the tokenizer of a GGUF file to one of Hugging Face's tokenizers library."""

from __future__ import annotations

from typing import Any

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
_CONTROL, _USER_DEFINED = 3, 4  # GGUF's token types


def build(fields: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The tokenizer and its `tokenizer_config.json`, from a GGUF file's metadata.

    For `gpt2` vocabularies (byte-level BPE), `tokenizer.ggml.pre` names the splitting: `smollm` splits digits one by
    one, which transformers' own conversion does not do. `llama` vocabularies are SentencePiece BPE. Raises ValueError
    for others.
    """
    from tokenizers import AddedToken

    tokens = fields["tokenizer.ggml.tokens"]
    kind = fields["tokenizer.ggml.model"]
    if kind == "gpt2":
        tokenizer = _byte_level(fields, tokens)
    elif kind == "llama":
        tokenizer = _sentencepiece(fields, tokens)
    else:
        raise ValueError(f"tokenizer.ggml.model={kind!r} is not supported; gpt2 and llama are")
    types = fields.get("tokenizer.ggml.token_type", [])
    for special, wanted in ((True, _CONTROL), (False, _USER_DEFINED)):
        added = [token for token, its in zip(tokens, types, strict=False) if its == wanted]
        add = tokenizer.add_special_tokens if special else tokenizer.add_tokens
        add([AddedToken(token, normalized=False, special=special) for token in added])
    return tokenizer, _config(fields, tokens, tokenizer)


def _byte_level(fields: dict[str, Any], tokens: list[str]) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pre = fields.get("tokenizer.ggml.pre", "default")
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    model = models.BPE(
        vocab={token: number for number, token in enumerate(tokens)}, merges=merges, ignore_merges=pre == "llama-bpe"
    )
    tokenizer = Tokenizer(model)
    bytes_alone = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if pre == "smollm":
        splits = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    elif pre == "llama-bpe":
        splits = [pre_tokenizers.Split(Regex(_LLAMA3_SPLIT), "isolated"), bytes_alone]
    elif pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
        splits = [pre_tokenizers.Split(Regex(_QWEN2_SPLIT), "isolated"), bytes_alone]
    elif pre in ("gpt-2", "default"):
        splits = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    else:
        raise ValueError(f"tokenizer.ggml.pre={pre!r} is not supported; smollm, llama-bpe, qwen2 and gpt-2 are")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(fields: dict[str, Any], tokens: list[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocab = {token: number for number, token in enumerate(tokens)}
    unknown = tokens[fields.get("tokenizer.ggml.unknown_token_id", 0)]
    model = models.BPE(
        vocab=vocab,
        merges=_merges(vocab, fields["tokenizer.ggml.scores"]),
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    spaces: list[Any] = [normalizers.Replace(" ", "▁")]
    trim: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if fields.get("tokenizer.ggml.add_space_prefix", True):
        spaces.insert(0, normalizers.Prepend("▁"))
        trim.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(spaces)
    tokenizer.decoder = decoders.Sequence(trim)
    return tokenizer


def _merges(vocab: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """BPE merges from SentencePiece scores: the pairs that form each piece, those of the best-scored piece first."""
    ranked = []
    for piece, number in vocab.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocab and right in vocab:
                ranked.append((-scores[number], number, vocab[left], vocab[right], left, right))
    return [(left, right) for *_, left, right in sorted(ranked)]


def _config(fields: dict[str, Any], tokens: list[str], tokenizer: Any) -> dict[str, Any]:
    from tokenizers import processors

    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for role, name in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        number = fields.get(f"tokenizer.ggml.{name}_token_id")
        if number is not None:
            config[f"{role}_token"] = tokens[number]
    if "tokenizer.chat_template" in fields:
        config["chat_template"] = fields["tokenizer.chat_template"]
    # llama.cpp's defaults if the field is missing: SentencePiece and Llama 3 vocabularies add BOS
    begins = fields["tokenizer.ggml.model"] == "llama" or fields.get("tokenizer.ggml.pre") == "llama-bpe"
    if fields.get("tokenizer.ggml.add_bos_token", begins) and "bos_token" in config:
        bos = config["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos}:0 $A:0", pair=f"{bos}:0 $A:0 {bos}:1 $B:1", special_tokens=[(bos, tokens.index(bos))]
        )
    return config
