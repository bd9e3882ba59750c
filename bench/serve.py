"""`python -m bench.serve` is `nixl-async bench serve`."""

from nixl_async.benchmarks.cli import app

if __name__ == "__main__":
    import sys

    app(["serve", *sys.argv[1:]], prog_name="python -m bench.serve")
