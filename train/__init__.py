"""Continued pretraining with recycled attention active: `python -m train.continued_pretrain`."""
