import os

os.environ |= {
    "VLLM_TARGET_DEVICE": "cpu",
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "NIXL_ASYNC_TOKEN": "a secret",
}

import pytest
from engine import Remote

# vLLM takes ten seconds to import: engines are forked from a process that has done it, and has done nothing else.
Remote.context.set_forkserver_preload(["engine", "vllm", "nixl_async.integrations.vllm", "vllm.v1.core.sched.scheduler"])


@pytest.fixture
def start(tmp_path):
    """Start engines, and end those that still run when the test ends; each must end well."""
    engines = []

    def start(name, role, **options):
        engine = Remote(tmp_path, name, role, **options)
        engines.append(engine)
        return engine

    yield start
    for engine in engines:
        engine.close()
