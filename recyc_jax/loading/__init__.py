"""Loading and saving of models and tokenizers: the hub, safetensors, GGUF."""
