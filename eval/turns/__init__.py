"""Times of turns: what a second question about a document costs, and what streaming does."""
