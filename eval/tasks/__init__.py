"""RULER's 13 tasks (Hsieh et al., arXiv:2404.06654), written from a description of NVIDIA/RULER at c3f5e3b.

The wording of prompts is benchmark data and exact. Generators do no I/O: texts, word lists and a token counter are
passed in. A sample depends on (seed, task, length, index) alone.
"""
