"""What a model reads while it answers: `python -m recyc_jax.inspect` writes a page that shows it."""
