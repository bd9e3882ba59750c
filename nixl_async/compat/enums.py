"""NIXL's enumerations, with its numbers."""

from __future__ import annotations

import enum

from nixl_async.descriptors import MemoryKind


class _Number(enum.IntEnum):
    __str__ = enum.Enum.__str__


class nixl_mem_t(_Number):
    """Where memory is."""

    DRAM_SEG = 0
    VRAM_SEG = 1
    BLK_SEG = 2
    OBJ_SEG = 3
    FILE_SEG = 4


class nixl_xfer_op_t(_Number):
    """Which way a transfer goes, seen from who posts it."""

    NIXL_READ = 0
    NIXL_WRITE = 1


class nixl_cost_t(_Number):
    """How a cost was estimated."""

    NIXL_COST_ANALYTICAL_BACKEND = 0


class nixl_status_t(_Number):
    """What a call returns; errors are raised instead."""

    NIXL_IN_PROG = 1
    NIXL_SUCCESS = 0
    NIXL_ERR_NOT_POSTED = -1
    NIXL_ERR_INVALID_PARAM = -2
    NIXL_ERR_BACKEND = -3
    NIXL_ERR_NOT_FOUND = -4
    NIXL_ERR_MISMATCH = -5
    NIXL_ERR_NOT_ALLOWED = -6
    NIXL_ERR_REPOST_ACTIVE = -7
    NIXL_ERR_UNKNOWN = -8
    NIXL_ERR_NOT_SUPPORTED = -9
    NIXL_ERR_REMOTE_DISCONNECT = -10
    NIXL_ERR_CANCELED = -11
    NIXL_ERR_NO_TELEMETRY = -12


class nixl_thread_sync_t(_Number):
    """How NIXL guards an agent against threads; here any number of threads may always use one."""

    NIXL_THREAD_SYNC_NONE = 0
    NIXL_THREAD_SYNC_STRICT = 1
    NIXL_THREAD_SYNC_RW = 2
    NIXL_THREAD_SYNC_DEFAULT = 0


KINDS = {
    nixl_mem_t.DRAM_SEG: MemoryKind.DRAM,
    nixl_mem_t.VRAM_SEG: MemoryKind.VRAM,
    nixl_mem_t.FILE_SEG: MemoryKind.FILE,
    nixl_mem_t.OBJ_SEG: MemoryKind.OBJECT,
}
"""Our kinds of memory; block devices have none."""
