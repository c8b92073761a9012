"""A decoder in plain numpy for one row, one token and one head at a time: slow and obvious."""

import numpy as np


def _rms(x, scale, eps):
    return x / np.sqrt(np.mean(x**2) + eps) * scale


def _rotate(x, position, inverse_frequencies):
    angle = position * inverse_frequencies
    first, second = np.split(x, 2)
    return np.concatenate(
        [first * np.cos(angle) - second * np.sin(angle), second * np.cos(angle) + first * np.sin(angle)]
    )


def log_softmax(x):
    return x - x.max() - np.log(np.exp(x - x.max()).sum())


class Decoder:
    """A decoder that takes one token at a time and calls `read(layer, kv_head)` for the positions to attend to (None:
    all), in layers with full attention. Llama's, with norms of q and k, layers without RoPE and sliding windows.

    `rest[layer, kv_head]`, where it is set, lists for each query head of the group a key, a value and a bias: one more
    token that the query attends to.

    It keeps values of the last token: `query[layer]` and `rotated_query[layer]`, the mean query over heads before
    and after RoPE, and `queries[layer]`, each head's query after RoPE; `read_chances[layer][kv_head]`, log-
    probabilities [G, positions read]; and `all_chances`, those of the same queries over all positions, whichever
    were read. `query` and `rotated_query` are set before `read` is called.
    """

    def __init__(self, params, config):
        from recyc_jax import rope

        self.p = _to64(params)
        self.c = config
        self.inverse_frequencies = rope.inverse_frequencies(config).astype(np.float64)
        self.keys = [[[] for _ in range(config.num_key_value_heads)] for _ in range(config.num_hidden_layers)]
        self.values = [[[] for _ in range(config.num_key_value_heads)] for _ in range(config.num_hidden_layers)]
        self.position = 0
        self.rest = {}
        self.queries = {}

    def feed(self, token, read):
        """The logits [V] after `token`."""
        c = self.c
        groups = c.num_attention_heads // c.num_key_value_heads
        x = self.p["embedding"][token]
        layers, kv_heads = range(c.num_hidden_layers), range(c.num_key_value_heads)
        self.query, self.rotated_query = ([None for _ in layers] for _ in range(2))
        self.read_chances, self.all_chances = ([[None for _ in kv_heads] for _ in layers] for _ in range(2))
        for layer in layers:
            block = self.p[f"layers_{layer}"]
            h = _rms(x, block["attention_norm"]["scale"], c.rms_norm_eps)
            q, k, v = (self._project(block["attention"], name, h) for name in "qkv")
            turns = 0 if layer in c.layers_without_rope else self.inverse_frequencies
            rotated = [_rotate(one, self.position, turns) for one in q]
            self.queries[layer] = rotated
            self.query[layer], self.rotated_query[layer] = np.mean(q, axis=0), np.mean(rotated, axis=0)
            out = np.zeros((c.num_attention_heads, c.head_dim))
            for kv_head in kv_heads:
                self.keys[layer][kv_head].append(_rotate(k[kv_head], self.position, turns))
                self.values[layer][kv_head].append(v[kv_head])
                everything = list(range(self.position + 1))
                window = c.window(layer)
                positions = read(layer, kv_head) if window is None else everything[-window:]
                positions = everything if positions is None else positions
                keys, values = (np.array(of[layer][kv_head]) for of in (self.keys, self.values))
                heads = range(kv_head * groups, (kv_head + 1) * groups)
                logits = np.array([keys @ rotated[head] / np.sqrt(c.head_dim) for head in heads])
                self.all_chances[layer][kv_head] = np.array([log_softmax(row) for row in logits])
                self.read_chances[layer][kv_head] = np.array([log_softmax(row[positions]) for row in logits])
                out[list(heads)] = np.exp(self.read_chances[layer][kv_head]) @ values[positions]
                if (layer, kv_head) in self.rest and positions is not everything:
                    for head, row, (key, value, bias) in zip(heads, logits, self.rest[layer, kv_head], strict=True):
                        one_more = key @ rotated[head] / np.sqrt(c.head_dim) + bias
                        chances = np.exp(log_softmax(np.append(row[positions], one_more)))
                        out[head] = chances[:-1] @ values[positions] + chances[-1] * value
            x = x + out.reshape(-1) @ block["attention"]["o_proj"]["kernel"]
            h = _rms(x, block["mlp_norm"]["scale"], c.rms_norm_eps)
            gate, up = h @ block["mlp"]["gate_proj"]["kernel"], h @ block["mlp"]["up_proj"]["kernel"]
            x = x + (gate / (1 + np.exp(-gate)) * up) @ block["mlp"]["down_proj"]["kernel"]
        self.position += 1
        hidden = _rms(x, self.p["final_norm"]["scale"], c.rms_norm_eps)
        return (self.p["embedding"] if c.tie_word_embeddings else self.p["head"]) @ hidden

    def _project(self, attention, name, h):
        """The heads [heads, H] of q, k or v, before RoPE."""
        dense, norm = attention[f"{name}_proj"], attention.get(f"{name}_norm")
        flat = h @ dense["kernel"] + dense.get("bias", 0)
        if norm is not None and self.c.qk_norm == "projection":
            flat = _rms(flat, norm["scale"], self.c.rms_norm_eps)
        heads = flat.reshape(-1, self.c.head_dim)
        if norm is not None and self.c.qk_norm == "head":
            heads = np.array([_rms(head, norm["scale"], self.c.rms_norm_eps) for head in heads])
        return heads


def _to64(tree):
    if hasattr(tree, "items"):
        return {name: _to64(child) for name, child in tree.items()}
    return np.asarray(tree, np.float64)
