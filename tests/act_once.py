"""An action of one process for two, for test_command_line.py; started by torchrun.

Each line of what happens goes to the file argv[1], what both processes have in the end to argv[2];
with argv[3], the action exits with this message.
"""

import sys
import time

from mmengine.config import Config
from processes import save_both_and_leave
from torch import distributed

from acmix_mm.command_line import join_processes, once


def log(event: str) -> None:
    with open(sys.argv[1], 'a') as file:
        file.write(f'{distributed.get_rank()} {event}\n')


def action(cfg: Config) -> None:
    log('acted')
    if len(sys.argv) > 3:
        sys.exit(sys.argv[3])
    cfg.weights = f'found by {distributed.get_rank()}'


cfg = Config({'launcher': 'pytorch', 'weights': None})
join_processes(cfg)
try:
    cfg = once(action, cfg)
except SystemExit as error:
    time.sleep(distributed.get_rank())  # torchrun ends the other at once
    log(f'exits with {error.code}')
    time.sleep(2 - distributed.get_rank())
    raise
backend = distributed.get_backend()
save_both_and_leave({'weights': cfg.weights, 'backend': backend}, sys.argv[2])
