"""The passes of `hf_ivon.passes` as kernels in Triton: one launch for any number of tensors.

A kernel's `table` has a row for each of its kinds of tensors, with a column of 64 bits for each of `count` tensors:
first how many elements they have; then where they begin, 0 where there is none; and in passes with noise the number
that it is a function of. A program works on `BLOCK` elements of the tensor that `owners` says, on the block of it that
`blocks` says. In passes with noise it works on `BLOCK` columns, that is on as many elements of each of the four lanes,
the last ones shorter or missing; see `hf_ivon.philox.normal_lanes`. What noise is a function of (`k0` to `c3`) comes
as signed integers of 32 bits. `ALIGNED` tensors begin at multiples of 16 bytes, and have multiples of 64 elements.
"""

import triton
import triton.language as tl

_LARGEST = tl.constexpr(3.4028234663852886e38)  # finite in fp32


@triton.jit
def logarithm(x):
    """Return log(x) of normal positive numbers, as exact as fp32 is: Cephes' logf."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23  # of x / sqrt(1/2)
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    z = f * f
    e = exponent.to(tl.float32)
    p = 7.0376836292e-2 * f - 1.1514610310e-1
    p = p * f + 1.1676998740e-1
    p = p * f - 1.2420140846e-1
    p = p * f + 1.4249322787e-1
    p = p * f - 1.6668057665e-1
    p = p * f + 2.0000714765e-1
    p = p * f - 2.4999993993e-1
    p = p * f + 3.3333331174e-1
    return f * z * p + e * -2.12194440e-4 - 0.5 * z + f + e * 0.693359375


@triton.jit
def box_muller(first, second):
    """See `hf_ivon.philox.box_muller`; of words of 32 bits."""
    uniform = ((first >> 8).to(tl.float32) + 0.5) * 5.9604644775390625e-08  # 2**-24
    radius = tl.sqrt(logarithm(uniform) * -2.0)
    quarter = ((second >> 8).to(tl.float32) - 8388607.5) * 9.362675557e-08  # pi / 2**25
    square = quarter * quarter
    sine = (square * -1.9515295891e-4 + 8.3321608736e-3) * square - 1.6666654611e-1
    sine = (sine * square + 1.0) * quarter
    cosine = (square * 2.443315711809948e-5 - 1.388731625493765e-3) * square + 4.166664568298827e-2
    cosine = (cosine * square - 0.5) * square + 1.0
    half_sine = cosine * sine * 2.0
    half_cosine = sine * sine * -2.0 + 1.0
    return (half_sine * half_sine * -2.0 + 1.0) * radius, half_cosine * half_sine * 2.0 * radius


@triton.jit
def normals(columns, k0, k1, c1, c2, c3):
    """See `hf_ivon.philox.normal_lanes`."""
    k0 = k0.to(tl.uint32, bitcast=True)
    k1 = k1.to(tl.uint32, bitcast=True)
    c2 = c2.to(tl.uint32, bitcast=True)
    c3 = c3.to(tl.uint32, bitcast=True)
    w0, w1, w2, w3 = tl.philox_impl(columns.to(tl.uint32), c1, c2, c3, k0, k1, 7)
    d0, d1 = box_muller(w0, w1)
    d2, d3 = box_muller(w2, w3)
    return d0, d1, d2, d3


@triton.jit
def changed_hess(hess, change, weight_decay):
    """See `hf_ivon.functional.update_hess`; `change` is its (1 - beta2) (hess_hat - hess)."""
    floor = tl.maximum(weight_decay * 9.5367431640625e-07, 1e-30) - weight_decay  # 2**-20
    new = hess + (change / (hess + weight_decay) * 0.5 + 1.0) * change
    return tl.where(new < floor, floor, new)  # not of NaN, which stays


@triton.jit
def size_of(table, i, ALIGNED: tl.constexpr):
    """Return how many elements a tensor has."""
    size = tl.load(table + i)
    if ALIGNED:
        size = tl.multiple_of(size, 64)
    return size


@triton.jit
def elements(owners, blocks, table, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """Return this program's tensor, its places there, and which of them are inside."""
    i = tl.load(owners + tl.program_id(0))
    at = tl.load(blocks + tl.program_id(0)).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return i, at, at < size_of(table, i, ALIGNED)


@triton.jit
def columns_of(owners, blocks, table, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """Return this program's tensor, its columns there, and how many elements the tensor has."""
    i = tl.load(owners + tl.program_id(0))
    columns = tl.load(blocks + tl.program_id(0)).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return i, columns, size_of(table, i, ALIGNED)


@triton.jit
def width_of(size, ALIGNED: tl.constexpr):
    """Return how many columns a tensor's noise has."""
    width = (size + 3) // 4
    if ALIGNED:
        width = tl.multiple_of(width, 16)
    return width


@triton.jit
def pointer(table, row, i, count, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Return where a tensor begins."""
    begin = tl.load(table + row * count + i).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        begin = tl.multiple_of(begin, 16)
    return begin


@triton.jit
def is_given(table, row, i, count, at):
    """Return whether there is a tensor, for each place; as a mask of the interpreter one truth value will not do."""
    return tl.zeros_like(at) + tl.load(table + row * count + i) != 0


@triton.jit
def sample_lane(theta, mean, hess, at, inside, draw, ess, weight_decay, KEEP: tl.constexpr):
    """Run `sample` on a range of one lane."""
    if KEEP:
        center = tl.load(theta + at, mask=inside)
        tl.store(mean + at, center, mask=inside)
    else:
        center = tl.load(mean + at, mask=inside)
    std = tl.rsqrt((tl.load(hess + at, mask=inside, other=1.0) + weight_decay) * ess)
    tl.store(theta + at, center + std * draw, mask=inside)


@triton.jit(do_not_specialize=["count", "k0", "k1", "c2", "c3"])
def sample(
    owners,
    blocks,
    table,
    count,
    k0,
    k1,
    c2,
    c3,
    ess,
    weight_decay,
    KEEP: tl.constexpr,
    WEIGHT: tl.constexpr,
    start,
    width,
    begin,
    end,
    PART: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """See `hf_ivon.passes.sample_lanes`. Rows: sizes, weights, means, Hessians, numbers.

    Of a `PART` that begins at `start` of a tensor with lanes of `width`, columns `begin` to `end` are sampled.
    """
    i, columns, size = columns_of(owners, blocks, table, ALIGNED, BLOCK)
    if PART:
        columns += begin
        inside = columns < end
        at = columns - start
    else:
        width = width_of(size, ALIGNED)
        inside = columns < width
        at = columns
    theta = pointer(table, 1, i, count, WEIGHT, ALIGNED)
    mean = pointer(table, 2, i, count, tl.float32, ALIGNED)
    hess = pointer(table, 3, i, count, tl.float32, ALIGNED)
    d0, d1, d2, d3 = normals(columns, k0, k1, tl.load(table + 4 * count + i).to(tl.uint32), c2, c3)
    sample_lane(theta, mean, hess, at, inside & (at >= 0) & (at < size), d0, ess, weight_decay, KEEP)
    at += width
    sample_lane(theta, mean, hess, at, inside & (at >= 0) & (at < size), d1, ess, weight_decay, KEEP)
    at += width
    sample_lane(theta, mean, hess, at, inside & (at >= 0) & (at < size), d2, ess, weight_decay, KEEP)
    at += width
    sample_lane(theta, mean, hess, at, inside & (at >= 0) & (at < size), d3, ess, weight_decay, KEEP)


@triton.jit
def subtract_noise_lane(
    theta, hess, grad, at, inside, given, draw, ess, weight_decay, rate, factor, FIRST: tl.constexpr
):
    """Run `subtract_noise` on a range of one lane."""
    old = tl.load(hess + at, mask=inside, other=1.0)
    precision = (old + weight_decay) * ess
    noise = tl.rsqrt(precision) * draw
    hess_hat = noise * tl.load(grad + at, mask=inside & given, other=0.0) * factor * precision
    if FIRST:
        hess_hat -= old
    new = changed_hess(old, hess_hat * rate, weight_decay)
    tl.store(hess + at, tl.where(tl.abs(new) <= _LARGEST, new, old), mask=inside & given)
    tl.store(theta + at, tl.load(theta + at, mask=inside) - noise, mask=inside)


@triton.jit(do_not_specialize=["count", "k0", "k1", "c2", "c3"])
def subtract_noise(
    owners,
    blocks,
    table,
    count,
    k0,
    k1,
    c2,
    c3,
    ess,
    weight_decay,
    rate,
    factor,
    FIRST: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """See `hf_ivon.passes.subtract_noise_lanes`; without a gradient the Hessian stays as it is.

    `rate` is its 1 - beta2. Rows: sizes, weights, Hessians, gradients, numbers.
    """
    i, at, size = columns_of(owners, blocks, table, ALIGNED, BLOCK)
    width = width_of(size, ALIGNED)
    inside = at < width
    theta = pointer(table, 1, i, count, tl.float32, ALIGNED)
    hess = pointer(table, 2, i, count, tl.float32, ALIGNED)
    grad = pointer(table, 3, i, count, tl.float32, ALIGNED)
    given = is_given(table, 3, i, count, at)
    d0, d1, d2, d3 = normals(at, k0, k1, tl.load(table + 4 * count + i).to(tl.uint32), c2, c3)
    here = inside & (at < size)
    subtract_noise_lane(theta, hess, grad, at, here, given, d0, ess, weight_decay, rate, factor, FIRST)
    at += width
    here = inside & (at < size)
    subtract_noise_lane(theta, hess, grad, at, here, given, d1, ess, weight_decay, rate, factor, FIRST)
    at += width
    here = inside & (at < size)
    subtract_noise_lane(theta, hess, grad, at, here, given, d2, ess, weight_decay, rate, factor, FIRST)
    at += width
    here = inside & (at < size)
    subtract_noise_lane(theta, hess, grad, at, here, given, d3, ess, weight_decay, rate, factor, FIRST)


@triton.jit(do_not_specialize=["count"])
def adopt(owners, blocks, table, count, WEIGHT: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """See `hf_ivon.passes.adopt`. Rows: sizes, weights, means."""
    i, at, inside = elements(owners, blocks, table, ALIGNED, BLOCK)
    theta = pointer(table, 1, i, count, WEIGHT, ALIGNED)
    mean = pointer(table, 2, i, count, tl.float32, ALIGNED)
    weights = tl.load(theta + at, mask=inside)
    old = tl.load(mean + at, mask=inside)
    if WEIGHT == tl.float32:
        same = weights.to(tl.int32, bitcast=True) == old.to(tl.int32, bitcast=True)
    else:
        same = weights.to(tl.int16, bitcast=True) == old.to(WEIGHT).to(tl.int16, bitcast=True)
    tl.store(mean + at, tl.where(same, old, weights.to(tl.float32)), mask=inside)


@triton.jit(do_not_specialize=["count"])
def take_product(
    owners, blocks, table, count, factor, SQUARED: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr
):
    """See `hf_ivon.passes.take_product`; zeros without a gradient. Rows: sizes, weights, means, gradients."""
    i, at, inside = elements(owners, blocks, table, ALIGNED, BLOCK)
    theta = pointer(table, 1, i, count, tl.float32, ALIGNED)
    mean = pointer(table, 2, i, count, tl.float32, ALIGNED)
    grad = pointer(table, 3, i, count, tl.float32, ALIGNED)
    given = is_given(table, 3, i, count, at)
    center = tl.load(mean + at, mask=inside)
    product = tl.load(grad + at, mask=inside & given, other=0.0)
    if SQUARED:
        product *= factor
        product *= product
    else:
        product = (tl.load(theta + at, mask=inside) - center) * product * factor
    tl.store(theta + at, center, mask=inside)
    tl.store(mean + at, tl.where(given, product, 0.0), mask=inside)


@triton.jit(do_not_specialize=["count"])
def add_product(
    owners, blocks, table, count, factor, WEIGHT: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr
):
    """See `hf_ivon.passes.add_product`; nothing without a gradient. Rows: sizes, totals, weights, means, gradients."""
    i, at, inside = elements(owners, blocks, table, ALIGNED, BLOCK)
    total = pointer(table, 1, i, count, tl.float32, ALIGNED)
    theta = pointer(table, 2, i, count, WEIGHT, ALIGNED)
    mean = pointer(table, 3, i, count, tl.float32, ALIGNED)
    grad = pointer(table, 4, i, count, WEIGHT, ALIGNED)
    given = is_given(table, 4, i, count, at)
    inside &= given
    noise = tl.load(theta + at, mask=inside).to(tl.float32) - tl.load(mean + at, mask=inside)
    product = noise * tl.load(grad + at, mask=inside).to(tl.float32) * factor
    tl.store(total + at, tl.load(total + at, mask=inside) + product, mask=inside)


@triton.jit(do_not_specialize=["count"])
def square(owners, blocks, table, count, factor, KEEP: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """See `hf_ivon.passes.square`; nothing without a gradient. Rows: sizes, totals, gradients."""
    i, at, inside = elements(owners, blocks, table, ALIGNED, BLOCK)
    total = pointer(table, 1, i, count, tl.float32, ALIGNED)
    grad = pointer(table, 2, i, count, tl.float32, ALIGNED)
    given = is_given(table, 2, i, count, at)
    inside &= given
    scaled = tl.load(grad + at, mask=inside) * factor
    squared = scaled * scaled
    if KEEP:
        squared += tl.load(total + at, mask=inside)
    tl.store(total + at, squared, mask=inside)


@triton.jit(do_not_specialize=["count"])
def update(
    owners,
    blocks,
    table,
    count,
    ess,
    weight_decay,
    rate1,
    rate2,
    inverse_debias,
    clip_radius,
    lr,
    inverse_divisor,
    PRICE: tl.constexpr,
    AVERAGE: tl.constexpr,
    MOMENTUM: tl.constexpr,
    GRADIENT: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """See `hf_ivon.passes.update`; `rate1` and `rate2` are its 1 - beta1 and 1 - beta2.

    Rows: sizes, means, gradients, curvatures, momenta, Hessians, prior means.
    """
    i, at, inside = elements(owners, blocks, table, ALIGNED, BLOCK)
    mean = pointer(table, 1, i, count, tl.float32, ALIGNED)
    grad = pointer(table, 2, i, count, GRADIENT, ALIGNED)
    curvature = pointer(table, 3, i, count, tl.float32, ALIGNED)
    learns = is_given(table, 3, i, count, at)
    momentum = pointer(table, 4, i, count, MOMENTUM, ALIGNED)
    hess = pointer(table, 5, i, count, tl.float32, ALIGNED)
    prior_mean = pointer(table, 6, i, count, tl.float32, ALIGNED)
    has_prior = is_given(table, 6, i, count, at)
    center = tl.load(mean + at, mask=inside)
    average = tl.load(momentum + at, mask=inside).to(tl.float32)
    average += (tl.load(grad + at, mask=inside).to(tl.float32) - average) * rate1
    tl.store(momentum + at, average, mask=inside)
    old = tl.load(hess + at, mask=inside, other=1.0)
    hess_hat = tl.load(curvature + at, mask=inside & learns, other=0.0) * inverse_divisor
    if PRICE:
        hess_hat *= (old + weight_decay) * ess
    change = (hess_hat - old) * rate2
    if AVERAGE:
        new = old + change
        new = tl.where(new < 1e-30, 1e-30, new)
    else:
        new = changed_hess(old, change, weight_decay)
    new = tl.where(learns, new, old)
    tl.store(hess + at, new, mask=inside & learns)
    displacement = center - tl.load(prior_mean + at, mask=inside & has_prior, other=0.0)
    direction = (average * inverse_debias + displacement * weight_decay) / (new + weight_decay)
    direction = tl.where(direction < -clip_radius, -clip_radius, direction)
    direction = tl.where(direction > clip_radius, clip_radius, direction)
    tl.store(mean + at, center - direction * lr, mask=inside)
