"""Triton kernels of neighbourhood attention; :mod:`.triton_backend` launches them.

Maps are (B, N, d, H, W) with adjacent channels of a head: a pixel of a head is one row of a matrix
product, read in accesses of 16 bytes where ``ALIGNED`` says that all rows start at multiples of it.

Queries work on a lattice. With stride s, dilation D and g = gcd(s, D), neighbourhoods only ever
touch pixels at multiples of ``UNIT = g``. In those units query y stands at ``STEP * y`` and its
keys lie ``PHASES`` apart, for ``STEP = s / g`` and ``PHASES = D / g``. The two have no common
divisor, so each phase, the queries ``y = phase + PHASES * t``, has one of the ``PHASES`` classes of
lattice points to itself, and on that its neighbourhoods are dense: with r = KERNEL_SIZE // 2, query
t sees the points ``u`` from ``STEP * t - r`` to ``STEP * t + r``, where u is lattice point ``STEP *
phase + PHASES * u``. Each phase has programs of its own. Lattice points beyond the map are
reflected when addresses are formed, so no padded maps exist.

Sizes and strides vary from image to image and are kept out of the specialisation; what shapes the
code (head dimension, neighbourhood) is constant. Nothing here accumulates into memory: a program
owns what it writes, and results do not depend on the order of programs.

A masked entry of a product is a zero, and zero times NaN or infinity is NaN: such a number would
reach all of a tile. So each kernel is launched twice, the second time ``CAREFUL``: a program whose
results are all finite then ends at once; others repeat their work with products that leave out what
is masked. (The same in one kernel would cost the ordinary case up to twice the registers.)

The position encoding of ACmix takes slopes * (x, y) off each key, so it takes off ``query . key``
the products of two numbers a query, its tilt, with the coordinates of the key. Keys are read as
they are, straight into matrix products, and the encoding is not rounded to half precision.

What a call does not have is None: ``slopes`` and the tilts without a position encoding;
``convolution``, which attention times ``factor`` is added to; what only a backward pass needs,
where there will be none; and of the gradients of key and value, one that is not needed.
"""

import inspect

import triton
import triton.language as tl


def _jit(function):
    """``triton.jit`` without a variant for each divisibility of sizes, strides and addresses."""
    parameters = inspect.signature(function).parameters.values()
    names = [p.name for p in parameters if p.annotation is not tl.constexpr]
    return triton.jit(function, do_not_specialize=names)


# Rows and columns of a tile, block of the other side and warps, by what products are of and the
# head dimension rounded up. Read off compilations (tools/dev/triton_report.py), not measured:
# nothing spills on 8.0 and 9.0 up to a head dimension of 64, and a 7x7 neighbourhood takes at most
# 208 keys a query, of which a whole tile has 140 to 196 in its region.
TILES = {
    ('half', 16): (4, 8, 32, 2),
    ('half', 32): (8, 8, 16, 2),
    ('half', 64): (8, 8, 16, 4),
    ('half', 128): (8, 8, 16, 8),
    ('tf32', 16): (4, 8, 16, 2),
    ('tf32', 32): (8, 8, 16, 4),
    ('tf32', 64): (8, 8, 16, 4),
    ('tf32', 128): (8, 8, 16, 8),
    ('ieee', 16): (4, 8, 32, 2),
    ('ieee', 32): (4, 8, 32, 4),
    ('ieee', 64): (4, 8, 16, 4),
    ('ieee', 128): (4, 8, 16, 8),
}


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr, start=None):
    """Matrix product, added to ``start``, if there is one.

    Sums are in float32; PRECISION of factors in float32: 'tf32' or 'ieee'.
    """
    if INTERPRETED and a.dtype == tl.bfloat16:
        # The interpreter (3.7.1) would multiply the bit patterns.
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, start, input_precision=PRECISION)


@triton.jit
def _reflect(position, size, ONCE: tl.constexpr):
    """Position within ``[0, size)``; ONCE, where reflection at both ends once is enough.

    With ONCE, positions that no neighbourhood reaches, of tiles that overhang, may come out as 0.
    """
    position = tl.abs(position)
    if ONCE:
        position = tl.maximum(size - 1 - tl.abs(size - 1 - position), 0)
    else:
        period = tl.maximum(2 * size - 2, 1)
        position = position % period
        position = tl.minimum(position, period - position)
    return position


INTERPRETED = tl.constexpr(not isinstance(_reflect, triton.JITFunction))
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _place(heads, height, width, CLASSES: tl.constexpr, TILE_Y: tl.constexpr, TILE_X: tl.constexpr):
    """This program's batch, head, class of pixels modulo CLASSES and tile of that.

    Tiles run fastest: their regions overlap. Classes that begin beyond the map have no programs.
    """
    pid = tl.program_id(0)
    tiles_y = tl.cdiv(tl.cdiv(height, CLASSES), TILE_Y)
    tiles_x = tl.cdiv(tl.cdiv(width, CLASSES), TILE_X)
    tile_x = pid % tiles_x
    pid = pid // tiles_x
    tile_y = pid % tiles_y
    pid = pid // tiles_y
    classes_y = tl.minimum(height, CLASSES)
    classes_x = tl.minimum(width, CLASSES)
    class_x = pid % classes_x
    pid = pid // classes_x
    class_y = pid % classes_y
    pid = pid // classes_y
    batch = (pid // heads).to(tl.int64)
    head = (pid % heads).to(tl.int64)
    return batch, head, class_y, class_x, tile_y, tile_x


@triton.jit
def _offset(y, x, stride_y, stride_x, WIDE: tl.constexpr):
    """Offset of pixels within one map; WIDE, where 32 bits do not hold it."""
    if WIDE:
        y = y.to(tl.int64)
        x = x.to(tl.int64)
    return y * stride_y + x * stride_x


@triton.jit
def _rows(
    maps, y, x, stride_y, stride_x,
    DIM_BLOCK: tl.constexpr, WIDE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """(pixels, DIM_BLOCK) addresses of a head's channels."""
    pixels = maps + _offset(y, x, stride_y, stride_x, WIDE)
    if ALIGNED:
        pixels = tl.multiple_of(pixels, 16)
    return pixels[:, None] + tl.arange(0, DIM_BLOCK)[None, :]


@triton.jit
def _inside(key_y, key_x, query_y, query_x, KERNEL_SIZE: tl.constexpr):
    """Is the key at 0 <= key - query < KERNEL_SIZE on both axes? (Unsigned: one comparison.)"""
    y = (key_y - query_y).to(tl.uint32, bitcast=True)
    x = (key_x - query_x).to(tl.uint32, bitcast=True)
    return (y < KERNEL_SIZE) & (x < KERNEL_SIZE)


@triton.jit
def _coordinates(pixels, size):
    """linspace(-1, 1) over ``size`` pixels."""
    return pixels.to(tl.float32) * (2.0 / tl.maximum(size - 1, 1)) - 1.0


@triton.jit
def _slope(slopes, DIM: tl.constexpr, DIM_BLOCK: tl.constexpr):
    """(1, DIM_BLOCK): a column of (DIM, 2) slopes."""
    channels = tl.arange(0, DIM_BLOCK)
    return tl.load(slopes + 2 * channels, mask=channels < DIM, other=0).to(tl.float32)[None, :]


@triton.jit
def _finite(maps):
    return tl.abs(maps.to(tl.float32)) < float('inf')


@triton.jit
def _all_finite(maps):
    return tl.min(tl.min(_finite(maps).to(tl.int32), 1), 0) == 1


@triton.jit
def _clean(maps, CAREFUL: tl.constexpr):
    return tl.where(_finite(maps), maps, 0) if CAREFUL else maps


@triton.jit
def _odd_seen(inside, maps):
    """How many numbers of ``maps`` (others, channels) that are not finite each row is to take."""
    odd = tl.where(_finite(maps), 0.0, 1.0).to(tl.float16)
    return tl.dot(inside.to(tl.float16), odd)


@_jit
def forward_kernel(
    query, key, value, slopes, convolution, factor, output, attention, lse,
    query_b, query_n, query_y, query_x,
    key_b, key_n, key_y, key_x,
    value_b, value_n, value_y, value_x,
    output_b, output_n, output_y, output_x,
    convolution_b, convolution_n, convolution_y, convolution_x,
    factor_step, heads, height, width, query_height, query_width, scale,
    DIM: tl.constexpr, DIM_BLOCK: tl.constexpr,
    KERNEL_SIZE: tl.constexpr, STEP: tl.constexpr, PHASES: tl.constexpr, UNIT: tl.constexpr,
    ONCE: tl.constexpr, WIDE: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
    CAREFUL: tl.constexpr, TILE_Y: tl.constexpr, TILE_X: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Output and log2-sum-exp2 of one tile of queries, over its key region in blocks of keys.

    With a convolution, output is ``factor * attention + convolution``; then ``attention``, of the
    layout of output, is what the backward pass needs. ``factor`` holds a number for each channel of
    all heads, ``factor_step`` apart.
    """
    RADIUS: tl.constexpr = KERNEL_SIZE // 2
    REGION_Y: tl.constexpr = (TILE_Y - 1) * STEP + KERNEL_SIZE
    REGION_X: tl.constexpr = (TILE_X - 1) * STEP + KERNEL_SIZE
    QUERIES: tl.constexpr = TILE_Y * TILE_X
    batch, head, phase_y, phase_x, tile_y, tile_x = _place(
        heads, query_height, query_width, PHASES, TILE_Y, TILE_X
    )
    query += batch * query_b + head * query_n
    key += batch * key_b + head * key_n
    value += batch * value_b + head * value_n
    output += batch * output_b + head * output_n
    channels = tl.arange(0, DIM_BLOCK)
    real = channels[None, :] < DIM

    m = tl.arange(0, QUERIES)
    m_y, m_x = m // TILE_X, m % TILE_X
    y = phase_y + PHASES * (tile_y * TILE_Y + m_y)
    x = phase_x + PHASES * (tile_x * TILE_X + m_x)
    exists = (y < query_height) & (x < query_width)
    mask = exists[:, None] & real
    if CAREFUL:
        written = _rows(output, y, x, output_y, output_x, DIM_BLOCK, WIDE, ALIGNED)
        done = _all_finite(tl.load(written, mask=mask, other=0))
        if done:
            return
    rows = _rows(query, y, x, query_y, query_x, DIM_BLOCK, WIDE, ALIGNED)
    q = tl.load(rows, mask=mask, other=0)

    # Where the region starts, on the pixels.
    first_y = UNIT * (STEP * phase_y + PHASES * (tile_y * (TILE_Y * STEP) - RADIUS))
    first_x = UNIT * (STEP * phase_x + PHASES * (tile_x * (TILE_X * STEP) - RADIUS))
    scale *= LOG2E  # powers of two are what the hardware computes
    if slopes is not None:
        tilt_x = tl.sum(q.to(tl.float32) * _slope(slopes, DIM, DIM_BLOCK), 1) * scale
        tilt_y = tl.sum(q.to(tl.float32) * _slope(slopes + 1, DIM, DIM_BLOCK), 1) * scale
    # A finite start keeps rows whose first blocks are masked altogether free of inf - inf.
    largest = tl.full([QUERIES], -1e38, tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    acc = tl.zeros([QUERIES, DIM_BLOCK], tl.float32)
    odd = tl.zeros([QUERIES, DIM_BLOCK], tl.float32)
    for start in range(0, REGION_Y * REGION_X, BLOCK):
        # Keys beyond the region's last row are nobody's neighbours; their addresses are valid.
        n = start + tl.arange(0, BLOCK)
        n_y, n_x = n // REGION_X, n % REGION_X
        pixel_y = _reflect(first_y + UNIT * PHASES * n_y, height, ONCE)
        pixel_x = _reflect(first_x + UNIT * PHASES * n_x, width, ONCE)
        k_rows = _rows(key, pixel_y, pixel_x, key_y, key_x, DIM_BLOCK, WIDE, ALIGNED)
        v_rows = _rows(value, pixel_y, pixel_x, value_y, value_x, DIM_BLOCK, WIDE, ALIGNED)
        k = tl.load(k_rows, mask=real, other=0)
        v = tl.load(v_rows, mask=real, other=0)
        logits = _dot(q, tl.trans(k), PRECISION) * scale
        if slopes is not None:
            logits -= tilt_y[:, None] * _coordinates(pixel_y, height)[None, :]
            logits -= tilt_x[:, None] * _coordinates(pixel_x, width)[None, :]
        inside = _inside(
            n_y[None, :], n_x[None, :], (STEP * m_y)[:, None], (STEP * m_x)[:, None], KERNEL_SIZE
        )
        logits = tl.where(inside, logits, float('-inf'))
        if CAREFUL:
            odd += _odd_seen(inside, v)
        new_largest = tl.maximum(largest, tl.max(logits, 1))
        weights = tl.exp2(logits - new_largest[:, None])
        decay = tl.exp2(largest - new_largest)
        total = total * decay + tl.sum(weights, 1)
        acc = acc * decay[:, None] + _dot(weights.to(v.dtype), _clean(v, CAREFUL), PRECISION)
        largest = new_largest

    if CAREFUL:
        acc = tl.where(odd > 0, float('nan'), acc)
    out = acc / total[:, None]
    if convolution is not None:
        if attention is not None:
            attention += batch * output_b + head * output_n
            rows = _rows(attention, y, x, output_y, output_x, DIM_BLOCK, WIDE, ALIGNED)
            tl.store(rows, out.to(attention.dtype.element_ty), mask=mask)
        convolution += batch * convolution_b + head * convolution_n
        rows = _rows(
            convolution, y, x, convolution_y, convolution_x, DIM_BLOCK, WIDE, ALIGNED
        )  # fmt: skip
        numbers = factor + (head * DIM + channels) * factor_step
        out *= tl.load(numbers, mask=channels < DIM, other=0).to(tl.float32)[None, :]
        out += tl.load(rows, mask=mask, other=0).to(tl.float32)
    rows = _rows(output, y, x, output_y, output_x, DIM_BLOCK, WIDE, ALIGNED)
    tl.store(rows, out.to(output.dtype.element_ty), mask=mask)
    if lse is not None:
        lse += (batch * heads + head) * query_height * query_width
        pixels = _offset(y, x, query_width, 1, WIDE)
        tl.store(lse + pixels, largest + tl.log2(total), mask=exists)


@_jit
def grad_query_kernel(
    query, key, value, slopes, factor, attention, lse, grad, grad_query, delta, tilts,
    query_b, query_n, query_y, query_x,
    key_b, key_n, key_y, key_x,
    value_b, value_n, value_y, value_x,
    attention_b, attention_n, attention_y, attention_x,
    grad_b, grad_n, grad_y, grad_x,
    result_b, result_n, result_y, result_x,
    heads, height, width, query_height, query_width, planes, scale,
    DIM: tl.constexpr, DIM_BLOCK: tl.constexpr,
    KERNEL_SIZE: tl.constexpr, STEP: tl.constexpr, PHASES: tl.constexpr, UNIT: tl.constexpr,
    ONCE: tl.constexpr, WIDE: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
    CAREFUL: tl.constexpr, TILE_Y: tl.constexpr, TILE_X: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """As the forward kernel, but that ``factor`` is one number.

    Also writes ``delta = sum(grad * attention)`` and ``tilts``, a map for x and, ``planes`` numbers
    on, one for y, for the other kernel.
    """
    RADIUS: tl.constexpr = KERNEL_SIZE // 2
    REGION_Y: tl.constexpr = (TILE_Y - 1) * STEP + KERNEL_SIZE
    REGION_X: tl.constexpr = (TILE_X - 1) * STEP + KERNEL_SIZE
    QUERIES: tl.constexpr = TILE_Y * TILE_X
    batch, head, phase_y, phase_x, tile_y, tile_x = _place(
        heads, query_height, query_width, PHASES, TILE_Y, TILE_X
    )
    query += batch * query_b + head * query_n
    key += batch * key_b + head * key_n
    value += batch * value_b + head * value_n
    attention += batch * attention_b + head * attention_n
    grad_query += batch * result_b + head * result_n
    grad += batch * grad_b + head * grad_n
    lse += (batch * heads + head) * query_height * query_width
    delta += (batch * heads + head) * query_height * query_width
    real = tl.arange(0, DIM_BLOCK)[None, :] < DIM

    m = tl.arange(0, QUERIES)
    m_y, m_x = m // TILE_X, m % TILE_X
    y = phase_y + PHASES * (tile_y * TILE_Y + m_y)
    x = phase_x + PHASES * (tile_x * TILE_X + m_x)
    exists = (y < query_height) & (x < query_width)
    mask = exists[:, None] & real
    if CAREFUL:
        written = _rows(grad_query, y, x, result_y, result_x, DIM_BLOCK, WIDE, ALIGNED)
        done = _all_finite(tl.load(written, mask=mask, other=0))
        if done:
            return
    rows = _rows(query, y, x, query_y, query_x, DIM_BLOCK, WIDE, ALIGNED)
    q = tl.load(rows, mask=mask, other=0)
    rows = _rows(grad, y, x, grad_y, grad_x, DIM_BLOCK, WIDE, ALIGNED)
    g = tl.load(rows, mask=mask, other=0)
    rows = _rows(attention, y, x, attention_y, attention_x, DIM_BLOCK, WIDE, ALIGNED)
    out = tl.load(rows, mask=mask, other=0)
    pixels = _offset(y, x, query_width, 1, WIDE)
    row_delta = tl.sum(g.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta + pixels, row_delta, mask=exists)
    row_lse = tl.load(lse + pixels, mask=exists, other=float('inf'))
    if slopes is not None:
        tilts += (batch * heads + head) * query_height * query_width
        tilt_x = tl.sum(q.to(tl.float32) * _slope(slopes, DIM, DIM_BLOCK), 1)
        tilt_y = tl.sum(q.to(tl.float32) * _slope(slopes + 1, DIM, DIM_BLOCK), 1)
        tl.store(tilts + pixels, tilt_x, mask=exists)
        tl.store(tilts + planes + pixels, tilt_y, mask=exists)
        sum_x = tl.zeros([QUERIES], tl.float32)
        sum_y = tl.zeros([QUERIES], tl.float32)

    first_y = UNIT * (STEP * phase_y + PHASES * (tile_y * (TILE_Y * STEP) - RADIUS))
    first_x = UNIT * (STEP * phase_x + PHASES * (tile_x * (TILE_X * STEP) - RADIUS))
    # Gradients of a query's logits add up to zero, but for rounding, which matters least where
    # coordinates are relative.
    middle_y = tl.minimum(first_y + UNIT * PHASES * (REGION_Y // 2), height - 1)
    middle_x = tl.minimum(first_x + UNIT * PHASES * (REGION_X // 2), width - 1)
    middle_y = _coordinates(middle_y, height)
    middle_x = _coordinates(middle_x, width)
    acc = tl.zeros([QUERIES, DIM_BLOCK], tl.float32)
    odd = tl.zeros([QUERIES, DIM_BLOCK], tl.float32)
    for start in range(0, REGION_Y * REGION_X, BLOCK):
        n = start + tl.arange(0, BLOCK)
        n_y, n_x = n // REGION_X, n % REGION_X
        pixel_y = _reflect(first_y + UNIT * PHASES * n_y, height, ONCE)
        pixel_x = _reflect(first_x + UNIT * PHASES * n_x, width, ONCE)
        k_rows = _rows(key, pixel_y, pixel_x, key_y, key_x, DIM_BLOCK, WIDE, ALIGNED)
        v_rows = _rows(value, pixel_y, pixel_x, value_y, value_x, DIM_BLOCK, WIDE, ALIGNED)
        k = tl.load(k_rows, mask=real, other=0)
        v = tl.load(v_rows, mask=real, other=0)
        logits = _dot(q, tl.trans(k), PRECISION)
        if slopes is not None:
            coordinate_y = _coordinates(pixel_y, height)[None, :]
            coordinate_x = _coordinates(pixel_x, width)[None, :]
            logits -= tilt_y[:, None] * coordinate_y
            logits -= tilt_x[:, None] * coordinate_x
        logits *= scale * LOG2E
        inside = _inside(
            n_y[None, :], n_x[None, :], (STEP * m_y)[:, None], (STEP * m_x)[:, None], KERNEL_SIZE
        )
        weights = tl.exp2(tl.where(inside, logits - row_lse[:, None], float('-inf')))
        grad_weights = _dot(g, tl.trans(v), PRECISION)
        grad_logits = weights * (grad_weights - row_delta[:, None])
        if CAREFUL:
            grad_logits = tl.where(inside, grad_logits, 0)
            odd += _odd_seen(inside, k)
        if slopes is not None:
            sum_x += tl.sum(grad_logits * (coordinate_x - middle_x), 1)
            sum_y += tl.sum(grad_logits * (coordinate_y - middle_y), 1)
        acc += _dot(grad_logits.to(k.dtype), _clean(k, CAREFUL), PRECISION)

    if CAREFUL:
        acc = tl.where(odd > 0, float('nan'), acc)
    if slopes is not None:
        acc -= sum_x[:, None] * _slope(slopes, DIM, DIM_BLOCK)
        acc -= sum_y[:, None] * _slope(slopes + 1, DIM, DIM_BLOCK)
    if factor is not None:
        acc *= tl.load(factor).to(tl.float32)
    rows = _rows(grad_query, y, x, result_y, result_x, DIM_BLOCK, WIDE, ALIGNED)
    tl.store(rows, (acc * scale).to(grad_query.dtype.element_ty), mask=mask)


@triton.jit
def _mirror_image(
    i, first_pixel, tile, size, queries,
    TILE: tl.constexpr, KERNEL_SIZE: tl.constexpr, STEP: tl.constexpr, PHASES: tl.constexpr,
    UNIT: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """The i-th mirror image of a tile's pixels ``first_pixel + PHASES * UNIT * t`` on one axis.

    A pixel p has images ``period * (i / 2) + p`` for even i and ``period * ((i - 1) / 2) - p`` for
    odd ones. All pixels of the tile have them in one class of lattice points, and so on the points
    ``u = origin + sign * t`` of one phase. INVERSE is that of STEP modulo PHASES.

    Returns:
        Phase, origin, sign, and the first query of the phase that sees any image of the tile, and
        how many do.
    """
    RADIUS: tl.constexpr = KERNEL_SIZE // 2
    odd = i & 1
    sign = 1 - 2 * odd
    period = tl.maximum(2 * size - 2, 1)
    position = (i - odd) // 2 * period + sign * first_pixel
    point = position // UNIT
    phase = (point % PHASES + PHASES) % PHASES * INVERSE % PHASES
    origin = (point - STEP * phase) // PHASES  # without remainder
    low = origin + sign * (tile * TILE) - odd * (TILE - 1)
    # Division truncates: the maximum before it.
    begin = tl.maximum(low - RADIUS + STEP - 1, 0) // STEP
    end = tl.maximum(low + TILE - 1 + RADIUS + STEP, 0) // STEP
    end = tl.minimum(end, (queries - phase + PHASES - 1) // PHASES)
    # Off the lattice nothing is seen; an axis of one pixel has the same images twice.
    seen = (position % UNIT == 0) & ((odd == 0) | (size > 1))
    return phase, origin, sign, begin, tl.where(seen, tl.maximum(end - begin, 0), 0)


@triton.jit
def _image_points(pixels, t, i, origin, sign, size):
    """Where tile pixels have their i-th image; far off, where it is an even one's once more."""
    again = (i & 1 == 1) & (2 * pixels % tl.maximum(2 * size - 2, 1) == 0)
    return tl.where(again, -(1 << 30), origin + sign * t)


@_jit
def grad_key_value_kernel(
    query, key, value, factor, lse, delta, tilts, grad, grad_key, grad_value,
    query_b, query_n, query_y, query_x,
    key_b, key_n, key_y, key_x,
    value_b, value_n, value_y, value_x,
    grad_b, grad_n, grad_y, grad_x,
    result_b, result_n, result_y, result_x,
    heads, height, width, query_height, query_width,
    first_image_y, end_image_y, first_image_x, end_image_x, planes, scale,
    DIM: tl.constexpr, DIM_BLOCK: tl.constexpr,
    KERNEL_SIZE: tl.constexpr, STEP: tl.constexpr, PHASES: tl.constexpr, UNIT: tl.constexpr,
    INVERSE: tl.constexpr, WIDE: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
    CAREFUL: tl.constexpr, TILE_Y: tl.constexpr, TILE_X: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile of pixels, over the queries near it and near its mirror images.

    Away from the border there is one image, the tile itself. Of the others that the launch names,
    most are seen by no query, and their loops have no turns.
    """
    RADIUS: tl.constexpr = KERNEL_SIZE // 2
    DILATION: tl.constexpr = PHASES * UNIT
    KEYS: tl.constexpr = TILE_Y * TILE_X
    batch, head, class_y, class_x, tile_y, tile_x = _place(
        heads, height, width, DILATION, TILE_Y, TILE_X
    )
    query += batch * query_b + head * query_n
    key += batch * key_b + head * key_n
    value += batch * value_b + head * value_n
    grad += batch * grad_b + head * grad_n
    lse += (batch * heads + head) * query_height * query_width
    if tilts is not None:
        tilts += (batch * heads + head) * query_height * query_width
    if grad_key is not None:
        grad_key += batch * result_b + head * result_n
        delta += (batch * heads + head) * query_height * query_width
    if grad_value is not None:
        grad_value += batch * result_b + head * result_n
    real = tl.arange(0, DIM_BLOCK)[None, :] < DIM

    n = tl.arange(0, KEYS)
    n_y = tile_y * TILE_Y + n // TILE_X
    n_x = tile_x * TILE_X + n % TILE_X
    pixel_y = class_y + DILATION * n_y
    pixel_x = class_x + DILATION * n_x
    mask = ((pixel_y < height) & (pixel_x < width))[:, None] & real
    if CAREFUL:
        done = True
        if grad_key is not None:
            rows = _rows(grad_key, pixel_y, pixel_x, result_y, result_x, DIM_BLOCK, WIDE, ALIGNED)
            done = _all_finite(tl.load(rows, mask=mask, other=0))
        if grad_value is not None:
            rows = _rows(grad_value, pixel_y, pixel_x, result_y, result_x, DIM_BLOCK, WIDE, ALIGNED)
            done &= _all_finite(tl.load(rows, mask=mask, other=0))
        if done:
            return
    rows = _rows(key, pixel_y, pixel_x, key_y, key_x, DIM_BLOCK, WIDE, ALIGNED)
    k = tl.load(rows, mask=mask, other=0)
    rows = _rows(value, pixel_y, pixel_x, value_y, value_x, DIM_BLOCK, WIDE, ALIGNED)
    v = tl.load(rows, mask=mask, other=0)
    if tilts is not None:
        coordinate_y = _coordinates(pixel_y, height)[:, None]
        coordinate_x = _coordinates(pixel_x, width)[:, None]

    acc_key = tl.zeros([KEYS, DIM_BLOCK], tl.float32)
    acc_value = tl.zeros([KEYS, DIM_BLOCK], tl.float32)
    odd_grad = tl.zeros([KEYS, DIM_BLOCK], tl.float32)
    for i in range(first_image_y, end_image_y):
        phase_y, origin_y, sign_y, begin_y, count_y = _mirror_image(
            i, class_y, tile_y, height, query_height,
            TILE_Y, KERNEL_SIZE, STEP, PHASES, UNIT, INVERSE,
        )  # fmt: skip
        u_y = _image_points(pixel_y, n_y, i, origin_y, sign_y, height) + RADIUS
        for j in range(first_image_x, tl.where(count_y > 0, end_image_x, first_image_x)):
            phase_x, origin_x, sign_x, begin_x, count_x = _mirror_image(
                j, class_x, tile_x, width, query_width,
                TILE_X, KERNEL_SIZE, STEP, PHASES, UNIT, INVERSE,
            )  # fmt: skip
            u_x = _image_points(pixel_x, n_x, j, origin_x, sign_x, width) + RADIUS
            for start in range(0, count_y * count_x, BLOCK):
                m = start + tl.arange(0, BLOCK)
                exists = m < count_y * count_x
                t_y = begin_y + m // tl.maximum(count_x, 1)
                t_x = begin_x + m % tl.maximum(count_x, 1)
                y = phase_y + PHASES * t_y
                x = phase_x + PHASES * t_x
                q_rows = _rows(query, y, x, query_y, query_x, DIM_BLOCK, WIDE, ALIGNED)
                g_rows = _rows(grad, y, x, grad_y, grad_x, DIM_BLOCK, WIDE, ALIGNED)
                pixels = _offset(y, x, query_width, 1, WIDE)
                q = tl.load(q_rows, mask=exists[:, None] & real, other=0)
                g = tl.load(g_rows, mask=exists[:, None] & real, other=0)
                # Beyond the queries that there are, weights are 0.
                row_lse = tl.load(lse + pixels, mask=exists, other=float('inf'))
                if grad_key is not None:
                    row_delta = tl.load(delta + pixels, mask=exists, other=0)
                # Here, sums that start with the tilt take fewer registers than its subtraction.
                tilt = None
                if tilts is not None:
                    tilt_x = tl.load(tilts + pixels, mask=exists, other=0)[None, :]
                    tilt_y = tl.load(tilts + planes + pixels, mask=exists, other=0)[None, :]
                    tilt = -(coordinate_y * tilt_y + coordinate_x * tilt_x)
                logits = _dot(k, tl.trans(q), PRECISION, tilt) * (scale * LOG2E)
                inside = _inside(
                    u_y[:, None], u_x[:, None], (STEP * t_y)[None, :], (STEP * t_x)[None, :],
                    KERNEL_SIZE,
                )  # fmt: skip
                if CAREFUL:
                    inside &= exists[None, :]
                weights = tl.exp2(tl.where(inside, logits - row_lse[None, :], float('-inf')))
                if grad_value is not None:
                    if CAREFUL:
                        odd_grad += _odd_seen(inside, g)
                    acc_value += _dot(weights.to(g.dtype), _clean(g, CAREFUL), PRECISION)
                if grad_key is not None:
                    grad_weights = _dot(v, tl.trans(g), PRECISION)
                    grad_logits = weights * (grad_weights - row_delta[None, :])
                    if CAREFUL:
                        grad_logits = tl.where(inside, grad_logits, 0)
                    # Of a query that is not finite, no weight is finite: there is nothing to mark.
                    acc_key += _dot(grad_logits.to(q.dtype), _clean(q, CAREFUL), PRECISION)

    if CAREFUL:
        acc_value = tl.where(odd_grad > 0, float('nan'), acc_value)
    if factor is not None:
        number = tl.load(factor).to(tl.float32)
        acc_key *= number
        acc_value *= number
    if grad_key is not None:
        rows = _rows(grad_key, pixel_y, pixel_x, result_y, result_x, DIM_BLOCK, WIDE, ALIGNED)
        tl.store(rows, (acc_key * scale).to(grad_key.dtype.element_ty), mask=mask)
    if grad_value is not None:
        rows = _rows(grad_value, pixel_y, pixel_x, result_y, result_x, DIM_BLOCK, WIDE, ALIGNED)
        tl.store(rows, acc_value.to(grad_value.dtype.element_ty), mask=mask)
