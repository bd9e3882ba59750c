"""One process of the demo; `run.py` starts it."""

import ctypes
import signal
import sys

from nixl_async.demo.side import main

_PR_SET_PDEATHSIG = 1

if __name__ == "__main__":
    # Ctrl-C reaches the whole foreground group; the process that started us decides, and closes our standard input.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    sys.exit(main(sys.argv[1]))
