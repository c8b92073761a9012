"""`python -m recyc_jax.inspect`: a page that shows what a model reads while it answers."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import tyro

from recyc_jax.commands import command_line, files
from recyc_jax.commands.backends import Backend


@dataclasses.dataclass(frozen=True)
class Config:
    """Write one HTML page, which opens in any browser: the document with each token shaded by how many layers and heads
    keep it, at each refresh; the answer, and for each of its tokens what the step that made it could read and would have
    attended to."""

    question: str
    """What to ask about the file; the whole prompt without one."""
    file: Path | None = None
    """A text that is put before the question."""
    model: str = "smollm2-135m"
    """Hub id, folder in Hugging Face layout, .gguf file, or smollm2-135m."""
    policy: str = "lookahead:budget=1024,stride=50"
    """The policy; a budget with a decimal point is a fraction of the prompt and its answer."""
    max_new_tokens: int = 64
    template: Literal["chat", "base"] = "chat"
    """chat: the prompt is a user's turn in the tokenizer's chat template, if it has one. base: the prompt alone."""
    out: Path = Path("inspect.html")
    """The page; a page that is there is replaced."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 on accelerators, float32 on CPU."""
    backend: Backend = "auto"


def main(args: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    config = tyro.cli(Config, prog="python -m recyc_jax.inspect", args=args)
    return command_line.run(_prepare, config, "no page was written")


def _prepare(config: Config) -> Callable[[], None]:
    """Check the flags and load the model; returns a function that does the rest."""
    if not config.question.strip():
        raise ValueError("--question is empty: ask something")
    command_line.check_texts(question=config.question)
    command_line.check_counts(max_new_tokens=config.max_new_tokens)
    command_line.check_policies([config.policy], [2**20])
    text = config.question
    if config.file is not None:
        text = f"{files.read_text('--file', config.file)}\n\n{text}"
    if config.out.is_dir() or not config.out.parent.is_dir():
        raise ValueError(f"--out {config.out}: name a file in a folder that is there")
    from recyc_jax.commands import backends, programs

    backends.select(config.backend)
    import jax.numpy as jnp

    import recyc_jax as rj
    from recyc_jax import text as texts
    from recyc_jax.inspect.watched import Watched

    programs.keep()
    lm = rj.load_pretrained(config.model, jnp.dtype(command_line.dtype_name(config.dtype)))
    is_chat = config.template == "chat" and bool(lm.tokenizer.chat_template)
    ids = texts.prompt_ids(lm.tokenizer, [{"role": "user", "content": text}] if is_chat else text)
    policy = texts.policy_of(config.policy, len(ids) + config.max_new_tokens)
    Watched(policy)  # which says what it cannot show
    if not lm.config.full_layers:
        raise ValueError(f"every layer of {config.model} has a sliding window: policies act on none of them")
    context = lm.config.max_position_embeddings
    if len(ids) + config.max_new_tokens > context:
        raise ValueError(
            f"the prompt has {len(ids)} tokens and its answer {config.max_new_tokens}, the model's context {context}: "
            "shorten the file or pass a smaller --max-new-tokens"
        )
    return lambda: _write(config, lm, ids, policy)


def _write(config: Config, lm: Any, ids: list[int], policy: Any) -> None:
    """Answer, watching each step, and write the page."""
    from recyc_jax.inspect.page import page, texts_of
    from recyc_jax.inspect.watched import StepSeen, steps

    seen: list[StepSeen] = []
    with command_line.progress(on_stderr=True) as bar:
        task = bar.add_task(f"{len(ids)} tokens read, answer", total=config.max_new_tokens)
        tokens = [0]
        for step in steps(lm, ids, policy, config.max_new_tokens):
            if isinstance(step, StepSeen):
                seen.append(step)
                tokens.append(step.token)
            else:
                tokens[0] = step
            bar.advance(task)
    full = sum(step.is_full.mean() for step in seen)
    read = sum(step.is_read.mean() for step in seen) / max(1, len(seen))
    facts = (
        f"{config.model} under {policy}: {len(ids)} tokens of prompt, {len(tokens)} of answer; {full:.0f} of {len(seen)} "
        f"steps full, {read:.1%} of the tokens read by a mean step"
    )
    written = page(texts_of(lm.tokenizer, [*ids, *tokens]), len(ids), seen, list(lm.config.full_layers), facts)
    files.write_text(config.out, written)
    print(lm.tokenizer.decode(tokens, skip_special_tokens=True))
    print(f"{facts}\n{config.out}: open it in a browser", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
