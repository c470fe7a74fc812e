#!/usr/bin/env bash
# Train on the GPUs, or CPU cores, of one or several machines by torchrun, one process each.
#   tools/dist_train.sh CONFIG PROCESSES_PER_MACHINE [arguments of tools/train.py]
# Several machines: run it on each, with NNODES, NODE_RANK (0, 1, ...), MASTER_ADDR and PORT set.
# One machine takes a free PORT unless it is set. PYTHON (python) is the interpreter.
# MAX_RESTARTS (0) is how often, after a process ended, all start again from the last checkpoint.
set -euo pipefail
if [ $# -lt 2 ]; then
    sed -n '2,6s/^# //p' "$0" >&2
    exit 2
fi
tools=$(dirname "$0")
rendezvous=(--standalone)
if [ "${NNODES:-1}" != 1 ] || [ -n "${PORT:-}" ]; then
    rendezvous=(
        --nnodes "${NNODES:-1}"
        --node-rank "${NODE_RANK:-0}"
        --master-addr "${MASTER_ADDR:-127.0.0.1}"
        --master-port "${PORT:-29500}"
    )
fi
exec "${PYTHON:-python}" -m acmix_mm.launch \
    "${rendezvous[@]}" \
    --nproc-per-node "$2" \
    --max-restarts "${MAX_RESTARTS:-0}" \
    "$tools"/train.py "$1" --launcher pytorch "${@:3}"
