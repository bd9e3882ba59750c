#!/usr/bin/env bash
# Dynamo: its nixl_connect on the drop-in and on stock NIXL, this library's dynamo_connect in its place, and each with the other.
# Dynamo's own tests of what is built on it run on both. --without-stock leaves the pairs with stock NIXL out.
. "$(dirname "$0")/common.sh"
here=$ROOT/tests/upstream/dynamo
environment dynamo =ai-dynamo==1.6.1 =ai-dynamo-runtime==1.6.1 =nixl==1.5.1 =nixl-cu12==1.5.1 ucxx-cu12 'pydantic>=2.10,<=2.13.5' \
    uvloop msgspec safetensors pillow 'aiohttp<4' pyyaml 'redis<9' pytest pytest-asyncio

"$ENV/bin/python" "$here/scenarios.py" "$@"
PYTHONPATH=$("$ENV/bin/python" -c 'import nixl_async.compat as c; print(c.path())') \
    "$ENV/bin/python" -m pytest -q -p no:cacheprovider --import-mode=importlib --noconftest -c /dev/null "$here/test_api.py"

# Those of them that need no GPU.
tests=$("$ENV/bin/python" -c 'import dynamo.common, pathlib; print(pathlib.Path(dynamo.common.__file__).parent / "tests/multimodal")')
of_theirs=(-q -p no:cacheprovider --import-mode=importlib -c /dev/null --asyncio-mode=auto -W ignore
    --noconftest -k "Nixl and not test_gpu" "$tests/test_embedding_transfer.py")
as_nixl "$ENV/bin/python" -m pytest "${of_theirs[@]}"
PYTHONPATH=$here "$ENV/bin/python" -m pytest -p as_nixl_connect "${of_theirs[@]}" -k "NixlRead and not test_gpu"
