"""Deprecated: runs `python -m train.attention_speed`."""

import runpy
import sys

print("eval.training_attention is deprecated: it is train.attention_speed now", file=sys.stderr)
runpy.run_module("train.attention_speed", run_name="__main__", alter_sys=True)
