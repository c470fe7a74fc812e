"""torchrun whose end says in one line, and by its exit code, how the processes ended.

    python -m acmix_mm.launch PROCESSES PROGRAM [arguments of PROGRAM]

The scripts ``tools/dist_*.sh`` start it; see :func:`options` for what it reads of the environment.
When a process fails, the others are ended, and the exit code is that of the first. SIGTERM goes to
all processes, which have 30 seconds to save what they have (``TORCH_ELASTIC_SHUTDOWN_TIMEOUT`` in
the environment: another number); the exit code then is 75, which asks a scheduler to try again.
"""

import os
import signal
import sys
from collections.abc import Mapping

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.run import main as torchrun


def options(environment: Mapping[str, str]) -> list[str]:
    """How torchrun has processes find each other.

    One machine takes a free port.

    Args:
        environment (Mapping[str, str]): NNODES (1): the number of machines; of several, NODE_RANK
            (0): this one's, MASTER_ADDR (127.0.0.1) and PORT (29500): the first one's; of one,
            MAX_RESTARTS (0): how often, after a process ended, all start again.

    Returns:
        list[str]: Arguments of torchrun.

    Raises:
        ValueError: For restarts of several machines; torchrun's processes then find the addresses
            of those before.
    """
    nodes, restarts = environment.get('NNODES', '1'), environment.get('MAX_RESTARTS', '0')
    if nodes == '1':
        return ['--standalone', f'--max-restarts={restarts}']
    if restarts != '0':
        raise ValueError(f'MAX_RESTARTS must be 0 for several machines, got {restarts}')
    return [
        f'--nnodes={nodes}',
        f'--node-rank={environment.get("NODE_RANK", "0")}',
        f'--master-addr={environment.get("MASTER_ADDR", "127.0.0.1")}',
        f'--master-port={environment.get("PORT", "29500")}',
    ]


def main(argv: list[str]) -> None:
    """Start processes, and wait for them.

    Args:
        argv (list[str]): See the module.
    """
    # By default addresses of the processes outlive a restart, and mislead those after it.
    os.environ.setdefault('TORCH_DISABLE_SHARE_RDZV_TCP_STORE', '1')
    processes, *program = argv
    try:
        torchrun([*options(os.environ), f'--nproc-per-node={processes}', *program])
    except ValueError as error:
        sys.exit(f'error: {error}')
    except ChildFailedError as error:
        rank, failure = _cause(error)
        print(f'error: process {rank} {_how(failure)}; so all are ended', file=sys.stderr)
        sys.exit(failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode)
    except SignalException as error:
        print(f'all processes are ended by {error.sigval.name}', file=sys.stderr)
        interrupted = error.sigval == signal.SIGINT
        sys.exit(128 + signal.SIGINT if interrupted else os.EX_TEMPFAIL)


def _cause(error: ChildFailedError) -> tuple[int, ProcessFailure]:
    """Rank and end of the process for which the others ended."""
    # What loses a killed process ends at once. Of those found together, torchrun takes the first.
    killed = [r for r, failure in error.failures.items() if failure.exitcode == -signal.SIGKILL]
    return (killed[0], error.failures[killed[0]]) if killed else error.get_first_failure()


def _how(failure: ProcessFailure) -> str:
    """The end of a process in words."""
    if failure.exitcode < 0:
        return f'was killed by {signal.Signals(-failure.exitcode).name}'
    return f'ended with exit code {failure.exitcode}'


if __name__ == '__main__':
    main(sys.argv[1:])
