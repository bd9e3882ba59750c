#!/usr/bin/env bash
# Ray Direct Transport: Ray's own NIXL transport on the drop-in, and this library's transport, each with two actors and the driver.
. "$(dirname "$0")/common.sh"
here=$ROOT/tests/upstream/ray
environment ray ray==2.60.0 ucxx-cu12 pytest
export NIXL_ASYNC_HOST=127.0.0.1 RAY_USAGE_STATS_ENABLED=0 RAY_DEDUP_LOGS=0

as_nixl "$ENV/bin/python" "$here/scenarios.py" NIXL
"$ENV/bin/python" "$here/scenarios.py" NIXL_ASYNC
"$ENV/bin/python" -m pytest -q -p no:cacheprovider --import-mode=importlib --noconftest -c /dev/null "$here/test_transport.py"
"$ENV/bin/python" -P -m nixl_async bench transfer --runtime ray --num-initiator-dev 2 --num-target-dev 2 --max-block-size 65536 --num-iter 100
