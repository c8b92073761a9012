"""Small checkpoints on disk, in the layouts that users have."""

import functools
import json

import jax
import numpy as np
from safetensors.numpy import save_file

import recyc_jax as rj
from recyc_jax.loading import tensor_names

TEXT = (
    "The grass is green. One of the special magic numbers for quiet-river is: 4217350. What is the special magic number? "
    "It was a truth universally acknowledged, that Emma Woodhouse, handsome, clever, and rich, had lived 21 years. "
)


@functools.cache  # training it breaks ties at random, so a session has one tokenizer
def tokenizer(vocab_size=400):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([TEXT], trainer)
    return made


def hf_tensors(params, config):
    tensors = {}
    for name, paths in tensor_names.parameters(config).items():
        parts = []
        for path in paths:
            leaf = params
            for key in path:
                leaf = leaf[key]
            parts.append(leaf.T if path[-1] == "kernel" else leaf)
        tensors[name] = np.ascontiguousarray(np.concatenate(parts))
    return tensors


FAMILY_FIELDS = {
    "qwen3": dict(head_dim=8),
    "gemma3_text": dict(head_dim=8, query_pre_attn_scalar=24, sliding_window=7, sliding_window_pattern=2),
    "smollm3": dict(no_rope_layer_interval=2),
    "olmo3": dict(layer_types=["sliding_attention", "full_attention"], sliding_window=7),
    "phi3": dict(sliding_window=None, partial_rotary_factor=0.75),
}
"""What `write_folder` puts into the config of a family beside Llama's fields."""


def write_folder(folder, *, shards=1, context=4096, family=None, **overrides):
    """Write a random tiny Llama (or model of another family) in Hugging Face layout, with a tokenizer; returns its
    params and config."""
    config = rj.LlamaConfig.tiny(vocab_size=400, max_position_embeddings=context, rms_norm_eps=1e-5, **overrides)
    folder.mkdir(parents=True, exist_ok=True)
    hf = dict(
        architectures=["LlamaForCausalLM"],
        model_type="qwen2" if config.qkv_bias else "llama",
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position_embeddings,
        rope_theta=config.rope_theta,
        rms_norm_eps=config.rms_norm_eps,
        tie_word_embeddings=config.tie_word_embeddings,
        eos_token_id=0,
    )
    if family is not None:
        act = "gelu_pytorch_tanh" if family == "gemma3_text" else "silu"
        hf |= dict(architectures=[], model_type=family, hidden_activation=act) | FAMILY_FIELDS[family]
        config = rj.LlamaConfig.from_hf(hf)
    params = rj.init_params(config, jax.random.key(3))
    (folder / "config.json").write_text(json.dumps(hf))
    tensors = hf_tensors(params, config)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
    else:
        names, places = list(tensors), {}
        for shard in range(shards):
            file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
            mine = names[shard::shards]
            save_file({name: tensors[name] for name in mine}, folder / file)
            places |= dict.fromkeys(mine, file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            dict(
                tokenizer_class="PreTrainedTokenizerFast",
                eos_token="<eos>",
                clean_up_tokenization_spaces=False,
                chat_template="{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<answer>",
            )
        )
    )
    return params, config
