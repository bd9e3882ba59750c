"""Run NIXL's side of the bargain and ours, and print a line for each: `scenarios.py PYTHON OWN_API [SOURCE]`.

PYTHON has this library and NIXL's wheel, which are never in one process; OWN_API is what `own_api.py` made; SOURCE is a checkout of
NIXL's repository, if there is one: its own tests and examples run from there.
"""

import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import nixl_async.compat
from nixl_async.testing.servers import free_ports

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))
from tests.compat.etcd_server import EtcdServer  # noqa: E402
from tests.discovery.tcp_server import TCPServer  # noqa: E402

COMPAT = ROOT / "tests/compat"
ROLES = Path(__file__).with_name("roles.py")
TELLER = Path(__file__).with_name("teller.py")
SECONDS = 170
PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
SCENARIOS = ("basic", "expanded", "storage")
failed = []


def environment(path, **more):
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "NIXL_ETCD_ENDPOINTS")}
    return kept | ({"PYTHONPATH": path} if path else {}) | more


def report(what, result, detail=""):
    print(f"{what:<68} {result}", flush=True)
    if detail:
        failed.append(what)
        print(detail, flush=True)


def behaviours(python, label, path, file="behaviours.py", **variables):
    ran = subprocess.run(
        [python, COMPAT / file],
        env=environment(path, **variables),
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    results = json.loads(ran.stdout or "{}")
    wrong = {name: text for name, text in results.items() if text}
    detail = "\n".join(f"{name}:\n{text}" for name, text in wrong.items()) or ("" if results else ran.stderr)
    report(f"{file}, {label}", f"{len(results) - len(wrong)} of {len(results)} hold", detail)


def telemetry(python, dropin):
    """Have `telemetry_reader` of NIXL's wheel read what an agent of the drop-in writes."""
    wheel = Path(sysconfig.get_path("platlib"))
    # As it is installed it is not to be executed, and does not find its libraries.
    reader = wheel / "nixl_cu12.scripts/telemetry_reader"
    reader.chmod(0o755)
    libraries = {"LD_LIBRARY_PATH": f"{wheel / 'nixl_cu12.libs'}:{wheel / '.nixl_cu12.mesonpy.libs'}"}
    with tempfile.TemporaryDirectory() as directory:
        variables = {"NIXL_TELEMETRY_ENABLE": "y", "NIXL_TELEMETRY_DIR": directory}
        subprocess.run([python, TELLER], env=environment(dropin, **variables), check=True, timeout=60)
        with subprocess.Popen([reader, Path(directory) / "teller"], env=environment(None, **libraries), **PIPES) as process:
            said = ""
            # It prints what is there, and waits for more.
            for line in process.stdout:
                said += line
                if "agent_memory_deregistered" in said and line.startswith("Value"):
                    break
            process.send_signal(signal.SIGINT)
            said += process.communicate(timeout=30)[0]
    values = dict(re.findall(r"Event name: (\w+)\s+Value: (\d+)", said))
    expected = {"agent_tx_bytes": "4096", "agent_tx_requests_num": "1", "agent_memory_deregistered": "8192"}
    good = expected.items() <= values.items()
    report("telemetry_reader of NIXL's wheel, an agent of the drop-in", "passed" if good else "FAILED", "" if good else said)


def outputs(processes):
    """Return what processes say, once all have ended; those that take too long are killed."""
    said = []
    try:
        said.extend(process.communicate(timeout=60)[0] for process in processes)
    except subprocess.TimeoutExpired as error:
        said.append(str(error))
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return said


@contextmanager
def etcd_running():
    with tempfile.TemporaryDirectory() as directory:
        server = EtcdServer(Path(directory))
        server.start()
        try:
            yield server.url
        finally:
            server.stop()


@contextmanager
def tcpstore_running():
    server = TCPServer()
    server.start()
    try:
        yield f"127.0.0.1:{server.port}"
    finally:
        server.stop()


def through_stores(python, dropin, own_api):
    with etcd_running() as url, tcpstore_running() as endpoint:
        for ours in (
            {"file": "through_etcd.py", "NIXL_ETCD_ENDPOINTS": url},
            {"file": "through_tcpstore.py", "NIXL_TCPSTORE_ENDPOINT": endpoint},
        ):
            behaviours(python, "the drop-in", dropin, **ours)
            behaviours(python, "NIXL's own _api.py on the low layer", own_api, **ours)
            behaviours(python, "the drop-in and NIXL", dropin, **ours, NIXL_PYTHON=python)


def partial_ports():
    first, second = free_ports(2)
    return ["--init-port", str(first), "--target-port", str(second)]


def two(python, scenario, label, paths):
    (port,) = free_ports(1)
    seen, tell = os.pipe()
    commands = {role: [python, ROLES, scenario, role, str(port)] for role in ("target", "initiator")}
    target = subprocess.Popen(commands["target"], env=environment(paths[0], READY_FD=str(tell)), pass_fds=(tell,), **PIPES)
    os.close(tell)
    # The end of a target that fails is readable too.
    select.select([seen], [], [], 60)
    os.close(seen)
    said = outputs([target, subprocess.Popen(commands["initiator"], env=environment(paths[1]), **PIPES)])
    # NIXL's wheel may crash when the interpreter takes it apart.
    good = len(said) == 2 and all(one.rstrip().endswith("passed") for one in said)
    report(f"{scenario}, {label}", "passed" if good else "FAILED", "" if good else "\n".join(said)[-6000:])


def until_open(port, process):
    """Wait until somebody listens at a port, or the process that is to do so has ended."""
    end = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < end:
        with socket.socket() as sock:
            if sock.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)


def own_files(python, source, dropin):
    """Run the tests and examples of a checkout as they are."""
    tests = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(source / "test/python")]
    kvbench = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(source / "benchmark/kvbench/test/test_kvcache.py")]
    query = [python, str(source / "examples/python/query_mem_example.py")]
    for label, command in (("its test/python", tests), ("its KVBench tests", kvbench), ("its query_mem_example.py", query)):
        ran = subprocess.run(
            command, env=environment(dropin), capture_output=True, text=True, timeout=SECONDS, check=False, cwd="/tmp"
        )
        last = (ran.stdout.strip().splitlines() or ["nothing"])[-1]
        result = last if " passed" in last else "passed" if ran.returncode == 0 else "FAILED"
        report(f"a checkout of NIXL: {label}", result, "" if ran.returncode == 0 else ran.stdout[-6000:] + ran.stderr[-3000:])
    with etcd_running() as url:
        for label, options in (("through etcd", ["--etcd"]), ("through sockets", partial_ports())):
            command = [python, str(source / "examples/python/partial_md_example.py"), *options]
            said = outputs([subprocess.Popen(command, env=environment(dropin, NIXL_ETCD_ENDPOINTS=url), **PIPES)])[0]
            good = "Test Complete." in said
            what = f"a checkout of NIXL: its partial_md_example.py, {label}"
            report(what, "passed" if good else "FAILED", "" if good else said[-6000:])
    for example in ("basic_two_peers.py", "expanded_two_peers.py"):
        (port,) = free_ports(1)
        command = [python, str(source / "examples/python" / example), "--ip", "127.0.0.1", "--port", str(port), "--mode"]
        both = [subprocess.Popen([*command, "target"], env=environment(dropin), **PIPES)]
        until_open(port, both[0])
        both.append(subprocess.Popen([*command, "initiator"], env=environment(dropin), **PIPES))
        said = outputs(both)
        good = all(process.returncode == 0 for process in both) and all("Test Complete." in one for one in said)
        report(f"a checkout of NIXL: its {example}", "passed" if good else "FAILED", "" if good else "\n".join(said)[-6000:])


def main(python, own_api, source=None):
    dropin = nixl_async.compat.path()
    behaviours(python, "the drop-in", dropin)
    behaviours(python, "NIXL's own _api.py on the low layer", own_api)
    through_stores(python, dropin, own_api)
    telemetry(python, dropin)
    for scenario in SCENARIOS:
        for label, paths in (
            ("both the drop-in", (dropin, dropin)),
            ("NIXL's own _api.py on the low layer", (own_api, own_api)),
            ("target NIXL, initiator the drop-in", (None, dropin)),
            ("target the drop-in, initiator NIXL", (dropin, None)),
        ):
            two(python, scenario, label, paths)
    if source:
        own_files(python, Path(source), dropin)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main(*sys.argv[1:])
