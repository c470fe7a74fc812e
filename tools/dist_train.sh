#!/usr/bin/env bash
# Train on the GPUs of one or several machines, one process a GPU, started by torchrun.
#   tools/dist_train.sh CONFIG GPUS_PER_MACHINE [arguments of tools/train.py]
# Several machines: run it on each, with NNODES, NODE_RANK (0, 1, ...), MASTER_ADDR and PORT set.
set -euo pipefail
if [ $# -lt 2 ]; then
    sed -n '2,4s/^# //p' "$0" >&2
    exit 2
fi
tools=$(dirname "$0")
exec torchrun \
    --nnodes "${NNODES:-1}" \
    --node_rank "${NODE_RANK:-0}" \
    --master_addr "${MASTER_ADDR:-127.0.0.1}" \
    --master_port "${PORT:-29500}" \
    --nproc_per_node "$2" \
    "$tools"/train.py "$1" --launcher pytorch "${@:3}"
