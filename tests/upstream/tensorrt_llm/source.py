"""TensorRT-LLM's own transfer agent, from a tree of its source or an installed package, without the rest of it.

Only its logger and its nvtx ranges are stubs; the CUDA library that the package loads is not touched.
"""

import importlib
import logging
import sys
import types
from pathlib import Path


def package(name, path=None):
    module = types.ModuleType(name)
    module.__path__ = [str(path)] if path is not None else []
    sys.modules[name] = module
    return module


def load(tree):
    """Return its modules `base.agent` and `nixl._agent_py`; `tree` is the folder that has `tensorrt_llm`."""
    root = Path(tree) / "tensorrt_llm"
    folder = root / "_torch/disaggregation"
    if not (folder / "nixl/_agent_py.py").is_file():
        raise SystemExit(f"{root} has no _torch/disaggregation/nixl/_agent_py.py")
    log = logging.getLogger("tensorrt_llm")
    top = package("tensorrt_llm")
    logger = package("tensorrt_llm.logger")
    top.logger = logger.logger = log
    tools = package("tensorrt_llm._utils")
    tools.nvtx_range = lambda *arguments, **options: lambda function: function
    package("tensorrt_llm._torch", root / "_torch")
    package("tensorrt_llm._torch.disaggregation", folder)
    for part in ("base", "nixl"):
        package(f"tensorrt_llm._torch.disaggregation.{part}", folder / part)
    base = importlib.import_module("tensorrt_llm._torch.disaggregation.base.agent")
    return base, importlib.import_module("tensorrt_llm._torch.disaggregation.nixl._agent_py")
