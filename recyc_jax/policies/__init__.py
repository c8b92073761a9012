"""Policies choose which cached tokens a decode step reads: one method per file, behind the contract in `base.py`."""
