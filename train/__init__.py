"""Continued pretraining with recycled attention active."""
