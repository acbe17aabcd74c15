"""The passes of `hf_ivon.passes` as kernels in Triton, one launch for a tensor.

Pointers are to the first number of contiguous tensors of `size` elements. A program of a pass without noise works on
`BLOCK` elements. One of a pass with noise works on `BLOCK` columns, that is on as many elements of each of the four
lanes, which are `width` elements long, the last ones shorter or missing; see `hf_ivon.philox.normal_lanes`. What such
noise is a function of (`k0` to `c3`) comes as signed integers of 32 bits.
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
    c1 = c1.to(tl.uint32, bitcast=True)
    c2 = c2.to(tl.uint32, bitcast=True)
    c3 = c3.to(tl.uint32, bitcast=True)
    w0, w1, w2, w3 = tl.philox_impl(columns.to(tl.uint32), c1, c2, c3, k0, k1, 7)
    d0, d1 = box_muller(w0, w1)
    d2, d3 = box_muller(w2, w3)
    return d0, d1, d2, d3


@triton.jit
def elements(size, BLOCK: tl.constexpr):
    """Return this program's places in tensors, and which of them are inside."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return at, at < size


@triton.jit
def changed_hess(hess, change, weight_decay):
    """See `hf_ivon.functional.update_hess`; `change` is its (1 - beta2) (hess_hat - hess)."""
    floor = tl.maximum(weight_decay * 9.5367431640625e-07, 1e-30) - weight_decay  # 2**-20
    new = hess + (change / (hess + weight_decay) * 0.5 + 1.0) * change
    return tl.where(new < floor, floor, new)  # not of NaN, which stays


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


@triton.jit(do_not_specialize=["k0", "k1", "c1", "c2", "c3"])
def sample(
    theta,
    mean,
    hess,
    size,
    start,
    width,
    begin,
    end,
    k0,
    k1,
    c1,
    c2,
    c3,
    ess,
    weight_decay,
    KEEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """See `hf_ivon.passes.sample_lanes`; for columns `begin` to `end` of a tensor's part that begins at `start`."""
    columns, inside = elements(end - begin, BLOCK)
    columns += begin
    d0, d1, d2, d3 = normals(columns, k0, k1, c1, c2, c3)
    at = columns - start
    sample_lane(theta, mean, hess, at, inside & (at >= 0) & (at < size), d0, ess, weight_decay, KEEP)
    at += width
    sample_lane(theta, mean, hess, at, inside & (at >= 0) & (at < size), d1, ess, weight_decay, KEEP)
    at += width
    sample_lane(theta, mean, hess, at, inside & (at >= 0) & (at < size), d2, ess, weight_decay, KEEP)
    at += width
    sample_lane(theta, mean, hess, at, inside & (at >= 0) & (at < size), d3, ess, weight_decay, KEEP)


@triton.jit
def subtract_noise_lane(
    theta, hess, grad, at, inside, draw, ess, weight_decay, rate, factor, FIRST: tl.constexpr, HAS_GRAD: tl.constexpr
):
    """Run `subtract_noise` on a range of one lane."""
    old = tl.load(hess + at, mask=inside, other=1.0)
    precision = (old + weight_decay) * ess
    noise = tl.rsqrt(precision) * draw
    if HAS_GRAD:
        hess_hat = noise * tl.load(grad + at, mask=inside, other=0.0) * factor * precision
        if FIRST:
            hess_hat -= old
        new = changed_hess(old, hess_hat * rate, weight_decay)
        tl.store(hess + at, tl.where(tl.abs(new) <= _LARGEST, new, old), mask=inside)
    tl.store(theta + at, tl.load(theta + at, mask=inside) - noise, mask=inside)


@triton.jit(do_not_specialize=["k0", "k1", "c1", "c2", "c3"])
def subtract_noise(
    theta,
    hess,
    grad,
    size,
    width,
    k0,
    k1,
    c1,
    c2,
    c3,
    ess,
    weight_decay,
    rate,
    factor,
    FIRST: tl.constexpr,
    HAS_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """See `hf_ivon.passes.subtract_noise_lanes`; `rate` is its 1 - beta2."""
    columns, inside = elements(width, BLOCK)
    d0, d1, d2, d3 = normals(columns, k0, k1, c1, c2, c3)
    i = inside & (columns < size)
    subtract_noise_lane(theta, hess, grad, columns, i, d0, ess, weight_decay, rate, factor, FIRST, HAS_GRAD)
    columns += width
    i = inside & (columns < size)
    subtract_noise_lane(theta, hess, grad, columns, i, d1, ess, weight_decay, rate, factor, FIRST, HAS_GRAD)
    columns += width
    i = inside & (columns < size)
    subtract_noise_lane(theta, hess, grad, columns, i, d2, ess, weight_decay, rate, factor, FIRST, HAS_GRAD)
    columns += width
    i = inside & (columns < size)
    subtract_noise_lane(theta, hess, grad, columns, i, d3, ess, weight_decay, rate, factor, FIRST, HAS_GRAD)


@triton.jit(do_not_specialize=["k0", "k1", "c2", "c3"])
def draw_lanes(lane0, lane1, lane2, lane3, columns, indices, size, k0, k1, c2, c3, BLOCK: tl.constexpr):
    """See `hf_ivon.passes.draw_lanes`."""
    at, inside = elements(size, BLOCK)
    numbers = tl.load(columns + at, mask=inside, other=0)
    tensors = tl.load(indices + at, mask=inside, other=0).to(tl.int32)
    d0, d1, d2, d3 = normals(numbers, k0, k1, tensors, c2, c3)
    tl.store(lane0 + at, d0, mask=inside)
    tl.store(lane1 + at, d1, mask=inside)
    tl.store(lane2 + at, d2, mask=inside)
    tl.store(lane3 + at, d3, mask=inside)


@triton.jit
def adopt(theta, mean, size, INTEGER: tl.constexpr, BLOCK: tl.constexpr):
    """See `hf_ivon.passes.adopt`; `INTEGER` has as many bits as a weight."""
    at, inside = elements(size, BLOCK)
    weights = tl.load(theta + at, mask=inside)
    old = tl.load(mean + at, mask=inside)
    same = weights.to(INTEGER, bitcast=True) == old.to(weights.dtype).to(INTEGER, bitcast=True)
    tl.store(mean + at, tl.where(same, old, weights.to(tl.float32)), mask=inside)


@triton.jit
def take_product(theta, mean, grad, size, factor, SQUARED: tl.constexpr, BLOCK: tl.constexpr):
    """See `hf_ivon.passes.take_product`."""
    at, inside = elements(size, BLOCK)
    center = tl.load(mean + at, mask=inside)
    product = tl.load(grad + at, mask=inside)
    if SQUARED:
        product *= factor
        product *= product
    else:
        product = (tl.load(theta + at, mask=inside) - center) * product * factor
    tl.store(theta + at, center, mask=inside)
    tl.store(mean + at, product, mask=inside)


@triton.jit
def add_product(total, theta, mean, grad, size, factor, BLOCK: tl.constexpr):
    """See `hf_ivon.passes.add_product`."""
    at, inside = elements(size, BLOCK)
    noise = tl.load(theta + at, mask=inside).to(tl.float32) - tl.load(mean + at, mask=inside)
    product = noise * tl.load(grad + at, mask=inside).to(tl.float32) * factor
    tl.store(total + at, tl.load(total + at, mask=inside) + product, mask=inside)


@triton.jit
def square(total, grad, size, factor, KEEP: tl.constexpr, BLOCK: tl.constexpr):
    """See `hf_ivon.passes.square`."""
    at, inside = elements(size, BLOCK)
    scaled = tl.load(grad + at, mask=inside) * factor
    squared = scaled * scaled
    if KEEP:
        squared += tl.load(total + at, mask=inside)
    tl.store(total + at, squared, mask=inside)


@triton.jit
def update(
    mean,
    grad,
    curvature,
    momentum,
    hess,
    prior_mean,
    size,
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
    HAS_CURVATURE: tl.constexpr,
    HAS_PRIOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """See `hf_ivon.passes.update`; `rate1` and `rate2` are its 1 - beta1 and 1 - beta2."""
    at, inside = elements(size, BLOCK)
    center = tl.load(mean + at, mask=inside)
    average = tl.load(momentum + at, mask=inside).to(tl.float32)
    average += (tl.load(grad + at, mask=inside) - average) * rate1
    tl.store(momentum + at, average, mask=inside)
    h = tl.load(hess + at, mask=inside, other=1.0)
    if HAS_CURVATURE:
        hess_hat = tl.load(curvature + at, mask=inside) * inverse_divisor
        if PRICE:
            hess_hat *= (h + weight_decay) * ess
        change = (hess_hat - h) * rate2
        if AVERAGE:
            h += change
            h = tl.where(h < 1e-30, 1e-30, h)
        else:
            h = changed_hess(h, change, weight_decay)
        tl.store(hess + at, h, mask=inside)
    displacement = center
    if HAS_PRIOR:
        displacement = center - tl.load(prior_mean + at, mask=inside)
    direction = (average * inverse_debias + displacement * weight_decay) / (h + weight_decay)
    direction = tl.where(direction < -clip_radius, -clip_radius, direction)
    direction = tl.where(direction > clip_radius, clip_radius, direction)
    tl.store(mean + at, center - direction * lr, mask=inside)
