"""Time and peak memory, side by side in one run.

Suites:
  operator   the ACmix layer against its unfold formulation and against nn.Conv2d 3x3, on one map:
             forward, and forward with backward
  detector   one training step of a detector from a config, on one image: time and peak memory

Candidates take turns in one process, so that what else the machine does strikes all alike; times
are medians with their range. Peak memory is taken in a fresh process each, over what the process
holds before its first step: gradients count, weights and libraries do not (on a CPU: resident
memory, as Linux reports it).
"""

import argparse
import json
import multiprocessing
import platform
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch import Tensor, nn
from tqdm import tqdm

from acmix_mm.layers import ACmix
from acmix_mm.ops import available_backends

RETINANET = 'configs/acmix_resnet/retinanet_acmix-r50_fpn_8xb2-1x_coco.py'


class UnfoldACmix(ACmix):
    """The operator as it is usually written, at dilation 1: neighbourhoods unfolded into memory.

    Every key, value and relative position is copied kernel_size^2 times, and the convolution path
    keeps its intermediate map. Same parameters and results as :class:`ACmix`.
    """

    def forward(self, x: Tensor) -> Tensor:
        stride, heads, dim = self.stride[0], self.num_heads, self.head_dim
        batch, _, height, width = x.shape
        query, key, value = (
            F.conv2d(x, p['weight'], p['bias']) for p in (self.conv1, self.conv2, self.conv3)
        )
        position = self.position_encoding(key.unflatten(1, (heads, dim)))[None]

        def unfold(maps: Tensor) -> Tensor:
            kernel_size = self.attn_kernel_size
            padded = F.pad(maps, (kernel_size // 2,) * 4, mode='reflect')
            columns = F.unfold(padded, kernel_size, stride=stride)
            return columns.view(maps.size(0), -1, dim, kernel_size**2, columns.size(-1))

        def subsample(maps: Tensor) -> Tensor:
            return maps[..., ::stride, ::stride].flatten(2).unflatten(1, (-1, dim)).unsqueeze(3)

        relative = subsample(position) - unfold(position)
        logits = (subsample(query) * (unfold(key) + relative)).sum(2, keepdim=True)
        weights = (logits * dim**-0.5).softmax(3)
        attention = (weights * unfold(value)).sum(3)

        maps = torch.cat(
            [m.view(batch, heads, dim * height, width) for m in (query, key, value)], 1
        )
        mixed = F.conv2d(maps, self.fc['weight'])
        mixed = mixed.unflatten(2, (dim, height)).transpose(1, 2).flatten(1, 2)
        padding = self.kernel_size[0] // 2
        convolution = F.conv2d(mixed, self.dep_conv['weight'], None, stride, padding, 1, dim)
        attention = attention.view(batch, heads * dim, *convolution.shape[-2:])
        return self.rate1 * attention + self.rate2 * convolution


def build_operator(name: str, channels: int, backend: str | None) -> nn.Module:
    """One of the layers that the suite *operator* compares; equal weights in the ACmix forms."""
    torch.manual_seed(0)
    if name == 'conv3x3':
        return nn.Conv2d(channels, channels, 3, padding=1)
    return {'acmix': ACmix, 'unfold': UnfoldACmix}[name](channels, channels, backend=backend)


def operator_step(
    name: str, shape: list[int], backend: str | None, device: str, train: bool
) -> Callable[[], None]:
    """A function that runs the layer once on a map (B, C, H, W)."""
    layer = build_operator(name, shape[1], backend).to(device)
    x = torch.randn(shape, device=device, requires_grad=train)

    def forward() -> None:
        with torch.no_grad():
            layer(x)

    def train_step() -> None:
        layer(x).sum().backward()

    return train_step if train else forward


def detector_step(
    config: str, size: list[int], backend: str | None, device: str
) -> Callable[[], None]:
    """A function that runs one training step on one image (height, width) with ten boxes."""
    from mmdet.registry import MODELS
    from mmdet.structures import DetDataSample
    from mmengine.structures import InstanceData

    cfg = Config.fromfile(config)
    init_default_scope(cfg.get('default_scope', 'mmdet'))
    model = MODELS.build(cfg.model).to(device)
    for module in model.modules():
        if isinstance(module, ACmix) and backend is not None:
            module.backend = backend
    model.train()
    torch.manual_seed(0)
    height, width = size
    corner = torch.rand(10, 2) * torch.tensor([width, height]) * 0.7
    boxes = torch.cat([corner, corner + torch.tensor([width, height]) * 0.25], 1)
    sample = DetDataSample(
        metainfo={'img_shape': (height, width), 'ori_shape': (height, width)},
        gt_instances=InstanceData(bboxes=boxes, labels=torch.arange(10)),
    )
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)

    def train_step() -> None:
        data = model.data_preprocessor({'inputs': [image], 'data_samples': [sample]}, True)
        loss, _ = model.parse_losses(model(**data, mode='loss'))
        loss.backward()

    return train_step


def interleave(
    steps: dict[str, Callable[[], None]], rounds: int, device: str
) -> dict[str, list[float]]:
    """Seconds of every step in every round, after one round of warm-up."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for index in tqdm(range(rounds + 1), desc='rounds', leave=False):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if device.startswith('cuda'):
                torch.cuda.synchronize()
            if index:
                times[name].append(time.perf_counter() - start)
    return times


def _measure_peak(connection, threads: int, device: str, build: Callable, arguments: tuple) -> None:
    torch.set_num_threads(threads)
    step = build(*arguments)
    if device.startswith('cuda'):
        torch.cuda.reset_peak_memory_stats()
        step()
        peak = torch.cuda.max_memory_allocated()
    else:
        # getrusage would also see what the parent held; this forgets earlier peaks.
        Path('/proc/self/clear_refs').write_text('5')
        before = _resident('VmRSS')
        step()
        peak = _resident('VmHWM') - before
    connection.send(peak)


def _resident(kind: str) -> int:
    """Resident memory of this process now (VmRSS) or at its peak (VmHWM), bytes (Linux)."""
    status = Path('/proc/self/status').read_text()
    return int(re.search(rf'^{kind}:\s+(\d+) kB', status, re.MULTILINE)[1]) * 1024


def peak_memory(threads: int, device: str, build: Callable, *arguments) -> int:
    """Bytes that one call of ``build(*arguments)()`` needs at most, in a fresh process."""
    context = multiprocessing.get_context('spawn')
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(
        target=_measure_peak, args=(sender, threads, device, build, arguments)
    )
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(
            f'measuring peak memory of {build.__name__}{arguments} failed with exit code '
            f'{process.exitcode}; is there enough memory?'
        ) from None
    finally:
        process.join()


def suite_operator(args: argparse.Namespace) -> list[dict]:
    names = ('acmix', 'unfold', 'conv3x3')
    rows = []
    for train in (False, True):
        steps = {n: operator_step(n, args.shape, args.backend, args.device, train) for n in names}
        times = interleave(steps, args.rounds, args.device)
        del steps
        for name in names:
            arguments = (name, args.shape, args.backend, args.device, train)
            peak = peak_memory(args.threads, args.device, operator_step, *arguments)
            mode = 'forward + backward' if train else 'forward'
            rows.append({'candidate': name, 'mode': mode, 'times': times[name], 'peak': peak})
    return rows


def suite_detector(args: argparse.Namespace) -> list[dict]:
    arguments = (args.config, args.size, args.backend, args.device)
    times = interleave({'step': detector_step(*arguments)}, args.rounds, args.device)
    peak = peak_memory(args.threads, args.device, detector_step, *arguments)
    name = Path(args.config).stem
    return [{'candidate': name, 'mode': 'training step', 'times': times['step'], 'peak': peak}]


def report(rows: list[dict]) -> None:
    """Print a table; ratios are to the first candidate of the same mode, > 1 means more."""
    first = {}
    width = max(len(row['candidate']) for row in rows)
    print(f'{"candidate":{width}}  {"mode":18}  {"median":>9}  {"min - max":>19}  '
          f'{"time":>6}  {"peak memory":>11}  {"memory":>6}')  # fmt: skip
    for row in rows:
        milliseconds = [1e3 * t for t in row['times']]
        median = statistics.median(milliseconds)
        base = first.setdefault(row['mode'], (median, row['peak']))
        spread = f'{min(milliseconds):.1f} - {max(milliseconds):.1f}'
        print(f'{row["candidate"]:{width}}  {row["mode"]:18}  {median:6.1f} ms  {spread:>16} ms  '
              f'{median / base[0]:5.2f}x  {row["peak"] / 2**20:7.0f} MiB  '
              f'{row["peak"] / base[1]:5.2f}x')  # fmt: skip


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('suite', choices=['operator', 'detector'])
    parser.add_argument(
        '--shape', type=int, nargs=4, default=[1, 64, 200, 304], metavar=('B', 'C', 'H', 'W'),
        help='map of the suite operator (1 64 200 304: stage 1 of an 800x1216 image)',
    )  # fmt: skip
    parser.add_argument('--config', default=RETINANET, help='of the suite detector (%(default)s)')
    parser.add_argument(
        '--size', type=int, nargs=2, default=[800, 1216], metavar=('H', 'W'),
        help='image of the suite detector (800 1216)',
    )  # fmt: skip
    parser.add_argument(
        '--backend', choices=available_backends(), help='of the ACmix layers (default: automatic)'
    )
    parser.add_argument('--rounds', type=int, default=5, help='timed rounds (%(default)s)')
    parser.add_argument(
        '--threads', type=int, default=torch.get_num_threads(), help='default: %(default)s'
    )
    parser.add_argument('--device', default='cpu', help='cpu or cuda (%(default)s)')
    parser.add_argument('--json', type=Path, help='also write all measurements to this file')
    args = parser.parse_args(argv)
    for name in ('rounds', 'threads'):
        if getattr(args, name) < 1:
            parser.error(f'--{name} must be at least 1, got {getattr(args, name)}')
    if not Path(args.config).is_file():
        parser.error(f'--config: {args.config} does not exist')
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    setting = {
        'suite': args.suite,
        'torch': torch.__version__,
        'backend': args.backend or 'automatic',
        'device': torch.cuda.get_device_name() if args.device.startswith('cuda') else 'CPU',
        'machine': platform.machine(),
        'cpu_capability': torch.backends.cpu.get_cpu_capability(),
        'threads': args.threads,
        'rounds': args.rounds,
    }
    print(', '.join(f'{key} {value}' for key, value in setting.items()), flush=True)
    rows = suite_operator(args) if args.suite == 'operator' else suite_detector(args)
    report(rows)
    if args.json is not None:
        args.json.write_text(json.dumps({'setting': setting, 'rows': rows}, indent=1))
        print(f'measurements: {args.json}')


if __name__ == '__main__':
    main()
