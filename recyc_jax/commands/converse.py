"""Text from a model: `python -m recyc_jax "prompt"`, or a conversation: `python -m recyc_jax --chat`."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import tyro

from recyc_jax.commands import command_line
from recyc_jax.commands.backends import Backend

COMMANDS = """/reset            forget the conversation
/policy STRING    answer under another policy, such as full
/stats            of the last answer
/save FOLDER      keep the conversation, with all that the model has read
/load FOLDER      go on with one that was kept
/quit             end (as does Ctrl-D); Ctrl-C ends an answer"""
_EXAMPLES = {"/policy": "full", "/save": "talk-of-today", "/load": "talk-of-today"}


@dataclasses.dataclass(frozen=True)
class Config:
    """Write what follows a prompt, or converse; the text comes as it is made."""

    prompt: tyro.conf.Positional[str] = ""
    """The prompt, or with --file a question about the file."""
    model: str = "smollm2-135m"
    """Hub id, folder in Hugging Face layout, .gguf file, or smollm2-135m."""
    policy: str = "lookahead:budget=1024,stride=50"
    """The policy; a budget with a decimal point is a fraction of the prompt and its answer."""
    chat: bool = False
    """Converse: every line is a turn, and the model reads it once."""
    file: Path | None = None
    """A text that is put before the prompt, or before the conversation's first turn."""
    system: str | None = None
    """The system's message."""
    template: Literal["chat", "base"] = "chat"
    """chat: the prompt is a user's turn in the tokenizer's chat template, if it has one. base: the prompt alone."""
    max_new_tokens: int = 512
    temperature: float = 0.0
    """0: always the most likely token."""
    top_p: float | None = None
    top_k: int | None = None
    seed: int = 0
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 on accelerators, float32 on CPU."""
    backend: Backend = "auto"


def main(args: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    config = tyro.cli(Config, prog="python -m recyc_jax", args=args)
    return command_line.run(_prepare, config, "nothing was kept")


def _prepare(config: Config) -> Callable[[], int | None]:
    """Check the flags and load the model; returns a function that does the rest."""
    if not config.prompt and not config.chat:
        raise ValueError('pass a prompt, such as "Once upon a time", or --chat')
    command_line.check_texts(prompt=config.prompt, system=config.system)
    command_line.check_counts(max_new_tokens=config.max_new_tokens)
    command_line.check_policies([config.policy], [2**20])
    document = _read(config.file)
    from recyc_jax.commands import backends, programs

    backends.select(config.backend)
    import jax
    import jax.numpy as jnp

    import recyc_jax as rj

    programs.keep()
    sampling: Any = rj.Greedy()
    if config.temperature != 0:
        sampling = rj.Sample(config.temperature, config.top_k, config.top_p)
    elif config.top_p is not None or config.top_k is not None:
        raise ValueError("--top-p and --top-k restrict what is drawn: pass --temperature, such as 0.7")
    lm = rj.load_pretrained(config.model, jnp.dtype(command_line.dtype_name(config.dtype)))
    if config.template == "base":
        lm.tokenizer.chat_template = None
    options: dict[str, Any] = dict(policy=config.policy, max_new_tokens=config.max_new_tokens, system=config.system)
    talk = lm.conversation(sampling=sampling, key=jax.random.key(config.seed), **options)
    return lambda: _converse(talk, document) if config.chat else _answer(talk, _turn(document, config.prompt))


def _read(file: Path | None) -> str:
    if file is None:
        return ""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--file {file}: {getattr(error, 'strerror', None) or error}") from None


def _turn(document: str, text: str) -> str:
    return f"{document}\n\n{text}" if document else text


def _answer(talk: Any, text: str) -> int:
    """Write the answer to standard output as it comes, and then a line of figures to standard error; the exit status."""
    try:
        for piece in talk.ask(text):
            print(piece, end="", flush=True)
    except KeyboardInterrupt:  # ends the answer, and not the program
        pass
    except ValueError as error:  # a prompt that is too long, or that the chat template refuses
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(flush=True)
    print(figures(talk), file=sys.stderr, flush=True)
    return 0


def _converse(talk: Any, document: str) -> None:
    print(COMMANDS, file=sys.stderr, flush=True)
    while True:
        try:
            line = input("> ").strip()
        except KeyboardInterrupt:
            print(flush=True)
            continue
        except EOFError:
            return
        command, _, rest = line.partition(" ")
        if command == "/quit":
            return
        if command == "/reset":
            talk.reset()
        elif command == "/stats":
            print(figures(talk), flush=True)
        elif command in ("/policy", "/save", "/load"):
            try:
                _obey(talk, command, rest.strip())
            except (ValueError, OSError) as error:
                print(error, flush=True)
        elif command.startswith("/"):
            print(COMMANDS, flush=True)
        elif line:
            first = all(message["role"] == "system" for message in talk.messages)
            try:
                _answer(talk, _turn(document if first else "", line))
            except ValueError as error:  # such as a turn that exceeds the context: the conversation stays
                print(error, flush=True)


def _memory_gib() -> float:
    """The most memory that was in use: of the accelerator, or on a CPU of this process."""
    import resource

    import jax

    held = jax.local_devices()[0].memory_stats() or {}
    most = held.get("peak_bytes_in_use") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return most / 2**30


def _obey(talk: Any, command: str, argument: str) -> None:
    """Run a command that has an argument. Raises ValueError or OSError where that fails; nothing has changed then."""
    if not argument:
        raise ValueError(f"{command} needs what to {command[1:]}, such as {command} " + _EXAMPLES[command])
    if command == "/policy":
        command_line.check_policies([argument], [2**20])
        talk.policy = argument
        return
    folder = Path(argument).expanduser()
    if command == "/save":
        talk.save(folder)
        print(f"saved: {len(talk.messages)} messages, {len(talk.tokens)} tokens", flush=True)
    else:
        talk.load(folder)
        print(f"loaded: {len(talk.messages)} messages, {len(talk.tokens)} tokens, {talk.policy}", flush=True)


def figures(talk: Any) -> str:
    """A line about the last answer."""
    of, parts = talk.figures, []
    parts.append(f"{of.read_tokens} tokens read, {of.new_tokens} made in {of.seconds:.1f} s")
    parts.append(f"first after {of.first_seconds:.2f} s, {of.rate:.1f} tokens/s")
    steps = max(1, of.new_tokens - 1)
    parts.append(f"{of.full_steps:.0f} of {steps} steps full, {of.share_read:.1%} of the context read by a step")
    parts.append(f"{len(talk.tokens)} tokens in the cache, {talk.policy}")
    parts.append(f"{_memory_gib():.1f} GiB at most")
    return "; ".join(parts)
