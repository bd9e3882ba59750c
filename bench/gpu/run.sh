#!/usr/bin/env bash
# Runs the tests that need a GPU and the GPU benches, from a checkout, on a machine with one NVIDIA GPU and no network.
#
#     bench/gpu/run.sh [WHEELS [OUT [PART...]]]
#
# WHEELS is a directory of wheels (default .whl): pytest, pytest-asyncio, pytest-timeout, cffi, rich, typer and what they need, if
# the machine's Python (PYTHON, default python3, >= 3.11, with cupy) lacks them; ucxx and RMM for the UCX backend; NIXL's wheel,
# nixl-cu13 or nixl-cu12, to be measured beside, in an environment of its own. OUT (default $OUT, else bench-gpu) gets gpu.json,
# gpu.txt and logs. PARTs (tests, or a command of bench.gpu) run alone; without, all of them do. It takes less than 8 minutes: each part is bounded. The exit status is 0 only if everything ran and every test
# passed, 3 if there is no GPU; missed promises are in the table.
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
cd "$root" || exit 1
python=${PYTHON:-python3}
wheels=$(realpath -m "${1:-.whl}")
out=$(realpath -m "${2:-${OUT:-bench-gpu}}")
kept=$(mktemp -d "${TMPDIR:-/tmp}/nixl-async-gpu.XXXXXX")
trap 'rm -rf "$kept"' EXIT
only=" ${*:3} "
failed=0

say() { printf '== %s\n' "$*"; }

"$python" - <<'PYTHON' || exit 3
import ctypes, sys

if sys.version_info < (3, 11):
    sys.exit(f"bench/gpu/run.sh: Python {sys.version.split()[0]} is too old; set PYTHON to one of 3.11 or later")
count = ctypes.c_int()
try:
    driver = ctypes.CDLL("libcuda.so.1")
    found = driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0
except OSError:
    found = False
if not found:
    sys.exit("bench/gpu/run.sh: there is no CUDA device here (libcuda.so.1 is missing or finds none); nothing was run")
PYTHON
mkdir -p "$out" "$kept/parts" || exit 1

# An environment of the wheels over what the machine's Python has. A virtual environment does not see the packages of another one
# it was made from: their directories are named in a .pth file.
environment() { # NAME WHEEL...: sets $made to its interpreter
    local directory="$kept/$1" site
    shift
    if "$python" -m venv --without-pip --system-site-packages "$directory" 2>/dev/null; then
        made="$directory/bin/python"
        site=$("$made" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
        "$python" -c 'import sys; print(*(p for p in sys.path if p.endswith(("site-packages", "dist-packages"))), sep="\n")' \
            >"$site/of-the-machine.pth"
    else
        # The workers of the benches keep PYTHONPATH.
        site="$directory/site"
        mkdir -p "$directory"
        printf '#!/bin/sh\nPYTHONPATH="%s${PYTHONPATH:+:$PYTHONPATH}" exec "%s" "$@"\n' "$site" "$python" >"$directory/python"
        chmod +x "$directory/python"
        made="$directory/python"
    fi
    [ $# -eq 0 ] || "$python" -m pip install -q --no-index --no-deps --no-compile --disable-pip-version-check --target "$site" "$@"
}

part() { # SECONDS NAME COMMAND...: runs one part, bounded
    local seconds=$1 name=$2 status
    shift 2
    [ "$only" = "  " ] || [[ $only == *" $name "* ]] || return 0
    say "$name (at most $seconds s)"
    timeout --kill-after=5 "$seconds" "$@" >"$out/$name.log" 2>&1
    status=$?
    tail -n 3 "$out/$name.log"
    if [ $status -ne 0 ]; then
        say "$name: exit status $status"
        failed=1
    fi
}

mapfile -t ours < <(find "$wheels" -maxdepth 1 -name '*.whl' ! -name 'nixl[_-]cu*' ! -name 'nixl-[0-9]*' 2>/dev/null | sort)
mapfile -t theirs < <(find "$wheels" -maxdepth 1 \( -name 'nixl_cu*.whl' -o -name 'nixl-[0-9]*.whl' \) 2>/dev/null | sort)
say "installing ${#ours[@]} wheels"
environment ours ${ours[@]+"${ours[@]}"} || exit 1
mine=$made
if ! "$mine" -c 'import nixl_async.native' 2>/dev/null; then
    say "building the compiled module"
    "$mine" nixl_async/native/builder.py || exit 1
fi
nixl=()
if [ ${#theirs[@]} -gt 0 ]; then
    say "NIXL: ${theirs[*]##*/}"
    environment nixl "${theirs[@]}" && nixl=(--nixl-python "$made")
fi

export PYTHONUNBUFFERED=1
part 200 tests "$mine" -m pytest --confcutdir=tests/gpu tests/gpu -m gpu --timeout 40 -p no:cacheprovider -q -rs \
    --junitxml="$kept/parts/tests.xml"
part 85 pages "$mine" -m bench.gpu pages ${nixl[@]+"${nixl[@]}"} --rounds 5 --out "$kept/parts"
part 40 peer-host "$mine" -m bench.gpu peer-host ${nixl[@]+"${nixl[@]}"} --rounds 3 --out "$kept/parts"
part 40 overlap "$mine" -m bench.gpu overlap --rounds 5 --out "$kept/parts"
part 30 host "$mine" -m bench.gpu host --rounds 5 --out "$kept/parts"
part 30 gather "$mine" -m bench.gpu gather --rounds 5 --out "$kept/parts"
part 15 wake "$mine" -m bench.gpu wake --out "$kept/parts"
"$mine" -m bench.gpu collect "$kept/parts" "$out/gpu.json" | tee "$out/gpu.txt" || [ "$only" != "  " ] || failed=1
say "results: $out/gpu.json, $out/gpu.txt; $([ $failed -eq 0 ] && echo 'everything ran' || echo 'NOT everything ran, see the logs')"
exit $failed
