"""HTTP/1.1 for object stores: bodies are received into registered memory and sent from it, without a copy in between.

`messages` (what is asked and answered, parsing) · `connection` (one socket) · `pool` (many of them to one server).
"""

from nixl_async.http.messages import DamagedError, HTTPError, Request, Response, view
from nixl_async.http.pool import Pool, PoolOptions

__all__ = ["DamagedError", "HTTPError", "Pool", "PoolOptions", "Request", "Response", "view"]
