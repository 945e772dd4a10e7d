"""`python -m adaptrt` is the `adaptrt` command."""

from adaptrt.cli import app

app()
