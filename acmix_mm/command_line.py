"""What the programs in tools/ share: errors, config with overrides, processes, checkpoints."""

import argparse
import atexit
import contextlib
import ctypes
import functools
import logging
import math
import os
import re
import select
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn
from unittest import mock

import torch
from mmengine.config import Config, DictAction
from mmengine.dist import broadcast_object_list, get_rank, init_dist, is_distributed
from mmengine.logging import MMLogger
from mmengine.utils.dl_utils import set_multi_processing
from torch import distributed

from .checkpoints import make_checkpoints_loadable, read_checkpoint
from .config_check import checked_config, reason
from .engine.distributed import CPUDistributedDataParallel, SharedBuffersHook
from .ops._dispatch import BACKEND_VARIABLE, check_backend
from .weights import build, check_fit

WORK_DIRS = 'work_dirs'
LENGTH = 300  # of a message
MEMORY_ADVICE = (
    'smaller batches and fewer processes need less, for example --cfg-options '
    'train_dataloader.batch_size=1 train_dataloader.num_workers=0'
)
IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp', '.ppm')


# How processes are started for a launcher, and the environment that they then have.
LAUNCHERS = {
    'pytorch': ('torchrun', ('RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT')),
    'slurm': ('srun', ('SLURM_PROCID', 'SLURM_NTASKS', 'SLURM_NODELIST')),
    'mpi': (
        'mpirun',
        (
            'OMPI_COMM_WORLD_RANK', 'OMPI_COMM_WORLD_SIZE', 'OMPI_COMM_WORLD_LOCAL_RANK',
            'MASTER_ADDR',
        ),
    ),
}  # fmt: skip


class Parser(argparse.ArgumentParser):
    """Parser of every program, with the option ``--traceback``; see :func:`program`."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.add_argument(
            '--traceback',
            action='store_true',
            help='show where in the code an error was raised, too',
        )

    def error(self, message: str) -> NoReturn:
        """End with one line, not with the usage before it."""
        self.exit(2, f'error: {message} (see {self.prog} --help)\n')


class OptionsAction(DictAction):
    """Action of ``--cfg-options``; mmengine's takes half a list for a text, or raises."""

    def __call__(self, parser, namespace, values, option_string=None):
        for option in values:
            key, equals, value = option.partition('=')
            pairs = (value.count(a) == value.count(b) for a, b in ('()', '[]'))
            if not key or not equals or not all(pairs):
                raise argparse.ArgumentError(
                    self, f'must be KEY=VALUE with pairs of brackets, got {option!r}'
                )
        super().__call__(parser, namespace, values, option_string)


def program(main: Callable[[list[str] | None], None]) -> Callable[[list[str] | None], None]:
    """Decorate the main function of a program: every error of it ends in one line.

    The traceback goes to the log, if there is one yet, and is shown with ``--traceback``.
    """

    @functools.wraps(main)
    def run(argv: list[str] | None = None) -> None:
        traced = '--traceback' in (sys.argv[1:] if argv is None else argv)
        try:
            check_backend(os.environ.get(BACKEND_VARIABLE) or None, BACKEND_VARIABLE)
            main(argv)
            sys.stdout.flush()
        except KeyboardInterrupt:
            print('interrupted', file=sys.stderr)
            sys.exit(130)  # as shells say it
        except SystemExit as error:
            if traced and error.__cause__ is not None:
                raise error.__cause__ from None
            raise
        except Exception as error:
            if isinstance(error, BrokenPipeError) and is_stdout_closed():
                sys.exit(141)  # as shells say it
            if traced:
                raise
            raise SystemExit(f'error: {in_one_line(error)}{log_traceback(error)}') from error

    @functools.wraps(main)
    def run_to_the_end(argv: list[str] | None = None) -> None:
        code = None
        try:
            run(argv)
        except SystemExit as error:
            code = error.code
            if not is_over_gloo():
                raise
        if is_over_gloo():
            end_process(code)

    return run_to_the_end


def is_over_gloo() -> bool:
    """Whether this is one of several processes that exchange over gloo."""
    return is_distributed() and distributed.get_backend() == 'gloo'


def end_process(code: str | int | None) -> NoReturn:
    """End as ``sys.exit(code)`` does, but without the destructors of libraries.

    Once in many runs, a thread of gloo outlives its group there, and the process would end by
    SIGABRT.
    """
    if isinstance(code, str):
        print(code, file=sys.stderr)
        code = 1
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code or 0)


def is_stdout_closed() -> bool:
    """Whether nobody reads the output any more, as behind ``| head``; then there is none."""
    poll = select.poll()
    poll.register(1, select.POLLOUT)
    closed = any(event & select.POLLERR for _, event in poll.poll(0))
    if closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what is flushed at the end
    return closed


def is_ours(error: BaseException) -> bool:
    """Whether the package itself refuses something, with a message for users."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    raised_here = frames and frames[-1].f_globals['__name__'].startswith('acmix_mm.')
    return isinstance(error, ValueError) and bool(raised_here)


def in_one_line(error: Exception) -> str:
    """What went wrong, without line breaks, and what helps, if that is known."""
    if isinstance(error, OSError) and error.strerror is not None:
        return error.strerror if error.filename is None else f'{error.filename}: {error.strerror}'
    text = str(error)
    if re.match(r'Caught \w+ in DataLoader worker process', text):
        # The traceback of the worker; below its last frame and that one's code is what it raised.
        text = re.split(r'(?m)^  File ".*\n(?:    .*\n)*', text)[-1]
        return shortened(' '.join(text.split()))
    text = reason(error)
    if isinstance(error, MemoryError | torch.cuda.OutOfMemoryError) or 'allocate memory' in text:
        return f'out of memory; {MEMORY_ADVICE}: {text}'[:LENGTH]
    if re.search(r'DataLoader worker .* (killed|exited unexpectedly)', text):
        return f'a process that loads data has died, often for want of memory; {MEMORY_ADVICE}'
    return text.partition(': ')[2] if is_ours(error) else shortened(text)


def shortened(text: str) -> str:
    """A message of such length that it is read."""
    return text if len(text) <= LENGTH else f'{text[: LENGTH - 3]}...'


def log_traceback(error: Exception) -> str:
    """Write the traceback to the files of the log, not to the terminal; says where it is."""
    if is_ours(error) or isinstance(error, OSError):
        return ''
    where = '--traceback shows where'
    if MMLogger.check_instance_created('mmengine'):
        record = logging.makeLogRecord({'levelno': logging.ERROR, 'levelname': 'ERROR'})
        record.msg = ''.join(traceback.format_exception(error))
        for handler in MMLogger.get_current_instance().handlers:
            if isinstance(handler, logging.FileHandler):
                handler.handle(record)
                where = f'traceback in {os.path.relpath(handler.baseFilename)}'
    return f' ({where})'


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of every program that builds a model from a config."""
    parser.add_argument('config', help='config file')
    add_cfg_options(parser)


def add_cfg_options(parser: argparse.ArgumentParser) -> None:
    """The argument ``--cfg-options``."""
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=OptionsAction,
        metavar='KEY=VALUE',
        help='override settings of the config, for example optim_wrapper.optimizer.lr=0.005 or '
        'key="[(a,b),(c,d)]" (no white space inside)',
    )


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the programs that run a config with mmengine's Runner."""
    add_config_arguments(parser)
    parser.add_argument(
        '--work-dir',
        help=f'folder for logs, checkpoints and metrics (default: {WORK_DIRS}/CONFIG_NAME)',
    )
    parser.add_argument(
        '--launcher',
        choices=['none', *LAUNCHERS],
        default='none',
        help='how the processes of a distributed job were started (default: none)',
    )
    # torch.distributed.launch passes it; torchrun sets the environment variable.
    parser.add_argument('--local-rank', '--local_rank', type=int, default=0, help=argparse.SUPPRESS)


def load_config(file: str, options: dict | None = None, needs: Iterable[str] = ()) -> Config:
    """:func:`~acmix_mm.config_check.checked_config`; exits with a message if that refuses it."""
    make_checkpoints_loadable()
    try:
        return checked_config(file, options, needs)
    except ValueError as error:
        raise SystemExit(f'error: {shortened(str(error))}') from error


def load_run_config(args: argparse.Namespace, needs: Iterable[str] = ()) -> Config:
    """:func:`load_config` with launcher and work directory set for the Runner.

    Exits with a message, too, if the launcher's environment is not there or no work directory can.
    """
    check_launcher(args.launcher)
    cfg = load_config(args.config, args.cfg_options, needs)
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    cfg.launcher = args.launcher
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = str(Path(WORK_DIRS) / Path(args.config).stem)
    check_work_dir(cfg.work_dir)
    return cfg


def check_launcher(launcher: str) -> None:
    """Exits with a message unless the process was started as ``--launcher`` says."""
    program, names = LAUNCHERS.get(launcher, (None, ()))
    for name in names:
        value = os.environ.get(name)
        number = not name.endswith(('ADDR', 'NODELIST'))
        if not value or (number and not value.isdecimal()):
            found = 'is not set' if value is None else f'is {value!r}'
            sys.exit(
                f'error: --launcher {launcher}: the environment variable {name} {found}; '
                f'{program} starts processes and sets it'
            )


def check_work_dir(folder: str) -> None:
    """Exits with a message unless the folder is there or can be made, and can be written to."""
    path = nearest_existing(Path(folder))
    if not path.is_dir() or not os.access(path, os.W_OK):
        problem = 'cannot be written to' if path.is_dir() else 'is no folder'
        sys.exit(f'error: --work-dir {folder}: {path} {problem}')


def join_processes(cfg: Config) -> None:
    """Connect the processes of a distributed job, as the Runner would later; see :func:`once`.

    Without a GPU, where mmengine connects none, they exchange over gloo.
    """
    launcher = cfg.get('launcher', 'none')
    if launcher == 'none' or is_distributed():
        return
    cfg.custom_hooks = [*(cfg.get('custom_hooks') or []), {'type': SharedBuffersHook.__name__}]
    env_cfg = cfg.get('env_cfg', {})
    set_multi_processing(**env_cfg.get('mp_cfg', {}), distributed=True)
    dist_cfg = {'backend': 'nccl', **env_cfg.get('dist_cfg', {})}
    if torch.cuda.is_available():
        init_dist(launcher, **dist_cfg)
        return
    with mock.patch('torch.cuda.set_device'):  # all that mmengine needs a GPU for
        init_dist(launcher, **{**dist_cfg, 'backend': 'gloo'})
    find_unused = cfg.get('find_unused_parameters', False)
    cfg.setdefault('model_wrapper_cfg', {'find_unused_parameters': find_unused})
    cfg.model_wrapper_cfg.setdefault('type', CPUDistributedDataParallel.__name__)


def once(action: Callable[[Config], object], cfg: Config) -> Config:
    """Let the first process of a job check and complete the config; all get it from there.

    Where the action raises or exits with a message, all processes end, and the message appears
    once.
    """
    failure = None
    if get_rank() == 0:
        try:
            action(cfg)
        except (Exception, SystemExit) as error:
            failure = error
    outcome = [cfg, failure is not None]
    broadcast_object_list(outcome)
    cfg, failed = outcome
    if failure is not None:
        raise failure
    if failed:
        sys.exit(1)
    return cfg


def keep_freed_memory() -> None:
    """Have the GNU C library keep what is freed for the next allocation, where there is no GPU.

    By default it maps every large tensor anew and returns it when freed; a model on a CPU then
    spends a good part of its time on page faults. The process stays as large as it was at its peak.
    Other C libraries are left as they are.
    """
    if torch.cuda.is_available():
        return
    with contextlib.suppress(AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no allocation is a mapping of its own
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks


def load_checkpoint(path: str) -> dict:
    """:func:`~acmix_mm.checkpoints.read_checkpoint`; exits with a message if that refuses it."""
    try:
        return read_checkpoint(path)
    except ValueError as error:
        sys.exit(f'error: {error}')


def check_weights(model: torch.nn.Module, checkpoint: dict, args: argparse.Namespace) -> None:
    """Load the checkpoint; exits with a message unless its weights are just those of the model."""
    try:
        check_fit(model, checkpoint, args.checkpoint, args.config)
    except ValueError as error:
        sys.exit(f'error: {error}')


def build_model(cfg: Config, checkpoint: dict, args: argparse.Namespace) -> torch.nn.Module:
    """The config's model in evaluation mode with the checkpoint's weights, which must fit."""
    model = build(cfg)
    check_weights(model, checkpoint, args)
    return model.eval()


def check_out(out: Path, suffix: str) -> None:
    """Exits with a message unless a file ``out`` of that suffix can be written anew."""
    if out.suffix != suffix:
        sys.exit(f'error: OUT must end in {suffix}, got {out}')
    check_folder(out.parent)
    if out.exists():
        sys.exit(f'error: {out} exists already')


def nearest_existing(path: Path) -> Path:
    """The path, or the first above it that is there, in which it can be made."""
    return next(p for p in (path, *path.absolute().parents) if p.exists())


def check_folder(folder: Path) -> None:
    """Exits with a message unless files can be written to a folder."""
    if not folder.is_dir():
        sys.exit(f'error: folder {folder} {"is none" if folder.exists() else "does not exist"}')
    if not os.access(folder, os.W_OK):
        sys.exit(f'error: folder {folder} cannot be written to')


def _positive(kind: type, text: str) -> float:
    try:
        value = kind(text)
    except ValueError:
        value = 0
    if not 0 < value < math.inf:
        what = 'an integer' if kind is int else 'a number'
        raise argparse.ArgumentTypeError(f'{text!r} is not {what} above 0')
    return value


positive_int = functools.partial(_positive, int)
positive_float = functools.partial(_positive, float)


def device_type(text: str) -> str:
    """A device, for argparse: ``cpu``, ``cuda`` or ``cuda:N``, which must be there."""
    if not re.fullmatch(r'cpu|cuda(:\d+)?', text):
        raise argparse.ArgumentTypeError(f'{text!r} is not cpu, cuda or cuda:N')
    if text != 'cpu' and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError(f'{text!r}: torch {torch.__version__} sees no CUDA device')
    if ':' in text and int(text[5:]) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(
            f'{text!r}: there are {torch.cuda.device_count()} CUDA devices'
        )
    return text


def output_type(suffixes: tuple[str, ...], text: str) -> Path:
    """A file to be written, for argparse, by what its name may end in; its folder must be there."""
    file = Path(text)
    if file.suffix not in suffixes:
        raise argparse.ArgumentTypeError(f'{text!r} must end in {" or ".join(suffixes)}')
    if not file.parent.is_dir():
        raise argparse.ArgumentTypeError(f'{text!r}: folder {file.parent} does not exist')
    if not os.access(file.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f'{text!r}: folder {file.parent} cannot be written to')
    if file.is_dir():
        raise argparse.ArgumentTypeError(f'{text!r} is a folder')
    return file


def find_images(folder: Path, pattern: str = '*', least: int = 1) -> list[Path]:
    """The images of a folder in the order of their names, without hidden ones.

    Exits with a message if there are not as many as ``least`` among the files that match the
    pattern, which is ``**/*`` to look below the folder, too.
    """
    if not folder.is_dir():
        sys.exit(f'error: {folder} does not exist or is no folder')
    images = sorted(
        path
        for path in folder.glob(pattern)
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith('.')
    )
    if len(images) < least:
        sys.exit(
            f'error: folder {folder} must hold images ({", ".join(IMAGE_SUFFIXES)}), at least '
            f'{least}, and holds {len(images)}'
        )
    return images


def relative_error(outputs: Iterable[torch.Tensor], expected: Iterable[torch.Tensor]) -> float:
    """Largest deviation of any output, relative to the largest value that it should have."""
    pairs = zip(outputs, expected, strict=True)
    return max(((out - e).abs().max() / e.abs().max()).item() for out, e in pairs)
