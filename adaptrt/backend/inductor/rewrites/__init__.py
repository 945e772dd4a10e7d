"""Rewrites of graphs that only Inductor's programs go through, one a file."""
