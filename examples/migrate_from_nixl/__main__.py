"""Run both programs, with themselves and with each other; carry their metadata.

python examples/migrate_from_nixl                                      # with_nixl.py runs on the drop-in nixl_async.compat
python examples/migrate_from_nixl --nixl-python NIXL-ENV/bin/python    # with_nixl.py runs on NIXL's own wheel, too
"""

import argparse
import asyncio
import os
import secrets
import sys
from asyncio.subprocess import PIPE, Process, create_subprocess_exec
from pathlib import Path

from nixl_async import compat

HERE = Path(__file__).parent
SECONDS = 60


async def start(kind: str, role: str, nixl_python: str, token: str) -> Process:
    """Start a program: "nixl_async", "drop-in" or "NIXL" is what runs it."""
    environment = {**os.environ, "NIXL_ASYNC_TOKEN": token}
    python, program = sys.executable, "with_nixl.py"
    if kind == "nixl_async":
        program = "with_nixl_async.py"
    elif kind == "drop-in":
        environment["PYTHONPATH"] = os.pathsep.join([compat.path(), *sys.path])
    else:
        python = nixl_python
        environment.pop("PYTHONPATH", None)
    return await create_subprocess_exec(python, str(HERE / program), role, stdin=PIPE, stdout=PIPE, env=environment)


async def said(process: Process, word: str) -> str:
    """Return the rest of the line that begins with a word; NIXL's log is on standard output, too."""
    async for line in process.stdout:
        first, _, rest = line.decode().partition(" ")
        if first == word:
            return rest
    raise SystemExit(f"a program ended without having said {word!r}; its last words are above")


async def run(kinds: tuple[str, str], nixl_python: str) -> str:
    """Run a sender and a receiver; return what is to be said of them."""
    token, roles = secrets.token_hex(16), ("sender", "receiver")
    both = [await start(kind, role, nixl_python, token) for kind, role in zip(kinds, roles, strict=True)]
    try:
        async with asyncio.timeout(SECONDS):
            for process, metadata in zip(both, [await said(process, "metadata") for process in reversed(both)], strict=True):
                process.stdin.write(metadata.encode())
            for process, role in zip(both, roles, strict=True):
                await said(process, role)
                both[1].stdin.close()
                if status := await process.wait():
                    raise SystemExit(f"the {role} ended with {status}; its last words are above")
    finally:
        for process in both:
            if process.returncode is None:
                process.kill()
                await process.wait()
    return f"{kinds[0]:>10} -> {kinds[1]:<10} written, read back, every byte checked by both"


async def main(nixl_python: str) -> None:
    names = ["nixl_async", "drop-in", *(["NIXL"] if nixl_python else [])]
    for sender in names:
        for line in await asyncio.gather(*(run((sender, receiver), nixl_python) for receiver in names)):
            print(line, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python examples/migrate_from_nixl", description=__doc__.partition("\n")[0])
    parser.add_argument("--nixl-python", default="", help="an interpreter for which NIXL's wheel is installed")
    given = parser.parse_args()
    if given.nixl_python and not os.access(given.nixl_python, os.X_OK):
        parser.error(f"--nixl-python: {given.nixl_python} is not a program")
    try:
        asyncio.run(main(given.nixl_python))
    except KeyboardInterrupt:
        sys.exit(130)
