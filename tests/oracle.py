"""The paper's algorithm in plain numpy, a token and a head at a time: slow and obvious. Fixed schedule, one row.

Written from the paper (section 3) and our decisions where it is silent, without a look at the fast path: sets are lists
of positions, ranked ones and new ones, not a ring of indices.
"""

import dataclasses
import itertools

import numpy as np


@dataclasses.dataclass
class Trace:
    tokens: list  # the new tokens
    logits: list  # the logits that each was chosen from, [V]
    least_gap: list  # for each: the least margin of a choice so far (of tokens and of selected positions)
    full_steps: int


def _rms(x, scale, eps):
    return x / np.sqrt(np.mean(x**2) + eps) * scale


def _rotate(x, position, inverse_frequencies):
    angle = position * inverse_frequencies
    first, second = np.split(x, 2)
    return np.concatenate(
        [first * np.cos(angle) - second * np.sin(angle), second * np.cos(angle) + first * np.sin(angle)]
    )


def _softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


class Decoder:
    """A Llama decoder that feeds one token at a time and asks `positions(layer, kv_head, logits_of)` what to read."""

    def __init__(self, params, config):
        from recyc_jax import rope

        self.p = _to64(params)
        self.c = config
        self.inverse_frequencies = rope.inverse_frequencies(config).astype(np.float64)
        self.keys = [[[] for _ in range(config.num_key_value_heads)] for _ in range(config.num_hidden_layers)]
        self.values = [[[] for _ in range(config.num_key_value_heads)] for _ in range(config.num_hidden_layers)]
        self.position = 0

    def feed(self, token, read):
        """Logits after `token`. `read(layer, kv_head)` lists the positions to attend to (None: all), and
        `self.scores[layer][kv_head]` afterwards holds log-probabilities over those positions, max over the group."""
        c = self.c
        groups = c.num_attention_heads // c.num_key_value_heads
        x = self.p["embedding"][token]
        self.scores = [[None] * c.num_key_value_heads for _ in range(c.num_hidden_layers)]
        for layer in range(c.num_hidden_layers):
            block = self.p[f"layers_{layer}"]
            h = _rms(x, block["attention_norm"]["scale"], c.rms_norm_eps)
            q, k, v = (self._project(block["attention"][f"{name}_proj"], h) for name in "qkv")
            out = np.zeros((c.num_attention_heads, c.head_dim))
            for kv_head in range(c.num_key_value_heads):
                self.keys[layer][kv_head].append(_rotate(k[kv_head], self.position, self.inverse_frequencies))
                self.values[layer][kv_head].append(v[kv_head])
                positions = read(layer, kv_head)
                if positions is None:
                    positions = list(range(self.position + 1))
                keys = np.array([self.keys[layer][kv_head][at] for at in positions])
                values = np.array([self.values[layer][kv_head][at] for at in positions])
                log_probabilities = []
                for head in range(kv_head * groups, (kv_head + 1) * groups):
                    rotated = _rotate(q[head], self.position, self.inverse_frequencies)
                    logits = keys @ rotated / np.sqrt(c.head_dim)
                    out[head] = _softmax(logits) @ values
                    log_probabilities.append(logits - logits.max() - np.log(np.exp(logits - logits.max()).sum()))
                self.scores[layer][kv_head] = np.max(log_probabilities, axis=0)
            x = x + out.reshape(-1) @ block["attention"]["o_proj"]["kernel"]
            h = _rms(x, block["mlp_norm"]["scale"], c.rms_norm_eps)
            gate, up = h @ block["mlp"]["gate_proj"]["kernel"], h @ block["mlp"]["up_proj"]["kernel"]
            x = x + (gate / (1 + np.exp(-gate)) * up) @ block["mlp"]["down_proj"]["kernel"]
        self.position += 1
        hidden = _rms(x, self.p["final_norm"]["scale"], c.rms_norm_eps)
        return (self.p["embedding"] if c.tie_word_embeddings else self.p["head"]) @ hidden

    def _project(self, dense, h):
        return (h @ dense["kernel"] + dense.get("bias", 0)).reshape(-1, self.c.head_dim)


def _to64(tree):
    if hasattr(tree, "items"):
        return {name: _to64(child) for name, child in tree.items()}
    return np.asarray(tree, np.float64)


def _rank(scores, pool, budget, lookahead):
    """Positions by pooled score, best first, ties to the earlier; and the least gap between neighbours in that order."""
    half = pool // 2
    pooled = [max(scores[max(0, at - half - lookahead) : at + half + 1]) for at in range(len(scores))]
    order = sorted(range(len(pooled)), key=lambda at: (-pooled[at], at))
    ranked = [pooled[at] for at in order[: budget + 1]]
    gaps = [a - b for a, b in itertools.pairwise(ranked) if a != b]
    return order[:budget], min(gaps, default=np.inf)


def recycled(params, config, prompt, *, budget, stride, pool, new_tokens, lookahead=0):
    """Greedy decoding under Recycled Attention with a fixed stride."""
    decoder = Decoder(params, config)
    layers, heads = range(config.num_hidden_layers), range(config.num_key_value_heads)
    for token in prompt:
        logits = decoder.feed(token, lambda layer, head: None)
    least = np.inf
    ranked, recent = {}, {}

    def refresh():
        nonlocal least
        for layer in layers:
            for head in heads:
                ranked[layer, head], gap = _rank(list(decoder.scores[layer][head]), pool, budget, lookahead)
                recent[layer, head] = []
                least = min(least, gap)

    def partial(layer, head):
        mine, new = ranked[layer, head], recent[layer, head]
        new.append(decoder.position)
        if len(mine) + len(new) > budget:
            if mine:
                mine.pop()  # the lowest-ranked
            else:
                new.pop(0)  # the oldest new one
        return list(mine + new)

    refresh()
    trace = Trace([], [], [], 0)
    for step in range(1, new_tokens + 1):
        best = np.sort(logits)[::-1]
        least = min(least, best[0] - best[1])
        trace.tokens.append(int(np.argmax(logits)))
        trace.logits.append(logits)
        trace.least_gap.append(least)
        if step == new_tokens:
            break
        if step % stride == 0:
            logits = decoder.feed(trace.tokens[-1], lambda layer, head: None)
            trace.full_steps += 1
            refresh()
        else:
            logits = decoder.feed(trace.tokens[-1], partial)
    return trace
