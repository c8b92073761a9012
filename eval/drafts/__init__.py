"""Lossless decoding: what a round of drafts costs at a model's shape, and how many tokens real text gets from one."""
