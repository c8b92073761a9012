"""Text from a model: `python -m recyc_jax "prompt"`, or a conversation: `python -m recyc_jax --chat`."""

import sys

from recyc_jax.commands.converse import main

if __name__ == "__main__":
    sys.exit(main())
