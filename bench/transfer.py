"""`python -m bench.transfer` is `nixl-async bench transfer`."""

from nixl_async.benchmarks.cli import app

if __name__ == "__main__":
    import sys

    app(["transfer", *sys.argv[1:]], prog_name="python -m bench.transfer")
