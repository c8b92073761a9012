"""Deprecated: this command is `python -m train.step_speed` now."""
