"""Samplers: how the next token is chosen from logits; and processors, which change the logits before that.

All are pytrees whose numbers may be arrays: another temperature needs no other program, and an array [B] has a number
for each row. `chain` composes processors and a sampler, as optax composes gradient transformations. A processor of
one's own is a subclass of `Processor`; a sampler of one's own is a pure function `(logits [B, V], row_keys, step) ->
tokens int32 [B]`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, Key

Steps: TypeAlias = Int[Array, ""] | Int[Array, "B 1"]
"""The number of a token, or of each row's token."""


LEAST_TEMPERATURE = 1e-30


@flax.struct.dataclass
class Greedy:
    """Chooses the most likely token; ties go to the lower id."""

    def __call__(
        self, logits: Float[Array, "B V"], row_keys: Key[Array, " B"] | None, step: Int[Array, ""]
    ) -> Int[Array, " B"]:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)


@flax.struct.dataclass
class Sample:
    """Draws from the softmax of `logits / temperature`, restricted to the `top_k` most likely tokens, then to the smallest
    set of them whose probability reaches `top_p`, then to tokens with at least `min_p` times the probability of the most
    likely one. None restricts nothing; the order of the restrictions is that of Hugging Face's logits warpers. Each may be
    a number or an array [B], one number for each row.

    Row b draws the token of step s with the key `fold_in(row_keys[b], s)`, so its draws do not depend on other rows;
    keys of JAX's other generators than threefry are turned into threefry keys for that (`independent`).
    """

    temperature: Any = 1.0
    top_k: Any = None
    top_p: Any = None
    min_p: Any = None

    def __post_init__(self) -> None:
        # logits over less than that are beyond float32
        check("temperature", self.temperature, above=LEAST_TEMPERATURE, hint="use Greedy() for the most likely token")
        check("top_k", self.top_k, least=1.0, whole=True)
        check("top_p", self.top_p, above=0.0, most=1.0)
        check("min_p", self.min_p, least=0.0, most=1.0)
        _as_floats(self, "temperature", "top_p", "min_p")

    def __call__(
        self, logits: Float[Array, "B V"], row_keys: Key[Array, " B"] | None, step: Int[Array, ""]
    ) -> Int[Array, " B"]:
        if row_keys is None:
            raise ValueError("sampling needs a key: pass key=jax.random.key(seed)")
        draw = jax.vmap(lambda key, row: jax.random.categorical(jax.random.fold_in(key, step), row))
        return draw(independent(row_keys), self.restricted(logits)).astype(jnp.int32)

    def restricted(self, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        """The logits that tokens are drawn by: -inf for those that are not drawn."""
        rows, vocabulary = logits.shape
        logits = logits / by_row(self.temperature, rows)
        if self.top_k is not None:
            place = vocabulary - jnp.clip(by_row(self.top_k, rows), 1, vocabulary)
            threshold = jnp.take_along_axis(jnp.sort(logits, axis=-1), place, axis=1)
            logits = jnp.where(logits < threshold, -jnp.inf, logits)
        if self.top_p is not None:
            logits = jax.vmap(_nucleus)(logits, by_row(self.top_p, rows)[:, 0])
        if self.min_p is not None:
            probabilities = jax.nn.softmax(logits, axis=-1)
            least = by_row(self.min_p, rows) * jnp.max(probabilities, axis=-1, keepdims=True)
            logits = jnp.where(probabilities < least, -jnp.inf, logits)
        return logits


def _nucleus(logits: Float[Array, " V"], top_p: Float[Array, ""]) -> Float[Array, " V"]:
    """The logits of the smallest set of most likely tokens whose probability reaches `top_p`, -inf for the others. Of
    equal tokens at the edge of the set those with lower ids are kept."""
    order = jnp.argsort(-logits)[::-1]  # from the least likely on; of equal tokens the higher id first
    # as transformers sums: a token is dropped while it and all less likely ones together have at most 1 - top_p
    is_kept = (jnp.cumsum(jax.nn.softmax(logits[order])) > 1 - top_p) | (top_p >= 1)
    is_kept = is_kept.at[-1].set(True)
    return jnp.where(jnp.zeros_like(is_kept).at[order].set(is_kept), logits, -jnp.inf)


# --- processors ------------------------------------------------------------------------------------------------------


class Processor:
    """Changes logits before a sampler chooses by them. A subclass is a pytree, such as a `flax.struct.dataclass`, of pure
    functions; what it carries from token to token is its state, any pytree of arrays with the rows first."""

    def start(self, seen: Bool[Array, "B V"], eos_ids: tuple[int, ...]) -> Any:
        """The state before the first new token. `seen` are the tokens that the row's prompt, turns and earlier answers
        have."""
        return ()

    def __call__(self, logits: Float[Array, "B V"], state: Any, step: Steps) -> Float[Array, "B V"]:
        """The changed logits; `step` counts the new tokens before this one (in each row, where drafts are verified)."""
        return logits

    def update(self, state: Any, token: Int[Array, " B"]) -> Any:
        """The state after a token was chosen."""
        return state


@flax.struct.dataclass
class RepetitionPenalty(Processor):
    """Divides positive logits of tokens that the text has by `penalty`, and multiplies negative ones (Keskar et al.,
    https://arxiv.org/abs/1909.05858, as transformers does)."""

    penalty: Any = 1.0

    def __post_init__(self) -> None:
        check("penalty", self.penalty, above=0.0)
        _as_floats(self, "penalty")

    def start(self, seen: Bool[Array, "B V"], eos_ids: tuple[int, ...]) -> Any:
        return seen

    def __call__(self, logits: Float[Array, "B V"], state: Any, step: Steps) -> Float[Array, "B V"]:
        penalty = by_row(self.penalty, logits.shape[0])
        return jnp.where(state, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)

    def update(self, state: Any, token: Int[Array, " B"]) -> Any:
        return state.at[jnp.arange(token.shape[0]), token].set(True)


@flax.struct.dataclass
class CountPenalty(Processor):
    """Takes `presence` off the logit of each token that the answer has, and `frequency` for each time that it has it: the
    two penalties of OpenAI's interface. The prompt does not count."""

    presence: Any = 0.0
    frequency: Any = 0.0

    def __post_init__(self) -> None:
        check("presence", self.presence)
        check("frequency", self.frequency)
        _as_floats(self, "presence", "frequency")

    def start(self, seen: Bool[Array, "B V"], eos_ids: tuple[int, ...]) -> Any:
        return jnp.zeros(seen.shape, jnp.int32)

    def __call__(self, logits: Float[Array, "B V"], state: Any, step: Steps) -> Float[Array, "B V"]:
        rows, counts = logits.shape[0], state.astype(jnp.float32)
        return logits - jnp.where(state > 0, by_row(self.presence, rows), 0) - counts * by_row(self.frequency, rows)

    def update(self, state: Any, token: Int[Array, " B"]) -> Any:
        return state.at[jnp.arange(token.shape[0]), token].add(1)


@flax.struct.dataclass
class MinNewTokens(Processor):
    """No end-of-sequence token before `count` new tokens."""

    count: Any = 0

    def __post_init__(self) -> None:
        check("count", self.count, least=0.0, whole=True)

    def start(self, seen: Bool[Array, "B V"], eos_ids: tuple[int, ...]) -> Any:
        ends = np.zeros(seen.shape[1], bool)
        ends[[token for token in eos_ids if token < seen.shape[1]]] = True
        return jnp.broadcast_to(jnp.asarray(ends), seen.shape)

    def __call__(self, logits: Float[Array, "B V"], state: Any, step: Steps) -> Float[Array, "B V"]:
        return jnp.where(state & (step < by_row(self.count, logits.shape[0])), -jnp.inf, logits)


@flax.struct.dataclass
class LogitBias(Processor):
    """Adds `values` [n] to the logits of the tokens `ids` [n]; -inf forbids a token. `LogitBias.of({id: value, ...})` makes
    one."""

    ids: Any
    values: Any

    @classmethod
    def of(cls, biases: dict[int, float]) -> LogitBias:
        """From a mapping of token ids. Raises ValueError for ids below 0 and values that are no numbers."""
        for token, value in biases.items():
            check("a token id of the bias", token, least=0.0, whole=True)
            check(f"the bias of token {token}", value, infinite=True)
        return cls(jnp.asarray(list(biases), jnp.int32), jnp.asarray(list(biases.values()), jnp.float32))

    def __call__(self, logits: Float[Array, "B V"], state: Any, step: Steps) -> Float[Array, "B V"]:
        return logits.at[:, self.ids].add(self.values, mode="drop")


@flax.struct.dataclass
class Chain:
    """Processors one after another, and the sampler that chooses by what they leave of the logits."""

    processors: tuple[Any, ...]
    sampler: Any

    def start(self, seen: Bool[Array, "B V"], eos_ids: tuple[int, ...]) -> Any:
        """The processors' states before the first new token."""
        return tuple(one.start(seen, eos_ids) for one in self.processors)

    def choose(self, logits: Float[Array, "B V"], row_keys: Any, step: Int[Array, ""], state: Any) -> Int[Array, " B"]:
        """The next token of each row."""
        return self.sampler(self.processed(logits, step, state), row_keys, step)

    def processed(self, logits: Float[Array, "B V"], step: Steps, state: Any) -> Float[Array, "B V"]:
        """What the processors make of the logits."""
        for one, its_state in zip(self.processors, state, strict=True):
            logits = one(logits, its_state, step)
        return logits

    def update(self, state: Any, token: Int[Array, " B"]) -> Any:
        """The processors' states after a token was chosen."""
        return tuple(one.update(its_state, token) for one, its_state in zip(self.processors, state, strict=True))


@flax.struct.dataclass
class OfFunction:
    """A sampler of the user's own, which is compiled for each function."""

    function: Callable[..., Any] = flax.struct.field(pytree_node=False)

    def __call__(self, logits: Any, row_keys: Any, step: Any) -> Any:
        return self.function(logits, row_keys, step)


def chain(*parts: Any) -> Chain:
    """Processors, and at the end a sampler: `chain(RepetitionPenalty(1.2), Sample(0.7, top_p=0.9))`; without a sampler
    `Greedy()`. Raises ValueError for a part in the wrong place."""
    has_sampler = bool(parts) and not isinstance(parts[-1], Processor)
    processors, sampler = (parts[:-1], parts[-1]) if has_sampler else (parts, Greedy())
    for one in processors:
        if not isinstance(one, Processor):
            raise ValueError(f"{one!r} is no processor: a chain is processors, and one sampler at its end")
    return Chain(tuple(processors), _sampler(sampler))


def as_chain(sampling: Any) -> Chain:
    """What `generate` takes as `sampling`: a chain, a sampler, a processor (greedy tokens then), or a pure function.
    Raises ValueError for anything else."""
    return sampling if isinstance(sampling, Chain) else chain(sampling)


def _sampler(sampler: Any) -> Any:
    if isinstance(sampler, Greedy | Sample | OfFunction):
        return sampler
    if callable(sampler):
        return OfFunction(sampler)
    raise ValueError(f"sampling={sampler!r} must be Greedy(), Sample(...), chain(...) or a function")


def by_row(value: Any, rows: int) -> Array:
    """A number, or one for each row, as an array [B, 1]. Raises ValueError for another number of rows."""
    array = jnp.asarray(value)
    if array.ndim > 1 or (array.ndim == 1 and array.shape[0] != rows):
        raise ValueError(
            f"there are numbers of shape {list(array.shape)} for {rows} rows: pass one, or one for each row"
        )
    return jnp.broadcast_to(array.reshape(-1, 1), (rows, 1))


def _as_floats(struct: Any, *names: str) -> None:
    """Make whole numbers floats, for which programs are compiled, and lists arrays."""
    for name in names:
        value = getattr(struct, name)
        if isinstance(value, int):
            object.__setattr__(struct, name, float(value))
        elif isinstance(value, list | tuple):
            object.__setattr__(struct, name, np.asarray(value, np.float32))


def check(
    name: str,
    value: Any,
    *,
    above: float | None = None,
    least: float = -math.inf,
    most: float = math.inf,
    whole: bool = False,
    infinite: bool = False,
    hint: str = "",
) -> None:
    """Raise ValueError, naming the field, for numbers outside of a range. What is traced, or stands for arrays in a
    pytree, is not looked at."""
    if (
        value is None
        or isinstance(value, Tracer)
        or not isinstance(value, bool | str | int | float | np.ndarray | np.number | jax.Array | list | tuple)
    ):
        return
    numbers = np.asarray(value)
    allowed = (np.integer,) if whole else (np.integer, np.floating)
    is_number = numbers.dtype.type in (jnp.bfloat16,) or any(np.issubdtype(numbers.dtype, kind) for kind in allowed)
    said = f" ({hint})" if hint else ""
    if not is_number or numbers.ndim > 1:
        raise ValueError(f"{name}={value!r} must be a {'whole ' if whole else ''}number, or one for each row{said}")
    inside = (numbers >= least) & (numbers <= most)
    if above is not None:
        inside = inside & (numbers > above)
    if not np.all(inside & (np.isfinite(numbers.astype(np.float64)) | infinite)):
        low = f"above {above:g}" if above is not None else f"at least {least:g}" if least > -math.inf else "finite"
        high = f" and at most {most:g}" if most < math.inf else ""
        raise ValueError(f"{name}={value!r} must be {low}{high}{said}")


def independent(keys: Key[Array, "..."]) -> Key[Array, "..."]:
    """Keys that draw the same numbers whatever other keys a `jax.vmap` draws with: threefry keys as they are, others
    (`rbg`, `unsafe_rbg`, whose batches draw from their first key alone) as threefry keys made of their bits."""
    if str(jax.random.key_impl(keys)) == "threefry2x32":
        return keys

    def fold(words: Array) -> Key[Array, ""]:
        key = jax.random.wrap_key_data(words[:2], impl="threefry2x32")
        for word in words[2:]:
            key = jax.random.fold_in(key, word)
        return key

    words = jax.random.key_data(keys)
    flat = jax.vmap(fold)(words.reshape(-1, words.shape[-1]))
    return flat.reshape(keys.shape)


@dataclasses.dataclass(frozen=True)
class Ends:
    """What ends a row: a token of `eos_ids`, or a sequence of tokens of `stops`."""

    eos_ids: tuple[int, ...]
    stops: tuple[tuple[int, ...], ...]

    @property
    def width(self) -> int:
        """The latest tokens that must be known."""
        return max(map(len, self.stops), default=0)

    def none_yet(self, rows: int) -> Int[Array, "B n"]:
        """The latest tokens before there are any."""
        return jnp.full((rows, self.width), -1, jnp.int32)

    def after(self, token: Int[Array, " B"], recent: Int[Array, "B n"]) -> Bool[Array, " B"]:
        """Whether a row ends with this token; `recent`, the latest tokens, includes it."""
        done = jnp.zeros(token.shape, jnp.bool_)
        for eos in self.eos_ids:
            done = done | (token == eos)
        for one in self.stops:
            done = done | jnp.all(recent[:, recent.shape[1] - len(one) :] == jnp.asarray(one, jnp.int32), axis=1)
        return done
