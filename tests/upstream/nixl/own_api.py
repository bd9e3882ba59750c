"""Lay out packages `nixl`, `nixl_cu12`, `nixl_cu13` of the Python files in NIXL's wheel and, under them, the drop-in's low layer.

`own_api.py DIRECTORY`: what is imported from there is NIXL's own `_api.py`, which calls this library as if it were NIXL's C++.
"""

import importlib.util
import sys
from pathlib import Path

LOW = {"_bindings": "bindings", "_utils": "buffers"}
FILES = ("__init__.py", "_api.py", "logging.py")


def main(directory):
    (wheel,) = importlib.util.find_spec("nixl_cu12").submodule_search_locations
    for package in ("nixl", "nixl_cu12", "nixl_cu13"):
        target = Path(directory) / package
        target.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            (target / name).write_bytes((Path(wheel) / name).read_bytes())
        for theirs, ours in LOW.items():
            (target / f"{theirs}.py").write_text(
                f"import sys\n\nfrom nixl_async.compat import {ours}\n\nsys.modules[__name__] = {ours}\n"
            )


if __name__ == "__main__":
    main(sys.argv[1])
