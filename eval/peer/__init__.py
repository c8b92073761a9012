"""Time of a decode step in Hugging Face transformers: `python -m eval.peer`."""
