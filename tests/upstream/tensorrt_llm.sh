#!/usr/bin/env bash
# TensorRT-LLM's Python transfer agent (TRTLLM_USE_PY_NIXL_KVCACHE=1) on the drop-in, between two processes.
# The package registry has no wheel of it, and its source distributions hold no code: its own file runs where TENSORRT_LLM_SOURCE names
# a folder with it (a checkout, or the site-packages of an installation); elsewhere a port of the calls that it makes.
. "$(dirname "$0")/common.sh"
here=$ROOT/tests/upstream/tensorrt_llm
environment tensorrt_llm ucxx-cu12
export NIXL_ASYNC_HOST=127.0.0.1

as_nixl "$ENV/bin/python" "$here/scenarios.py"
if [ -n "${TENSORRT_LLM_SOURCE:-}" ]; then
    as_nixl "$ENV/bin/python" "$here/scenarios.py" "$TENSORRT_LLM_SOURCE"
else
    echo "tensorrt_llm: its own file is not tried: TENSORRT_LLM_SOURCE is not set"
fi
