#!/usr/bin/env bash
# A release of diffboost_segmentation in MONAI Label's monaibundle app: info, infer, train.
#   bash tests/acceptance/monai_label.sh [VENV]
# VENV is the server's virtual environment, made by docs/monai_label_constraints.txt if it is not
# there; none given: a new one in a temporary folder. Our package is not installed in it.
# PYTHON (python3) makes the release and the phantoms: an interpreter with this project's
# requirements. PORT (8123) is the server's. TMPDIR needs 10 GB while the environment is made.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
unset PYTHONPATH # the server must do without this project's package
python=$(command -v "${PYTHON:-python3}")
case $python in /*) ;; *) python=$PWD/$python ;; esac # the folder and the PATH change below
port=${PORT:-8123}
work=$(mktemp -d)
venv=${1:-$work/venv}
server=""
name=diffboost_segmentation

finish() {
  code=$?
  if [ -n "$server" ]; then
    kill -- "-$server" 2>/dev/null || true
    wait "$server" 2>/dev/null || true
  fi
  if [ $code -eq 0 ]; then
    rm -rf "$work"
    echo "PASS: MONAI Label serves and trains a release of $name"
  else
    [ -f "$work/server.log" ] && tail -n 60 "$work/server.log"
    echo "FAIL: MONAI Label, see $work"
  fi
  exit $code
}
trap finish EXIT

echo "1. the server's environment: $venv"
if [ ! -x "$venv/bin/monailabel" ]; then
  python3 -m venv "$venv"
  "$venv/bin/pip" install -c "$root/docs/monai_label_constraints.txt" monailabel \
    einops fire h5py matplotlib pandas pyarrow safetensors
  "$venv/bin/pip" check
fi
export PATH="$venv/bin:$PATH" # the command monailabel takes the python that comes first

echo "2. a release, phantoms, and what monai.bundle run makes of them"
cd "$work"
PYTHONPATH="$root/common" "$python" -m diffboost.cli package "$root/bundles/$name" \
  --output_dir "$work/dist"
PYTHONPATH="$root/common" "$python" "$root/tests/acceptance/monai_label_data.py" "$work/data"
cp -r "$work"/dist/$name-*/ "$work/release"
for kind in volumes pictures; do
  "$venv/bin/python" -m monai.bundle run --config_file "$work/release/configs/inference.json" \
    --bundle_root "$work/release" --dataset_dir "$work/data/$kind" \
    --output_dir "$work/expected" >"$work/$kind.log" 2>&1
done

echo "3. the app, by the commands of docs/monai_label.md"
monailabel apps --download --name monaibundle --output "$work/apps" >"$work/apps.log"
mkdir -p "$work/apps/monaibundle/model"
cp -r "$work/release" "$work/apps/monaibundle/model/$name"
set -m # a process group of its own, with the training processes
monailabel start_server --app "$work/apps/monaibundle" --studies "$work/data/studies" \
  --conf models $name --conf zoo_source local --conf sam2 false \
  --host 127.0.0.1 --port "$port" >"$work/server.log" 2>&1 &
server=$!
set +m

echo "4. info, infer, train"
"$venv/bin/python" "$root/tests/acceptance/monai_label_client.py" --port "$port" \
  --data "$work/data" --expected "$work/expected" \
  --bundle "$work/apps/monaibundle/model/$name" --log "$work/server.log"
