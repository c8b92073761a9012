"""What all Triton kernels share."""

INTERPRET: bool = False
"""Run the kernels in Pallas' interpreter, for tests without a GPU."""
