"""Executable specifications: one module per op, in plain PyTorch, readable before it is fast."""
