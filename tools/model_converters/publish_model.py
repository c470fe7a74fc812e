"""Prepare a checkpoint for publication: weights and meta data alone, a hash in its name.

Writes OUT-HASH.pth, with the first eight digits of the file's SHA-256. State of optimiser,
schedules and message hub, and what hooks keep, is left out; of a training with averaged weights
(EMAHook), the averages are published, which `state_dict` holds. Both files are those of torch's
safe loader.
"""

import argparse
import hashlib
import io
import sys
from pathlib import Path

import torch

from acmix_mm.checkpoints import state_dict_of
from acmix_mm.command_line import (
    Parser,
    check_folder,
    load_checkpoint,
    program,
)
from acmix_mm.files import write_whole


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument('file', metavar='IN', help='checkpoint')
    parser.add_argument('out', metavar='OUT', type=Path, help='name up to the hash')
    return parser.parse_args(argv)


def is_plain(value: object) -> bool:
    """Whether torch's safe loader reads it without being told of any class."""
    if type(value) in (list, tuple):
        return all(map(is_plain, value))
    if type(value) is dict:
        return all(map(is_plain, [*value, *value.values()]))
    return value is None or type(value) in (bool, int, float, str)


@program
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    check_folder(args.out.parent)
    checkpoint = load_checkpoint(args.file)
    weights = state_dict_of(checkpoint)
    meta = checkpoint.get('meta', {})
    kept = {key: meta[key] for key in meta if key != 'hook_msgs' and is_plain(meta[key])}
    file = io.BytesIO()
    torch.save({'meta': kept, 'state_dict': weights}, file)
    digest = hashlib.sha256(file.getbuffer()).hexdigest()
    out = args.out.with_name(f'{args.out.name.removesuffix(".pth")}-{digest[:8]}.pth')
    if out.exists():
        sys.exit(f'error: {out} exists already')
    write_whole(out, file.getbuffer())
    own = {'meta', 'state_dict'} if weights.keys() != checkpoint.keys() else set(checkpoint)
    left_out = [k for k in checkpoint if k not in own] + [
        f'meta.{k}' for k in meta if k not in kept
    ]
    print(f'left out:   {", ".join(map(str, left_out)) or "nothing"}')
    print(f'checkpoint: {out}')


if __name__ == '__main__':
    main()
