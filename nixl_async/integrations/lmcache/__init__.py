"""Plug-ins for LMCache: an L2 adapter for its server, and a storage plug-in for LMCache inside an engine.

    lmcache server ... --l2-adapter '{"type": "plugin", "module_path": "nixl_async.integrations.lmcache",
        "class_name": "NixlAsyncL2Adapter", "adapter_params": {"url": "s3://bucket/kv", "options": {"region": "eu-central-1"}}}'

Both keep chunks in a directory, in S3, Azure or Google storage (`url`), or in tiers of memory, files and objects (`tiers`); they
take the same parameters, which `NixlAsyncL2AdapterConfig.help()` lists. The classes say how they are switched on, and what they
promise.
"""

from nixl_async.integrations.lmcache.l2 import NixlAsyncL2Adapter, NixlAsyncL2AdapterConfig
from nixl_async.integrations.lmcache.storage import NixlAsyncStorageBackend

__all__ = ["NixlAsyncL2Adapter", "NixlAsyncL2AdapterConfig", "NixlAsyncStorageBackend"]
