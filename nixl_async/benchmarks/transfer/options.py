"""What `nixl-async bench transfer` may be told, what fits together, and the TOML file that says the same.

Names and meanings are NIXLBench's wherever it has the option; underscores and dashes are the same.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from nixl_async.benchmarks.options import Format, Word, flag, plain, read_file, refusal
from nixl_async.benchmarks.tables import check_format
from nixl_async.benchmarks.transfer.peers.plain import Flow, Point
from nixl_async.errors import ConfigurationError

LARGE_BLOCK = 1 << 20
"""Blocks of more bytes than this run `num_iter / large_blk_iter_ftr` iterations."""
AUTOMATIC = 0


class Scheme(Word):
    """Who talks to whom."""

    PAIRWISE = "pairwise"
    MANY_TO_ONE = "manytoone"
    ONE_TO_MANY = "onetomany"
    TP = "tp"


class Mode(Word):
    """How devices are shared out among processes."""

    SG = "SG"
    MG = "MG"


class Op(Word):
    """The direction, as the initiator sees it."""

    WRITE = "WRITE"
    READ = "READ"


class Segment(Word):
    """The kind of one side's memory."""

    DRAM = "DRAM"
    VRAM = "VRAM"
    FILE = "FILE"
    OBJ = "OBJ"


class Location(Word):
    """Where in the far side's memory or file the blocks of a request are."""

    NONE = "none"
    BLOCK = "blockaligned"
    BYTE = "bytealigned"


class Runtime(Word):
    """How the processes come to be and find each other."""

    AUTO = "auto"
    LOCAL = "local"
    RANKS = "ranks"
    ETCD = "etcd"
    RAY = "ray"


class Versus(Word):
    """Who can run beside this library."""

    NIXL = "nixl"
    MOONCAKE = "mooncake"
    OBSTORE = "obstore"
    AWSCRT = "awscrt"
    FIO = "fio"


STORAGE = frozenset({Segment.FILE, Segment.OBJ})
NIXL_BACKENDS = {
    "ucx": ("ucx", None),
    "posix": ("", Segment.FILE),
    "gds": ("gds", Segment.FILE),
    "gds_mt": ("gds", Segment.FILE),
    "obj": ("", Segment.OBJ),
    "azure_blob": ("", Segment.OBJ),
}
"""NIXLBench's names of backends: the backend here ("": whichever there is), and what the far side then is."""


@dataclass(frozen=True)
class Options:
    """A run. Sizes are bytes; what is 0 or empty is chosen by the run."""

    scheme: Scheme = Scheme.PAIRWISE
    mode: Mode = Mode.SG
    op_type: Op = Op.WRITE
    initiator_seg_type: Segment = Segment.DRAM
    target_seg_type: Segment = Segment.DRAM
    num_initiator_dev: int = 1
    num_target_dev: int = 1
    backend: str = ""
    device_list: str = "all"
    total_buffer_size: int = AUTOMATIC
    start_block_size: int = 4096
    max_block_size: int = 64 << 20
    start_batch_size: int = 1
    max_batch_size: int = 1
    size_factor: int = 2
    max_request_size: int = AUTOMATIC
    num_iter: int = 1000
    warmup_iter: int = 100
    large_blk_iter_ftr: int = 16
    rounds: int = 5
    num_threads: int = 1
    pipeline_depth: int = 1
    recreate_xfer: bool = False
    reregister_mem: bool = False
    prepared_xfer: bool = False
    notify: bool = False
    use_hugepages: bool = False
    check_consistency: bool = True
    randomize_location_mode: Location = Location.NONE
    randomize_location_mode_seed: int = 0
    raw: bool = True
    filepath: str = ""
    filenames: str = ""
    num_files: int = 1
    storage_enable_direct: bool = False
    obj_url: str = ""
    obj_access_key: str = ""
    obj_secret_key: str = ""
    obj_session_token: str = ""
    obj_bucket_name: str = ""
    obj_scheme: str = "http"
    obj_region: str = "eu-central-1"
    obj_use_virtual_addressing: bool = False
    obj_endpoint_override: str = ""
    obj_req_checksum: str = "supported"
    obj_ca_bundle: str = ""
    azure_blob_account_url: str = ""
    azure_blob_container_name: str = ""
    azure_blob_connection_string: str = ""
    runtime: Runtime = Runtime.AUTO
    benchmark_group: str = "default"
    etcd_endpoints: str = ""
    rendezvous: str = ""
    rank: int = -1
    world_size: int = 0
    address: str = ""
    ray_address: str = ""
    versus: tuple[Versus, ...] = field(default=(), metadata={"of": Versus})
    nixl_python: str = ""
    mooncake_python: str = ""
    format: Format = Format.TEXT
    output: str = ""

    @property
    def storage(self) -> bool:
        """Whether the far side is a file or a store, which needs no process."""
        return self.target_seg_type in STORAGE

    @property
    def n_initiators(self) -> int:
        """How many processes are initiators."""
        return 1 if self.mode is Mode.MG else self.num_initiator_dev

    @property
    def n_targets(self) -> int:
        """How many processes are targets."""
        return 0 if self.storage else 1 if self.mode is Mode.MG else self.num_target_dev

    @property
    def world(self) -> int:
        """How many processes move bytes; initiators come first."""
        return self.n_initiators + self.n_targets

    @property
    def slots(self) -> int:
        """How many requests of one initiator are in flight at once."""
        return self.num_threads * self.pipeline_depth

    def role(self, rank: int) -> tuple[str, int]:
        """Return what a rank is, and its number among those."""
        if rank < self.n_initiators:
            return "initiator", rank
        return "target", rank - self.n_initiators

    def points(self) -> Iterator[Point]:
        """Yield the steps of the sweep: blocks grow by `size_factor`, and for each of them batches do, up to `max_request_size`."""
        salt = 1
        for block in self._rising(self.start_block_size, self.max_block_size):
            for batch in self._rising(self.start_batch_size, self.max_batch_size):
                if self.max_request_size and block * batch > self.max_request_size:
                    break
                location, seed = self.randomize_location_mode.value, self.randomize_location_mode_seed
                yield Point(block, batch, self.slots, self.op_type.value, salt, location, seed)
                salt += 1

    def _rising(self, start: int, most: int) -> Iterator[int]:
        while start <= most:
            yield start
            start *= self.size_factor

    def iterations(self, block: int) -> tuple[int, int]:
        """Return how many requests each initiator makes in a round, and how many to warm up; multiples of the slots."""
        factor = self.large_blk_iter_ftr if block > LARGE_BLOCK else 1
        return _up(-(-self.num_iter // (factor * self.rounds)), self.slots), _up(-(-self.warmup_iter // factor), self.slots)

    def changed(self) -> dict[str, Any]:
        """Return what differs from the defaults, as text, numbers and booleans."""
        found = {}
        for one in dataclasses.fields(self):
            value = getattr(self, one.name)
            if value != one.default and "secret" not in one.name and "token" not in one.name:
                found[one.name] = plain(value)
        return found


def flows(options: Options) -> list[Flow]:
    """Return who moves bytes to or from whom.

    pairwise: initiator i and target i. manytoone: all initiators and target 0. onetomany: initiator 0 and each target, from
    memory of its own for each. tp: as tensor parallel ranks share heads: the smaller side's blocks are cut among those of the
    larger side that hold the same heads. With mode MG one process has all devices of a side, each with memory of its own.
    """
    found = _between_devices(options)
    if options.mode is Mode.SG or options.storage:
        return found
    lanes, inbounds = (max(getattr(one, name) for one in found) + 1 for name in ("lane", "inbound"))
    return [
        Flow(0, 0, one.initiator * lanes + one.lane, one.target * inbounds + one.inbound, one.piece, one.pieces, one.lanes)
        for one in found
    ]


def _between_devices(options: Options) -> list[Flow]:
    n, m = options.num_initiator_dev, options.num_target_dev
    if options.storage:
        return [Flow(i, -1) for i in range(n)]
    match options.scheme:
        case Scheme.PAIRWISE:
            return [Flow(i, i) for i in range(n)]
        case Scheme.MANY_TO_ONE:
            return [Flow(i, 0, inbound=i) for i in range(n)]
        case Scheme.ONE_TO_MANY:
            return [Flow(0, t, lane=t, lanes=m) for t in range(m)]
    if n <= m:
        ratio = m // n
        return [Flow(t // ratio, t, piece=t % ratio, pieces=ratio) for t in range(m)]
    ratio = n // m
    return [Flow(i, i // ratio, inbound=i % ratio) for i in range(n)]


_ALIASES = {"runtime_type": "runtime"}


def make(given: Mapping[str, Any], config_file: str = "") -> Options:
    """Make options of a file's and, before those, of what is `given`; check that they fit together.

    Raises:
        ConfigurationError: something is out of bounds or does not fit; the message names both.
    """
    chosen = (read_file(config_file, Options, _ALIASES) if config_file else {}) | dict(given)
    return check(Options(**chosen), frozenset(chosen))


_POSITIVE = (
    "num_initiator_dev",
    "num_target_dev",
    "start_block_size",
    "max_block_size",
    "start_batch_size",
    "max_batch_size",
    "num_iter",
    "large_blk_iter_ftr",
    "rounds",
    "num_threads",
    "pipeline_depth",
    "num_files",
)


def check(options: Options, chosen: frozenset[str] = frozenset()) -> Options:
    """Return the options with what follows from others filled in.

    Raises:
        ConfigurationError: they do not fit together.
    """
    options = _backend(options, chosen)
    for name in _POSITIVE:
        _at_least(options, name, 1)
    _at_least(options, "size_factor", 2)
    for name in ("warmup_iter", "total_buffer_size", "max_request_size", "randomize_location_mode_seed", "world_size"):
        _at_least(options, name, 0)
    for start, most in (("start_block_size", "max_block_size"), ("start_batch_size", "max_batch_size")):
        if getattr(options, start) > getattr(options, most):
            if most not in chosen:
                options = dataclasses.replace(options, **{most: getattr(options, start)})
                continue
            if start in chosen:
                raise refusal(options, start, f"at most {flag(most)} ({getattr(options, most)})")
            options = dataclasses.replace(options, **{start: getattr(options, most)})
    _check_scheme(options)
    _check_modes(options)
    _check_storage(options)
    _check_sizes(options)
    if options.rank >= 0 and not options.world_size:
        raise ConfigurationError(f"--rank is {options.rank} and there is no --world-size; give both")
    for one in options.versus:
        _check_peer(options, one)
    check_format(options.format, options.output)
    return options


def _backend(options: Options, chosen: frozenset[str]) -> Options:
    name = options.backend.lower()
    if name not in NIXL_BACKENDS:
        return dataclasses.replace(options, backend=name)
    ours, segment = NIXL_BACKENDS[name]
    if segment is None:
        return dataclasses.replace(options, backend=ours)
    if "target_seg_type" in chosen and options.target_seg_type is not segment:
        raise ConfigurationError(
            f"--backend {options.backend} moves to and from {segment.value}, and --target-seg-type is"
            f" {options.target_seg_type.value}; leave one of them out"
        )
    return dataclasses.replace(options, backend=ours, target_seg_type=segment)


def _check_scheme(options: Options) -> None:
    n, m = options.num_initiator_dev, options.num_target_dev
    scheme = options.scheme
    if options.initiator_seg_type in STORAGE:
        raise refusal(options, "initiator_seg_type", "DRAM or VRAM; files and objects are the target's")
    if options.storage:
        if scheme is not Scheme.PAIRWISE:
            raise refusal(options, "scheme", f"pairwise where the target is {options.target_seg_type.value}")
        return
    what = {
        Scheme.PAIRWISE: (n == m, f"as many targets as initiators; it has {n} and {m}"),
        Scheme.MANY_TO_ONE: (m == 1, f"--num-target-dev 1, not {m}"),
        Scheme.ONE_TO_MANY: (n == 1, f"--num-initiator-dev 1, not {n}"),
        Scheme.TP: (max(n, m) % min(n, m) == 0, f"one of the two sides to be a multiple of the other; it has {n} and {m}"),
    }
    fits, text = what[scheme]
    if not fits:
        raise ConfigurationError(f"--scheme {scheme.value} needs {text}")
    if scheme is Scheme.TP and m > n:
        for block in (options.start_block_size, options.max_block_size):
            if block % (m // n):
                raise ConfigurationError(f"--scheme tp cuts each block into {m // n} parts; a block of {block} bytes has none")


def _check_modes(options: Options) -> None:
    if options.reregister_mem and options.prepared_xfer:
        raise ConfigurationError("--prepared-xfer keeps descriptors of memory that --reregister-mem gives up; leave one out")
    if options.reregister_mem and options.slots > 1:
        raise ConfigurationError(
            f"--reregister-mem gives up the memory after each request; {options.slots} at once (--num-threads x"
            " --pipeline-depth) would lose it: give 1 and 1"
        )
    if options.mode is Mode.MG and options.storage and options.num_initiator_dev > 1:
        raise ConfigurationError(
            f"--mode MG has one process, and {options.target_seg_type.value} is moved to and from by one process for each of"
            f" --num-initiator-dev {options.num_initiator_dev}; use --mode SG"
        )
    if options.notify and options.storage:
        raise ConfigurationError(f"--notify tells a target, and {options.target_seg_type.value} has none; leave it out")


def _check_storage(options: Options) -> None:
    mode = options.randomize_location_mode
    if mode is Location.BYTE:
        if options.target_seg_type is not Segment.FILE:
            raise refusal(options, "randomize_location_mode", "none or blockaligned; bytealigned is for files")
        for other in ("storage_enable_direct", "check_consistency"):
            if getattr(options, other):
                raise ConfigurationError(
                    f"--randomize-location-mode bytealigned does not go with {flag(other)}: give {flag(other, no=True)}"
                )
    if options.target_seg_type is not Segment.FILE:
        for name in ("filepath", "filenames", "storage_enable_direct"):
            if getattr(options, name):
                raise ConfigurationError(f"{flag(name)} is for files; add --target-seg-type FILE or leave it out")
    elif options.filepath and not os.path.isdir(options.filepath):
        raise refusal(options, "filepath", "a directory that exists")
    if options.target_seg_type is Segment.OBJ and not store_url(options):
        raise ConfigurationError(
            "--target-seg-type OBJ needs a store: --obj-bucket-name NAME, --azure-blob-container-name NAME or --obj-url URL"
        )
    if options.filenames and len(options.filenames.split(",")) != options.num_files:
        raise refusal(options, "num_files", f"the number of --filenames, {len(options.filenames.split(','))}")


def _check_sizes(options: Options) -> None:
    first = options.start_block_size * options.start_batch_size
    if options.max_request_size and first > options.max_request_size:
        raise refusal(options, "max_request_size", f"at least the first request's bytes, {first}")
    total = options.total_buffer_size
    if not total:
        return
    least = max(point.block * point.batch for point in options.points()) * options.slots
    for name in ("num_initiator_dev", *(() if options.storage else ("num_target_dev",))):
        devices = getattr(options, name)
        if least > total // devices:
            raise ConfigurationError(
                f"--total-buffer-size is {total}, {total // devices} for each of {flag(name)} {devices}; --max-block-size"
                f" {options.max_block_size} x --max-batch-size {options.max_batch_size} x {options.slots} at once needs {least}"
            )


_PEERS = {
    Versus.NIXL: (Segment.DRAM, Segment.FILE, Segment.OBJ),
    Versus.MOONCAKE: (Segment.DRAM,),
    Versus.OBSTORE: (Segment.OBJ,),
    Versus.AWSCRT: (Segment.OBJ,),
    Versus.FIO: (Segment.FILE,),
}


def _check_peer(options: Options, peer: Versus) -> None:
    kinds = {options.initiator_seg_type, options.target_seg_type}
    allowed = {Segment.DRAM, *_PEERS[peer]}
    if not kinds <= allowed or (options.target_seg_type is Segment.DRAM and Segment.DRAM not in _PEERS[peer]):
        can = ", ".join(one.value for one in _PEERS[peer])
        raise ConfigurationError(
            f"--versus {peer.value} can be measured with the target {can}, not with {options.initiator_seg_type.value} and"
            f" {options.target_seg_type.value}"
        )
    python = {Versus.NIXL: "nixl_python", Versus.MOONCAKE: "mooncake_python"}.get(peer)
    # Without one the peer is reported as absent.
    if python and (path := getattr(options, python)) and not os.access(path, os.X_OK):
        raise refusal(options, python, "an interpreter that can be run")


def store_url(options: Options) -> str:
    """Return the URL of the store that objects are in, "" if none is named."""
    if options.obj_url:
        return options.obj_url
    if options.azure_blob_container_name:
        return f"az://{options.azure_blob_container_name}"
    return f"s3://{options.obj_bucket_name}" if options.obj_bucket_name else ""


def store_options(options: Options) -> dict[str, Any]:
    """Return what the store's backend is to be told."""
    url = store_url(options)
    if url.startswith("az://"):
        given = {"connection_string": options.azure_blob_connection_string, "account_url": options.azure_blob_account_url}
        return {name: value for name, value in given.items() if value}
    if not url.startswith("s3://"):
        return {}
    endpoint = options.obj_endpoint_override
    if endpoint and "://" not in endpoint:
        endpoint = f"{options.obj_scheme}://{endpoint}"
    given = {
        "endpoint_url": endpoint,
        "region": options.obj_region,
        "access_key": options.obj_access_key,
        "secret_key": options.obj_secret_key,
        "session_token": options.obj_session_token,
        "addressing": "virtual" if options.obj_use_virtual_addressing else "path" if endpoint else "auto",
        "checksum": "crc32c" if options.obj_req_checksum == "required" else "",
        "verify": options.obj_ca_bundle,
    }
    return {name: value for name, value in given.items() if value}


def _at_least(options: Options, name: str, least: int) -> None:
    if getattr(options, name) < least:
        raise refusal(options, name, f"at least {least}")


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
