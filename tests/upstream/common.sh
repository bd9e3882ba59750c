# What the scripts of this directory share; they source it and are run by run.sh, each in a process of its own.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
UPSTREAM=$ROOT/.upstream
export PIP_DISABLE_PIP_VERSION_CHECK=1
mkdir -p "$UPSTREAM"

# environment NAME PACKAGE...: set ENV to a virtual environment of that name which has this library, CPU torch and the packages,
# made once. A package of the form `=X` is installed without its dependencies, most of which would be CUDA's.
environment() {
    ENV=$UPSTREAM/$1
    shift
    [ ! -e "$ENV/made-of" ] || [ "$(cat "$ENV/made-of")" != "$*" ] || return 0
    rm -rf "$ENV"
    "${PYTHON:-python3}" -m venv "$ENV"
    "$ENV/bin/python" -m pip install --quiet torch==2.13.0 numpy
    "$ENV/bin/python" -m pip install --quiet --editable "$ROOT"
    local package alone=() with_needs=()
    for package in "$@"; do
        case $package in
        =*) alone+=("${package#=}") ;;
        *) with_needs+=("$package") ;;
        esac
    done
    [ ${#with_needs[@]} = 0 ] || "$ENV/bin/python" -m pip install --quiet "${with_needs[@]}"
    [ ${#alone[@]} = 0 ] || "$ENV/bin/python" -m pip install --quiet --no-deps "${alone[@]}"
    echo "$*" >"$ENV/made-of"
}

# as_nixl COMMAND...: run a command of ENV to which `import nixl` means this library.
as_nixl() {
    PATH="$ENV/bin:$PATH" "$ENV/bin/nixl-async" run-as-nixl -- "$@"
}

# source_of NAME VERSION: set SOURCE to the unpacked source distribution of a package.
source_of() {
    SOURCE=$UPSTREAM/src/$1-$2
    [ ! -e "$SOURCE/unpacked" ] || return 0
    rm -rf "$SOURCE"
    mkdir -p "$SOURCE"
    "${PYTHON:-python3}" - "$1" "$2" "$SOURCE" <<'PY'
import io, json, os, sys, tarfile, urllib.request
from urllib.parse import urljoin

from pip._internal.models.index import PyPI

name, version, target = sys.argv[1:]
index = os.environ.get("PIP_INDEX_URL", PyPI.simple_url).rstrip("/")
ask = urllib.request.Request(f"{index}/{name}/", headers={"Accept": "application/vnd.pypi.simple.v1+json"})
with urllib.request.urlopen(ask, timeout=60) as answer:
    files = json.load(answer)["files"]
(url,) = (file["url"] for file in files if file["filename"].replace("_", "-") == f"{name}-{version}.tar.gz".replace("_", "-"))
with urllib.request.urlopen(urljoin(f"{index}/{name}/", url), timeout=300) as answer:
    archive = tarfile.open(fileobj=io.BytesIO(answer.read()))
for member in archive.getmembers():
    member.name = member.name.partition("/")[2]
    if member.name:
        archive.extract(member, target, filter="data")
PY
    touch "$SOURCE/unpacked"
}
