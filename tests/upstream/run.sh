#!/usr/bin/env bash
# Run other projects' own code on this library: its drop-in for NIXL's API, and its plug-ins. Their code comes from the package
# registry, into .upstream/. Arguments name the systems (all of them: the scripts beside this one); prints one line for each.
set -uo pipefail
cd "$(dirname "$0")"
systems=("$@")
if [ $# = 0 ]; then
    for script in *.sh; do
        case $script in run.sh | common.sh) ;; *) systems+=("${script%.sh}") ;; esac
    done
fi
failed=0
summary=
for system in "${systems[@]}"; do
    if [ ! -e "$system.sh" ]; then
        echo "there is no $system.sh beside run.sh" >&2
        exit 2
    fi
    printf '\n=== %s\n' "$system"
    began=$SECONDS
    if bash "$system.sh"; then verdict=passed; else
        verdict="FAILED ($?)"
        failed=1
    fi
    summary+=$(printf '%-12s %-12s %5d s' "$system" "$verdict" $((SECONDS - began)))$'\n'
done
printf '\n%s' "$summary"
exit $failed
