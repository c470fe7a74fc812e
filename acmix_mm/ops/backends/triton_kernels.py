"""Triton kernels of neighbourhood attention; :mod:`.triton_backend` launches them.

All kernels work on a lattice. With stride s, dilation D and g = gcd(s, D), neighbourhoods only
ever touch pixels at multiples of ``UNIT = g``. In those units query y stands at ``STEP * y`` and
its keys lie ``PHASES`` apart, for ``STEP = s / g`` and ``PHASES = D / g``. The two have no common
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

Of the gradients of key and value, one may be None: it is not needed then.
"""

import inspect

import triton
import triton.language as tl


def _jit(function):
    """``triton.jit`` without a variant for each divisibility of sizes, strides and addresses.

    Reflection breaks up what could be read as vectors, so those variants would gain nothing.
    """
    parameters = inspect.signature(function).parameters.values()
    names = [p.name for p in parameters if p.annotation is not tl.constexpr]
    return triton.jit(function, do_not_specialize=names)


# Rows and columns of a tile, block of the other side, warps. Smaller tiles spend less arithmetic on
# masked pairs, larger ones read each key less often.
_HALF_SHAPES = [
    (8, 8, 32, 4),
    (4, 8, 32, 4),
    (8, 8, 32, 8),
    (8, 8, 64, 4),
    (8, 8, 64, 8),
    (8, 16, 32, 8),
    (4, 8, 16, 4),
    (4, 8, 32, 8),
]
_SINGLE_SHAPES = [
    (4, 8, 32, 4),
    (8, 8, 32, 8),
    (4, 8, 16, 4),
    (8, 8, 32, 4),
    (8, 8, 64, 8),
]


def tile_shapes(dim_block: int, itemsize: int) -> list[tuple[int, int, int, int]]:
    """Candidates for a head dimension, the first being good without tuning.

    Bounds are on what a warp holds; they were read off compilations for sm_90 (Triton 3.7.1) and
    leave out what would spill registers by the hundred, or take many warps for next to nothing.
    """
    if itemsize < 4:
        return [
            (y, x, block, warps)
            for y, x, block, warps in _HALF_SHAPES
            if 256 <= (y * x + block) * dim_block / warps <= 1536
        ]
    # Products of float32 run on the ordinary units, unrolled.
    return [
        (y, x, block, warps)
        for y, x, block, warps in _SINGLE_SHAPES
        if y * x * block * dim_block / warps <= 1 << 14
    ]


@triton.jit
def _dot(a, b):
    """Matrix product, with float32 sums; of float32 in full precision, not TF32."""
    if INTERPRETED and a.dtype == tl.bfloat16:
        # The interpreter (3.7.1) would multiply the bit patterns.
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision='ieee')


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
def _place(heads, height, width, PHASES: tl.constexpr, TILE_Y: tl.constexpr, TILE_X: tl.constexpr):
    """This program's batch, head, phase and tile. Tiles run fastest: their regions overlap."""
    pid = tl.program_id(0)
    tiles_y = tl.cdiv(tl.cdiv(height, PHASES), TILE_Y)
    tiles_x = tl.cdiv(tl.cdiv(width, PHASES), TILE_X)
    tile_x = pid % tiles_x
    pid = pid // tiles_x
    tile_y = pid % tiles_y
    pid = pid // tiles_y
    phase_x = pid % PHASES
    pid = pid // PHASES
    phase_y = pid % PHASES
    pid = pid // PHASES
    batch = (pid // heads).to(tl.int64)
    head = (pid % heads).to(tl.int64)
    return batch, head, phase_y, phase_x, tile_y, tile_x


@triton.jit
def _offset(y, x, stride_y, stride_x, WIDE: tl.constexpr):
    """Offset of pixels within one map; WIDE, where 32 bits do not hold it."""
    if WIDE:
        y = y.to(tl.int64)
        x = x.to(tl.int64)
    return y * stride_y + x * stride_x


@triton.jit
def _channels(stride, DIM_BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """(DIM_BLOCK, 1) offsets of the channels of a head."""
    channel = tl.arange(0, DIM_BLOCK)[:, None]
    if WIDE:
        channel = channel.to(tl.int64)
    return channel * stride


@triton.jit
def _contiguous(y, x, height, width, DIM_BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """(DIM_BLOCK, pixels) offsets within a head of contiguous maps."""
    channels = tl.arange(0, DIM_BLOCK)[:, None] * (height.to(tl.int64) * width)
    return channels + _offset(y, x, width, 1, WIDE)[None, :]


@triton.jit
def _inside(key_y, key_x, query_y, query_x, KERNEL_SIZE: tl.constexpr):
    """Is the key at 0 <= key - query < KERNEL_SIZE on both axes? (Unsigned: one comparison.)"""
    y = (key_y - query_y).to(tl.uint32, bitcast=True)
    x = (key_x - query_x).to(tl.uint32, bitcast=True)
    return (y < KERNEL_SIZE) & (x < KERNEL_SIZE)


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
    """How many numbers of ``maps`` (channels, others) that are not finite each row is to take."""
    odd = tl.where(_finite(maps), 0.0, 1.0).to(tl.float16)
    return tl.dot(inside.to(tl.float16), tl.trans(odd))


@_jit
def forward_kernel(
    query, key, value, output, lse,
    query_b, query_n, query_d, query_y, query_x,
    key_b, key_n, key_d, key_y, key_x,
    value_b, value_n, value_d, value_y, value_x,
    heads, height, width, query_height, query_width, scale,
    DIM: tl.constexpr, DIM_BLOCK: tl.constexpr,
    KERNEL_SIZE: tl.constexpr, STEP: tl.constexpr, PHASES: tl.constexpr, UNIT: tl.constexpr,
    ONCE: tl.constexpr, WIDE: tl.constexpr, CAREFUL: tl.constexpr,
    TILE_Y: tl.constexpr, TILE_X: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Output and log2-sum-exp2 of one tile of queries, over its key region in blocks of keys."""
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
    area = query_height.to(tl.int64) * query_width
    output += (batch * heads + head) * DIM * area
    lse += (batch * heads + head) * area
    real = tl.arange(0, DIM_BLOCK)[:, None] < DIM

    m = tl.arange(0, QUERIES)
    m_y, m_x = m // TILE_X, m % TILE_X
    y = phase_y + PHASES * (tile_y * TILE_Y + m_y)
    x = phase_x + PHASES * (tile_x * TILE_X + m_x)
    exists = (y < query_height) & (x < query_width)
    mask = real & exists[None, :]
    if CAREFUL:
        places = _contiguous(y, x, query_height, query_width, DIM_BLOCK, WIDE)
        done = _all_finite(tl.load(output + places, mask=mask, other=0))
        if done:
            return
    pixels = _offset(y, x, query_y, query_x, WIDE)[None, :]
    q = tl.load(query + _channels(query_d, DIM_BLOCK, WIDE) + pixels, mask=mask, other=0)
    q = tl.trans(q)

    # Where the region starts, on the pixels.
    first_y = UNIT * (STEP * phase_y + PHASES * (tile_y * (TILE_Y * STEP) - RADIUS))
    first_x = UNIT * (STEP * phase_x + PHASES * (tile_x * (TILE_X * STEP) - RADIUS))
    keys = key + _channels(key_d, DIM_BLOCK, WIDE)
    values = value + _channels(value_d, DIM_BLOCK, WIDE)
    scale *= LOG2E  # powers of two are what the hardware computes
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
        k_pixels = _offset(pixel_y, pixel_x, key_y, key_x, WIDE)[None, :]
        v_pixels = _offset(pixel_y, pixel_x, value_y, value_x, WIDE)[None, :]
        k = tl.load(keys + k_pixels, mask=real, other=0)
        v = tl.load(values + v_pixels, mask=real, other=0)
        logits = _dot(q, k) * scale
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
        acc = acc * decay[:, None] + _dot(weights.to(v.dtype), tl.trans(_clean(v, CAREFUL)))
        largest = new_largest

    if CAREFUL:
        acc = tl.where(odd > 0, float('nan'), acc)
    out = tl.trans((acc / total[:, None]).to(output.dtype.element_ty))
    places = _contiguous(y, x, query_height, query_width, DIM_BLOCK, WIDE)
    tl.store(output + places, out, mask=mask)
    tl.store(lse + _offset(y, x, query_width, 1, WIDE), largest + tl.log2(total), mask=exists)


@_jit
def grad_query_kernel(
    query, key, value, output, lse, grad, grad_query, delta,
    query_b, query_n, query_d, query_y, query_x,
    key_b, key_n, key_d, key_y, key_x,
    value_b, value_n, value_d, value_y, value_x,
    grad_b, grad_n, grad_d, grad_y, grad_x,
    heads, height, width, query_height, query_width, scale,
    DIM: tl.constexpr, DIM_BLOCK: tl.constexpr,
    KERNEL_SIZE: tl.constexpr, STEP: tl.constexpr, PHASES: tl.constexpr, UNIT: tl.constexpr,
    ONCE: tl.constexpr, WIDE: tl.constexpr, CAREFUL: tl.constexpr,
    TILE_Y: tl.constexpr, TILE_X: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """As the forward kernel; also writes delta = sum(grad * output), for the other kernel."""
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
    grad += batch * grad_b + head * grad_n
    real = tl.arange(0, DIM_BLOCK)[:, None] < DIM
    area = query_height.to(tl.int64) * query_width
    output += (batch * heads + head) * DIM * area
    grad_query += (batch * heads + head) * DIM * area
    lse += (batch * heads + head) * area
    delta += (batch * heads + head) * area

    m = tl.arange(0, QUERIES)
    m_y, m_x = m // TILE_X, m % TILE_X
    y = phase_y + PHASES * (tile_y * TILE_Y + m_y)
    x = phase_x + PHASES * (tile_x * TILE_X + m_x)
    exists = (y < query_height) & (x < query_width)
    mask = real & exists[None, :]
    places = _contiguous(y, x, query_height, query_width, DIM_BLOCK, WIDE)
    if CAREFUL:
        done = _all_finite(tl.load(grad_query + places, mask=mask, other=0))
        if done:
            return
    pixels = _offset(y, x, query_y, query_x, WIDE)[None, :]
    q = tl.load(query + _channels(query_d, DIM_BLOCK, WIDE) + pixels, mask=mask, other=0)
    pixels = _offset(y, x, grad_y, grad_x, WIDE)[None, :]
    g = tl.load(grad + _channels(grad_d, DIM_BLOCK, WIDE) + pixels, mask=mask, other=0)
    pixels = _offset(y, x, query_width, 1, WIDE)
    out = tl.load(output + places, mask=mask, other=0)
    row_delta = tl.sum(g.to(tl.float32) * out.to(tl.float32), 0)
    tl.store(delta + pixels, row_delta, mask=exists)
    row_lse = tl.load(lse + pixels, mask=exists, other=float('inf'))
    q, g = tl.trans(q), tl.trans(g)

    first_y = UNIT * (STEP * phase_y + PHASES * (tile_y * (TILE_Y * STEP) - RADIUS))
    first_x = UNIT * (STEP * phase_x + PHASES * (tile_x * (TILE_X * STEP) - RADIUS))
    keys = key + _channels(key_d, DIM_BLOCK, WIDE)
    values = value + _channels(value_d, DIM_BLOCK, WIDE)
    acc = tl.zeros([QUERIES, DIM_BLOCK], tl.float32)
    odd = tl.zeros([QUERIES, DIM_BLOCK], tl.float32)
    for start in range(0, REGION_Y * REGION_X, BLOCK):
        n = start + tl.arange(0, BLOCK)
        n_y, n_x = n // REGION_X, n % REGION_X
        pixel_y = _reflect(first_y + UNIT * PHASES * n_y, height, ONCE)
        pixel_x = _reflect(first_x + UNIT * PHASES * n_x, width, ONCE)
        k_pixels = _offset(pixel_y, pixel_x, key_y, key_x, WIDE)[None, :]
        v_pixels = _offset(pixel_y, pixel_x, value_y, value_x, WIDE)[None, :]
        k = tl.load(keys + k_pixels, mask=real, other=0)
        v = tl.load(values + v_pixels, mask=real, other=0)
        logits = _dot(q, k) * (scale * LOG2E)
        inside = _inside(
            n_y[None, :], n_x[None, :], (STEP * m_y)[:, None], (STEP * m_x)[:, None], KERNEL_SIZE
        )
        weights = tl.exp2(tl.where(inside, logits - row_lse[:, None], float('-inf')))
        grad_weights = _dot(g, v)
        grad_logits = weights * (grad_weights - row_delta[:, None])
        if CAREFUL:
            grad_logits = tl.where(inside, grad_logits, 0)
            odd += _odd_seen(inside, k)
        acc += _dot(grad_logits.to(k.dtype), tl.trans(_clean(k, CAREFUL)))

    if CAREFUL:
        acc = tl.where(odd > 0, float('nan'), acc)
    result = tl.trans((acc * scale).to(grad_query.dtype.element_ty))
    tl.store(grad_query + places, result, mask=mask)


@_jit
def grad_key_value_kernel(
    query, key, value, lse, delta, grad, padded_grad_key, padded_grad_value,
    query_b, query_n, query_d, query_y, query_x,
    key_b, key_n, key_d, key_y, key_x,
    value_b, value_n, value_d, value_y, value_x,
    grad_b, grad_n, grad_d, grad_y, grad_x,
    heads, height, width, query_height, query_width, padded_height, padded_width, scale,
    DIM: tl.constexpr, DIM_BLOCK: tl.constexpr,
    KERNEL_SIZE: tl.constexpr, STEP: tl.constexpr, PHASES: tl.constexpr, UNIT: tl.constexpr,
    ONCE: tl.constexpr, WIDE: tl.constexpr, CAREFUL: tl.constexpr,
    TILE_Y: tl.constexpr, TILE_X: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile of lattice points as if each was a pixel, over the queries near it.

    It is a tile of the points ``PHASES * v + STEP * phase % PHASES`` of the padded lattice, which
    starts ``RADIUS * PHASES`` before the map: together, the phases cover all of it.
    """
    RADIUS: tl.constexpr = KERNEL_SIZE // 2
    REGION_Y: tl.constexpr = (TILE_Y - 1 + 2 * RADIUS) // STEP + 1
    REGION_X: tl.constexpr = (TILE_X - 1 + 2 * RADIUS) // STEP + 1
    KEYS: tl.constexpr = TILE_Y * TILE_X
    batch, head, phase_y, phase_x, tile_y, tile_x = _place(
        heads, padded_height, padded_width, PHASES, TILE_Y, TILE_X
    )
    query += batch * query_b + head * query_n
    key += batch * key_b + head * key_n
    value += batch * value_b + head * value_n
    grad += batch * grad_b + head * grad_n
    real = tl.arange(0, DIM_BLOCK)[:, None] < DIM
    area = query_height.to(tl.int64) * query_width
    lse += (batch * heads + head) * area
    padded_area = padded_height.to(tl.int64) * padded_width
    if padded_grad_key is not None:
        padded_grad_key += (batch * heads + head) * DIM * padded_area
        delta += (batch * heads + head) * area
    if padded_grad_value is not None:
        padded_grad_value += (batch * heads + head) * DIM * padded_area

    n = tl.arange(0, KEYS)
    v_y = tile_y * TILE_Y + n // TILE_X
    v_x = tile_x * TILE_X + n % TILE_X
    row = STEP * phase_y % PHASES + PHASES * v_y
    col = STEP * phase_x % PHASES + PHASES * v_x
    if CAREFUL:
        places = _contiguous(row, col, padded_height, padded_width, DIM_BLOCK, WIDE)
        written = real & ((row < padded_height) & (col < padded_width))[None, :]
        done = True
        if padded_grad_key is not None:
            done = _all_finite(tl.load(padded_grad_key + places, mask=written, other=0))
        if padded_grad_value is not None:
            done &= _all_finite(tl.load(padded_grad_value + places, mask=written, other=0))
        if done:
            return
    pixel_y = _reflect(UNIT * (row - RADIUS * PHASES), height, ONCE)
    pixel_x = _reflect(UNIT * (col - RADIUS * PHASES), width, ONCE)
    pixels = _offset(pixel_y, pixel_x, key_y, key_x, WIDE)[None, :]
    k = tl.trans(tl.load(key + _channels(key_d, DIM_BLOCK, WIDE) + pixels, mask=real, other=0))
    pixels = _offset(pixel_y, pixel_x, value_y, value_x, WIDE)[None, :]
    v = tl.trans(tl.load(value + _channels(value_d, DIM_BLOCK, WIDE) + pixels, mask=real, other=0))

    # v = 0 is u = -shift, relative to the first key that query t = 0 sees (u = -RADIUS there).
    shift_y = STEP * phase_y // PHASES
    shift_x = STEP * phase_x // PHASES
    # The first query that sees the tile, rounded up; the maximum before division, which truncates.
    first_y = tl.maximum(tile_y * TILE_Y - shift_y - 2 * RADIUS + STEP - 1, 0) // STEP
    first_x = tl.maximum(tile_x * TILE_X - shift_x - 2 * RADIUS + STEP - 1, 0) // STEP
    queries = query + _channels(query_d, DIM_BLOCK, WIDE)
    grads = grad + _channels(grad_d, DIM_BLOCK, WIDE)
    acc_key = tl.zeros([KEYS, DIM_BLOCK], tl.float32)
    acc_value = tl.zeros([KEYS, DIM_BLOCK], tl.float32)
    odd_grad = tl.zeros([KEYS, DIM_BLOCK], tl.float32)
    for start in range(0, REGION_Y * REGION_X, BLOCK):
        m = start + tl.arange(0, BLOCK)
        t_y = first_y + m // REGION_X
        t_x = first_x + m % REGION_X
        y = phase_y + PHASES * t_y
        x = phase_x + PHASES * t_x
        exists = (y < query_height) & (x < query_width)
        mask = real & exists[None, :]
        q_pixels = _offset(y, x, query_y, query_x, WIDE)[None, :]
        g_pixels = _offset(y, x, grad_y, grad_x, WIDE)[None, :]
        rows = _offset(y, x, query_width, 1, WIDE)
        q = tl.load(queries + q_pixels, mask=mask, other=0)
        g = tl.load(grads + g_pixels, mask=mask, other=0)
        # Queries beyond the map have weight 0.
        row_lse = tl.load(lse + rows, mask=exists, other=float('inf'))
        if padded_grad_key is not None:
            row_delta = tl.load(delta + rows, mask=exists, other=0)
        logits = _dot(k, q) * (scale * LOG2E)
        inside = _inside(
            (v_y - shift_y)[:, None],
            (v_x - shift_x)[:, None],
            (STEP * t_y)[None, :],
            (STEP * t_x)[None, :],
            KERNEL_SIZE,
        )
        if CAREFUL:
            inside &= exists[None, :]
        weights = tl.exp2(tl.where(inside, logits - row_lse[None, :], float('-inf')))
        if padded_grad_value is not None:
            if CAREFUL:
                odd_grad += _odd_seen(inside, g)
            acc_value += _dot(weights.to(g.dtype), tl.trans(_clean(g, CAREFUL)))
        if padded_grad_key is not None:
            grad_weights = _dot(v, g)
            grad_logits = weights * (grad_weights - row_delta[None, :])
            if CAREFUL:
                grad_logits = tl.where(inside, grad_logits, 0)
            # Of a query that is not finite, no weight is finite: there is nothing to mark.
            acc_key += _dot(grad_logits.to(q.dtype), tl.trans(_clean(q, CAREFUL)))

    if CAREFUL:
        acc_value = tl.where(odd_grad > 0, float('nan'), acc_value)
    places = _contiguous(row, col, padded_height, padded_width, DIM_BLOCK, WIDE)
    written = real & ((row < padded_height) & (col < padded_width))[None, :]
    if padded_grad_key is not None:
        tl.store(padded_grad_key + places, tl.trans(acc_key * scale), mask=written)
    if padded_grad_value is not None:
        tl.store(padded_grad_value + places, tl.trans(acc_value), mask=written)


@_jit
def fold_kernel(
    padded_grad_key, padded_grad_value, grad_key, grad_value,
    maps, height, width, padded_height, padded_width,
    first_y, last_y, first_x, last_x,
    BEFORE: tl.constexpr, UNIT: tl.constexpr, TILE_M: tl.constexpr, TILE_X: tl.constexpr,
):  # fmt: skip
    """Adjoint of reflection: each pixel of a row sums the lattice points that mirror onto it.

    Those are at ``period * i + y`` and ``period * i - y``; where the two coincide, that is one.
    ``first`` to ``last`` are the i for which any lies on the lattice.
    """
    pid = tl.program_id(0)
    tiles_x = tl.cdiv(width, TILE_X)
    tiles_m = tl.cdiv(maps, TILE_M)
    tile_x = pid % tiles_x
    pid = pid // tiles_x
    tile_m = pid % tiles_m
    y = pid // tiles_m
    x = tile_x * TILE_X + tl.arange(0, TILE_X)
    m = tile_m.to(tl.int64) * TILE_M + tl.arange(0, TILE_M)
    m = m[:, None]
    padded_area = padded_height.to(tl.int64) * padded_width
    period_y = tl.maximum(2 * height - 2, 1)
    period_x = tl.maximum(2 * width - 2, 1)
    exists = (m < maps) & (x < width)[None, :]
    acc_key = tl.zeros([TILE_M, TILE_X], tl.float32)
    acc_value = tl.zeros([TILE_M, TILE_X], tl.float32)
    # Even i: at period * (i / 2) + pixel; odd i: at period * ((i - 1) / 2) - pixel.
    for i in range(2 * first_y, 2 * last_y + 2):
        odd_y = i & 1
        point_y = BEFORE + (i - odd_y) // 2 * period_y + (1 - 2 * odd_y) * y
        row = point_y // UNIT
        once_y = (odd_y == 0) | (2 * y % period_y != 0)
        if (point_y >= 0) & (point_y % UNIT == 0) & (row < padded_height) & once_y:
            rows = m * padded_area + row.to(tl.int64) * padded_width
            for j in range(2 * first_x, 2 * last_x + 2):
                odd_x = j & 1
                origin = BEFORE + (j - odd_x) // 2 * period_x
                sign = 1 - 2 * odd_x
                end_1 = origin + sign * tile_x * TILE_X
                end_2 = end_1 + sign * (TILE_X - 1)
                # For all but tiles at the border, most mirror images are off the lattice.
                if (tl.maximum(end_1, end_2) >= 0) & (
                    tl.minimum(end_1, end_2) < padded_width * UNIT
                ):
                    point_x = origin + sign * x
                    col = point_x // UNIT
                    once_x = (odd_x == 0) | (2 * x % period_x != 0)
                    seen = (point_x >= 0) & (point_x % UNIT == 0) & (col < padded_width) & once_x
                    mask = seen[None, :] & exists
                    sources = rows + col[None, :]
                    if grad_key is not None:
                        acc_key += tl.load(padded_grad_key + sources, mask=mask, other=0)
                    if grad_value is not None:
                        acc_value += tl.load(padded_grad_value + sources, mask=mask, other=0)
    offset = (m * height + y) * width + x[None, :]
    if grad_key is not None:
        tl.store(grad_key + offset, acc_key.to(grad_key.dtype.element_ty), mask=exists)
    if grad_value is not None:
        tl.store(grad_value + offset, acc_value.to(grad_value.dtype.element_ty), mask=exists)
