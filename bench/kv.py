"""`python -m bench.kv`: the commands of `nixl-async bench kv`, out of this checkout."""

from nixl_async.benchmarks.kv.cli import app

if __name__ == "__main__":
    app(prog_name="python -m bench.kv")
