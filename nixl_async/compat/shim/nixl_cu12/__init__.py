"""NIXL's Python API on nixl_async, under the name `nixl_cu12`."""

from nixl_async.compat.naming import install

install(__name__, globals())
