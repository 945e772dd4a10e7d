"""Graphs: pure functions of tensors as functional ATen operations, captured from Python and rewritten by passes."""
