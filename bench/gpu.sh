#!/usr/bin/env bash
# Run `python -m bench.gpu` on a machine that cannot install anything, in under nine minutes.
#
#     bash bench/gpu.sh [OUT]                           the first argument or $OUT is the folder of the results
#     PROVIDER=cpu NETS=resnet20 LIMIT=60 bash bench/gpu.sh results
#
# WHEELS (default: .gpu) holds wheels that the machine lacks, large ones in pieces NAME.whl.aa, NAME.whl.ab, ... as
# `split -b 48M NAME.whl NAME.whl.` makes them. onnxruntime-gpu from there goes before an installed onnxruntime.
# PROVIDER, NETS, LIMIT (seconds) and ONLY (kinds of steps) are the options of bench.gpu; PYTHON is the interpreter.
set -eu
cd "$(dirname "$0")/.."
out=${1:-${OUT:?type the folder of the results}}
python=${PYTHON:-python3}
wheels=${WHEELS:-.gpu}
if [ -d "$wheels" ]; then
  target=$(mktemp -d)
  trap 'rm -rf "$target"' EXIT
  for piece in "$wheels"/*.whl.aa; do
    [ -e "$piece" ] && cat "${piece%.aa}".[a-z][a-z] > "$target/$(basename "${piece%.aa}")"
  done
  find "$wheels" -name '*.whl' -exec cp {} "$target" \;
  "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$target/site" "$target"/*.whl
  export PYTHONPATH="$target/site${PYTHONPATH:+:$PYTHONPATH}"
fi
# shellcheck disable=SC2086  # NETS and ONLY are lists
"$python" -m bench.gpu "$out" ${PROVIDER:+--provider "$PROVIDER"} ${NETS:+--nets $NETS} \
  ${LIMIT:+--limit "$LIMIT"} ${ONLY:+--only $ONLY}
