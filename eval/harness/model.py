"""A model of this project as the lm-evaluation-harness asks its models (https://github.com/EleutherAI/lm-evaluation-harness,
version 0.4): greedy and sampled text, log-likelihoods, rolling log-likelihoods, each under a policy.

A request's context is prefilled; the tokens of the continuation, or of the answer, are fed one at a time under the policy.
So a rolling log-likelihood decodes a whole text, a token at a time, which takes as long as to generate it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from tqdm import tqdm

import recyc_jax as rj
from recyc_jax.commands import backends, command_line
from recyc_jax.prompts import bucket
from recyc_jax.scoring import score_after
from recyc_jax.text import policy_of

LOG = logging.getLogger(__name__)
CONTINUATION = 16
"""Numbers of scored tokens are rounded up to multiples of this, so that few programs are compiled."""
KNOWN = ("until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k", "min_p", "seed")
"""What a task may say of how text is generated."""
Request = TypeVar("Request")


@register_model("recyc_jax")
class RecycJax(TemplateLM):
    """`--model recyc_jax --model_args pretrained=MODEL,policy=POLICY,...`"""

    def __init__(
        self,
        pretrained: str,
        policy: str = "full",
        dtype: str = "auto",
        backend: str = "auto",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        seed: int = 0,
        device: str | None = None,
    ) -> None:
        """`pretrained` is what `rj.load_pretrained` takes; `policy` a policy string, in which commas of `--model_args` are
        written as semicolons: `policy=lookahead:budget=1024;stride=50`. `device` and `max_batch_size` are the harness's own
        and mean nothing here. Raises ValueError for what cannot be had, before weights are read."""
        super().__init__()
        self._policy = str(policy).replace(";", ",")
        command_line.check_policies([self._policy], [2**20])
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(
                f"batch_size={batch_size} must be a whole number of at least 1: sizes are not found automatically"
            )
        if device not in (None, "cuda:0", "cuda", "cpu", "mps"):  # the first is the harness's default
            LOG.warning("device=%s is not heeded: pass backend=gpu, cpu or tpu", device)
        backends.select(backend)
        lm = rj.load_pretrained(pretrained, command_line.dtype_name(dtype))
        context = lm.config.max_position_embeddings
        if max_length is not None and not 1 < int(max_length) <= context:
            raise ValueError(f"max_length={max_length} must lie in 2..{context}, the model's context")
        self._lm, self._pretrained, self._seed = lm, pretrained, int(seed)
        self.tokenizer, self.batch_size = lm.tokenizer, int(batch_size)
        self.max_length, self.max_gen_toks, self._add_bos = int(max_length or context), int(max_gen_toks), add_bos_token

    # --- text and tokens

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self._pretrained.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The token ids of a text, as the harness's Hugging Face model makes them."""
        wanted = self._add_bos if add_special_tokens is None else add_special_tokens
        if add_special_tokens is None and string.startswith(self.tokenizer.decode([self.prefix_token_id])):
            wanted = False
        return self.tokenizer.encode(string, **({} if wanted is None else {"add_special_tokens": wanted}))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The messages in the tokenizer's chat template."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    # --- log-likelihoods

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Each continuation's log-probability after its context, and whether greedy decoding would have written it."""
        pairs = [self._cut(context, continuation) for _, context, continuation in requests]

        def scored(some: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
            contexts, continuations = zip(*some, strict=True)
            most = -(-max(map(len, continuations)) // CONTINUATION) * CONTINUATION
            tokens = np.asarray([[*one, *[0] * (most - len(one))] for one in continuations], np.int32)
            policy = policy_of(self._policy, max(len(context) + len(one) for context, one in some))
            lm, options = self._lm, dict(policies=(policy,), max_new_tokens=most, allow_beyond_context=True)
            state = rj.prefill(lm.params, lm.config, list(contexts), **options)
            scores, _ = score_after(lm.params, lm.config, state, tokens, policy=policy)
            each = zip(
                np.asarray(scores.log_probabilities),
                np.asarray(scores.most_likely),
                map(len, continuations),
                strict=True,
            )
            return [(float(row[:count].sum()), bool(most_likely[:count].all())) for row, most_likely, count in each]

        def kind(pair: tuple[list[int], list[int]]) -> Any:
            return bucket(len(pair[0])), -(-len(pair[1]) // CONTINUATION)

        found = self._in_batches(pairs, kind, scored, "Running loglikelihood requests", disable_tqdm)
        for (text, *_), answer in zip(requests, found, strict=True):
            if text is not None:
                self.cache_hook.add_partial("loglikelihood", text, answer)
        return found

    def _cut(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        """What of a request fits into the model's context, of which the last token is not fed: the end."""
        both = (context + continuation)[-(self.max_length + 1) :]
        before = max(1, len(both) - len(continuation))
        return both[:before], both[before:]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of whole texts, in windows of the model's context that do not overlap."""
        windows, counts = [], []
        for (text,) in (request.args for request in requests):
            ids, options = self.tok_encode(text), dict(prefix_token=self.prefix_token_id, max_seq_len=self.max_length)
            its = [
                (None, *utils.make_disjoint_window(window))
                for window in utils.get_rolling_token_windows(token_list=ids, context_len=1, **options)
            ]
            windows += its
            counts.append(len(its))
        found, totals = iter(self._loglikelihood_tokens(windows, disable_tqdm)), []
        for request, count in zip(requests, counts, strict=True):
            totals.append(sum(next(found)[0] for _ in range(count)))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, totals[-1])
        return totals

    # --- generation

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The text that follows each context, up to one of its stop strings."""
        asked, stop_ids = [], set(self.tokenizer.all_special_ids)
        for number, (context, options) in enumerate(request.args for request in requests):
            options = dict(normalize_gen_kwargs(options, self.max_gen_toks))
            if unknown := sorted(name for name in set(options) - set(KNOWN) if options[name] not in (None, 1, 1.0)):
                raise ValueError(
                    f"generation_kwargs: {', '.join(unknown)} cannot be had here; known are {', '.join(KNOWN)}"
                )
            most = int(options["max_gen_toks"])
            if most >= self.max_length:
                raise ValueError(f"max_gen_toks={most} must be less than the model's context of {self.max_length}")
            asked.append((self.tok_encode(context)[-(self.max_length - most) :], options, number))

        def kind(one: tuple[list[int], dict[str, Any], int]) -> Any:
            return bucket(len(one[0])), repr(sorted(one[1].items(), key=str))

        def made(some: Sequence[tuple[list[int], dict[str, Any], int]]) -> list[str]:
            lm, options = self._lm, some[0][1]
            stops = handle_stop_sequences(options.get("until"), eos=self.tokenizer.decode([self.eot_token_id]))
            most = int(options["max_gen_toks"])
            # ends that are special tokens have no text in an answer: they end it as tokens
            ids = [self.tokenizer.encode(stop, add_special_tokens=False) for stop in stops if stop]
            ends = {
                self.eot_token_id,
                *lm.config.eos_token_ids,
                *(i[0] for i in ids if len(i) == 1 and i[0] in stop_ids),
            }
            of_request = jax.random.key(int(options.get("seed") or self._seed))
            # a request draws by its place, so that a repeated one draws anew, whatever the batch
            keys = jax.vmap(lambda number: jax.random.fold_in(of_request, number))(np.asarray([one[2] for one in some]))
            stream = rj.stream(
                lm.params,
                lm.config,
                [one[0] for one in some],
                policy=policy_of(self._policy, max(len(one[0]) for one in some) + most),
                max_new_tokens=most,
                sampling=_sampling(options),
                key=keys,
                eos_ids=sorted(ends),
            )
            tokens: list[list[int]] = [[] for _ in some]
            for piece in stream:
                for row, its in enumerate(tokens):
                    its += piece.tokens[row, : piece.lengths[row]].tolist()
                texts = [self.tokenizer.decode(its, skip_special_tokens=True) for its in tokens]
                stopped = [any(stop in text for stop in stops if stop) for text in texts]
                if all(done or at_stop for done, at_stop in zip(piece.done, stopped, strict=True)):
                    break
            kept = [its[:-1] if its and its[-1] in ends else its for its in tokens]
            texts = [self.tokenizer.decode(its, skip_special_tokens=True) for its in kept]
            return [postprocess_generated_text(text, stops, None) for text in texts]

        texts = self._in_batches(asked, kind, made, "Running generate_until requests", disable_tqdm)
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _in_batches(
        self,
        requests: Sequence[Request],
        kind: Callable[[Request], Any],
        answer: Callable[[Sequence[Request]], list[Any]],
        title: str,
        is_quiet: bool,
    ) -> list[Any]:
        """The answers in the requests' order, made in batches of requests of one kind, long ones first."""
        kinds: dict[Any, list[int]] = {}
        for number, request in enumerate(requests):
            kinds.setdefault(kind(request), []).append(number)
        found: list[Any] = [None] * len(requests)
        with tqdm(total=len(requests), desc=title, disable=is_quiet) as bar:
            for some in sorted(kinds, key=str, reverse=True):
                numbers = kinds[some]
                for begin in range(0, len(numbers), self.batch_size):
                    batch = numbers[begin : begin + self.batch_size]
                    # rows are filled up, so that the last batch needs no program of its own
                    filled = (
                        [*batch, *batch[:1] * (self.batch_size - len(batch))]
                        if len(numbers) > self.batch_size
                        else batch
                    )
                    answers = answer([requests[number] for number in filled])
                    for number, one in zip(batch, answers, strict=False):
                        found[number] = one
                    bar.update(len(batch))
        return found


def _sampling(options: dict[str, Any]) -> Any:
    if not options.get("do_sample") or options.get("temperature") == 0:
        return rj.Greedy()
    restrictions = {name: options.get(name) for name in ("top_k", "top_p", "min_p")}
    temperature = options.get("temperature")
    return rj.Sample(1.0 if temperature is None else float(temperature), **restrictions)
