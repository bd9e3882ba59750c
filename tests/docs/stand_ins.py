"""What pages of the documentation call servers and places by, and what stands in for it here."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

_numbers = itertools.count(1)
FIXTURES = {"s3": "seaweed", "azure": "azure_server", "gcs": "gcs_server", "etcd": "etcd"}
"""Who provides the servers that pages ask for."""


@dataclass(frozen=True)
class StandIn:
    """What is put for texts of a page, and the environment of its blocks."""

    texts: dict[str, str]
    environment: dict[str, str] = field(default_factory=dict)


def stand_in(name: str, server: Any) -> StandIn:
    """Return what stands for the server of that name on a page; each page has a prefix or namespace of its own."""
    prefix = f"docs-{next(_numbers)}"
    match name:
        case "s3":
            keys = {"AWS_ACCESS_KEY_ID": server.key_id, "AWS_SECRET_ACCESS_KEY": server.secret, "AWS_REGION": server.region}
            return StandIn(
                {"https://s3.example.com": server.endpoint, "s3://kv-cache/": f"s3://{server.bucket}/{prefix}/"}, keys
            )
        case "azure":
            texts = {"https://azure.example.com": server.endpoint, "az://kv-cache/": f"az://bench/{prefix}/"}
            return StandIn(texts, {"AZURE_STORAGE_CONNECTION_STRING": server.connection_string})
        case "gcs":
            return StandIn({"https://gcs.example.com": server.endpoint, "gs://kv-cache/": f"gs://{server.bucket}/{prefix}/"})
        case _:
            address = server.url.removeprefix("http://")
            return StandIn({"etcd.example.com:2379/": f"{address}/{prefix}-", "etcd.example.com:2379": address})
