#!/usr/bin/env bash
# SGLang's prefill-decode disaggregation: its own NIXL backend on the drop-in, and the transfer backend nixl_async, between processes.
# Arguments are words of the scenarios to run (all).
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
source "$ROOT/tests/upstream/sglang/environment"
cd "$ROOT/tests/upstream/sglang/pd"
export PYTHONDONTWRITEBYTECODE=1 PYTHONWARNINGS=ignore NIXL_LOG_LEVEL=WARN
failed=0
as_nixl "$ENV/bin/python" run.py nixl "$@" || failed=1
"$ENV/bin/python" run.py nixl_async "$@" || failed=1
"$ENV/bin/python" -m pytest -q --no-header --tb=short -c /dev/null --rootdir . --confcutdir . -p no:cacheprovider --timeout 120 . || failed=1
exit $failed
