"""Check the data sets of a config: annotations, files, sizes, classes and duplicates.

All pictures and label maps are opened. The report tells what each data set holds, errors, at which
training would stop or be spoilt, and warnings, of what would be left out. With errors the exit code
is 1. train.py and test.py do the quick part before every run: annotations, class names, whether all
files exist, and the first and last pictures.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from acmix_mm.command_line import (
    Parser,
    add_config_arguments,
    check_out,
    load_config,
    program,
)
from acmix_mm.data_check import Contents, look_through
from acmix_mm.files import whole_file


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_arguments(parser)
    parser.add_argument(
        '--splits',
        nargs='+',
        choices=['train', 'val', 'test'],
        default=['train', 'val', 'test'],
        help='which data sets to check (default: all that the config has)',
    )
    parser.add_argument('--out', metavar='FILE.txt', help='write the report to a file, too')
    args = parser.parse_args(argv)
    if args.out is not None:
        check_out(Path(args.out), '.txt')
    return args


def report(contents: Contents) -> Iterator[str]:
    """Lines on one data set."""
    yield f'{contents.place} ({contents.kind}), {contents.images} images'
    for name, value in contents.facts.items():
        yield f'  {name}: {value}'
    for name, count in sorted(contents.labels.items(), key=lambda item: -item[1]):
        yield f'    {name}: {count}'
    for problem in contents.problems.values():
        severity = 'error' if problem.stops else 'warning'
        yield f'  {severity}, {problem.count} times ({problem.allowed}):'
        yield from (f'    {example}' for example in problem.examples)
    if not contents.problems:
        yield '  no problems'


@program
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    cfg = load_config(args.config, args.cfg_options)
    splits = list(dict.fromkeys(args.splits))
    if 'val' in splits and 'test' in splits and cfg.get('test_dataloader') == cfg.val_dataloader:
        splits.remove('test')
        print('test: the same as val')
    lines: list[str] = []
    errors = []
    for contents in look_through(cfg, splits, thorough=True):
        for line in report(contents):
            print(line)
            lines.append(line)
        errors += contents.errors
    if args.out is not None:
        with whole_file(args.out) as file:
            file.write_text('\n'.join(lines) + '\n')
    if errors:
        count = sum(problem.count for problem in errors)
        sys.exit(f'error: {count} errors in the data, the first: {errors[0]}')


if __name__ == '__main__':
    main()
