"""What a GPU takes part in, measured: `bench/gpu/run.sh` on a machine with one, or `python -m bench.gpu COMMAND`."""
