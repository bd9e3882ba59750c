"""What UCX finds on this machine, by its own program `ucx_info`, and whether that is of the UCX that the ucx backend loads.

Nothing is loaded here: a process of its own opens the backend and says which libucp it has then.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from nixl_async.backends.ucx_lanes import is_rdma
from nixl_async.doctor.children import run

SECONDS = 20.0
PREFER_SYSTEM = "RAPIDS_LIBUCX_PREFER_SYSTEM_LIBRARY"
"""The libucx package's own switch: `true` makes it load the system's UCX instead of the wheel's."""


@dataclass(frozen=True, slots=True)
class Library:
    """The libucp that a process has loaded when the ucx backend is open: its version and its file."""

    version: str
    path: str


@dataclass(frozen=True, slots=True)
class UCX:
    """What a `program` ucx_info says: UCX's version, how it was built, the (transport, device) pairs it found, or its `failure`.

    `library` is what is loaded, `None` if that is not known; `others` are the `ucx_info` on PATH and its version, if it is another.
    """

    program: str
    version: str = ""
    built: str = ""
    transports: tuple[tuple[str, str], ...] = ()
    failure: str = ""
    library: Library | None = None
    others: tuple[tuple[str, str], ...] = ()

    @property
    def rdma(self) -> tuple[str, ...]:
        """The transports over RDMA hardware."""
        return tuple(sorted({name for name, _ in self.transports if is_rdma(name)}))

    @property
    def differing(self) -> tuple[tuple[str, str], ...]:
        """The programs, with their versions, that are not of the version that is loaded."""
        if self.library is None:
            return ()
        asked = ((self.program, self.version), *self.others)
        return tuple((program, version) for program, version in asked if version and version != self.library.version)

    def devices(self, transport: str) -> tuple[str, ...]:
        """Return the devices of a transport."""
        return tuple(device for name, device in self.transports if name == transport)


async def ask_ucx(library: Library | None = None) -> UCX | None:
    """Ask UCX, that which `library` belongs to if it is known; `None` where it is not installed."""
    program = beside(library) or find_program()
    if program is None:
        return None
    found = await _ask(program, "-v", "-d")
    others = [(other, (await _ask(other, "-v")).version) for other in _others(program)]
    return replace(found, library=library, others=tuple(others))


def _others(program: str) -> list[str]:
    on_path = shutil.which("ucx_info")
    return [on_path] if on_path is not None and os.path.realpath(on_path) != os.path.realpath(program) else []


async def _ask(program: str, *arguments: str) -> UCX:
    # Found by the wheel's own search path when it is the wheel's program.
    libraries = Path(program).parents[1] / "lib"
    environment = {"LD_LIBRARY_PATH": f"{libraries}:{os.environ.get('LD_LIBRARY_PATH', '')}"} if libraries.is_dir() else {}
    answer = await run([program, *arguments], SECONDS, environment=environment)
    return read(program, answer.text, answer.failure)


def beside(library: Library | None) -> str | None:
    """Return the `ucx_info` that was installed with a library: its directory's parent has it in `bin`."""
    if library is None or not library.path:
        return None
    program = Path(library.path).parent.parent / "bin/ucx_info"
    return str(program) if os.access(program, os.X_OK) else None


def find_program() -> str | None:
    """Return the `ucx_info` of the UCX that the ucx backend is to load, by what the user prefers."""
    if os.environ.get(PREFER_SYSTEM, "false").lower() != "false" and (found := shutil.which("ucx_info")):
        return found
    spec = importlib.util.find_spec("libucx")
    for place in (spec.submodule_search_locations or ()) if spec is not None else ():
        program = Path(place) / "bin/ucx_info"
        if os.access(program, os.X_OK):
            return str(program)
    return None


def read(program: str, text: str, failure: str = "") -> UCX:
    """Read what `ucx_info -v -d` printed."""
    version = re.search(r"Library version:\s*(\S+)", text)
    built = re.search(r"Configured with:\s*(.+)", text)
    pairs = re.findall(r"Transport:\s*(\S+)\s*\n#\s*Device:\s*(\S+)", text)
    return UCX(program, version[1] if version else "", built[1].strip() if built else "", tuple(dict.fromkeys(pairs)), failure)
