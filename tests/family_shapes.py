"""Fields of `LlamaConfig` by which families differ from Llama, for shapes of any size."""

GEMMA_3 = dict(
    norms="both",
    norm_scale="one_plus",
    qk_norm="head",
    activation="gelu_tanh",
    query_pre_attn_scalar=24.0,
    sliding_rope_theta=500.0,
)
OLMO = dict(norms="after", norm_scale="float32", qk_norm="projection")


def windows(size, kinds):
    """A sliding window of that size in the layers marked `s` of `kinds`, such as "ssf"."""
    names = {"s": "sliding_attention", "f": "full_attention"}
    return dict(sliding_window=size, layer_types=tuple(names[kind] for kind in kinds))
