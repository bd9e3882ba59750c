"""What the examination does in processes of its own: `python -m nixl_async.doctor.child WHAT`, told by a line of JSON."""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from typing import Any

from nixl_async.errors import NixlError

_PR_SET_PDEATHSIG = 1


def say(**message: Any) -> None:
    """Tell the examination something."""
    # One write: messages of several threads never mix.
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


async def backend(setup: dict[str, Any]) -> None:
    """Open one backend as an agent does, and close it."""
    from nixl_async.agent import Agent

    async with Agent("doctor", backends=[setup["name"]]):
        say(event="opened")
        if setup["name"] == "ucx":
            from nixl_async.backends.ucx import loaded_library

            version, path = loaded_library()
            say(event="library", version=version, path=path)


async def file_engine(setup: dict[str, Any]) -> None:
    """Tell what the file backends copy with."""
    from nixl_async.fileio import FileEngine

    engine = FileEngine("doctor", 1)
    say(event="engine", how=engine.how, why_threads=engine.why_threads)
    engine.close()


async def gpu(setup: dict[str, Any]) -> None:
    """Tell which devices CUDA has, and which of them reach each other."""
    from nixl_async import cuda

    driver = cuda.load_driver()
    if driver is None:
        say(event="gpu", driver=False, devices=[])
        return
    devices, version = [], ctypes.c_int()
    driver.cuDriverGetVersion(ctypes.byref(version))
    for number in range(cuda.device_count()):
        name, ordinal, nbytes = ctypes.create_string_buffer(128), ctypes.c_int(), ctypes.c_size_t()
        driver.cuDeviceGet(ctypes.byref(ordinal), number)
        driver.cuDeviceGetName(name, 128, ordinal)
        driver.cuDeviceTotalMem_v2(ctypes.byref(nbytes), ordinal)
        others = [other for other in range(cuda.device_count()) if other != number and cuda.reaches(number, other)]
        devices.append({"name": name.value.decode(errors="replace"), "nbytes": nbytes.value, "reaches": others})
    say(event="gpu", driver=True, cuda=f"{version.value // 1000}.{version.value % 1000 // 10}", devices=devices)


async def gds(setup: dict[str, Any]) -> None:
    """Tell how kvikio would copy between files and VRAM."""
    from nixl_async.backends.gds import GDSBackend

    say(event="gds", compat_mode=GDSBackend().statistics().compat_mode)


async def peer(setup: dict[str, Any]) -> None:
    """Be a peer until standard input ends."""
    from nixl_async.doctor.stage import be_peer

    await be_peer(setup, say)


async def routes(setup: dict[str, Any]) -> None:
    """Explain every pair of places, and try the routes."""
    from nixl_async.doctor.routes import explain_and_try

    await explain_and_try(setup, say)


WHAT: dict[str, Callable[[dict[str, Any]], Coroutine[Any, Any, None]]] = {
    "backend": backend,
    "file-engine": file_engine,
    "gpu": gpu,
    "gds": gds,
    "peer": peer,
    "routes": routes,
}


def main() -> None:
    """Run one of `WHAT`; what this library refuses is said, everything else ends the process."""
    # Whoever started this one may be killed: then nobody would end it.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    setup = json.loads(sys.stdin.readline() or "{}")
    try:
        asyncio.run(WHAT[sys.argv[1]](setup))
    except (NixlError, OSError) as error:
        say(event="refused", kind=type(error).__name__, text=str(error))
    sys.stdout.flush()
    # Libraries that hang or crash while they are unloaded say nothing about what they do when used.
    os._exit(0)


if __name__ == "__main__":
    main()
