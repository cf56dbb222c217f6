#!/usr/bin/env bash
# Measures what is promised of a card and writes one JSON a bench into RESULTS, as soon as it is there. A bench that
# fails or outlasts its time does not stop the next, and ends this with exit code 1. All in all under 9 minutes.
# PYTHON, RESULTS, DEVICE, SIZES ("1b 8b"), HOST_BUDGET ("110GiB") and FLAGS (--quick) change the defaults.
set -uo pipefail
python=${PYTHON:-python3}
results=${RESULTS:-benches/results}
device=${DEVICE:-cuda}
mkdir -p "$results" || exit
name=$("$python" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu")') || exit
stem=$results/$(date -u +%F)-$(tr ' [:upper:]' '-[:lower:]' <<<"$name")
# The 8 B model resident fills most of the largest cards: no room for a fragmented cache.
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
failed=()
trap 'exit 130' INT

measure() { # seconds, name of the file, arguments of `offload bench`
  local seconds=$1 name=$2
  shift 2
  timeout --foreground --signal=INT --kill-after=10 "$seconds" \
    "$python" -m offload bench "$@" ${FLAGS:-} --json "$stem-$name.json" >/dev/null || failed+=("$name")
}

declare -A seconds=([tiny]=60 [1b]=80 [8b]=240)
measure 60 link link --device "$device"
measure 90 adamw adamw
measure 50 step step --device "$device"
for size in ${SIZES:-1b 8b}; do
  measure "${seconds[$size]}" "train-$size" train --device "$device" --size "$size" \
    ${HOST_BUDGET:+--host-budget "$HOST_BUDGET"}
done
if ((${#failed[@]})); then
  echo "gpu_acceptance: failed or stopped: ${failed[*]}" >&2
  exit 1
fi
