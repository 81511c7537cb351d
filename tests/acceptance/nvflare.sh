#!/bin/sh
# NVFlare's simulator on both trainable bundles: two sites with stores of their own, two rounds.
# The last line says PASS or FAIL, the exit code too.
#   tests/acceptance/nvflare.sh [virtual environment]    # made there, or used if it is there
set -u
unset PYTHONPATH # pip would take what lies there for installed
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
environment=${1:-$work/environment}
trap 'rm -rf "$work"' EXIT

make_environment() {
    python3 -m venv "$environment" || return 1
    "$environment/bin/pip" install --quiet "nvflare>=2.9,<2.10" "$here/../.."
}

outcome=FAIL
if [ -x "$environment/bin/python" ] || make_environment; then
    PYTHONPATH="$here/../../common" OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 \
        "$environment/bin/python" "$here/federated_rounds.py" "$work" && outcome=PASS
    [ $outcome = PASS ] || tail -n 40 "$work"/*.log
fi
echo "$outcome"
[ $outcome = PASS ]
