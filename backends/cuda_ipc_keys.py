"""What processes tell each other for CUDA IPC: where a region's memory is, and where they are themselves."""

from __future__ import annotations

import json
import os
import secrets
import struct
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

_IN_PROCESS = secrets.token_hex(16)
_KEY = struct.Struct("<B64s16sQQ")
_REFUSED, _SHARED = 0, 1


@dataclass(frozen=True, slots=True)
class Shared:
    """What a region's key says: the handle of its allocation, the UUID of its device, its offset in the allocation, its size."""

    handle: bytes
    uuid: bytes
    offset: int
    nbytes: int

    def encode(self) -> bytes:
        """Return the key."""
        return _KEY.pack(_SHARED, self.handle, self.uuid, self.offset, self.nbytes)


def refused_key(why: str) -> bytes:
    """Return the key of a region that other processes cannot open: peers show the reason."""
    return bytes([_REFUSED]) + why.encode()


@lru_cache(maxsize=4096)
def decode_key(key: bytes) -> Shared | str:
    """Read a region's key: what it shares, or why it does not."""
    if key[:1] == bytes([_REFUSED]):
        return key[1:1000].decode(errors="replace")
    if len(key) != _KEY.size or key[0] != _SHARED:
        return f"its key of {len(key)} bytes is none of this backend's" if key else "it is not registered with cuda_ipc"
    _, handle, uuid, offset, nbytes = _KEY.unpack(key)
    return Shared(handle, uuid, offset, nbytes)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a process is: the boot of its kernel, its IPC and process namespaces, its id there, when it began, and a secret."""

    boot: str
    ipc: int
    pids: int
    pid: int
    began: int
    secret: str

    @classmethod
    def here(cls) -> Place:
        """Return this process's."""
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        ipc, pids = (os.stat(f"/proc/self/ns/{name}").st_ino for name in ("ipc", "pid"))
        pid = os.getpid()
        # A fork has another id.
        return cls(boot, ipc, pids, pid, began(pid), f"{_IN_PROCESS}:{pid}")

    def encode(self) -> bytes:
        """Return what `decode` reads."""
        return json.dumps([self.boot, self.ipc, self.pids, self.pid, self.began, self.secret]).encode()

    @classmethod
    def decode(cls, text: bytes) -> Place:
        """Read a peer's.

        Raises:
            ValueError: it is malformed.
        """
        value = json.loads(text)
        kinds = (str, int, int, int, int, str)
        if not isinstance(value, list) or [type(one) for one in value] != list(kinds) or value[3] <= 0:
            raise ValueError(f"{value!r} is no place of a process")
        return cls(*value)


def began(pid: int) -> int:
    """Return when a process began, in ticks since boot (proc(5)); 0 if it is not to be seen."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
        # Its name may hold blanks and parentheses.
        return int(stat.rpartition(b")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0
