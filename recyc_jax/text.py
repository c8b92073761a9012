"""Text in, text out: answers to prompts, and conversations that keep what the model has read."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from recyc_jax.config import LlamaConfig
from recyc_jax.model import Params
from recyc_jax.policies.base import Policy
from recyc_jax.policies.registry import as_policy, parse_policy
from recyc_jax.prefilling import Prefilled, prefill
from recyc_jax.sampling import Greedy
from recyc_jax.state_files import load_state, read_card
from recyc_jax.streaming import Stream, stream, stream_after
from recyc_jax.turns import extend, rounded, token_counts

DEFAULT_POLICY = "lookahead:budget=1024,stride=50"


class Reply(NamedTuple):
    """What `PretrainedLM.generate` returns: for one prompt, or lists for several."""

    text: Any  # str: up to the first of the stop strings, which is not part of it
    tokens: Any  # list[int]: the tokens made, the end-of-sequence token included
    ended: Any  # bool: by an end-of-sequence token or a stop string, not by the number of tokens
    prompt_tokens: Any  # int
    full_steps: Any  # float: full-attention decode steps, the mean over layers
    seconds: float  # for all prompts together, compilation included


def policy_of(policy: Policy | str, length: int) -> Policy:
    """The policy, whose string may have a budget that is a fraction of `length` tokens."""
    return as_policy(parse_policy(policy, length) if isinstance(policy, str) else policy)


def prompt_text(tokenizer: Any, prompt: str | Sequence[Any], template_options: Mapping[str, Any] | None = None) -> str:
    """The text of a prompt: a text as it is, messages ({"role": ..., "content": ...}) in the tokenizer's chat template,
    whose own variables `template_options` may set. Raises ValueError where there is no template or it refuses the messages,
    and for half a surrogate pair, which no tokenizer takes."""
    if isinstance(prompt, str):
        text = prompt
    elif tokenizer.chat_template:
        try:
            text = tokenizer.apply_chat_template(
                list(prompt), tokenize=False, add_generation_prompt=True, **(template_options or {})
            )
        except Exception as error:  # templates are programs of the model's, and raise what they like
            raise ValueError(f"the model's chat template refuses these messages: {error}") from None
    else:
        raise ValueError("this model's tokenizer has no chat template: pass text instead of messages")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the prompt's character {error.start} is {text[error.start]!a}, half a surrogate pair: no tokenizer takes it"
        ) from None
    return text


def prompt_ids(
    tokenizer: Any, prompt: str | Sequence[Any], template_options: Mapping[str, Any] | None = None
) -> list[int]:
    """The token ids of a text, after the special tokens that the tokenizer puts before one, or of messages."""
    is_text = isinstance(prompt, str)
    ids = tokenizer(prompt_text(tokenizer, prompt, template_options), add_special_tokens=is_text)["input_ids"]
    ends = {tokenizer.eos_token_id, tokenizer.sep_token_id}
    while is_text and len(ids) > 1 and ids[-1] in ends:  # an end behind the prompt would end the answer too
        ids = ids[:-1]
    if not ids:
        raise ValueError("the prompt is empty: pass at least one character")
    return list(ids)


def _is_prompt(prompt: Any) -> bool:
    """Whether it is a text, or messages."""
    if isinstance(prompt, list | tuple):
        return len(prompt) > 0 and all(isinstance(message, Mapping) for message in prompt)
    return isinstance(prompt, str)


def generate_text(
    params: Params,
    config: LlamaConfig,
    tokenizer: Any,
    prompts: Any,
    *,
    policy: Policy | str = DEFAULT_POLICY,
    max_new_tokens: int = 256,
    sampling: Any = Greedy(),
    stop: str | Sequence[str] | None = (),
    key: Any = None,
    eos_ids: Any = None,
    allow_beyond_context: bool = False,
) -> Reply:
    """The function behind `PretrainedLM.generate`, which describes it."""
    is_one = _is_prompt(prompts)
    prompts = [prompts] if is_one else prompts
    if not isinstance(prompts, list | tuple) or not all(map(_is_prompt, prompts)):
        raise ValueError("prompts must be a text, messages, or a list of these; token ids go to rj.generate")
    stops = stop_strings(stop)
    ids = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    chosen = policy_of(policy, max(map(len, ids), default=0) + max_new_tokens)
    began = time.perf_counter()
    answer = stream(
        params,
        config,
        ids,
        policy=chosen,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        eos_ids=eos_ids,
        key=key,
        allow_beyond_context=allow_beyond_context,
        tokenizer=tokenizer,
    )
    rows = [_Row(stops) for _ in ids]
    for piece in answer:
        for row, tokens, length, text in zip(rows, piece.tokens, piece.lengths, piece.text or (), strict=True):
            row.add(tokens[:length].tolist(), text)
        if all(row.stopped or done for row, done in zip(rows, piece.done, strict=True)):
            break
    ends = set(config.eos_token_ids if eos_ids is None else np.ravel(eos_ids).tolist())
    full = np.mean(np.asarray(answer.full_steps), axis=1) if np.size(answer.full_steps) else np.zeros(len(ids))
    reply = Reply(
        [row.text for row in rows],
        [row.tokens for row in rows],
        [row.stopped or bool(row.tokens and row.tokens[-1] in ends) for row in rows],
        [len(one) for one in ids],
        [float(steps) for steps in full],
        time.perf_counter() - began,
    )
    if not is_one:
        return reply
    return Reply(*[field[0] for field in reply[:-1]], seconds=reply.seconds)


def stop_strings(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """The strings that end an answer (None: none). Raises ValueError for anything but texts of one character at least."""
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if not all(isinstance(one, str) and one for one in stops):
        raise ValueError(f"stop={stop!r} must be a text or several, none of them empty")
    return stops


class _Row:
    """An answer's text, up to a stop string."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self.text, self.tokens, self.stopped, self._stops = "", [], False, stops

    def add(self, tokens: list[int], text: str) -> None:
        """Take further tokens and their text; what follows a stop string is dropped."""
        if self.stopped:
            return
        searched = max(0, len(self.text) - max(map(len, self._stops), default=0))
        self.tokens, self.text = self.tokens + tokens, self.text + text
        found = [place for place in (self.text.find(one, searched) for one in self._stops) if place >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True


@dataclasses.dataclass
class Figures:
    """Of the last answer of a conversation."""

    read_tokens: int = 0  # that the model read before it: of the turn, and of the prompt at the beginning
    new_tokens: int = 0
    first_seconds: float = 0.0  # until the first piece of text
    seconds: float = 0.0
    full_steps: float = 0.0  # mean over layers
    rate: float = 0.0  # tokens per second after the first piece; 0 where nothing followed it
    share_read: float = 1.0  # of the cached tokens, by the mean step; the bounds or keys that some policies read apart


def share_read(policy: Policy, length: int, full_steps: float, steps: int) -> float:
    """The share of `length` cached tokens that the mean of so many steps attends to, `full_steps` of them to all. What
    a method reads only in order to choose (Quest's bounds, the keys of the ideal top-K) is not counted."""
    budget = getattr(policy, "budget", length)
    if steps < 1 or budget >= length:
        return 1.0
    return min(1.0, (full_steps + (steps - full_steps) * budget / length) / steps)


class Conversation:
    """A conversation with one model, which reads each turn once. `messages` may be changed between turns: what of the
    state is still their beginning is kept, the rest is read again."""

    def __init__(
        self,
        params: Params,
        config: LlamaConfig,
        tokenizer: Any,
        *,
        policy: Policy | str = DEFAULT_POLICY,
        max_new_tokens: int = 512,
        sampling: Any = Greedy(),
        key: Any = None,
        system: str | None = None,
    ) -> None:
        self._params, self._config, self._tokenizer = params, config, tokenizer
        self.policy, self.max_new_tokens, self.sampling, self.key = policy, max_new_tokens, sampling, key
        self.messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
        self.figures = Figures()
        self.state: Prefilled | None = None
        self.tokens: list[int] = []  # that `state` holds, the last answer's among them
        self._text = ""  # of these but for the last answer's
        self._policy: Policy = policy_of(policy, 2**20)  # of the last answer

    def reset(self) -> None:
        """Forget all turns but the system's."""
        self.messages = [message for message in self.messages if message["role"] == "system"]
        self.state, self.tokens = None, []

    def save(self, folder: Path | str) -> None:
        """Write the conversation and its state to a folder. Raises ValueError before the first turn, and as
        `Prefilled.save` does."""
        if self.state is None:
            raise ValueError("there is nothing to save before the first turn")
        told = {"messages": self.messages, "tokens": self.tokens, "text": self._text}
        told |= {"new_tokens": self.figures.new_tokens, "policy": str(self.policy)}
        self.state.save(folder, self._params, self._config, conversation=told)

    def load(self, folder: Path | str) -> None:
        """Go on with a conversation that was saved, under its policy. Raises ValueError as `load_state` does, and for a
        folder without a conversation; this conversation then stays as it is."""
        told = read_card(folder)["notes"].get("conversation")
        if not isinstance(told, dict):
            raise ValueError(f"{folder} is a state without a conversation: `rj.load_state` reads it")
        state = load_state(folder, self._params, self._config)
        self.state, self.messages, self.tokens, self._text = state, told["messages"], told["tokens"], told["text"]
        self.policy, self.figures = told["policy"], Figures(new_tokens=told["new_tokens"])

    def ask(self, text: str) -> Iterator[str]:
        """The pieces of the answer to a turn. Leaving the loop ends the answer there; it then stays in the conversation as
        far as it was read. Raises ValueError where the turn and its answer do not fit into the model's context."""
        self.messages.append({"role": "user", "content": text})
        began = time.perf_counter()
        try:
            answer, read = self._begun()
        except ValueError:
            self.messages.pop()
            raise
        self.figures, said, made, first = Figures(read_tokens=read), "", [], 0
        try:
            for piece in answer:
                made += piece.tokens[0, : piece.lengths[0]].tolist()
                (new,) = piece.text or ("",)
                said += new
                if not self.figures.first_seconds:
                    self.figures.first_seconds, first = time.perf_counter() - began, len(made)
                if new:
                    yield new
                if piece.done[0]:
                    break
        finally:
            full = np.asarray(answer.full_steps)
            is_whole = answer.state is not None and not answer.state.logits.is_deleted()  # not if a piece was cut off
            self.state, self.tokens = (answer.state, self.tokens + made) if is_whole else (None, [])
            self.messages.append({"role": "assistant", "content": said})
            self.figures.new_tokens, self.figures.seconds = len(made), time.perf_counter() - began
            self.figures.full_steps = float(full.mean()) if full.size else 0.0
            self.figures.share_read = share_read(self._policy, len(self.tokens), self.figures.full_steps, len(made) - 1)
            later = self.figures.seconds - self.figures.first_seconds
            self.figures.rate = (len(made) - first) / later if len(made) > first else 0.0

    def _begun(self) -> tuple[Stream, int]:
        """The stream of the answer to the messages, and how many tokens had to be read."""
        text = prompt_text(self._tokenizer, self._prompt())
        kept, turn = self._kept(text)
        self._policy = policy = policy_of(self.policy, kept + len(turn) + self.max_new_tokens)
        if self.state is None or policy.needs | self.state.needs != self.state.needs:
            kept, turn = 0, prompt_ids(self._tokenizer, self._prompt())
        before = self.tokens[:kept]
        if kept:
            options: dict[str, Any] = dict(max_new_tokens=self.max_new_tokens)
            state = extend(self._params, self._config, _some(self.state), [turn], keep=[kept], **options)
        else:
            self.state = None  # frees its cache before the next one is made
            arguments = self._params, self._config, [turn]
            state = rounded(prefill(*arguments, policies=(policy,), max_new_tokens=self.max_new_tokens))
        self.tokens, self._text = before + turn, text
        answer = stream_after(
            self._params,
            self._config,
            state,
            policy=policy,
            tokenizer=self._tokenizer,
            sampling=self.sampling,
            key=self.key,
        )
        return answer, len(turn)

    def _kept(self, text: str) -> tuple[int, list[int]]:
        """How many of the state's tokens the text begins with, and the tokens of the rest. An answer's tokens are kept
        where its text is the same, although the tokenizer might write that text with other tokens."""
        ended = bool(self.tokens) and self.tokens[-1] in self._config.eos_token_ids
        for dropped in (0, 1) if ended else (0,):
            count = len(self.tokens) - dropped
            answer = self.tokens[len(self.tokens) - self.figures.new_tokens : count]
            known = self._text + self._tokenizer.decode(answer, skip_special_tokens=False)
            if self.tokens and text.startswith(known) and len(text) > len(known) and self._can_keep(count):
                return count, list(self._tokenizer(text[len(known) :], add_special_tokens=False)["input_ids"])
        ids = prompt_ids(self._tokenizer, self._prompt())
        most = min(len(ids) - 1, len(self.tokens))
        same = next((place for place in range(most) if ids[place] != self.tokens[place]), most)
        same = same if self._can_keep(same) else 0
        return same, ids[same:]

    def _can_keep(self, count: int) -> bool:
        """Rings of layers with a sliding window cannot go back."""
        rings = len(self._config.full_layers) < self._config.num_hidden_layers
        return not rings or (self.state is not None and count == sum(map(int, map(sum, token_counts(self.state)))))

    def _prompt(self) -> Any:
        """The messages, or where there is no chat template their texts one after another."""
        if self._tokenizer.chat_template:
            return self.messages
        return "\n".join(message["content"] for message in self.messages)


def _some(state: Prefilled | None) -> Prefilled:
    assert state is not None
    return state
