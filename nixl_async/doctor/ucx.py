"""What UCX finds on this machine, by its own program `ucx_info`, which comes with the libucx wheel: nothing is loaded here."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from nixl_async.doctor.children import run

SECONDS = 20.0
PREFER_SYSTEM = "RAPIDS_LIBUCX_PREFER_SYSTEM_LIBRARY"
"""The libucx package's own switch: `true` makes it load the system's UCX instead of the wheel's."""
RDMA = frozenset({"rc_verbs", "rc_mlx5", "ud_verbs", "ud_mlx5", "dc_mlx5", "rc_gda", "gga_mlx5", "srd", "efa"})
"""UCX's transports over InfiniBand and RoCE cards."""


@dataclass(frozen=True, slots=True)
class UCX:
    """UCX's version, how it was built, and the (transport, device) pairs it found; `failure` says why it is not known."""

    program: str
    version: str = ""
    built: str = ""
    transports: tuple[tuple[str, str], ...] = ()
    failure: str = ""

    @property
    def rdma(self) -> tuple[str, ...]:
        """The transports over RDMA hardware."""
        return tuple(sorted({name for name, _ in self.transports} & RDMA))

    def devices(self, transport: str) -> tuple[str, ...]:
        """Return the devices of a transport."""
        return tuple(device for name, device in self.transports if name == transport)


async def ask_ucx() -> UCX | None:
    """Ask UCX; `None` where it is not installed."""
    program = find_program()
    if program is None:
        return None
    # Found by the wheel's own search path when it is the wheel's program.
    libraries = Path(program).parents[1] / "lib"
    environment = {"LD_LIBRARY_PATH": f"{libraries}:{os.environ.get('LD_LIBRARY_PATH', '')}"} if libraries.is_dir() else {}
    answer = await run([program, "-v", "-d"], SECONDS, environment=environment)
    return read(program, answer.text, answer.failure)


def find_program() -> str | None:
    """Return the `ucx_info` of the UCX that the ucx backend would load."""
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
