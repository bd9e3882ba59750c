"""A prefill process pushes a Llama-3.1-8B KV cache into a decode process, layer by layer; every byte is checked.

    python examples/prefill_decode.py

The two sides are in nixl_async/demo/side.py; this is how a program runs the job. `nixl-async demo --help` has the options.
"""

import asyncio
import sys

from nixl_async.demo.job import Job
from nixl_async.demo.report import Progress, print_result
from nixl_async.demo.run import run_job


async def main() -> None:
    job = Job(model="llama-3.1-8b", tokens=512, page_size=16, layers_per_push=1, compute_seconds=0.005)
    with Progress(job, "nixl_async") as progress:
        result = await run_job(job, on_event=progress.take)
    print_result(result)


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except KeyboardInterrupt:
        sys.exit(130)
