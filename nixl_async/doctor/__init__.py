"""What this machine offers, what the library will use for each pair of places and why, what would make it faster, and a self-test.

Facts are read from the kernel's files in this process. Whatever loads other people's native libraries (UCX, CUDA, kvikio) runs in
processes of its own, bounded in time: one that crashes or hangs is a finding, not the end of the examination.
"""

from nixl_async.doctor.examination import examine
from nixl_async.doctor.report import Finding, Level, Report

__all__ = ["Finding", "Level", "Report", "examine"]
