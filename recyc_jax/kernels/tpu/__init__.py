"""Pallas (Mosaic) kernels for TPUs."""
