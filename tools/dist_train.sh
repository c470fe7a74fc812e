#!/usr/bin/env bash
# Train on the GPUs, or CPU cores, of one or several machines by torchrun, one process each.
#   tools/dist_train.sh CONFIG PROCESSES_PER_MACHINE [arguments of tools/train.py]
# Several machines: run it on each, with NNODES, NODE_RANK (0, 1, ...), MASTER_ADDR and PORT (29500)
# set. One machine takes a free port. PYTHON (python) is the interpreter.
# One machine, MAX_RESTARTS (0): how often, after a process ended, all start again, from the last
# checkpoint.
set -euo pipefail
if [ $# -lt 2 ]; then
    sed -n '2,7s/^# //p' "$0" >&2
    exit 2
fi
tools=$(dirname "$0")
if [ "${NNODES:-1}" = 1 ]; then
    rendezvous=(--standalone --max-restarts "${MAX_RESTARTS:-0}")
elif [ "${MAX_RESTARTS:-0}" != 0 ]; then
    echo "error: MAX_RESTARTS must be 0 for several machines, got $MAX_RESTARTS" >&2
    exit 2
else
    rendezvous=(
        --nnodes "$NNODES"
        --node-rank "${NODE_RANK:-0}"
        --master-addr "${MASTER_ADDR:-127.0.0.1}"
        --master-port "${PORT:-29500}"
    )
fi
exec "${PYTHON:-python}" -m acmix_mm.launch \
    "${rendezvous[@]}" \
    --nproc-per-node "$2" \
    "$tools"/train.py "$1" --launcher pytorch "${@:3}"
