"""Deprecated: runs `python -m train.step_speed`."""

import runpy
import sys

print("eval.training_step is deprecated: it is train.step_speed now", file=sys.stderr)
runpy.run_module("train.step_speed", run_name="__main__", alter_sys=True)
