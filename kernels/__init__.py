"""Triton kernels, one module per op; `config` holds launch shapes, `aot` compiles them ahead of time."""
