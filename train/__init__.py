"""Training with recycled attention active."""
