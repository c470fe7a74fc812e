"""What stands around a network in an ONNX file: from a picture to its input, from maps to results.

The graphs are written in ONNX's own text syntax. They do what the transforms of the test pipeline
and the post-processing of mmdet's and mmseg's models do to one picture, for pictures of any size.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from mmengine.config import Config, ConfigDict

DIVISOR = 32  # of the height and width that backbones get


@dataclass
class Preprocessing:
    """What a config does to a picture before its network sees it.

    Attributes:
        resizes (list[ConfigDict]): Transforms that resize, in their order.
        pad (ConfigDict | None): The transform that pads to a size.
        mean (list[float]): Is subtracted, in the order of the network's channels.
        std (list[float]): Divides.
        rgb (bool): Whether the network's channels are red, green, blue, or the reverse.
        divisor (int): Height and width of the network's input are multiples of it.
        pad_value (float): What is added for that, after the normalisation.
        least (int): Least height and width of the network's input, before the divisor.
    """

    resizes: list[ConfigDict] = field(default_factory=list)
    pad: ConfigDict | None = None
    mean: list[float] = field(default_factory=lambda: [0.0] * 3)
    std: list[float] = field(default_factory=lambda: [1.0] * 3)
    rgb: bool = True
    divisor: int = 1
    pad_value: float = 0.0
    least: int = 1


def preprocessing_of(cfg: Config, least: int) -> Preprocessing:
    """What the test pipeline and the data preprocessor of a config do.

    Args:
        cfg (Config): Of a detector or segmentor.
        least (int): Least height and width that the network takes.

    Raises:
        ValueError: If a transform, or an option of one, has no counterpart here.
    """
    dataset = cfg.test_dataloader.dataset
    while 'dataset' in dataset:  # wrappers
        dataset = dataset.dataset
    out = Preprocessing(least=least)
    for transform in dataset.pipeline:
        kind = transform.type.split('.')[-1] if isinstance(transform.type, str) else ''
        options = set(transform) - {'type', 'backend', 'interpolation'}
        bilinear = transform.get('interpolation', 'bilinear') == 'bilinear'
        if kind == 'Resize' and bilinear and options <= {'scale', 'scale_factor', 'keep_ratio'}:
            if not isinstance(transform.get('scale_factor') or 1.0, (int, float)):
                raise ValueError(_unsupported(transform))
            out.resizes.append(transform)
        elif kind == 'ResizeToMultiple' and bilinear and options <= {'size_divisor'}:
            out.resizes.append(transform)
        elif kind == 'Pad' and out.pad is None and options <= {'size', 'pad_val'}:
            out.pad = transform
        elif kind not in ('LoadImageFromFile', 'LoadAnnotations', 'PackDetInputs', 'PackSegInputs'):
            raise ValueError(_unsupported(transform))
    data = cfg.model.get('data_preprocessor') or {}
    out.mean, out.std = (list(map(float, data.get(k) or getattr(out, k))) for k in ('mean', 'std'))
    out.rgb = bool(data.get('bgr_to_rgb', False))
    test = data.get('test_cfg') or {}
    if test.get('size') is not None:
        raise ValueError(
            f'model.data_preprocessor.test_cfg must have a size_divisor, got size {test["size"]}'
        )
    wanted = data.get('pad_size_divisor') or test.get('size_divisor') or 1
    out.divisor = math.lcm(wanted, DIVISOR)
    out.pad_value = float(data.get('pad_value', data.get('pad_val', 0)))
    return out


def pad_to_multiples(cfg: Config) -> bool:
    """Have a config's model pad test images to multiples of 32, in place, as exported files do.

    Returns:
        bool: Whether it has not done so before.
    """
    path = 'data_preprocessor.pad_size_divisor'
    if cfg.get('default_scope') == 'mmseg':
        path = 'data_preprocessor.test_cfg.size_divisor'
    options, where = cfg.model, path.split('.')
    for key in where:
        options = (options or {}).get(key)
    before = options or 1
    divisor = math.lcm(before, DIVISOR)
    cfg.merge_from_dict({f'model.{path}': divisor})
    return divisor != before


def _unsupported(transform: ConfigDict) -> str:
    return (
        'transforms of the test pipeline must load, resize (bilinear), pad to a size and pack, got '
        f'{dict(transform)}'
    )


def _constant(name: str, values: list[int] | list[float], double: bool = False) -> str:
    """A vector, int64 or float."""
    kind = 'float' if any(isinstance(v, float) for v in values) else 'int64'
    kind = 'double' if double else kind
    return f'{name} = Constant <value = {kind}[{len(values)}] {{{", ".join(map(str, values))}}}> ()'


def _resized_size(resize: ConfigDict, old: str, new: str) -> Iterator[str]:
    """Height and width after one of the transforms, as mmcv computes them in double precision."""
    yield f'{new}_hw = Cast <to = 11> ({old})'
    if resize.type.endswith('ResizeToMultiple'):
        yield _constant(f'{new}_d', [float(resize.get('size_divisor', 32))], double=True)
        yield f'{new}_q = Div ({new}_hw, {new}_d)'
        yield f'{new}_n = Ceil ({new}_q)'
        yield f'{new}_f = Mul ({new}_n, {new}_d)'
        yield f'{new} = Cast <to = 7> ({new}_f)'
        return
    scale = resize.get('scale')
    if scale is not None and not resize.get('keep_ratio', False):
        width, height = (scale, scale) if isinstance(scale, int) else scale
        yield _constant(new, [int(height), int(width)])
        return
    if scale is None:
        yield _constant(f'{new}_r', [float(resize.get('scale_factor') or 1.0)], double=True)
    else:
        edges = (scale, scale) if isinstance(scale, int) else scale
        yield _constant(f'{new}_long', [float(max(edges))], double=True)
        yield _constant(f'{new}_short', [float(min(edges))], double=True)
        yield f'{new}_max = ReduceMax <keepdims = 1> ({new}_hw)'
        yield f'{new}_min = ReduceMin <keepdims = 1> ({new}_hw)'
        yield f'{new}_r1 = Div ({new}_long, {new}_max)'
        yield f'{new}_r2 = Div ({new}_short, {new}_min)'
        yield f'{new}_r = Min ({new}_r1, {new}_r2)'
    yield _constant(f'{new}_half', [0.5], double=True)
    yield f'{new}_s = Mul ({new}_hw, {new}_r)'
    yield f'{new}_t = Add ({new}_s, {new}_half)'
    yield f'{new}_f = Floor ({new}_t)'
    yield f'{new} = Cast <to = 7> ({new}_f)'


RESIZE = 'Resize <mode = "linear", coordinate_transformation_mode = "{}">'


def preprocessing_graph(preprocessing: Preprocessing) -> str:
    """From ``picture``, uint8 (H, W, 3) in RGB, to the network's input ``image`` (1, 3, h, w).

    Further outputs: ``original``, height and width of the picture; ``size``, those after resizing
    and padding to a size (mmdet's ``img_shape``); ``resized``, those without the padding; and
    ``padded``, those of ``image``.
    """
    p = preprocessing
    lines = [
        'shape = Shape (picture)',
        _constant('zero', [0]), _constant('two', [2]),
        'original = Slice (shape, zero, two)',
        'chw = Transpose <perm = [2, 0, 1]> (picture)',
        'nchw = Unsqueeze (chw, zero)',
        'x0 = Cast <to = 1> (nchw)',
        _constant('images', [1, 3]),
        'least_value = Constant <value = float {0.0}> ()',
        'most_value = Constant <value = float {255.0}> ()',
        'size0 = Identity (original)',
    ]  # fmt: skip
    for i, resize in enumerate(p.resizes):
        lines += _resized_size(resize, f'size{i}', f'size{i + 1}')
        lines += [
            f'sizes{i} = Concat <axis = 0> (images, size{i + 1})',
            f'r{i} = {RESIZE.format("half_pixel")} (x{i}, , , sizes{i})',
            f'c{i} = Clip (r{i}, least_value, most_value)',
            f'x{i + 1} = Round (c{i})',  # pictures stay bytes between transforms
        ]
    last = len(p.resizes)
    lines += [f'resized = Identity (size{last})', _constant('before', [0, 0, 0, 0, 0, 0])]
    pixels, size = f'x{last}', 'resized'
    if p.pad is not None:
        width, height = p.pad.size
        value = p.pad.get('pad_val', 0)
        value = value.get('img', 0) if isinstance(value, dict) else value
        value = float(value[0] if isinstance(value, (list, tuple)) else value)
        lines += [
            _constant('canvas', [int(height), int(width)]),
            'grown = Max (canvas, resized)',
            'missing0 = Sub (grown, resized)',
            'pads0 = Concat <axis = 0> (before, missing0)',
            f'value0 = Constant <value = float {{{value}}}> ()',
            f'canvas_pixels = Pad ({pixels}, pads0, value0)',
        ]
        pixels, size = 'canvas_pixels', 'grown'
    if not p.rgb:
        lines += [_constant('order', [2, 1, 0]), f'reversed = Gather <axis = 1> ({pixels}, order)']
        pixels = 'reversed'
    lines += [
        f'size = Identity ({size})',
        _constant('mean', p.mean), _constant('std', p.std),
        _constant('channel_axes', [0, 2, 3]),
        'mean4 = Unsqueeze (mean, channel_axes)',
        'std4 = Unsqueeze (std, channel_axes)',
        f'centred = Sub ({pixels}, mean4)',
        'normalised = Div (centred, std4)',
        _constant('divisor', [p.divisor]), _constant('more', [p.divisor - 1]),
        _constant('least', [p.least]),
        'enough = Max (size, least)',
        'up = Add (enough, more)',
        'parts = Div (up, divisor)',
        'padded = Mul (parts, divisor)',
        'missing = Sub (padded, size)',
        'pads = Concat <axis = 0> (before, missing)',
        f'value = Constant <value = float {{{p.pad_value}}}> ()',
        'image = Pad (normalised, pads, value)',
    ]  # fmt: skip
    return _graph(
        'preprocessing',
        'uint8[H, W, 3] picture',
        'float[1, 3, h, w] image, int64[2] original, int64[2] size, int64[2] resized, '
        'int64[2] padded',
        lines,
    )


def detections_graph(levels: int, classes: int, test_cfg: ConfigDict, factors: bool) -> str:
    """From scores and boxes of every level to those that non-maximum suppression leaves.

    As mmdet's BaseDenseHead: of every level the ``nms_pre`` best scores of any class, above
    ``score_thr``; boxes clipped to the image; suppression within classes; the ``max_per_img`` best,
    in pixels of the picture.

    Args:
        levels (int): Number of levels; inputs are ``scores{i}`` (n, classes) and ``boxes{i}``
            (n, 4), and where ``factors`` says so ``factors{i}`` (n,), which multiply the scores
            that have been chosen.
        classes (int): Number of classes.
        test_cfg (ConfigDict): Of the head.
        factors (bool): Whether there are factors.
    """
    lines = [
        _constant('minus', [-1]), _constant('zero', [0]), _constant('one', [1]),
        _constant('most', [int(test_cfg.get('nms_pre', -1))]),
        _constant('classes', [classes]),
    ]  # fmt: skip
    inputs = []
    for i in range(levels):
        inputs += [f'float[n{i}, {classes}] scores{i}', f'float[n{i}, 4] boxes{i}']
        lines += [
            f'flat{i} = Reshape (scores{i}, minus)',
            f'count{i} = Shape (flat{i})',
            f'k{i} = Min (count{i}, most)' if test_cfg.get('nms_pre', -1) > 0
            else f'k{i} = Identity (count{i})',
            f's{i}, index{i} = TopK <axis = 0> (flat{i}, k{i})',
            f'prior{i} = Div (index{i}, classes)',
            f'label{i} = Mod (index{i}, classes)',
            f'b{i} = Gather <axis = 0> (boxes{i}, prior{i})',
        ]  # fmt: skip
        if factors:
            inputs.append(f'float[n{i}] factors{i}')
            lines.append(f'f{i} = Gather <axis = 0> (factors{i}, prior{i})')

    def joined(name: str) -> str:
        return f'{name} = Concat <axis = 0> ({", ".join(f"{name}{i}" for i in range(levels))})'

    lines += [joined('s'), joined('b'), joined('label')]
    threshold = float(test_cfg.get('score_thr', 0))
    lines += [
        f'threshold = Constant <value = float {{{threshold}}}> ()',
        'above = Greater (s, threshold)',
        'kept_scores = Compress <axis = 0> (s, above)',
        'kept_boxes = Compress <axis = 0> (b, above)',
        'kept_labels = Compress <axis = 0> (label, above)',
    ]
    if factors:
        lines += [
            joined('f'),
            'kept_factors = Compress <axis = 0> (f, above)',
            'final_scores = Mul (kept_scores, kept_factors)',
        ]
    else:
        lines.append('final_scores = Identity (kept_scores)')
    nms = test_cfg.nms
    lines += [
        # (height, width) to (x, y, x, y).
        _constant('order', [1, 0, 1, 0]),
        'limits = Gather <axis = 0> (size, order)',
        'limit = Cast <to = 1> (limits)',
        'nothing = Constant <value = float {0.0}> ()',
        'low = Max (kept_boxes, nothing)',
        'clipped = Min (low, limit)',
        # In pixels of the picture.
        'resized_float = Cast <to = 1> (resized)',
        'original_float = Cast <to = 1> (original)',
        'scale = Div (resized_float, original_float)',
        'scales = Gather <axis = 0> (scale, order)',
        'all_boxes = Div (clipped, scales)',
        *_large_enough(float(test_cfg.get('min_bbox_size', -1))),
        # Boxes of different classes are moved apart.
        'largest = ReduceMax <keepdims = 0> (limit)',
        'smallest_scale = ReduceMin <keepdims = 0> (scale)',
        'farthest = Div (largest, smallest_scale)',
        'unit = Constant <value = float {1.0}> ()',
        'distance = Add (farthest, unit)',
        'classes_float = Cast <to = 1> (some_labels)',
        'shift = Mul (classes_float, distance)',
        'shift_column = Unsqueeze (shift, one)',
        'apart = Add (some_boxes, shift_column)',
        'box_batch = Unsqueeze (apart, zero)',
        _constant('zero_one', [0, 1]),
        'score_batch = Unsqueeze (some_scores, zero_one)',
        _constant('results', [int(test_cfg.max_per_img)]),
        f'overlap = Constant <value = float[1] {{{float(nms.get("iou_threshold", 0.5))}}}> ()',
        'selected = NonMaxSuppression (box_batch, score_batch, results, overlap)',
        _constant('column', [2]),
        'chosen_column = Gather <axis = 1> (selected, column)',
        'chosen = Reshape (chosen_column, minus)',
        'boxes = Gather <axis = 0> (some_boxes, chosen)',
        'scores = Gather <axis = 0> (some_scores, chosen)',
        'labels = Gather <axis = 0> (some_labels, chosen)',
    ]
    inputs += ['int64[2] original', 'int64[2] size', 'int64[2] resized']
    outputs = 'float[results, 4] boxes, float[results] scores, int64[results] labels'
    return _graph('detections', ', '.join(inputs), outputs, lines)


def _large_enough(least: float) -> Iterator[str]:
    """Boxes wider and higher than this, unless it is negative, with scores and labels."""
    parts = {'all_boxes': 'some_boxes', 'final_scores': 'some_scores', 'kept_labels': 'some_labels'}
    if least < 0:
        yield from (f'{new} = Identity ({old})' for old, new in parts.items())
        return
    yield 'x1, y1, x2, y2 = Split <axis = 1, num_outputs = 4> (all_boxes)'
    yield 'widths = Sub (x2, x1)'
    yield 'heights = Sub (y2, y1)'
    yield 'sides_column = Min (widths, heights)'
    yield 'sides = Reshape (sides_column, minus)'
    yield f'least_side = Constant <value = float {{{least}}}> ()'
    yield 'large = Greater (sides, least_side)'
    yield from (f'{new} = Compress <axis = 0> ({old}, large)' for old, new in parts.items())


def label_map_graph(classes: int, align_corners: bool, threshold: float | None) -> str:
    """From logits (1, classes, h, w) to ``label_map``, int32 (H, W) at the picture's size.

    As mmseg's EncoderDecoder: logits are enlarged to the network's input, cut to the image without
    its padding, and brought to the picture's size before the best class is chosen.

    Args:
        classes (int): Channels of the logits.
        align_corners (bool): Of the head.
        threshold (float | None): Of the sigmoid, where there is one channel.
    """
    resize = RESIZE.format('align_corners' if align_corners else 'half_pixel')
    lines = [
        _constant('zero', [0]), _constant('spatial', [2]),
        'logits_shape = Shape (logits)',
        'channels = Slice (logits_shape, zero, spatial)',
        'sizes = Concat <axis = 0> (channels, padded)',
        f'large = {resize} (logits, , , sizes)',
        _constant('corner', [0, 0]), _constant('axes', [2, 3]),
        'without = Slice (large, corner, resized, axes)',
        'last_sizes = Concat <axis = 0> (channels, original)',
        f'final = {resize} (without, , , last_sizes)',
    ]  # fmt: skip
    if classes > 1:
        lines.append('best = ArgMax <axis = 1, keepdims = 0> (final)')
    else:
        lines += [
            'probability = Sigmoid (final)',
            f'threshold = Constant <value = float {{{float(threshold)}}}> ()',
            'above = Greater (probability, threshold)',
            'best4 = Cast <to = 7> (above)',
            _constant('channel', [1]),
            'best = Squeeze (best4, channel)',
        ]
    lines += ['map = Squeeze (best, zero)', 'label_map = Cast <to = 6> (map)']
    inputs = (
        f'float[1, {classes}, lh, lw] logits, int64[2] original, int64[2] resized, int64[2] padded'
    )
    return _graph('label_map_of', inputs, 'int32[H, W] label_map', lines)


def _graph(name: str, inputs: str, outputs: str, lines: list[str]) -> str:
    """A model in ONNX's text syntax."""
    body = '\n'.join(f'  {line}' for line in lines)
    return (
        '<ir_version: 10, opset_import: ["" : 18]>\n'
        f'{name} ({inputs}) => ({outputs})\n{{\n{body}\n}}'
    )
