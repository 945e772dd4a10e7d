"""Writes an unroll as files: the whole adaptation, and not only the adapted model."""
