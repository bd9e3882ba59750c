"""Run a command for which the kernel forbids system calls: `forbidding.py NUMBER[,NUMBER...] COMMAND...`; they fail with EPERM."""

import ctypes
import errno
import os
import struct
import sys


class Filter(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("program", ctypes.c_void_p)]


def main() -> None:
    numbers = [int(number) for number in sys.argv[1].split(",")]
    # Load the number of the call; if it is one of these, the error EPERM; else allow.
    steps = [(0x20, 0, 0, 0)]
    steps += [(0x15, len(numbers) - place, 0, number) for place, number in enumerate(numbers)]
    steps += [(0x06, 0, 0, 0x7FFF0000), (0x06, 0, 0, 0x00050000 | errno.EPERM)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0
    assert libc.prctl(22, 2, ctypes.byref(Filter(len(steps), ctypes.addressof(code)))) == 0, ctypes.get_errno()
    os.execvp(sys.argv[2], sys.argv[2:])


main()
