"""Which cached tokens a decode step reads: one method a file, all behind the contract in `base.py`."""
