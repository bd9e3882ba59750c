"""How processes of one run on several machines find rank 0: by the variables of torchrun, SLURM and OpenMPI, or by etcd.

Rank 0 listens; the others connect to it, and prove that they know the run's secret: NIXL_ASYNC_TOKEN, or one that rank 0 leaves in
the store where it is met.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import zlib
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from nixl_async.benchmarks.transfer.control import Channel, ControlServer, connect
from nixl_async.benchmarks.transfer.options import Options, Runtime
from nixl_async.discovery import StoreURL, open_store
from nixl_async.discovery.etcd_client import Etcd
from nixl_async.errors import AuthenticationError, BackendError, ConfigurationError

TOKEN_VARIABLE = "NIXL_ASYNC_TOKEN"
MEET_SECONDS = 120.0
LEASE_SECONDS = 10
RETRY_SECONDS = 0.1
LOWEST_PORT, PORTS = 20_000, 10_000
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Ranks:
    """Which process of how many this is, and where rank 0 is met; `source` is who says so."""

    rank: int
    world: int
    place: str
    source: str


@dataclass
class Meeting:
    """A run's processes have found each other: rank 0 has the server, the others know its address."""

    rank: int
    world: int
    address: tuple[str, int]
    secret: str
    server: ControlServer | None = None

    @staticmethod
    def name(rank: int) -> str:
        """Return what a rank calls itself."""
        return f"rank {rank}"

    async def connect(self) -> Channel:
        """Connect to rank 0, waiting until it is there.

        Raises:
            ConfigurationError: nobody answers there.
        """
        deadline = asyncio.get_running_loop().time() + MEET_SECONDS
        while True:
            try:
                return await connect(*self.address, self.secret, self.name(self.rank))
            except OSError as error:
                if asyncio.get_running_loop().time() > deadline:
                    host, port = self.address
                    raise ConfigurationError(f"rank 0 does not answer at {host}:{port}: {error.strerror or error}") from None
                await asyncio.sleep(RETRY_SECONDS)


def ranks_here(options: Options, environment: Mapping[str, str] = os.environ) -> Ranks | None:
    """Return what the options or the launcher's variables say of this process; `None` if they say nothing.

    Raises:
        ConfigurationError: they say no number, or do not say where rank 0 is.
    """
    given = options.rendezvous
    if options.rank >= 0:
        _check_rank("--rank", options.rank, options.world_size)
        if not given:
            raise ConfigurationError(f"--rank is {options.rank}; --rendezvous host:port must say where rank 0 is met")
        return Ranks(options.rank, options.world_size, given, "--rank")
    for source, rank_name, world_name, place in _SOURCES:
        if rank_name in environment and world_name in environment:
            rank, world = _number(environment, rank_name), _number(environment, world_name)
            _check_rank(rank_name, rank, world)
            where = given or _master(environment) or place(environment, world)
            if not where:
                raise ConfigurationError(
                    f"{source} has started this process as rank {rank} of {world}, and nothing says where rank 0 is: pass"
                    " --rendezvous host:port, or set MASTER_ADDR and MASTER_PORT"
                )
            return Ranks(rank, world, where, source)
    return None


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment[name]
    if not text.isdecimal():
        raise ConfigurationError(f"{name} is {text!r}; it must be a number")
    return int(text)


def _check_rank(name: str, rank: int, world: int) -> None:
    if not 0 <= rank < world:
        raise ConfigurationError(f"{name} is {rank}; it must be 0 to {world - 1}, as there are {world} ranks")


def _master(environment: Mapping[str, str]) -> str:
    host, port = environment.get("MASTER_ADDR"), environment.get("MASTER_PORT")
    if not host or not port:
        return ""
    # torchrun itself listens at that port, with a store that its processes share.
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        run = environment.get("TORCHELASTIC_RUN_ID", "run")
        attempt = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
        return f"tcpstore://{host}:{port}/nixl_async/benchmark/{run}/{attempt}"
    return f"{host}:{port}"


def _port_of(job: str) -> int:
    return LOWEST_PORT + zlib.crc32(job.encode()) % PORTS


def _slurm(environment: Mapping[str, str], world: int) -> str:
    job = f"{environment.get('SLURM_JOB_ID', '')}.{environment.get('SLURM_STEP_ID', '')}"
    if environment.get("SLURM_STEP_NUM_NODES", environment.get("SLURM_NNODES", "")) == "1":
        return f"{LOOPBACK}:{_port_of(job)}"
    host = _first_host(environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_NODELIST", "")))
    return f"{host}:{_port_of(job)}" if host else ""


def _first_host(listed: str) -> str:
    """Return the first of a SLURM list such as `node[003-008,12],gpu1`."""
    if "[" not in listed.partition(",")[0]:
        return listed.partition(",")[0]
    prefix, _, rest = listed.partition("[")
    inside, _, after = rest.partition("]")
    return prefix + inside.partition(",")[0].partition("-")[0] + after.partition(",")[0]


def _open_mpi(environment: Mapping[str, str], world: int) -> str:
    if environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") != str(world):
        return ""
    job = environment.get("PMIX_NAMESPACE") or environment.get("OMPI_MCA_ess_base_jobid", "")
    return f"{LOOPBACK}:{_port_of(job)}"


_SOURCES = (
    ("OpenMPI", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", _open_mpi),
    ("torchrun", "RANK", "WORLD_SIZE", lambda environment, world: ""),
    ("SLURM", "SLURM_PROCID", "SLURM_NTASKS", _slurm),
)


@asynccontextmanager
async def meet(options: Options, runtime: Runtime) -> AsyncIterator[Meeting]:
    """Have this process meet the others; leaving ends the server and takes back what was published.

    Raises:
        ConfigurationError: nothing says who this is, or nobody is met.
    """
    async with contextlib.AsyncExitStack() as stack:
        if runtime is Runtime.ETCD:
            yield await _meet_in_etcd(options, stack)
            return
        ranks = ranks_here(options)
        if ranks is None:
            raise ConfigurationError(
                "--runtime ranks needs the variables of torchrun, SLURM or OpenMPI, or --rank, --world-size and --rendezvous"
            )
        if "://" in ranks.place:
            yield await _meet_in_store(options, ranks, stack)
        else:
            yield await _meet_at(options, ranks, stack)


async def _meet_at(options: Options, ranks: Ranks, stack: contextlib.AsyncExitStack) -> Meeting:
    host, colon, port = ranks.place.rpartition(":")
    host = host.strip("[]")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigurationError(f"--rendezvous is {ranks.place!r}; it must be host:port of rank 0, or a discovery URL")
    secret = os.environ.get(TOKEN_VARIABLE, "")
    if not secret and host not in (LOOPBACK, "localhost", "::1"):
        raise ConfigurationError(
            f"ranks meet at {ranks.place}, which others can reach: set {TOKEN_VARIABLE} to one secret in all of them"
        )
    meeting = Meeting(ranks.rank, ranks.world, (host, int(port)), secret or "loopback")
    if ranks.rank == 0:
        meeting.server = ControlServer(meeting.secret)
        try:
            await meeting.server.open(host, int(port))
        except OSError as error:
            raise ConfigurationError(f"rank 0 cannot listen at {ranks.place}: {error.strerror}") from None
        stack.push_async_callback(meeting.server.aclose)
    return meeting


async def _meet_in_store(options: Options, ranks: Ranks, stack: contextlib.AsyncExitStack) -> Meeting:
    """Rank 0 publishes where it listens, and a secret, in a discovery store."""
    url = StoreURL.parse(ranks.place)
    store = open_store(ranks.place)
    stack.push_async_callback(store.aclose)
    name = f"benchmark-{options.benchmark_group}"
    if ranks.rank == 0:
        server, published = await _listen(options, store.server, ranks.world, stack)
        await store.put(name, published)
        keeping = asyncio.ensure_future(store.keep())
        stack.callback(keeping.cancel)
        return Meeting(0, ranks.world, server.address, server.secret, server)
    try:
        async with asyncio.timeout(MEET_SECONDS), contextlib.aclosing(store.watch()) as seen:
            async for one in seen:
                if found := one.values.get(name):
                    return _read(found, ranks.rank)
    except TimeoutError:
        pass
    raise ConfigurationError(f"rank 0 has not appeared at {url} within {MEET_SECONDS:g} s")


async def _meet_in_etcd(options: Options, stack: contextlib.AsyncExitStack) -> Meeting:
    """Ranks are taken in the order of arrival, under a lease; the first publishes where it listens, and a secret."""
    etcd = Etcd(options.etcd_endpoints)
    prefix = f"/nixl_async/benchmark/{options.benchmark_group}/".encode()
    try:
        lease = await etcd.grant(LEASE_SECONDS)
        stack.push_async_callback(_revoke, etcd, lease)
        renewing = asyncio.ensure_future(_renew(etcd, lease))
        stack.callback(renewing.cancel)
        rank = await _take_rank(etcd, prefix, options.world, lease)
        if rank == 0:
            server, published = await _listen(options, etcd.first, options.world, stack)
            await etcd.put(prefix + b"meeting", published, lease=lease)
            return Meeting(0, options.world, server.address, server.secret, server)
        async with asyncio.timeout(MEET_SECONDS):
            found, revision = await etcd.get(prefix + b"meeting")
            while found is None:
                async with contextlib.aclosing(etcd.watch(prefix + b"meeting", revision + 1)) as events:
                    async for event in events:
                        if event.value is not None:
                            found = event.value
                            break
        return _read(found, rank)
    except TimeoutError:
        raise ConfigurationError(f"rank 0 has not appeared in etcd within {MEET_SECONDS:g} s") from None
    except (BackendError, OSError) as error:
        raise ConfigurationError(f"--etcd-endpoints {options.etcd_endpoints}: {error}") from None


async def _take_rank(etcd: Etcd, prefix: bytes, world: int, lease: int) -> int:
    for rank in range(world):
        if await etcd.create(prefix + f"rank/{rank}".encode(), b"taken", lease=lease):
            return rank
    raise ConfigurationError(
        f"all {world} ranks of --benchmark-group {prefix.decode().split('/')[-2]} are taken: another run uses the group, or one"
        f" that was killed has left its ranks there for {LEASE_SECONDS} s; name another group or wait"
    )


async def _renew(etcd: Etcd, lease: int) -> None:
    while True:
        await asyncio.sleep(LEASE_SECONDS / 3)
        with contextlib.suppress(BackendError, OSError):
            await etcd.renew(lease)


async def _revoke(etcd: Etcd, lease: int) -> None:
    with contextlib.suppress(BackendError, OSError):
        await etcd.revoke(lease)


async def _listen(
    options: Options, towards: tuple[str, int] | None, world: int, stack: contextlib.AsyncExitStack
) -> tuple[ControlServer, bytes]:
    """Listen where the store is reached from; return the server, and what is published of it."""
    server = ControlServer(os.environ.get(TOKEN_VARIABLE, ""))
    host = options.address or await _own_address(towards)
    await server.open(host)
    stack.push_async_callback(server.aclose)
    published: dict[str, Any] = {"host": host, "port": server.address[1], "world": world}
    if TOKEN_VARIABLE not in os.environ:
        published["secret"] = server.secret
    return server, json.dumps(published).encode()


def _read(published: bytes, rank: int) -> Meeting:
    found = json.loads(published)
    secret = os.environ.get(TOKEN_VARIABLE) or found.get("secret", "")
    if not secret:
        raise AuthenticationError(f"rank 0 has a {TOKEN_VARIABLE} and this rank has none; set the same")
    return Meeting(rank, found["world"], (found["host"], found["port"]), secret)


async def _own_address(towards: tuple[str, int] | None) -> str:
    """Return the address of this machine by which the store is reached."""
    if towards is None:
        return LOOPBACK
    try:
        _, writer = await asyncio.open_connection(*towards)
    except OSError:
        return LOOPBACK
    host = str(writer.get_extra_info("sockname")[0])
    writer.close()
    return host
