"""NIXL's Python API on nixl_async, under the name `nixl`."""

from nixl_async.compat.naming import install

install(__name__, globals())
