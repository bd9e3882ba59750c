"""Measure nixl_async against NIXL, Mooncake and the machine's own limits: `python -m bench --help`."""
