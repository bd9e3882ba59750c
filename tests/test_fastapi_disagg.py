"""The serving example: real servers, each a process, whose tokens are those of one process, whoever leaves or dies in between."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.agents import ROOT, TOKEN

pytestmark = pytest.mark.skipif(
    find_spec("torch") is None, reason="the model needs torch, which is installed for one Python only"
)

ENVIRONMENT = {**os.environ, "NIXL_ASYNC_TOKEN": TOKEN}
MODULE = "examples.fastapi_disagg"
N_TOKENS = 24
# Around the page's 16 tokens, and far more than one page.
PROMPTS = ["a", "sixteen letters!", "fifteen letters", "one more than 16.", "many pages " * 30]
LONG = "a long prompt, " * 100
PREFILL_PAGES, DECODE_PAGES = 104, 400
PAGE_TOKENS = 16
SECONDS = 60.0


class Server:
    """A server in a process of its own, at a port that it keeps when it is replaced."""

    def __init__(self, role: str, logs: Path, *options: str) -> None:
        self.role, self.options, self.port = role, options, 0
        self.log = logs / f"{role}.log"
        # What UCX says of a peer that was killed is no complaint of the server's.
        self.environment = ENVIRONMENT | {"UCX_LOG_FILE": str(logs / f"{role}.ucx")}
        self.process = self._started()
        self.url = ""

    def _started(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", f"{MODULE}.{self.role}", "--port", f"{self.port}", *self.options]
        with self.log.open("a") as log:
            return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, cwd=ROOT, env=self.environment)

    def wait(self) -> None:
        """Wait until it serves."""
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()
        assert self.url, self.log.read_text()
        self.port = int(self.url.rpartition(":")[2])

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()

    async def replace(self) -> None:
        self.process = self._started()
        await asyncio.to_thread(self.wait)

    def end(self) -> None:
        """Tell it to end; it must do so at once, and have had nothing to complain of."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            status = self.process.wait(SECONDS)
        finally:
            self.kill()
        assert (status, self.log.read_text()) in ((0, ""), (-15, ""))

    @asynccontextmanager
    async def client(self) -> AsyncIterator[httpx.AsyncClient]:
        async with httpx.AsyncClient(base_url=self.url, timeout=SECONDS, trust_env=False) as client:
            yield client

    async def health(self) -> Any:
        async with self.client() as client:
            return (await client.get("/health")).json()

    async def metrics(self) -> dict[str, int]:
        async with self.client() as client:
            lines = (await client.get("/metrics")).text.splitlines()
        return {name: int(value) for name, value in (line.rsplit(" ", 1) for line in lines)}

    async def until(self, condition: Callable[[Any], bool]) -> Any:
        """Ask it how it is until that is as wanted."""
        async with self.client() as client, asyncio.timeout(SECONDS):
            while not condition(health := (await client.get("/health")).json()):
                pass
        return health


class Cluster:
    """A prefill and a decode server, and what one process says to the prompts."""

    def __init__(self, logs: Path) -> None:
        single = [sys.executable, "-m", f"{MODULE}.single", "--max-tokens", f"{N_TOKENS}", *PROMPTS, LONG]
        with subprocess.Popen(single, stdout=subprocess.PIPE, text=True, cwd=ROOT) as alone:
            self.prefill = Server("prefill", logs, "--pages", f"{PREFILL_PAGES}")
            self.prefill.wait()
            self.decode = Server("decode", logs, "--pages", f"{DECODE_PAGES}", "--prefill", self.prefill.url)
            self.decode.wait()
            assert alone.stdout is not None
            self.expected = [json.loads(line) for line in alone.stdout]
        assert alone.returncode == 0

    async def check(self, times: int = 1) -> None:
        """Send all prompts at once; compare the tokens."""
        async with self.decode.client() as client:
            found = await asyncio.gather(*(generate(client, prompt) for prompt in PROMPTS * times))
        assert found == self.expected[:-1] * times

    async def idle(self) -> None:
        """Wait until neither server has a request or holds a page."""
        for server in (self.prefill, self.decode):
            await server.until(lambda h: h["requests"]["running"] == 0 and h["pages"]["free"] == h["pages"]["all"])

    @asynccontextmanager
    async def computing(self, client: httpx.AsyncClient) -> AsyncIterator[asyncio.Task[list[int]]]:
        """Send the long prompt; yield when the prefill server is at it."""
        task = asyncio.create_task(generate(client, LONG))
        try:
            await self.prefill.until(lambda health: health["requests"]["running"] == 1)
            yield task
        finally:
            task.cancel()
            await asyncio.wait([task])


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("fastapi_disagg"))
    yield cluster
    cluster.decode.end()
    cluster.prefill.end()


async def generate(client: httpx.AsyncClient, prompt: str, max_tokens: int = N_TOKENS) -> list[int]:
    """Return the tokens that a decode server streams."""
    async with client.stream("POST", "/generate", json={"prompt": prompt, "max_tokens": max_tokens}) as answer:
        lines = [json.loads(line) async for line in answer.aiter_lines()]
    assert answer.status_code == 200, lines
    assert lines[-1] == {"done": True}
    return [line["token"] for line in lines[:-1]]


async def test_tokens_are_those_of_one_process(cluster: Cluster) -> None:
    # Three of each at once: requests take turns on both servers, and their pages are scattered.
    await cluster.check(times=3)
    async with cluster.decode.client() as client:
        assert await generate(client, LONG) == cluster.expected[-1]
        told = await client.post("/generate", json={"prompt": PROMPTS[1], "max_tokens": N_TOKENS, "overlap": False})
        assert [json.loads(line).get("token") for line in told.text.splitlines()[:-1]] == cluster.expected[1]
    await cluster.idle()
    n_tokens = 3 * sum(map(len, PROMPTS)) + len(LONG) + len(PROMPTS[1])
    # 12 layers of 8 heads, keys and values, 64 numbers of 4 bytes.
    assert (await cluster.prefill.metrics())['nixl_async_bytes_total{backend="samehost"}'] == n_tokens * 12 * 8 * 2 * 64 * 4
    assert (await cluster.decode.metrics())['requests{state="done"}'] == 3 * len(PROMPTS) + 2


async def test_a_client_that_leaves_while_its_prompt_is_computed_frees_both_sides(cluster: Cluster) -> None:
    before = [(await server.health())["requests"] for server in (cluster.prefill, cluster.decode)]
    async with cluster.decode.client() as client, cluster.computing(client) as task:
        task.cancel()
        await cluster.idle()
    for server, requests in zip((cluster.prefill, cluster.decode), before, strict=True):
        assert (await server.health())["requests"] == {**requests, "aborted": requests["aborted"] + 1}
    await cluster.check()


async def test_a_client_that_leaves_while_tokens_come_frees_its_pages(cluster: Cluster) -> None:
    before = (await cluster.decode.health())["requests"]
    async with cluster.decode.client() as client:
        body = {"prompt": PROMPTS[0], "max_tokens": 4000}
        async with client.stream("POST", "/generate", json=body) as answer:
            lines = answer.aiter_lines()
            assert answer.headers["Transfer-Encoding"] == "chunked"
            assert [json.loads(await anext(lines)).get("token") for _ in range(3)] == cluster.expected[0][:3]
            # These are here while the server computes those that follow.
            assert (await cluster.decode.health())["requests"]["running"] == 1
            await lines.aclose()
    await cluster.idle()
    assert (await cluster.decode.health())["requests"] == {**before, "aborted": before["aborted"] + 1}


async def test_a_server_without_room_says_so_and_has_room_again(cluster: Cluster) -> None:
    big = {"prompt": PROMPTS[0], "max_tokens": DECODE_PAGES * PAGE_TOKENS // 2 - 200}
    async with cluster.decode.client() as client:
        for body, status, why in [
            ({"prompt": "", "max_tokens": 1}, 422, "at least 1"),
            ({"prompt": [256], "max_tokens": 1}, 422, "less than 256"),
            ({"prompt": "a", "max_tokens": 4096}, 413, "4097 tokens; the model takes 4096"),
            ({"prompt": "a" * (PREFILL_PAGES * PAGE_TOKENS + 1), "max_tokens": 1}, 413, "the prefill server refuses"),
        ]:
            answer = await client.post("/generate", json=body)
            assert answer.status_code == status
            assert why in answer.text
        async with client.stream("POST", "/generate", json=big), client.stream("POST", "/generate", json=big) as second:
            assert second.status_code == 200
            refused = await client.post("/generate", json=big)
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
        assert f"of {DECODE_PAGES} are free" in refused.text
        await cluster.idle()
        async with cluster.computing(client):
            refused = await client.post("/generate", json={"prompt": "a" * 500, "max_tokens": 1})
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
        assert f"of {PREFILL_PAGES} are free" in refused.text
    await cluster.idle()
    await cluster.check()


async def test_a_decode_server_that_is_killed_is_replaced_without_the_other_knowing(cluster: Cluster) -> None:
    async with cluster.decode.client() as client, cluster.computing(client) as task:
        cluster.decode.kill()
        with pytest.raises(httpx.TransportError):
            await task
    health = await cluster.prefill.until(lambda h: not h["peers"] and h["pages"]["free"] == h["pages"]["all"])
    assert health["requests"]["running"] == 0
    await cluster.decode.replace()
    await cluster.check()
    assert (await cluster.prefill.health())["peers"] == ["decode"]


async def test_a_prefill_server_that_is_killed_is_replaced_too(cluster: Cluster) -> None:
    async with cluster.decode.client() as client:
        body = {"prompt": LONG, "max_tokens": 1}
        async with client.stream("POST", "/generate", json=body) as answer:
            await cluster.prefill.until(lambda health: health["requests"]["running"] == 1)
            cluster.prefill.kill()
            lines = [json.loads(line) async for line in answer.aiter_lines()]
        assert "prefill" in lines[-1]["error"]
        refused = await client.post("/generate", json=body)
        assert refused.status_code == 503
        assert f"the prefill server at {cluster.prefill.url} does not answer" in refused.text
    await cluster.prefill.replace()
    await cluster.check()
    # A process that is cut off, instead of dead, could have gone on writing for a while: until then its pages are nobody's.
    await cluster.idle()


def test_a_server_without_a_token_says_what_to_do() -> None:
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "NIXL_ASYNC_TOKEN"}
    command = [sys.executable, "-m", f"{MODULE}.prefill", "--port", "0"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=ROOT, env=environment)
    assert ran.returncode == 2
    assert "set NIXL_ASYNC_TOKEN to a secret" in ran.stderr


def test_the_readme_names_every_file() -> None:
    folder = ROOT / "examples/fastapi_disagg"
    text = (folder / "README.md").read_text()
    files = {path.name for path in folder.glob("*.py")}
    assert set(re.findall(r"`(\w+\.py)`", text)) == files
    assert {f"{name}.py" for name in re.findall(rf"{MODULE}\.(\w+)", text)} == files - {
        "api.py",
        "application.py",
        "cache.py",
        "forward.py",
        "generation.py",
        "model.py",
        "worker.py",
    }


PAGED_OR_NOT = f"""
import torch
from {MODULE}.forward import Forward
from {MODULE}.model import Transformer
from {MODULE}.single import generate
torch.set_num_threads(1)
model, prompt = Transformer(dtype=torch.float64), list(b"forty letters, which are two pages and ")
tokens = list(prompt)
for _ in range(20):
    # All of it again for each token, in pages of no particular order.
    tokens.append(Forward(model, model.new_cache(4), [2, 0, 3, 1], tokens).run())
assert generate(model, prompt, 20) == tokens[len(prompt):], tokens
print(model.n_parameters)
"""


def test_the_paged_cache_changes_nothing() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", PAGED_OR_NOT], capture_output=True, text=True, timeout=60, check=False, cwd=ROOT
    )
    assert ran.returncode == 0, ran.stderr
    assert 2_000_000 < int(ran.stdout) < 10_000_000


def test_the_measurement_runs() -> None:
    command = [sys.executable, "-m", f"{MODULE}.measure", "--tokens", "64", "--rounds", "2"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=ROOT)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "without / with overlap, pair by pair: median" in ran.stdout
