"""The tasks of EleutherAI's lm-evaluation-harness under any policy: `python -m eval.harness` (extra `lm-eval`)."""
