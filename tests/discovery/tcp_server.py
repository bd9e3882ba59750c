"""A TCPStore in a process of its own, which can be killed and started anew at the same port, without what was in it."""

from __future__ import annotations

import subprocess
import sys

from nixl_async.testing.servers import free_ports

PROGRAM = """
import sys
from torch.distributed import TCPStore
store = TCPStore("127.0.0.1", int(sys.argv[1]), is_master=True, wait_for_workers=False)
print("ready", flush=True)
sys.stdin.read()
"""


def has_torch() -> bool:
    """Tell whether torch is installed; load it, for it keeps threads."""
    try:
        import torch.distributed
    except ImportError:
        return False
    return torch.distributed.is_available()


class TCPServer:
    """One server."""

    def __init__(self) -> None:
        (self.port,) = free_ports(1)
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Start it; return when it answers."""
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(self.port)], **pipes)  # type: ignore[call-overload]
        assert self._process is not None
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def stop(self) -> None:
        """Kill it."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None
