"""Small checkpoints on disk, in the layouts that users have."""

import functools
import json

import jax
import numpy as np
from safetensors.numpy import save_file

import recyc_jax as rj
from recyc_jax.loading import weights

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
    for name, path in weights.hf_names(config).items():
        leaf = params
        for key in path:
            leaf = leaf[key]
        tensors[name] = np.ascontiguousarray(leaf.T if path[-1] == "kernel" else leaf)
    return tensors


def write_folder(folder, *, shards=1, context=4096, **overrides):
    """Write a random tiny Llama in Hugging Face layout, with a tokenizer; returns its params and config."""
    config = rj.LlamaConfig.tiny(vocab_size=400, max_position_embeddings=context, rms_norm_eps=1e-5, **overrides)
    params = rj.init_params(config, jax.random.key(3))
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
