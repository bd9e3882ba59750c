"""Make the environments of the peers that `nixl-async bench transfer --versus` and `python -m bench` run beside this library.

    python bench/environments.py [DIRECTORY] [nixl] [mooncake]

makes `DIRECTORY/nixl` and `DIRECTORY/mooncake` (default: `.peers`) with the versions below, unless they are there already, and
prints the variables that name their interpreters: `eval "$(python bench/environments.py)"`.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import venv
from pathlib import Path

PACKAGES = {
    # NIXL's wheel needs any torch; with its dependencies it would bring CUDA's libraries.
    "nixl": (["torch==2.13.0", "numpy"], ["nixl-cu12==1.5.1"], "nixl_cu12._api"),
    "mooncake": (["numpy", "mooncake-transfer-engine-non-cuda==0.3.13.post1"], [], "mooncake.engine"),
}
VARIABLES = {"nixl": "NIXL_ASYNC_NIXL_PYTHON", "mooncake": "NIXL_ASYNC_MOONCAKE_PYTHON"}


def make(directory: Path, peer: str) -> Path:
    """Make a peer's environment if it is not there; return its interpreter."""
    packages, alone, module = PACKAGES[peer]
    room = directory / peer
    python, done = room / "bin" / "python", room / "made-of"
    wanted = " ".join([*packages, *alone])
    if done.is_file() and done.read_text() == wanted:
        return python
    shutil.rmtree(room, ignore_errors=True)
    venv.create(room, with_pip=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, *packages], check=True)
    if alone:
        subprocess.run([*pip, "--no-deps", *alone], check=True)
    subprocess.run([str(python), "-c", f"import {module}"], check=True)
    done.write_text(wanted)
    return python


def main() -> int:
    """Make those that are asked for; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("directory", nargs="?", type=Path, default=Path(".peers"))
    parser.add_argument("peers", nargs="*", metavar="peer", default=[])
    given = parser.parse_args()
    if unknown := set(given.peers) - set(PACKAGES):
        parser.error(f"no peer is called {', '.join(sorted(unknown))}; there are {', '.join(PACKAGES)}")
    failed = 0
    for peer in given.peers or PACKAGES:
        try:
            print(f"export {VARIABLES[peer]}={make(given.directory.resolve(), peer)}", flush=True)
        except subprocess.CalledProcessError as error:
            failed += 1
            print(f"{peer} is left out: {error.cmd[0]} ended with exit status {error.returncode}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
