"""An OpenAI-compatible endpoint for one model on one machine: `python -m recyc_jax.serve` (extra `serve`)."""
