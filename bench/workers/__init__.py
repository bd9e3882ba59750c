"""One module for each contender, run in that contender's interpreter: `python -m bench.workers.nixl FD`."""
