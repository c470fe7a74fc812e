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
exec "${PYTHON:-python}" -m acmix_mm.launch \
    "$2" "$(dirname "$0")"/train.py "$1" --launcher pytorch "${@:3}"
