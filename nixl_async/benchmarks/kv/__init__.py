"""KV caches of models as benchmarks: what they take, moved for real, and traffic between many ranks.

Rooms: `models` (what a model keeps for each token) · `layouts` (parallelism, requests and pages; KVBench's configuration files) ·
`planning` (what each rank moves) · `kvbench` (KVBench's own figures and the nixlbench command that it prints) · `reports` (tables,
CSV) · `matrices` (traffic patterns and their files) · `workloads` (patterns made up from a model and its requests) · `documents`
(YAML, JSON, TOML) · `processes` (ranks as processes) · `worker`, `profiling`, `traffic` (what ranks do) · `contents` (their memory,
and the bytes in it) · `running` (jobs and their results) · `options`, `cli`.

The file formats and figures are those of NIXL's KVBench (benchmark/kvbench of ai-dynamo/nixl).
"""
