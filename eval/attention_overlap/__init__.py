"""How much attention a kept set still covers, step by step: `python -m eval.attention_overlap`."""
