"""How agents find each other by name: a store that all of them reach, chosen by URL.

`Agent("decode-3", discovery=url)` watches the store from its opening on. An agent that is served publishes its name, the id of its
life and its address; one that never calls `serve` publishes nothing, and finds others all the same. `await agent.peer("prefill-0")`
connects by name.

| URL | what it is | an entry vanishes | a change is seen |
|---|---|---|---|
| `etcd://[user:password@]host:2379[,host:port]/namespace` | etcd 3 | `?ttl=10` s after its owner's death | at once |
| `etcds://…?ca=…&cert=…&key=…`, paths of PEM files | the same over TLS | | |
| `file:///directory` | a file system that all see | `?ttl=10` s after its owner's death | within 50 ms to 1 s |
| `tcpstore://host:port/prefix` | torch's c10d TCPStore that runs already | when it is withdrawn or replaced | at once |
| `memory://name` | one process | when it is withdrawn | at once |

The agents of one process that have the same URL share one watch of the store, on each loop; each has a lease of its own.

**Outages.** The store is needed to find each other and for nothing else: connected peers stay connected, and what it said last
goes on to hold, until it answers again. Agents open while it is away, and publish themselves when it is there. What it has
forgotten is put again; what is still missing a lease and five seconds after it came back is withdrawn.

**Stock NIXL agents** find agents with the ucx backend in etcd as they find each other, by `NIXL_ETCD_ENDPOINTS` (and
`NIXL_ETCD_NAMESPACE`, which is the URL's path; neither given, both use `/nixl/agents/`): whole metadata is kept up to date
under `<namespace>/<agent>/metadata`. In the other direction `agent.peer(name)` loads what a stock agent has sent; it proves
nothing, so an agent with a token takes it only with `?stock=allow`. When its key is deleted, it has left.

**Trust.** Entries are hints: whoever is dialled must prove that it knows the token and has the name. Who can write to the store can
hide agents, and delay connections; with `stock=allow` also pose as a stock agent. Who can read etcd sees addresses and UCX keys.

**Kubernetes.** Run etcd as a service of its own (the cluster's own etcd is not for this), give every pod
`discovery="etcd://etcd.kv.svc:2379/my-model"`, and serve with `await agent.serve("0.0.0.0", 7000)`: what is published then is
the address that leads to the store, in a pod the pod's. With several networks pass `advertise=os.environ["POD_IP"]`, from the
downward API.
Name agents after the pod (`metadata.name`): a restarted container then replaces its entry, and a rescheduled pod of a StatefulSet
comes back under its name. Without etcd, a headless service over a StatefulSet gives each pod a stable name, and no store is
needed: `await agent.connect("decode-3.decode.kv.svc.cluster.local:7000")`. A `ReadWriteMany` volume serves as `file:///shared/agents`.
"""

from __future__ import annotations

from functools import partial
from importlib import import_module

from nixl_async.discovery.finder import Finder
from nixl_async.discovery.roster import Discovered, Roster
from nixl_async.discovery.shared import SharedStore
from nixl_async.discovery.store import DiscoveryStore, Seen, StoreURL
from nixl_async.errors import ConfigurationError
from nixl_async.membership import Membership

# Loaded when they are asked for.
_STORES = {
    "etcd": ("etcd_store", "EtcdStore"),
    "etcds": ("etcd_store", "EtcdStore"),
    "file": ("file_store", "FileStore"),
    "memory": ("memory_store", "MemoryStore"),
    "tcpstore": ("tcp_store", "TCPStoreStore"),
}

__all__ = ["Discovered", "DiscoveryStore", "Finder", "Roster", "Seen", "SharedStore", "StoreURL", "open_finder", "open_store"]


def open_store(url: str | StoreURL) -> DiscoveryStore:
    """Return the store that a URL names; nothing is connected yet.

    Raises:
        ConfigurationError: the URL is none of those that the package's documentation lists.
    """
    parsed = StoreURL.parse(url) if isinstance(url, str) else url
    try:
        module, kind = _STORES[parsed.scheme]
    except KeyError:
        raise ConfigurationError(f"discovery {parsed} has an unknown scheme; there are {', '.join(_STORES)}") from None
    store: DiscoveryStore = getattr(import_module(f"nixl_async.discovery.{module}"), kind)(parsed)
    return store


def open_finder(url: str, membership: Membership, name: str, incarnation: str, *, authenticated: bool) -> Finder:
    """Return what finds an agent's peers through the store that a URL names; nothing is connected yet.

    Raises:
        ConfigurationError: the URL is wrong.
    """
    parsed = StoreURL.parse(url)
    stock = parsed.options.get("stock", "refuse" if authenticated else "allow")
    if stock not in ("allow", "refuse"):
        raise ConfigurationError(f"stock={stock!r} of {parsed} must be allow or refuse")
    store = SharedStore(partial(open_store, parsed), parsed)
    return Finder(store, str(parsed), membership, name, incarnation, stock=stock == "allow")
