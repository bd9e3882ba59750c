"""The main job as a program: a prefill process pushes a paged KV cache, layer by layer, into a decode process that checks it.

`python -m nixl_async.demo ROLE` is one of the two processes; `run.run_job` starts both, and `nixl-async demo` calls that.
"""
