"""From the body of a request to jobs: what OpenAI's two interfaces for text ask for, checked. What this server does not do
is refused by name, so that nothing is ignored in silence."""

from __future__ import annotations

import inspect
import json
import math
from typing import Any, NamedTuple

from recyc_jax.serve.jobs import TOP, Job
from recyc_jax.text import prompt_ids

MOST_STOPS, MOST_STOP_CHARACTERS, MOST_PROMPTS = 16, 256, 64
LEAST_TEMPERATURE, LEAST_TOP_P = 1e-4, 1e-6
"""Below these the most likely token is taken: float32 would divide by nothing."""
DEFAULT_COMPLETION = 16
"""New tokens of a completion that asks for no number, as in OpenAI's interface."""
REFUSED = {  # what is not done, and the values that ask for nothing
    "n": (1, None),
    "best_of": (1, None),
    "echo": (False, None),
    "suffix": (None, ""),
    "logit_bias": (None, {}),
    "tools": (None, []),
    "functions": (None, []),
    "tool_choice": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "audio": (None,),
    "modalities": (None, ["text"]),
    "prediction": (None,),
    # of vLLM and other servers
    "top_k": (None, 0, -1),
    "min_p": (None, 0, 0.0),
    "repetition_penalty": (None, 1, 1.0),
    "length_penalty": (None, 1, 1.0),
    "use_beam_search": (None, False),
    "min_tokens": (None, 0),
    "ignore_eos": (None, False),
    "stop_token_ids": (None, []),
    "bad_words": (None, []),
    "skip_special_tokens": (None, True),
    "include_stop_str_in_output": (None, False),
    "add_generation_prompt": (None, True),
    "continue_final_message": (None, False),
    "documents": (None, []),
}
READ = {
    *("model", "messages", "prompt", "stream", "stream_options", "max_tokens", "max_completion_tokens"),
    *("temperature", "top_p", "seed", "stop", "presence_penalty", "frequency_penalty", "logprobs", "top_logprobs"),
    "chat_template_kwargs",
}
WITHOUT_EFFECT = {
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"),
}
"""Fields that say nothing about the text."""


class RefusedError(Exception):
    """A request that is not answered, with the reason for the client."""

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.param, self.status, self.code = param, status, code


class Asked(NamedTuple):
    """A request that was understood."""

    jobs: list[Job]
    is_streamed: bool
    with_usage: bool  # at the end of a stream


class Reader:
    """Understands requests to one model."""

    def __init__(self, tokenizer: Any, name: str, vocabulary: int, most_tokens: int, default_tokens: int) -> None:
        """`most_tokens`: of a prompt and its answer; `default_tokens`: of a chat's answer."""
        self._tokenizer, self.name, self._vocabulary = tokenizer, name, vocabulary
        self._most_tokens, self._default_tokens = most_tokens, default_tokens

    def chat(self, body: bytes) -> Asked:
        """A request to /v1/chat/completions."""
        fields = self._fields(body)
        messages = _messages(fields.get("messages"))
        if not self._tokenizer.chat_template:
            raise RefusedError("this model has no chat template: use /v1/completions", "messages")
        try:
            ids = prompt_ids(self._tokenizer, messages, _template_options(fields, self._tokenizer))
        except Exception as error:  # of the template, or of the tokenizer, each in its own way
            raise RefusedError(str(error), "messages") from None
        top = None
        if _flag(fields, "logprobs"):
            top = _whole(fields, "top_logprobs", 0, 0, TOP)
        elif fields.get("top_logprobs") is not None:
            raise RefusedError("top_logprobs needs logprobs: true", "top_logprobs")
        name = "max_completion_tokens" if fields.get("max_completion_tokens") is not None else "max_tokens"
        return self._asked(fields, [ids], name, self._default_tokens, top)

    def completion(self, body: bytes) -> Asked:
        """A request to /v1/completions."""
        fields = self._fields(body)
        top = None if fields.get("logprobs") is None else _whole(fields, "logprobs", 0, 0, TOP)
        prompts = [self._prompt_ids(prompt) for prompt in _prompts(fields.get("prompt"))]
        return self._asked(fields, prompts, "max_tokens", DEFAULT_COMPLETION, top)

    def _fields(self, body: bytes) -> dict[str, Any]:
        try:
            fields = json.loads(body, parse_constant=_no_number)
        except (ValueError, RecursionError) as error:
            raise RefusedError(f"the body is not JSON: {error}") from None
        if not isinstance(fields, dict):
            raise RefusedError("the body must be a JSON object")
        model = fields.get("model", self.name)
        if model != self.name:
            raise RefusedError(
                f"the model {model!r} is not here: this server has {self.name!r}", "model", 404, "model_not_found"
            )
        for name, value in fields.items():
            nothing = (None,) if name not in READ | WITHOUT_EFFECT else (value,)
            if not any(value == one and type(value) is type(one) for one in REFUSED.get(name, nothing)):
                raise RefusedError(f"{name} is not supported by this server: leave it out", name)
        return fields

    def _prompt_ids(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            try:
                return prompt_ids(self._tokenizer, prompt)
            except Exception as error:  # tokenizers refuse half a surrogate pair, say, each in its own way
                raise RefusedError(f"the prompt cannot be read: {error}", "prompt") from None
        if not all(0 <= token < self._vocabulary for token in prompt):
            raise RefusedError(f"a token id of the prompt is not in 0..{self._vocabulary - 1}", "prompt")
        return prompt

    def _asked(
        self, fields: dict[str, Any], prompts: list[list[int]], tokens_name: str, default: int, top: int | None
    ) -> Asked:
        made = []
        temperature = _number(fields, "temperature", 1.0, 0.0, 2.0)
        seed = _whole(fields, "seed", None, -(2**63), 2**64 - 1)
        for number, ids in enumerate(prompts):
            left = self._most_tokens - len(ids)
            if left < 1:
                raise RefusedError(
                    f"the prompt has {len(ids)} tokens, and with its answer it may have {self._most_tokens}",
                    code="context_length_exceeded",
                )
            wanted = _whole(fields, tokens_name, min(default, left), 1, None)
            if wanted > left:
                raise RefusedError(
                    f"{tokens_name}={wanted} and a prompt of {len(ids)} tokens exceed the {self._most_tokens} tokens that "
                    f"they may have together: at most {left} are left for the answer",
                    tokens_name,
                    code="context_length_exceeded",
                )
            options: dict[str, Any] = {} if seed is None else {"seed": (seed + number) % 2**32}
            made.append(
                Job(
                    ids,
                    wanted,
                    temperature=temperature if temperature >= LEAST_TEMPERATURE else 0.0,
                    top_p=max(_number(fields, "top_p", 1.0, 0.0, 1.0), LEAST_TOP_P),
                    presence=_number(fields, "presence_penalty", 0.0, -2.0, 2.0),
                    frequency=_number(fields, "frequency_penalty", 0.0, -2.0, 2.0),
                    stops=_stops(fields.get("stop")),
                    top=top,
                    **options,
                )
            )
        stream_options = fields.get("stream_options") or {}
        if not isinstance(stream_options, dict):
            raise RefusedError("stream_options must be an object", "stream_options")
        return Asked(made, _flag(fields, "stream"), _flag(stream_options, "include_usage"))


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _whole(fields: dict[str, Any], name: str, default: Any, least: int, most: int | None) -> Any:
    value = fields.get(name)
    if value is None:
        return default
    if type(value) is not int or value < least or (most is not None and value > most):
        raise RefusedError(f"{name} must be a whole number of {_range(least, most)}, not {_shown(value)}", name)
    return value


def _number(fields: dict[str, Any], name: str, default: float, least: float, most: float) -> float:
    value = fields.get(name)
    if value is None:
        return default
    if type(value) not in (int, float) or not least <= value <= most or not math.isfinite(value):
        raise RefusedError(f"{name} must be a number of {_range(least, most)}, not {_shown(value)}", name)
    return float(value)


def _flag(fields: dict[str, Any], name: str) -> bool:
    value = fields.get(name)
    if value is not None and not isinstance(value, bool):
        raise RefusedError(f"{name} must be true or false, not {_shown(value)}", name)
    return bool(value)


def _range(least: Any, most: Any) -> str:
    return f"at least {least}" if most is None else f"{least:g} to {most:g}"


def _shown(value: Any) -> str:
    return repr(value)[:60]


def _stops(stop: Any) -> tuple[str, ...]:
    stops = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or len(stops) > MOST_STOPS or not all(map(_is_stop, stops)):
        raise RefusedError(
            f"stop must be a text or up to {MOST_STOPS} texts, each of 1 to {MOST_STOP_CHARACTERS} characters", "stop"
        )
    return tuple(stops)


def _is_stop(one: Any) -> bool:
    return isinstance(one, str) and 0 < len(one) <= MOST_STOP_CHARACTERS


def _prompts(prompt: Any) -> list[Any]:
    """The prompts, each a text or token ids."""
    if isinstance(prompt, str):
        return [prompt]
    if _are_ids(prompt):
        return [prompt]
    is_list = isinstance(prompt, list) and 0 < len(prompt) <= MOST_PROMPTS
    if is_list and (all(isinstance(one, str) for one in prompt) or all(map(_are_ids, prompt))):
        return prompt
    raise RefusedError(
        f"prompt must be a text, a list of token ids, or a list of up to {MOST_PROMPTS} of these, none of them empty",
        "prompt",
    )


def _are_ids(one: Any) -> bool:
    return isinstance(one, list) and bool(one) and all(type(token) is int for token in one)


def _messages(messages: Any) -> list[dict[str, str]]:
    if not isinstance(messages, list) or not messages:
        raise RefusedError("messages must be a list of at least one message", "messages")
    return [_message(number, message) for number, message in enumerate(messages)]


def _message(number: int, message: Any) -> dict[str, str]:
    where = f"messages[{number}]"
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise RefusedError(f"{where} must be an object with a role and a content", where)
    for name in set(message) - {"role", "content", "name"}:
        if message[name] not in (None, [], ""):
            raise RefusedError(f"{where}.{name} is not supported by this server: leave it out", where)
    content = message.get("content")
    if isinstance(content, list):
        parts = [part["text"] for part in content if _is_text(part)]
        content = "".join(parts) if len(parts) == len(content) else None
    if not isinstance(content, str):
        raise RefusedError(f"{where}.content must be text: this server reads no images, audio or tool calls", where)
    return {"role": message["role"], "content": content}


def _template_options(fields: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Variables of the model's own chat template, such as Qwen3's `enable_thinking`."""
    options = fields.get("chat_template_kwargs") or {}
    taken = inspect.signature(tokenizer.apply_chat_template).parameters
    if not isinstance(options, dict) or set(options) & (set(taken) | {"messages"}):
        raise RefusedError(
            "chat_template_kwargs must be an object of the template's own variables", "chat_template_kwargs"
        )
    return options


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
