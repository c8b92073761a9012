"""RULER's 13 tasks (Hsieh et al., arXiv:2404.06654), written from a description of NVIDIA/RULER at c3f5e3b.

The wording of prompts is exactly that of the benchmark. Generators do no I/O: texts, word lists and a token counter
are passed in. A sample depends only on (seed, task, length, index).
"""
