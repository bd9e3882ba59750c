"""fio with io_uring on files of the same kind: as many requests in flight as a request has blocks. It moves bytes of its own."""

from __future__ import annotations

import json
import subprocess
from typing import Any

from plain import Array, Files, Measured, Stored, serve


class Fio(Stored):
    def opened(self) -> Any:
        self.files = Files(self.options, "fio", self.index, len(self.buffer))

    def put(self, content: Array) -> None:
        self.files.put(content, self.point.block)

    def blank(self, value: int) -> None:
        """Nothing is there to be compared."""

    def check(self) -> Any:
        return 0, 0

    def run(self, iterations: int) -> Any:
        """Run fio once for as many blocks; its own clock counts."""
        measured, point = Measured(), self.point
        random = "rand" if point.location != "none" else ""
        command = [
            "fio", "--name=bench", "--output-format=json", "--ioengine=io_uring", "--thread",
            f"--filename={':'.join(self.files.paths)}", f"--rw={random}{point.op.lower()}", f"--bs={point.block}",
            f"--iodepth={point.batch * self.options['pipeline_depth']}", f"--numjobs={self.options['num_threads']}",
            f"--direct={int(self.files.direct)}", f"--filesize={self.files.nbytes}", "--group_reporting",
            f"--io_size={-(-iterations // self.options['num_threads']) * point.batch * point.block}", "--norandommap",
        ]  # fmt: skip
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        if ran.returncode:
            raise RuntimeError(f"fio ended with {ran.returncode}: {(ran.stderr or ran.stdout).strip()[-300:]}")
        (job,) = json.loads(ran.stdout[ran.stdout.index("{") :])["jobs"]
        found = job[point.op.lower()]
        measured.nbytes = found["io_bytes"]
        measured.seconds = found["io_bytes"] / found["bw_bytes"]
        measured.cpu = (job["usr_cpu"] + job["sys_cpu"]) / 100 * job["job_runtime"] / 1000
        return measured.as_dict(route="io_uring")


if __name__ == "__main__":
    serve(Fio())
