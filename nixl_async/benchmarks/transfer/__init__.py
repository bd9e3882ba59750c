"""`nixl-async bench transfer`: blocks and batches between processes, machines, files and objects, beside other libraries."""
