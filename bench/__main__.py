"""Run the command line."""

from bench.cli import app

app(prog_name="python -m bench")
