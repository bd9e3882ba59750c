"""Run one page of the documentation: `python -m tests.docs.running PAGE NAME` in the directory that it may write to.

PAGE is the text, with the addresses of servers in it; tracebacks call it NAME. The exit status is 0 if all that the page
says is so.
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import faulthandler
import inspect
import io
import json
import os
import signal
import sys
import tomllib
import types
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import yaml

from tests.docs.pages import Block, Kind, Page, matches, parse, transcript

SECONDS = 60.0
"""How long a page may take."""
ENVIRONMENT = ".environment"
# What a script exports and where it went counts for the page's later blocks, as in the reader's shell.
_SCRIPT = """set -euo pipefail
trap '{{ env -0; }} > "{environment}"' EXIT
{text}
"""


class Difference(AssertionError):
    """A page says something that is not so."""


class Running:
    """A page under way: its namespace, its environment, and what runs meanwhile."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.module = types.ModuleType("page")
        self.environment = dict(os.environ)
        self.meanwhile: list[tuple[Block, asyncio.subprocess.Process, asyncio.Task[str]]] = []
        sys.modules["page"] = self.module

    async def run(self, page: Page) -> None:
        """Run the blocks in order.

        Raises:
            Difference: something is not as the page says.
        """
        before = asyncio.all_tasks()
        async with AsyncExitStack() as stack:
            for block in page.blocks:
                if block.kind is Kind.FILE:
                    self._write(block)
                elif block.excuse is None:
                    await self._block(block, stack)
            for block, process, printing in self.meanwhile:
                if block.interrupted:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGINT)
                printed = await printing
                self._ended(block, await process.wait(), printed)
        if left := asyncio.all_tasks() - before:
            raise Difference(f"the page leaves tasks: {left}")

    async def _block(self, block: Block, stack: AsyncExitStack) -> None:
        match block.kind:
            case Kind.PARSED:
                self._parse(block)
            case Kind.PYTHON:
                self._compare(block, block.output, await self._python(block))
            case Kind.SHELL | Kind.TRANSCRIPT if block.meanwhile:
                process = await stack.enter_async_context(self._script(block))
                printing, seen = await self._until_shown(block, process)
                self.meanwhile.append((block, process, printing))
                if not seen:
                    raise Difference(f"{self._at(block)} ended before it had printed what is shown:\n{await printing}")
            case _:
                async with self._script(block) as process:
                    printed = (await process.communicate())[0].decode()
                    self._ended(block, await process.wait(), printed)
                self._take_environment()

    def _write(self, block: Block) -> None:
        assert block.path is not None
        path = Path(block.path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.text)
        if path.suffix == ".py":
            compile(block.text, str(path), "exec", dont_inherit=True)
        elif path.suffix in (".yaml", ".yml", ".json", ".toml"):
            self._parse(block)

    async def _python(self, block: Block) -> str:
        # Empty lines before it give tracebacks the page's own line numbers.
        text = "\n" * (block.line - 1) + block.text
        code = compile(text, self.name, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            running = eval(code, self.module.__dict__)
            if inspect.iscoroutine(running):
                await running
        return printed.getvalue()

    @asynccontextmanager
    async def _script(self, block: Block) -> AsyncIterator[asyncio.subprocess.Process]:
        text = transcript(block.text)[0] if block.kind is Kind.TRANSCRIPT else block.text
        environment = os.devnull if block.meanwhile else os.path.join(os.getcwd(), ENVIRONMENT)
        process = await asyncio.create_subprocess_exec(
            *("bash", "-c", _SCRIPT.format(environment=environment, text=text)),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={**self.environment, "PYTHONUNBUFFERED": "1", "COLUMNS": "120"},
            process_group=0,
        )
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()

    async def _until_shown(self, block: Block, process: asyncio.subprocess.Process) -> tuple[asyncio.Task[str], bool]:
        shown, printed, seen = self._shown(block) or "", bytearray(), asyncio.Event()
        assert process.stdout is not None
        stream = process.stdout

        async def read() -> str:
            while got := await stream.read(1 << 16):
                printed.extend(got)
                if matches(shown, printed.decode(errors="replace"), whole=False):
                    seen.set()
            return printed.decode(errors="replace")

        reading, seeing = asyncio.create_task(read()), asyncio.create_task(seen.wait())
        if shown:
            await asyncio.wait((reading, seeing), return_when=asyncio.FIRST_COMPLETED)
        seeing.cancel()
        return reading, seen.is_set() or not shown

    def _ended(self, block: Block, status: int, printed: str) -> None:
        allowed = (0, -signal.SIGINT, 128 + signal.SIGINT) if block.interrupted else (0,)
        if status not in allowed:
            raise Difference(f"{self._at(block)} ended with status {status}:\n{printed}")
        if not block.meanwhile:
            self._compare(block, self._shown(block), printed)
        elif not matches(self._shown(block) or "", printed, whole=False):
            raise Difference(f"{self._at(block)} prints\n{printed}")

    def _shown(self, block: Block) -> str | None:
        return transcript(block.text)[1] if block.kind is Kind.TRANSCRIPT else block.output

    def _compare(self, block: Block, expected: str | None, printed: str) -> None:
        if expected is not None and not matches(expected, printed):
            raise Difference(f"{self._at(block)} prints\n{printed}\nand not\n{expected}")

    def _take_environment(self) -> None:
        if (path := Path(ENVIRONMENT)).exists():
            self.environment = dict(part.split("=", 1) for part in path.read_text().split("\0") if "=" in part)
            path.unlink()
            directory = self.environment.pop("PWD", os.getcwd())
            os.environ.clear()
            os.environ.update(self.environment)
            os.chdir(directory)

    def _parse(self, block: Block) -> None:
        match block.language:
            case "json":
                json.loads(block.text)
            case "toml":
                tomllib.loads(block.text)
            case "yaml":
                for document in yaml.safe_load_all(block.text):
                    check_manifest(document, self._at(block))

    def _at(self, block: Block) -> str:
        return f"{self.name}:{block.line}"


def check_manifest(document: Any, where: str) -> None:
    """Check the structure of a Kubernetes object; nothing of what is none.

    Raises:
        Difference: it has no kind or name, or a container has no name or image.
    """
    if not isinstance(document, dict) or "apiVersion" not in document:
        return
    if not document.get("kind") or not document.get("metadata", {}).get("name"):
        raise Difference(f"{where}: a Kubernetes object has a kind and metadata.name")
    for containers in _found(document, "containers"):
        for container in containers:
            if not container.get("name") or not container.get("image"):
                raise Difference(f"{where}: a container has a name and an image: {container}")


def _found(node: Any, key: str) -> list[Any]:
    if isinstance(node, dict):
        own = [node[key]] if isinstance(node.get(key), list) else []
        return own + [one for value in node.values() for one in _found(value, key)]
    return [one for value in node for one in _found(value, key)] if isinstance(node, list) else []


async def main(text: str, name: str) -> None:
    """Run a page within its time."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    loop.add_signal_handler(signal.SIGTERM, task.cancel)
    async with asyncio.timeout(SECONDS):
        await Running(name).run(parse(text))


if __name__ == "__main__":
    # A page that holds the loop for good is not ended by the loop's own clock.
    faulthandler.dump_traceback_later(SECONDS + 10, exit=True)
    # Where tests run in the background it is ignored, and what they start would ignore it too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        asyncio.run(main(Path(sys.argv[1]).read_text(), sys.argv[2]))
    except Difference as difference:
        sys.exit(str(difference))
