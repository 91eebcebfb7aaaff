"""The operations that are worth writing by hand, one folder each; import them from their folder.

Every folder holds `reference.py`, the mathematics step by step in any dtype, and a fast
differentiable path in pure PyTorch that is tested against it. Nothing here knows about models.
"""
