"""LMCache's server, a process of its own, with our L2 adapter: it starts, lists and deletes what others stored, and ends."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from places import WAIT_SECONDS, key_of, look_up, object_of, random_bytes, store

from nixl_async.integrations.lmcache import NixlAsyncL2Adapter

Make = Callable[..., NixlAsyncL2Adapter]
Parameters = Callable[[str], dict[str, Any]]
CHUNK = 16 << 10


def free_ports(n: int) -> list[int]:
    """Return ports that nobody listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def ask(port: int, path: str, method: str = "GET", body: Any = None) -> Any:
    """Ask the server; return its answer."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"}, method=method
    )
    with urllib.request.urlopen(request, timeout=WAIT_SECONDS) as answer:
        return json.load(answer)


def test_lmcaches_server(parameters: Parameters, adapters: Make, tmp_path: Path) -> None:
    given = parameters("s3")
    keys = list(map(key_of, range(5)))
    adapter = adapters(given)
    assert store(adapter, keys, [object_of(random_bytes(CHUNK)) for _ in keys]).is_successful()
    request, http, metrics = free_ports(3)
    spec = {"module_path": "nixl_async.integrations.lmcache", "class_name": "NixlAsyncL2Adapter", "adapter_params": given}
    options = {
        "--host": "127.0.0.1",
        "--port": request,
        "--http-host": "127.0.0.1",
        "--http-port": http,
        "--prometheus-port": metrics,
        "--l1-size-gb": 0.1,
        "--eviction-policy": "LRU",
        "--l2-adapter": json.dumps({"type": "plugin"} | spec),
    }
    command = [sys.executable, "-m", "lmcache.v1.multiprocess.http_server", "--no-l1-use-lazy"]
    with (tmp_path / "server.log").open("w") as log:
        server = subprocess.Popen([*command, *(str(one) for pair in options.items() for one in pair)], stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 2 * WAIT_SECONDS
        while True:
            try:
                status = ask(http, "/status")
                break
            except (urllib.error.URLError, ConnectionError):
                assert server.poll() is None, (tmp_path / "server.log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.1)
        assert status["is_healthy"]
        (ours,) = status["storage_manager"]["l2_adapters"]
        assert ours["type"] == "NixlAsyncL2Adapter"
        assert ours["is_healthy"]
        first = ask(http, "/cache/objects?tier=l2&page_size=3")
        rest = ask(http, f"/cache/objects?tier=l2&page_size=3&page_token={first['next_page_token']}")
        entries = first["entries"] + rest["entries"]
        assert rest["next_page_token"] is None
        assert {entry["key"]["chunk_hash_hex"] for entry in entries} == {key.chunk_hash.hex() for key in keys}
        assert {entry["size_bytes"] for entry in entries} == {CHUNK}
        gone = [
            entry["key"] for entry in entries if entry["key"]["chunk_hash_hex"] in {key.chunk_hash.hex() for key in keys[:2]}
        ]
        assert ask(http, "/cache/objects", "DELETE", {"tier": "l2", "keys": gone})["ok"]
        assert look_up(adapter, keys) == [False, False, True, True, True]
        server.send_signal(signal.SIGTERM)
        assert server.wait(WAIT_SECONDS) in (0, -signal.SIGTERM), (tmp_path / "server.log").read_text()
        assert "Traceback" not in (tmp_path / "server.log").read_text()
    finally:
        server.kill()
        server.wait()
