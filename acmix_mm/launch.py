"""torchrun whose end says in one line, and by its exit code, how the processes ended.

    python -m acmix_mm.launch [arguments of torchrun] PROGRAM [arguments of PROGRAM]

The scripts ``tools/dist_*.sh`` start it. When a process fails, the others are ended, and the exit
code is that of the first. SIGTERM goes to all processes, which have 30 seconds to save what they
have (``TORCH_ELASTIC_SHUTDOWN_TIMEOUT`` in the environment: another number); the exit code then is
75, which asks a scheduler to try again.
"""

import os
import signal
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.run import main as torchrun


def main(argv: list[str] | None = None) -> None:
    """Start processes, and wait for them.

    Args:
        argv (list[str] | None): See the module. Default: the command line.
    """
    # By default addresses of the processes outlive a restart, and mislead those after it.
    os.environ.setdefault('TORCH_DISABLE_SHARE_RDZV_TCP_STORE', '1')
    try:
        torchrun(argv)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        print(f'error: process {rank} {_how(failure)}; so all are ended', file=sys.stderr)
        sys.exit(failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode)
    except SignalException as error:
        print(f'all processes are ended by {error.sigval.name}', file=sys.stderr)
        interrupted = error.sigval == signal.SIGINT
        sys.exit(128 + signal.SIGINT if interrupted else os.EX_TEMPFAIL)


def _how(failure: ProcessFailure) -> str:
    """The end of a process in words."""
    if failure.exitcode < 0:
        return f'was killed by {signal.Signals(-failure.exitcode).name}'
    return f'ended with exit code {failure.exitcode}'


if __name__ == '__main__':
    main()
