#!/usr/bin/env bash
# Evaluate on the GPUs, or CPU cores, of one or several machines by torchrun, one process each.
#   tools/dist_test.sh CONFIG CHECKPOINT PROCESSES_PER_MACHINE [arguments of tools/test.py]
# Several machines: run it on each, with NNODES, NODE_RANK (0, 1, ...), MASTER_ADDR and PORT (29500)
# set. One machine takes a free port. PYTHON (python) is the interpreter.
set -euo pipefail
if [ $# -lt 3 ]; then
    sed -n '2,5s/^# //p' "$0" >&2
    exit 2
fi
exec "${PYTHON:-python}" -m acmix_mm.launch \
    "$3" "$(dirname "$0")"/test.py "$1" "$2" --launcher pytorch "${@:4}"
