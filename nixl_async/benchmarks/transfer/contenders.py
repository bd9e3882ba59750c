"""Who takes part in a run: this library, the machine's limit, and the peers that are asked for and there."""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec

from nixl_async.benchmarks.transfer.conductor import OURS, RAW
from nixl_async.benchmarks.transfer.control import HERE, Contender
from nixl_async.benchmarks.transfer.options import Options, Segment, Versus

NIXL_LIKE_OURS = "nixl, our UCX settings"
OUR_UCX_ENVIRONMENT = {"UCX_TCP_TX_SEG_SIZE": "64k", "UCX_TCP_RX_SEG_SIZE": "256k"}
"""What the ucx backend sets on its own context, as a stock UCX program would be given it."""
PEERS = HERE / "peers"


def contenders(options: Options) -> list[Contender]:
    """Return all that take part, ours first, the raw limit last; those that cannot say why."""
    found = [Contender(OURS, _ours(options), environment=_devices(options))]
    for one in dict.fromkeys(options.versus):
        found += _peer(options, one)
    if options.raw and (limit := _raw(options)) is not None:
        found.append(limit)
    return found


def _ours(options: Options) -> str:
    modules = {Segment.FILE: "ours_files", Segment.OBJ: "ours_objects"}
    return f"nixl_async.benchmarks.transfer.{modules.get(options.target_seg_type, 'ours')}"


def _devices(options: Options) -> dict[str, str]:
    """Return the variables that keep UCX to the devices and transports that are asked for."""
    given = {} if options.device_list == "all" else {"UCX_NET_DEVICES": options.device_list}
    return given


def _raw(options: Options) -> Contender | None:
    if options.initiator_seg_type is Segment.VRAM or options.target_seg_type is Segment.VRAM:
        return None
    match options.target_seg_type:
        case Segment.DRAM:
            return Contender(RAW, str(PEERS / "raw_peer.py"))
        case Segment.FILE:
            return Contender(RAW, str(PEERS / "raw_file_peer.py"))
    return None


def _peer(options: Options, peer: Versus) -> list[Contender]:
    match peer:
        case Versus.NIXL:
            return _nixl(options)
        case Versus.MOONCAKE:
            absent = _absent(options.mooncake_python, "--mooncake-python", "Mooncake's wheel")
            python = options.mooncake_python
            return [Contender("mooncake", str(PEERS / "mooncake_peer.py"), python, spins=True, absent=absent)]
        case Versus.FIO:
            absent = "" if shutil.which("fio") else "the program fio is not installed: apt-get install fio"
            return [Contender("fio", str(PEERS / "fio_peer.py"), absent=absent)]
    label = peer.value
    absent = "" if find_spec(label) else f"{label} is not installed in this environment: pip install {label}"
    return [Contender(label, str(PEERS / f"{label}_peer.py"), absent=absent)]


def _nixl(options: Options) -> list[Contender]:
    python = options.nixl_python
    absent = _absent(python, "--nixl-python", "NIXL's wheel")
    if options.storage:
        return [Contender("nixl", str(PEERS / "nixl_storage_peer.py"), python, spins=True, absent=absent)]
    given = _devices(options) | {"NIXL_LOG_LEVEL": "ERROR"}
    if options.backend == "tcp":
        # The same way for both: not the memory that the two processes could share.
        given["UCX_TLS"] = "tcp"
    program = str(PEERS / "nixl_peer.py")
    found = [Contender("nixl", program, python, given, spins=True, absent=absent)]
    if not absent:
        found.append(Contender(NIXL_LIKE_OURS, program, python, given | OUR_UCX_ENVIRONMENT, spins=True))
    return found


def _absent(python: str, flag: str, what: str) -> str:
    if not python:
        return f"it needs {flag}: the interpreter of an environment with {what}; bench/environments.py makes one"
    return "" if os.access(python, os.X_OK) else f"{flag} {python} cannot be run"
