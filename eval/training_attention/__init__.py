"""Deprecated: this command is `python -m train.attention_speed` now."""
