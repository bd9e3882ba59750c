"""The native half of the calls that callers repeat (native/polled.c), as the types that it is made of."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from nixl_async.native import ffi, lib

NEW, ACTIVE, DONE, FAILED, COPYING = range(5)
"""States of a request: `COPYING` is active on a caller's own thread."""

if TYPE_CHECKING:

    class Gate:
        """Keeps those who copy on their own threads apart from those who change registrations."""

        epoch: int

        def enter(self) -> bool:
            """Count one who copies; False while registrations change."""

        def leave(self) -> None:
            """Count one who copies less."""

        def bump(self) -> None:
            """Begin another epoch: what was found to hold before is looked at again."""

        def close(self) -> None:
            """Begin another epoch, let nobody in, and wait until nobody copies."""

        def open(self) -> None:
            """Let them in again; once for each `close`."""

    class Target:
        """The process whose memory is copied to or from, by its id and a descriptor that this closes; pid 0 is this one."""

        def __init__(self, pid: int, pidfd: int) -> None: ...

    class Side:
        """Places to choose from, found to be registered in an epoch."""

        way: Any
        target: Target | None

        def __init__(
            self,
            addresses: Any,
            lengths: Any,
            strides: Any,
            ends: Any,
            n: int,
            index: Any,
            lane: int,
            epoch: int,
            target: Target | None,
            way: Any,
        ) -> None: ...

        def columns(self) -> tuple[bytes, bytes, bytes | None, bytes | None, bytes | None]:
            """Return addresses, lengths, strides, ends and the regions' positions."""

    class Ranges:
        """What of an agent's memory is registered in an epoch, sorted by its beginnings."""

        epoch: int

        def __init__(self, starts: Any, ends: Any, lane: int, epoch: int, target: Target | None, way: Any) -> None: ...

    class Request:
        """A transfer, as far as it is posted natively."""

        state: int
        put: int
        nbytes: int
        n_descs: int
        began_ns: int
        ended_ns: int
        notify: bytes | None
        near: Side
        far: Side

        def arm(self, gate: Gate, target: Target, epoch: int, here: Any, there: Any, lengths: Any) -> None:
            """Let it be posted natively while the epoch is that one."""

        def columns(self) -> tuple[bytes, bytes, bytes, bytes, bytes]:
            """Return addresses here and there, lengths, and the regions' positions here and there."""

    class Calls:
        """The calls of an agent's low layer that are repeated; what is unusual goes to methods with an underscore."""

        def open_calls(
            self,
            requests: dict[int, Any],
            sides: dict[int, Side],
            ranges: dict[str, Ranges],
            gate: Gate,
            kind: type[Request],
            list_kind: type,
            memory: Any,
            success: Any,
            in_progress: Any,
            write: Any,
            running_loop: Callable[[], Any],
            timed: bool,
        ) -> None:
            """Say what the calls go by."""

else:
    Gate, Target, Side, Ranges, Request, Calls = ctypes.cast(
        int(ffi.cast("uintptr_t", lib.nx_polled())), ctypes.py_object
    ).value

HERE = Target(0, -1)
"""This process."""
