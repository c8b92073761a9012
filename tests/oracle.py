"""The methods in plain numpy for one row, one token and one head at a time: slow and obvious.

Written from the papers, and from our decisions where the papers are silent, independently of the fast path: a kept set
is two lists of positions, ranked and new. For each layer and key/value head, a method says which positions to read.
"""

import dataclasses
import itertools

import numpy as np
from oracle_decoder import Decoder, log_softmax


@dataclasses.dataclass
class Trace:
    tokens: list  # the new tokens
    logits: list  # the logits [V] that each token was chosen from
    least_gap: list  # for each token: the least margin of any choice so far (token, position, full or partial)
    full_steps: list  # the number of full steps of each layer


def _rank(scores, pool, budget, lookahead):
    """The top `budget` positions by pooled score, best first, ties to the earlier position; and the least positive gap
    between neighbouring scores in that order."""
    half = pool // 2
    pooled = [max(scores[max(0, at - half - lookahead) : at + half + 1]) for at in range(len(scores))]
    order = sorted(range(len(pooled)), key=lambda at: (-pooled[at], at))
    ranked = [pooled[at] for at in order[: budget + 1]]
    gaps = [a - b for a, b in itertools.pairwise(ranked) if a != b]
    return order[:budget], min(gaps, default=np.inf)


class Method:
    """The functions of a method that `run` calls. `gap` is the least margin of any choice that the method has made."""

    def __init__(self, config):
        self.c = config
        self.gap = np.inf
        self.layers, self.heads = config.full_layers, range(config.num_key_value_heads)
        self.places = [(layer, head) for layer in self.layers for head in self.heads]

    def after_prompt_token(self, decoder):
        """Called after each prompt token, which attended to everything."""

    def start(self, decoder):
        """Called after the prompt."""

    def before(self, decoder, step):
        """Called before a new token is fed."""

    def read(self, decoder, step, layer, head):
        """The positions that the token at `decoder.position` attends to; None: all."""

    def is_full(self, step, layer):
        """Whether the step is a full step; called after `read`."""

    def after(self, decoder, step):
        """Called after a step."""


class Full(Method):
    def is_full(self, step, layer):
        return True


class StreamingLLM(Method):
    """The first `sinks` and the latest `budget - sinks` tokens."""

    def __init__(self, config, budget, sinks=4, full_stride=None):
        super().__init__(config)
        self.budget, self.sinks, self.full_stride = budget, sinks, full_stride

    def is_full(self, step, layer):
        return self.full_stride is not None and step % self.full_stride == 0

    def read(self, decoder, step, layer, head):
        if self.is_full(step, layer):
            return None
        everything = list(range(decoder.position + 1))
        return sorted({*everything[: self.sinks], *everything[-(self.budget - self.sinks) :]})


class H2O(Method):
    """Heavy hitters by accumulated attention, and the latest tokens; a dropped token never returns."""

    def __init__(self, config, budget, full_stride=None):
        super().__init__(config)
        self.heavy, self.recent = budget // 2, budget - budget // 2
        self.full_stride = full_stride
        groups = config.num_attention_heads // config.num_key_value_heads
        self.mass = {place: [np.zeros(0) for _ in range(groups)] for place in self.places}  # [query head][position]
        self.kept = {}

    is_full = StreamingLLM.is_full

    def _add(self, place, positions, chances):
        for mass, row in zip(self.mass[place], np.exp(chances), strict=True):
            mass[positions] += row

    def _make_room(self, position):
        for place in self.places:
            self.mass[place] = [np.append(mass, 0.0) for mass in self.mass[place]]
            if place in self.kept:
                self.kept[place].append(position)
                self._evict(place, position)

    def _evict(self, place, newest):
        kept = self.kept[place]
        old = [at for at in kept if at <= newest - self.recent]
        score = {at: max(mass[at] for mass in self.mass[place]) for at in old}
        order = sorted(old, key=lambda at: (-score[at], at))
        for a, b in itertools.pairwise(order[: self.heavy + 1]):
            self.gap = min(self.gap, (score[a] - score[b]) / max(score[a], 1e-30))
        self.kept[place] = [at for at in kept if at not in order[self.heavy :]]

    def after_prompt_token(self, decoder):
        self._make_room(decoder.position - 1)
        for layer, head in self.places:
            everything = list(range(decoder.position))
            self._add((layer, head), everything, decoder.all_chances[layer][head])

    def start(self, decoder):
        # nothing is evicted before the next token
        self.kept = {place: list(range(decoder.position)) for place in self.places}

    def before(self, decoder, step):
        self._make_room(decoder.position)

    def read(self, decoder, step, layer, head):
        return None if self.is_full(step, layer) else self.kept[layer, head]

    def after(self, decoder, step):
        for layer, head in self.places:
            kept = self.kept[layer, head]
            chances = decoder.read_chances[layer][head]
            self._add((layer, head), kept, chances[:, kept] if self.is_full(step, layer) else chances)


class SnapKV(Method):
    """The top `budget` tokens by the last `window` prompt tokens, chosen once; new tokens replace the lowest-ranked."""

    def __init__(self, config, budget, window=1, pool=7, lookahead=0):
        super().__init__(config)
        self.budget, self.window, self.pool, self.lookahead = budget, window, pool, lookahead
        self.queries = []  # for each prompt token: log-probabilities by (layer, head)
        self.ranked, self.recent, self.chosen_by = {}, {}, {}

    def after_prompt_token(self, decoder):
        self.queries.append({(layer, head): decoder.all_chances[layer][head] for layer, head in self.places})

    def start(self, decoder):
        for place in self.places:
            groups = self.queries[-1][place].shape[0]
            total = np.zeros((groups, decoder.position))
            for query in self.queries[-self.window :]:
                total[:, : query[place].shape[1]] += np.exp(query[place])
            self._select(place, np.log(total).max(axis=0))

    def _select(self, place, scores):
        self.chosen_by[place] = scores
        self.ranked[place], gap = _rank(list(scores), self.pool, self.budget, self.lookahead)
        self.recent[place] = []
        self.gap = min(self.gap, gap)

    def is_full(self, step, layer):
        return False

    def read(self, decoder, step, layer, head):
        mine, new = self.ranked[layer, head], self.recent[layer, head]
        new.append(decoder.position)
        if len(mine) + len(new) > self.budget:
            if mine:
                mine.pop()  # the lowest-ranked
            else:
                new.pop(0)  # the oldest new token
        return mine + new


class Recycled(SnapKV):
    """Recycled Attention: SnapKV's set, which full steps refresh."""

    def __init__(self, config, budget, stride=None, check_every=None, threshold=None, rope=False, evict=True,
                 ablation=None, pool=7, lookahead=0, window=1, decay=None):  # fmt: skip
        if lookahead == "auto":
            lookahead = (stride or check_every) - 1
        super().__init__(config, budget, window, pool, lookahead)
        self.decay = decay
        self.stride, self.check_every, self.threshold, self.rope = stride, check_every, threshold, rope
        self.evict, self.ablation = evict, ablation
        self.remembered, self.due = {}, {}

    def start(self, decoder):
        super().start(decoder)
        for layer in self.layers:
            self.remembered[layer] = self._query(decoder, layer)

    def _query(self, decoder, layer):
        return (decoder.rotated_query if self.rope else decoder.query)[layer]

    def _is_due(self, decoder, step, layer):
        if self.stride:
            return step % self.stride == 0
        if step % self.check_every:
            return False
        now, then = self._query(decoder, layer), self.remembered[layer]
        similarity = min(now @ then / (np.linalg.norm(now) * np.linalg.norm(then)), 1)
        if self.threshold < 1:
            self.gap = min(self.gap, abs(similarity - self.threshold))
        return similarity <= self.threshold

    def read(self, decoder, step, layer, head):
        if head == 0:
            self.due[layer] = self._is_due(decoder, step, layer)
        if self.evict:
            partial = super().read(decoder, step, layer, head)
        else:
            self.recent[layer, head].append(decoder.position)
            partial = self.ranked[layer, head] + self.recent[layer, head]
        return None if self.due[layer] and self.ablation != "no_full_attention" else partial

    def is_full(self, step, layer):
        return self.due[layer] and self.ablation != "no_full_attention"

    def after(self, decoder, step):
        for layer in self.layers:
            if self.due[layer]:
                self.remembered[layer] = self._query(decoder, layer)
        for layer, head in self.places:
            if self.due[layer] and self.ablation != "no_refresh":
                scores = decoder.all_chances[layer][head].max(axis=0)
                if self.decay is not None:
                    before = self.chosen_by[layer, head]
                    scores[: len(before)] = np.maximum(scores[: len(before)], before - self.decay)
                self._select((layer, head), scores)


class Lookahead(Recycled):
    """Recycled attention with look-ahead and memory, where one token stands for those that are not kept."""

    def __init__(self, config, budget, stride, lookahead="auto", window=32, decay=1.0, pool=7, remainder=True):
        if lookahead == "auto":
            lookahead = max(stride - 1, min(24, budget // 32))
        super().__init__(config, budget, stride, pool=pool, lookahead=lookahead, window=window, decay=decay)
        self.remainder = remainder

    def start(self, decoder):
        super().start(decoder)
        self._represent_rest(decoder)

    def after(self, decoder, step):
        super().after(decoder, step)
        if step % self.stride == 0:
            self._represent_rest(decoder)

    def _represent_rest(self, decoder):
        """The rest under the queries of the last token: its mean key and value, and a bias that makes it exact."""
        decoder.rest = {}
        for layer, head in self.places if self.remainder else ():
            left_out = [at for at in range(decoder.position) if at not in self.ranked[layer, head]]
            keys, values = (np.array(of[layer][head])[left_out] for of in (decoder.keys, decoder.values))
            groups = self.c.num_attention_heads // self.c.num_key_value_heads
            for query in decoder.queries[layer][head * groups : (head + 1) * groups] if left_out else ():
                logits = keys @ query / np.sqrt(self.c.head_dim)
                total, chances = np.logaddexp.reduce(logits), np.exp(log_softmax(logits))
                key = chances @ keys
                bias = total - key @ query / np.sqrt(self.c.head_dim)
                every = np.logaddexp.reduce(np.array(decoder.keys[layer][head]) @ query / np.sqrt(self.c.head_dim))
                if np.exp(total - every) < 1e-4:  # our decision: less than this is nothing
                    bias = -np.inf
                self.gap = min(self.gap, 10 * abs(np.exp(total - every) - 1e-4))
                decoder.rest.setdefault((layer, head), []).append((key, chances @ values, bias))


class TopK(Method):
    """The tokens with the most attention in this very step."""

    def __init__(self, config, budget):
        super().__init__(config)
        self.budget = budget

    def is_full(self, step, layer):
        return False

    def read(self, decoder, step, layer, head):
        groups = self.c.num_attention_heads // self.c.num_key_value_heads
        keys = np.array(decoder.keys[layer][head])
        queries = decoder.queries[layer][head * groups : (head + 1) * groups]
        scores = np.max([log_softmax(keys @ query / np.sqrt(self.c.head_dim)) for query in queries], axis=0)
        positions, gap = _rank(list(scores), 1, self.budget, 0)
        self.gap = min(self.gap, gap)
        return positions


class Quest(Method):
    """The pages whose keys' smallest and largest coordinates allow the largest product with the query."""

    def __init__(self, config, budget, page=16, dense_layers=2):
        super().__init__(config)
        self.pages, self.page, self.dense = budget // page, page, self.layers[:dense_layers]

    def is_full(self, step, layer):
        return layer in self.dense

    def read(self, decoder, step, layer, head):
        if layer in self.dense:
            return None
        groups = self.c.num_attention_heads // self.c.num_key_value_heads
        keys = np.array(decoder.keys[layer][head])
        queries = decoder.queries[layer][head * groups : (head + 1) * groups]
        pages = [range(at, min(at + self.page, len(keys))) for at in range(0, len(keys), self.page)]
        bounds = []
        for page in pages:
            low, high = keys[list(page)].min(axis=0), keys[list(page)].max(axis=0)
            bounds.append(max(np.sum(np.maximum(query * low, query * high)) for query in queries))
        bounds[-1] = 1e9
        best, gap = _rank(bounds, 1, self.pages, 0)
        self.gap = min(self.gap, gap)
        return [at for number in best for at in pages[number]]


def run(params, config, prompt, method, new_tokens):
    """Greedy decoding under a method; returns a Trace."""
    decoder = Decoder(params, config)
    for token in prompt:
        logits = decoder.feed(token, lambda layer, head: None)
        method.after_prompt_token(decoder)
    method.start(decoder)
    trace = Trace([], [], [], [0] * len(config.full_layers))
    least = np.inf
    for step in range(1, new_tokens + 1):
        best = np.sort(logits)[::-1]
        least = min(least, method.gap, best[0] - best[1])
        trace.tokens.append(int(np.argmax(logits)))
        trace.logits.append(logits)
        trace.least_gap.append(least)
        if step == new_tokens:
            break
        method.before(decoder, step)
        logits = decoder.feed(trace.tokens[-1], lambda layer, head, step=step: method.read(decoder, step, layer, head))
        method.after(decoder, step)
        for number, layer in enumerate(method.layers):
            trace.full_steps[number] += method.is_full(step, layer)
    return trace


def recycled(params, config, prompt, *, new_tokens, **options):
    """Greedy decoding under Recycled Attention."""
    return run(params, config, prompt, Recycled(config, **options), new_tokens)
