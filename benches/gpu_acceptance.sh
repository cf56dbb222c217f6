#!/usr/bin/env bash
# Measures what is promised of a card and writes one JSON a bench into RESULTS, as soon as it is there. A bench that
# fails or outlasts its time does not stop the next, and ends this with exit code 1. Each part takes under 9 minutes:
# PART=whole (the default), what fits the card beside what is offloaded; PART=capped, an 8 B model in 24 GiB of it.
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

whole() {
  local -A seconds=([tiny]=60 [1b]=80 [8b]=200)
  measure 60 link link --device "$device"
  measure 80 adamw adamw
  measure 50 step step --device "$device"
  measure 60 swap swap --device "$device"
  for size in ${SIZES:-1b 8b}; do
    measure "${seconds[$size]}" "train-$size" train --device "$device" --size "$size" \
      ${HOST_BUDGET:+--host-budget "$HOST_BUDGET"}
  done
}

# Micro-batches of 8 k tokens with checkpointing; of 4 k with activations on the host, which must hold them too.
capped() {
  local model=(train --device "$device" --size 8b --vocabulary 32768 --steps 3 --device-cap 24
    ${HOST_BUDGET:+--host-budget "$HOST_BUDGET"})
  for tokens in 8192 16384 32768; do
    measure 130 "capped-$((tokens / 1024))k" "${model[@]}" --tokens "$tokens" --micro-batch 8192 \
      --offload optimizer gradients params
  done
  measure 130 capped-activations "${model[@]}" --tokens 8192 --micro-batch 4096 --no-checkpointing \
    --offload optimizer gradients params activations
}

case ${PART:-whole} in
  whole | capped) "${PART:-whole}" ;;
  *) echo "PART=$PART: give whole or capped" >&2 && exit 2 ;;
esac
if ((${#failed[@]})); then
  echo "gpu_acceptance: failed or stopped: ${failed[*]}" >&2
  exit 1
fi
