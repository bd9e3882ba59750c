"""Through which store an agent's metadata goes: what NIXL's settings say."""

from __future__ import annotations

from nixl_async.compat import central_etcd, central_tcpstore
from nixl_async.compat.central import Central
from nixl_async.compat.core import Core
from nixl_async.compat.settings import setting
from nixl_async.errors import ConfigurationError

CHOICE = f"{central_etcd.ENDPOINTS_VARIABLE} or {central_tcpstore.ENDPOINT_VARIABLE}"
"""The settings that name one."""


def central_of(core: Core, etcd_seconds: float) -> Central | None:
    """Return an agent's end of the store that the settings name, or `None` if they name none.

    Raises:
        ConfigurationError: they name two, or one that cannot be.
    """
    endpoints, endpoint = setting(central_etcd.ENDPOINTS_VARIABLE), setting(central_tcpstore.ENDPOINT_VARIABLE)
    if endpoints and endpoint:
        raise ConfigurationError(f"metadata goes through one store: set {CHOICE}, not both")
    if endpoints:
        namespace = setting(central_etcd.NAMESPACE_VARIABLE) or central_etcd.NAMESPACE
        return central_etcd.EtcdCentral(core, endpoints, namespace, etcd_seconds)
    return central_tcpstore.TCPStoreCentral(core, endpoint) if endpoint else None
