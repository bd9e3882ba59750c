"""Rules about devices, networks and processors, as `findings` has them about everything else."""

from __future__ import annotations

from collections.abc import Iterator

from nixl_async.doctor.report import Finding, Level, Report

OK, NOTE, SLOW, BROKEN = Level.OK, Level.NOTE, Level.SLOW, Level.BROKEN

FAST_MBIT = 10_000
SOCKET_NBYTES = 16 << 20
"""What TCP may have under way on a fast network: 100 Gbit/s times a round trip of 1.3 ms."""


def judge_gpu(report: Report) -> Iterator[Finding]:
    """Judge devices, and the ways into and out of their memory."""
    facts, devices = report.facts, report.gpu.get("devices") or []
    hidden = facts.get("environment", "CUDA_VISIBLE_DEVICES")
    if facts.get("gpu", "driver") is None and not report.gpu.get("driver"):
        yield Finding(OK, "there is no NVIDIA driver: no VRAM is moved")
        return
    if not devices:
        yield Finding(
            NOTE if hidden is not None else BROKEN,
            "there is an NVIDIA driver, and CUDA finds no device",
            f"CUDA_VISIBLE_DEVICES is {hidden!r}" if hidden is not None else "cuInit or cuDeviceGetCount fails",
            "unset CUDA_VISIBLE_DEVICES"
            if hidden is not None
            else "nvidia-smi says why; docker: --gpus all; Kubernetes: resources.limits nvidia.com/gpu",
        )
        return
    yield Finding(OK, f"{len(devices)} CUDA devices, driver for CUDA {report.gpu.get('cuda')}")
    if "cupy" in report.missing.get("cuda", ""):
        yield Finding(
            SLOW,
            "VRAM cannot be copied here: cupy is missing",
            report.missing["cuda"],
            "pip install 'nixl-async[cu12]', or [cu13]",
        )
    apart = [number for number, device in enumerate(devices) if len(device["reaches"]) < len(devices) - 1]
    if apart:
        yield Finding(
            NOTE,
            f"devices {apart} do not reach every other device",
            "cuDeviceCanAccessPeer",
            "copies between them go by the host",
        )
    if "gds" in report.missing:
        yield Finding(NOTE, "VRAM goes to files by way of the host", report.missing["gds"], "pip install 'nixl-async[gds]'")
    elif report.gds.get("compat_mode") == "ON" or not facts.get("gds", "nvidia-fs"):
        there = "is" if facts.get("gds", "nvidia-fs") else "is not"
        yield Finding(
            NOTE,
            "kvikio copies through the host: there is no GPUDirect Storage",
            f"compat mode {report.gds.get('compat_mode')}; /proc/driver/nvidia-fs {there} there",
            "install nvidia-fs (package nvidia-gds), modprobe nvidia-fs, KVIKIO_COMPAT_MODE=OFF",
        )
    if report.ucx is not None and report.ucx.rdma and not facts.get("rdma", "nvidia_peermem"):
        yield Finding(
            NOTE,
            "RDMA cards may not reach VRAM: nvidia_peermem is not loaded",
            "/sys/module/nvidia_peermem; DMA-BUF does it too, with the open kernel modules and Linux 5.12",
            "modprobe nvidia-peermem",
        )


def judge_network(report: Report) -> Iterator[Finding]:
    """Judge the fastest interface, and what TCP may have under way on it."""
    facts = report.facts
    speeds = {
        fact.name.removesuffix(" Mbit/s"): facts.number("network", fact.name, 0)
        for fact in facts.room("network")
        if fact.name.endswith(" Mbit/s") and not fact.name.startswith("lo ")
    }
    known = {name: speed for name, speed in speeds.items() if speed}
    if not known:
        told = f"{', '.join(speeds)} tell" if len(speeds) > 1 else f"{next(iter(speeds), 'no interface')} tells"
        yield Finding(OK, f"{told} no speed: a virtual interface, or none")
        return
    fastest = max(known, key=lambda name: known[name])
    speed = f"{known[fastest] / 1000:g} Gbit/s, {known[fastest] / 8000:.3g} GB/s"
    if known[fastest] < FAST_MBIT:
        yield Finding(
            NOTE,
            f"the fastest interface, {fastest}, has {speed}: other hosts get no more",
            f"/sys/class/net/{fastest}/speed",
        )
        return
    yield Finding(OK, f"the fastest interface, {fastest}, has {speed}")
    small = {name: facts.number("network", f"net.ipv4.{name} max", SOCKET_NBYTES) for name in ("tcp_rmem", "tcp_wmem")}
    small = {name: most for name, most in small.items() if most < SOCKET_NBYTES}
    if small:
        yield Finding(
            SLOW,
            "TCP may not have enough bytes under way to fill that: "
            + ", ".join(f"{n} ends at {v / 2**20:.3g} MiB" for n, v in small.items()),
            "the kernel sizes the sockets of tcp and ucx by itself up to that; net.core.rmem_max binds only who sets a size",
            "; ".join(f"sysctl -w net.ipv4.{name}='4096 {131072} {SOCKET_NBYTES}'" for name in small),
        )
    if facts.number("network", f"{fastest} MTU", 9000) <= 1500:
        yield Finding(
            NOTE,
            f"{fastest} has an MTU of {facts.get('network', f'{fastest} MTU')}: more packets, more CPU for each GB",
            f"/sys/class/net/{fastest}/mtu",
            f"ip link set {fastest} mtu 9000, if every switch and host between allows it",
        )


def judge_cpu(report: Report) -> Iterator[Finding]:
    """Judge clocks and NUMA nodes."""
    facts = report.facts
    governor = facts.get("machine", "cpufreq governor")
    if governor not in (None, "performance", "schedutil"):
        yield Finding(
            NOTE,
            f"the cpufreq governor is {governor}: cores are slow to speed up for short transfers",
            "/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor",
            "cpupower frequency-set -g performance",
        )
    if facts.number("machine", "numa nodes", 1) > 1:
        near = sorted(
            {
                f"{fact.name.removesuffix(' numa node')}: node {fact.value}"
                for fact in facts.room("network")
                if "numa" in fact.name
            }
        )
        yield Finding(
            NOTE,
            f"{facts.get('machine', 'numa nodes')} NUMA nodes: copies across them, and to a card of another one, are slower",
            "; ".join(near) or "/sys/devices/system/node",
            "numactl --cpunodebind=N --membind=N for each process, N being the node of its GPU and card",
        )
