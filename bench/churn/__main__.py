"""Run the drill."""

from bench.churn.cli import app

app(prog_name="python -m bench.churn")
