"""Loads a checkpoint folder's tokenizer."""

from __future__ import annotations

import importlib.util
import os
from importlib import metadata
from pathlib import Path
from typing import Any


def load_tokenizer(folder: Path) -> Any:
    """The folder's transformers tokenizer, without the truncation and padding that a trainer may have stored in its
    tokenizer.json. Raises ValueError, naming the folder and what to do, if it cannot be loaded."""
    # silences advice to install torch, which is not needed; transformers reads the variable when imported
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except BaseException as error:  # tokenizers raises plain Exceptions or panics, libraries that are missing anything
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError | GeneratorExit):
            raise
        raise ValueError(f"{folder}: its tokenizer cannot be loaded; {_advice(folder, error)}") from None
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def _advice(folder: Path, error: BaseException) -> str:
    """What to do about a tokenizer that cannot be loaded, and the library's own words."""
    words = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
    if "trust_remote_code" in str(error):
        return (
            "it needs Python code of its own, which is not run: only tokenizers of transformers and tokenizer.json are"
        )
    if of_config := _fault_of_config(folder):
        return f"transformers, which reads config.json first, cannot read that: {of_config}"
    if (folder / "tokenizer.json").is_file():
        installed = f"tokenizers {metadata.version('tokenizers')} and transformers {metadata.version('transformers')}"
        return (
            f"the installed {installed} cannot read its tokenizer.json: another version may have written it ({words})"
        )
    if any(folder.glob("*.model")) and importlib.util.find_spec("sentencepiece") is None:
        return "it is a SentencePiece model (tokenizer.model) without a tokenizer.json: pip install sentencepiece"
    if not any(folder.glob("tokenizer*")) and not any(folder.glob("vocab*")):
        return "the folder has no tokenizer.json"
    return words


def _fault_of_config(folder: Path) -> str | None:
    """Why transformers cannot read the folder's config.json, which it does before the tokenizer; None if it can."""
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        return " ".join(str(error).split())[:300] or type(error).__name__
    return None


def special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer puts before a text (such as BOS), and those that it puts after it."""
    whole = tokenizer("a")["input_ids"]
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    for before in range(len(whole) - len(plain) + 1):
        if whole[before : before + len(plain)] == plain:
            return whole[:before], whole[before + len(plain) :]
    return [], []
