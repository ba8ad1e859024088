"""The spline layer on a GPU, in Triton: hats made in registers and a matrix product, or for few tokens the look-up.

y = A @ C with A[b, f, n] = hat n at x[b, f] has N/2 times the flops of the look-up, on tensor cores, and reads every
control point once for a whole tile of tokens. A is never in memory: a tile of it is made from x, which is N times
smaller, and fed to tl.dot. At N = 8 the flops are those of the MLP of equal parameters.

    forward         y[b, o]      = sum_f sum_n hat_n(u[b, f]) C[f, n, o]       tiles of tokens x outputs
    table_gradient  dC[f, n, o]  = sum_b hat_n(u[b, f]) g[b, o]                tiles of knots of features x outputs
    input_gradient  dx[b, f]     = scale * sum_o g[b, o] S[f, i[b, f], o]      tiles of tokens x intervals of features:
                                   S[f, n] = C[f, n + 1] - C[f, n]             of these each keeps its own, i
    look_up         y[b, o]      = sum_f (1 - t) C[f, i, o] + t C[f, i + 1, o] few tokens

    u = x * scale + (N - 1) / 2  position in knots, float32; scale = (N - 1) / spline_width

A tile is over KN knots of some features: 8, or 4 where that leaves fewer unused. So x, the table and the gradients are
read about as often as by a plain product. Nothing is added atomically: results are the same every time.
Saved is x.

Where there is a tensor memory accelerator (TMA: sm_90 and later; half precision, rows of multiples of 16 bytes), tiles
come through it, and what lies outside a matrix comes as zero; elsewhere by addresses and masks. On an H200, 768 to 768
and 2,048 to 2,048, it made the forward 1.13 and 1.27 times as fast, the table's gradient 1.21, that of x 1.15.

Sums are in float32. Products are of bfloat16, float16, or float32, the latter in full or, if PyTorch is told to use it
(torch.backends.cuda.matmul.allow_tf32), in TF32; hats and slopes are made in float32 and then rounded to that.

    TRITON_INTERPRET=1 python ...       the numbers, without a GPU
    python -m kan_kernels.aot           the code for sm_80, sm_90 and sm_100, without a GPU
    python bench.py --cuda              how fast it is

Legend of shapes
    B  tokens       F  features     x  (B, F), float32          g  (B, O), the gradient of y
    N  knots        O  outputs      C  (F, N, O), the table     y  (B, O)
"""

import contextlib
import functools

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
NAN = tl.constexpr(tl.PropagateNan.ALL)

# ----------------------------------------------------------------------------------------------------------------------
# Kernels. All matrices are contiguous. Addresses are 64 bits: tables of more than 2^31 numbers exist. bucket is there
# for the tuner alone: the power of two that B is rounded up to. With TMA those of BOXES are descriptors, not addresses.


# Whether B is a multiple of 16 makes no better code: it need not be compiled anew for those that are.
jit = triton.jit(do_not_specialize=["B", "bucket"])


@triton.jit
def hat(u, rise, rise_from, fall, fall_from):
    """Hats at u = x * scale, of knots with these constants (see knot_constants). NaN stays NaN."""
    rising = tl.maximum(u + rise, rise_from, propagate_nan=NAN)
    falling = tl.maximum(fall - u, fall_from, propagate_nan=NAN)
    return tl.minimum(rising, falling, propagate_nan=NAN)


@triton.jit
def interval(u, N: tl.constexpr):
    """As a number like u; of NaN 0, so that it is always one to look up."""
    return tl.minimum(tl.where(u >= 0, tl.floor(u), 0.0), N - 2.0)


@triton.jit
def wide(n):
    """A whole number, in a loop a tensor or, if interpreted, Python's, in 64 bits."""
    return tl.full((), n, tl.int64)


@triton.jit
def multiply(a, c, acc, TF32: tl.constexpr):
    if INTERPRETED:  # the interpreter multiplies the bits of bfloat16 as if they were whole numbers
        a, c = a.to(tl.float32), c.to(tl.float32)
    return tl.dot(a, c, acc, input_precision="tf32" if TF32 else "ieee")


@triton.jit
def tile_of(pid, rows, columns, GROUP: tl.constexpr):
    """Which tile a program makes: GROUP rows at a time, so that those that run together read the same from L2."""
    first = pid // (GROUP * columns) * GROUP
    height = tl.minimum(rows - first, GROUP)
    within = pid % (GROUP * columns)
    return first + within % height, within // height


@jit
def forward_kernel(
    x, table, constants, y, B, F, O, per_part, bucket,
    N: tl.constexpr, KN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SCALE: tl.constexpr,
    TMA: tl.constexpr, TF32: tl.constexpr,
):  # fmt: skip
    """A tile (BM, BN) of y, (parts, B, O), over a part of the features: KN knots of BK / KN of them a step.

    per_part is a multiple of BK / KN.
    """
    BF: tl.constexpr = BK // KN
    groups: tl.constexpr = (N + KN - 1) // KN
    row, column = tile_of(tl.program_id(0), tl.cdiv(B, BM), tl.cdiv(O, BN), 8)
    b, f, o = row * BM + tl.arange(0, BM), tl.arange(0, BF), column * BN + tl.arange(0, BN)
    k, n = tl.arange(0, BK), tl.arange(0, KN)
    first = tl.program_id(1) * per_part
    last = tl.minimum(F, first + per_part)
    if not TMA:
        x += row.to(tl.int64) * BM * F
        at_x, at_table = tl.arange(0, BM)[:, None] * F + f[None, :], (k % BF * N + k // BF)[:, None] * O + o[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    steps = tl.cdiv(last - first, BF) * groups
    if TMA or TF32:  # at least one, as it is anyway: not knowing it, ptxas waits for every product (1.2 times as long)
        steps = tl.maximum(steps, 1)
    for step in range(steps):
        f0, n0 = first + step // groups * BF, step % groups * KN
        if TMA:
            p = x.load([row * BM, f0])
            c = tl.reshape(table.load([n0, f0, column * BN]), (BK, BN))
        else:
            p = tl.load(x + f0 + at_x, mask=(b < B)[:, None] & (f0 + f < F)[None, :], other=0.0)
            there = ((f0 + k % BF < F) & (n0 + k // BF < N))[:, None] & (o < O)[None, :]
            c = tl.load(table + (wide(f0) * N + n0) * O + at_table, mask=there, other=0.0)
        rise, rise_from = tl.load(constants + n0 + n), tl.load(constants + groups * KN + n0 + n)
        fall, fall_from = tl.load(constants + 2 * groups * KN + n0 + n), tl.load(constants + 3 * groups * KN + n0 + n)
        u = tl.broadcast_to((p * SCALE)[:, None, :], (BM, KN, BF))
        a = hat(u, rise[None, :, None], rise_from[None, :, None], fall[None, :, None], fall_from[None, :, None])
        acc = multiply(tl.reshape(a.to(c.dtype), (BM, BK)), c, acc, TF32)
    y += (tl.program_id(1).to(tl.int64) * B + b)[:, None] * O + o[None, :]
    tl.store(y, acc.to(y.dtype.element_ty), mask=(b < B)[:, None] & (o < O)[None, :])


@jit
def table_gradient_kernel(
    x, g, constants, out, sums, B, F, O, multiprocessors, bucket,
    N: tl.constexpr, KN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SCALE: tl.constexpr,
    PER_SM: tl.constexpr, PARTS: tl.constexpr, TMA: tl.constexpr, TF32: tl.constexpr,
):  # fmt: skip
    """A tile of dC, (F, N, O): KN knots each of BM / KN features, BN outputs; BK tokens a step.

    Tiles that would leave multiprocessors idle at the end are made in PARTS, each over a part of the tokens and stored
    as a tile of sums (tiles, PARTS, BM, BN), to be added.
    """
    BF: tl.constexpr = BM // KN
    groups: tl.constexpr = (N + KN - 1) // KN
    pid, rows, columns = tl.program_id(0), tl.cdiv(F, BF) * groups, tl.cdiv(O, BN)
    whole = rows * columns
    if PARTS > 1:
        whole -= whole % (multiprocessors * PER_SM)
    late = pid >= whole
    tile = tl.where(late, whole + (pid - whole) // PARTS, pid)
    per_part = tl.cdiv(tl.cdiv(B, PARTS), BK) * BK
    first = tl.where(late, (pid - whole) % PARTS * per_part, 0)
    last = tl.where(late, tl.minimum(B, first + per_part), B)
    row, column = tile_of(tile, rows, columns, 8)
    n0, f0 = row % groups * KN, row // groups * BF
    f, b, o = f0 + tl.arange(0, BF), tl.arange(0, BK), column * BN + tl.arange(0, BN)
    there, n = (o < O)[None, :], tl.arange(0, KN)
    # Of features outside whatever is there: their rows are not stored, and a mask would make it spill on sm_100.
    at_x, at_g = b[None, :] * F + tl.minimum(f, F - 1)[:, None], b[:, None] * O + o[None, :]
    rise, rise_from = tl.load(constants + n0 + n), tl.load(constants + groups * KN + n0 + n)
    fall, fall_from = tl.load(constants + 2 * groups * KN + n0 + n), tl.load(constants + 3 * groups * KN + n0 + n)
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(first, last, BK):
        if TMA:
            p, c = x.load([start, f0]).T, g.load([start, column * BN])
        else:
            inside = start + b < last
            p = tl.load(x + wide(start) * F + at_x, mask=inside[None, :], other=0.0)
            c = tl.load(g + wide(start) * O + at_g, mask=inside[:, None] & there, other=0.0)
        u = tl.broadcast_to((p * SCALE)[:, None, :], (BF, KN, BK))
        a = hat(u, rise[None, :, None], rise_from[None, :, None], fall[None, :, None], fall_from[None, :, None])
        acc = multiply(tl.reshape(a.to(c.dtype), (BM, BK)), c, acc, TF32)
    r = tl.arange(0, BM)[:, None]
    if late:
        tl.store(sums + ((pid - whole).to(tl.int64) * BM + r) * BN + tl.arange(0, BN)[None, :], acc)
    else:
        # Within a tile 32 bits are enough (see launch); with 64 it spills on sm_100.
        to = out + (f0.to(tl.int64) * N + n0) * O + ((r // KN * N + r % KN) * O + o[None, :])
        tl.store(to, acc.to(out.dtype.element_ty), mask=(r < (F - f0) * KN) & (r % KN < N - n0) & there)


@triton.jit
def add_tiles_kernel(
    sums, out, F, O, whole,
    N: tl.constexpr, KN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PARTS: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """R rows of a tile of dC from its parts' sums (tiles, PARTS, BM, BN), in their order."""
    BF: tl.constexpr = BM // KN
    groups: tl.constexpr = (N + KN - 1) // KN
    tile, r = whole + tl.program_id(0), tl.program_id(1) * R + tl.arange(0, R)
    row, column = tile_of(tile, tl.cdiv(F, BF) * groups, tl.cdiv(O, BN), 8)
    f, n, o = row // groups * BF + r // KN, row % groups * KN + r % KN, tl.arange(0, BN)
    sums += tl.program_id(0).to(tl.int64) * PARTS * BM * BN + r[:, None] * BN + o[None, :]
    total = tl.zeros((R, BN), tl.float32)
    for part in range(PARTS):
        total += tl.load(sums + part * BM * BN)
    o += column * BN
    out += (f.to(tl.int64) * N + n)[:, None] * O + o[None, :]
    tl.store(out, total.to(out.dtype.element_ty), mask=((f < F) & (n < N))[:, None] & (o < O)[None, :])


@triton.jit
def input_gradient_tile(
    tile, x, g, slopes, out, B, F, O, scale,
    N: tl.constexpr, KN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    TMA: tl.constexpr, TF32: tl.constexpr,
):  # fmt: skip
    """A tile (BM, BN) of g @ S^T, for KN intervals of BN / KN features, of which each token and feature keeps its own.

    Every number of dx lies in one interval, so it is written once. slopes (F, N - 1, O).
    """
    BF: tl.constexpr = BN // KN
    groups: tl.constexpr = (N - 2 + KN) // KN
    row, column = tile_of(tile, tl.cdiv(B, BM), tl.cdiv(F, BF) * groups, 8)
    n0, f0, k = column % groups * KN, column // groups * BF, tl.arange(0, BN)
    b, o = row * BM + tl.arange(0, BM), tl.arange(0, BK)
    if not TMA:
        g += row.to(tl.int64) * BM * O
        slopes += (f0.to(tl.int64) * (N - 1) + n0) * O
        at_g = tl.arange(0, BM)[:, None] * O + o[None, :]
        # Outside whatever is there: no token keeps it, and a mask would make it spill on sm_80.
        f, n = tl.minimum(k % BF, F - 1 - f0), tl.minimum(k // BF, N - 2 - n0)
        at_slopes = (f * (N - 1) + n)[None, :] * O + o[:, None]
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, O, BK):
        if TMA:
            c = g.load([row * BM, start])
            s = tl.reshape(slopes.load([n0, f0, start]), (BN, BK)).T
        else:
            inside = start + o < O
            c = tl.load(g + start + at_g, mask=(b < B)[:, None] & inside[None, :], other=0.0)
            s = tl.load(slopes + start + at_slopes, mask=inside[:, None], other=0.0)
        acc = multiply(c, s, acc, TF32)
    f, n = f0 + tl.arange(0, BF), n0 + tl.arange(0, KN)
    at, inside = b.to(tl.int64)[:, None] * F + f[None, :], (b < B)[:, None] & (f < F)[None, :]
    u = tl.load(x + at, mask=inside, other=0.0) * scale + (N - 1) / 2
    i = interval(u, N).to(tl.int32)
    d = tl.sum(tl.where(n[None, :, None] == i[:, None, :], tl.reshape(acc, (BM, KN, BF)), 0.0), 1)
    tl.store(out + at, d * scale, mask=inside & (i >= n0) & (i < n0 + KN))


@jit
def input_gradient_kernel(
    x, g, slopes, out, B, F, O, scale, bucket,
    N: tl.constexpr, KN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    PER_SM: tl.constexpr, TMA: tl.constexpr, TF32: tl.constexpr,
):  # fmt: skip
    """A tile; with TMA as many as are left for each of PER_SM programs a multiprocessor, which then load for the next
    tile while they finish one."""
    if TMA:
        tiles = tl.cdiv(B, BM) * tl.cdiv(F, BN // KN) * tl.cdiv(N - 1, KN)
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
            input_gradient_tile(tile, x, g, slopes, out, B, F, O, scale, N, KN, BM, BN, BK, TMA, TF32)
    else:
        input_gradient_tile(tl.program_id(0), x, g, slopes, out, B, F, O, scale, N, KN, BM, BN, BK, TMA, TF32)


@triton.jit
def slopes_kernel(table, out, O, N: tl.constexpr, BN: tl.constexpr):
    """BN numbers of one feature of out (F, N - 1, O), the differences of neighbours in table (F, N, O).

    Differences are rounded, not made of what is rounded: that would be 10% off in bfloat16 at N = 128.
    """
    f, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BN + tl.arange(0, BN)
    size = (N - 1) * O
    below = tl.load(table + f * N * O + at, mask=at < size, other=0.0).to(tl.float32)
    above = tl.load(table + f * N * O + O + at, mask=at < size, other=0.0).to(tl.float32)
    tl.store(out + f * size + at, (above - below).to(out.dtype.element_ty), mask=at < size)


@triton.jit
def look_up_kernel(
    x, table, y, F, O, scale,
    N: tl.constexpr, BF: tl.constexpr, BN: tl.constexpr, STEPS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """BN outputs of one token; STEPS times BF features are at least F. EARLY: started before the kernel before it has
    ended, for whose end it waits, and letting the one after it start: of 3.7 us a layer of 768 channels 0.6 (H200).

    Not a loop: then loads of several steps are under way at once, which in a loop they are not (twice as slow).
    """
    b, o = tl.program_id(0).to(tl.int64), tl.program_id(1) * BN + tl.arange(0, BN)
    acc = tl.zeros((BF, BN), tl.float32)
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    for step in tl.static_range(STEPS):
        f = step * BF + tl.arange(0, BF)
        inside = (f < F)[:, None] & (o < O)[None, :]
        u = tl.load(x + b * F + f, mask=f < F, other=0.0).to(tl.float32) * scale + (N - 1) / 2
        i = interval(u, N)
        t = (u - i)[:, None]
        at = table + (f.to(tl.int64) * N + i.to(tl.int32))[:, None] * O + o[None, :]
        below = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        above = tl.load(at + O, mask=inside, other=0.0).to(tl.float32)
        acc += below + t * (above - below)
    tl.store(y + b * O + o, tl.sum(acc, 0).to(y.dtype.element_ty), mask=o < O)


@triton.jit
def add_kernel(sums, out, parts, size, PARTS: tl.constexpr, BN: tl.constexpr):
    """BN numbers of out (size,), the sum of sums (parts, size); PARTS is parts rounded up to a power of two."""
    part, at = tl.arange(0, PARTS), tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    inside = (part < parts)[:, None] & (at < size)[None, :]
    total = tl.sum(tl.load(sums + part.to(tl.int64)[:, None] * size + at[None, :], mask=inside, other=0.0), 0)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=at < size)


# ----------------------------------------------------------------------------------------------------------------------
# Tiles. A short list for each kernel, timed on first use for a device, a dtype, F, N, O and B rounded up to a power of
# two; Triton keeps the choice on disk. `python -m kan_kernels.aot` compiles all of them.

Tensor = torch.Tensor
HALF, TF32, FULL = "half", "tf32", "full"  # of what the products are


def config(warps, stages, **tile):
    return triton.Config(tile, num_warps=warps, num_stages=stages)


CHOICES = {
    (forward_kernel, HALF): [
        config(8, 3, BM=128, BN=256, BK=64),
        config(8, 4, BM=128, BN=256, BK=64),
        config(4, 3, BM=64, BN=256, BK=64),
        config(8, 3, BM=128, BN=128, BK=64),
        config(4, 3, BM=64, BN=128, BK=64),
    ],
    (forward_kernel, TF32): [config(8, 3, BM=128, BN=128, BK=32)],
    (forward_kernel, FULL): [config(8, 2, BM=128, BN=64, BK=16)],
    (table_gradient_kernel, HALF): [
        config(8, 3, BM=128, BN=256, BK=64, PER_SM=1),  # PER_SM: programs a multiprocessor holds at once
        config(8, 4, BM=128, BN=256, BK=64, PER_SM=1),
        config(4, 3, BM=64, BN=256, BK=64, PER_SM=2),
        config(4, 3, BM=64, BN=128, BK=64, PER_SM=2),
    ],
    (table_gradient_kernel, TF32): [config(8, 3, BM=128, BN=128, BK=32, PER_SM=1)],
    (table_gradient_kernel, FULL): [config(4, 3, BM=64, BN=64, BK=16, PER_SM=2)],
    (input_gradient_kernel, HALF): [
        config(8, 3, BM=128, BN=256, BK=64, PER_SM=1),
        config(8, 3, BM=256, BN=128, BK=64, PER_SM=1),
        config(4, 3, BM=128, BN=128, BK=64, PER_SM=2),
        config(4, 4, BM=64, BN=128, BK=64, PER_SM=2),
    ],
    (input_gradient_kernel, TF32): [config(8, 3, BM=128, BN=128, BK=32, PER_SM=1)],
    (input_gradient_kernel, FULL): [config(8, 2, BM=64, BN=64, BK=16, PER_SM=2)],
}
ADD, SLOPES = 128, 1024


def look_up_tile(F):
    """The best of 30 on an H200, with 768 and 2,048 features; at most 16 steps, or it would take long to compile."""
    BF = 128 * triton.next_power_of_2(triton.cdiv(F, 2048))
    return dict(BF=BF, BN=32, STEPS=triton.cdiv(F, BF), EARLY=False, num_warps=8)


def knots_at_once(count):
    """KN, of so many knots or intervals: 8 or 4, whichever leaves fewer of a tile unused. 2 spill in some tiles."""
    return min((8, 4), key=lambda some: triton.cdiv(count, some) * some)


def tiles_of_table(args):
    """(all tiles of the table's gradient, those left when every multiprocessor has as many as the others)."""
    features = triton.cdiv(args["F"], args["BM"] // args["KN"])
    tiles = features * triton.cdiv(args["N"], args["KN"]) * triton.cdiv(args["O"], args["BN"])
    return tiles, tiles % (args["multiprocessors"] * args["PER_SM"])


def parts_of_tokens(args):
    """PARTS: into how many the tokens are divided for the tiles that are left, so that these take least time.

    They may take one to three turns of all multiprocessors, each the shorter the more parts there are.
    """
    left, slots = tiles_of_table(args)[1], args["multiprocessors"] * args["PER_SM"]
    most = max(1, args["B"] // 512)
    tries = [max(1, min(turns * slots // left, most)) for turns in (1, 2, 3)] if left else [1]
    return min(tries, key=lambda parts: (triton.cdiv(left * parts, slots) / parts, parts))


def divided(args):
    """(whole tiles of the table's gradient, those to be divided, into how many parts)."""
    (tiles, left), parts = tiles_of_table(args), parts_of_tokens(args)
    return (tiles - left, left, parts) if parts > 1 else (tiles, 0, 1)


@functools.cache
def most_sums(kind, major, **sizes):
    """How many numbers the parts' sums are, whichever tile is chosen."""
    most = 0
    for chosen in choices(table_gradient_kernel, kind, major):
        _, left, parts = divided({**sizes, **chosen.kwargs})
        most = max(most, left * parts * chosen.kwargs["BM"] * chosen.kwargs["BN"])
    return most


# What a step loads by TMA, by the tile: the table and its slopes as (knots, features, outputs).
BOXES = {
    forward_kernel: dict(
        x=lambda a: (a["BM"], a["BK"] // a["KN"]), table=lambda a: (a["KN"], a["BK"] // a["KN"], a["BN"])
    ),
    table_gradient_kernel: dict(x=lambda a: (a["BK"], a["BM"] // a["KN"]), g=lambda a: (a["BK"], a["BN"])),
    input_gradient_kernel: dict(
        g=lambda a: (a["BM"], a["BK"]), slopes=lambda a: (a["KN"], a["BN"] // a["KN"], a["BK"])
    ),
}


def set_boxes(kernel, sizes):
    """Whether the arguments of BOXES are descriptors; these get the shape of what is loaded, which follows the tile."""
    described = False
    for name, box in BOXES[kernel].items():
        if isinstance(sizes[name], TensorDescriptor):
            sizes[name].block_shape, described = list(box(sizes)), True
    return described


# What follows from sizes and tile.
DERIVED = {kernel: dict(TMA=functools.partial(set_boxes, kernel)) for kernel in BOXES}
DERIVED[table_gradient_kernel]["PARTS"] = parts_of_tokens


def fits(kernel, chosen, major):
    """Whether a choice is any good on devices of this compute capability: what python -m kan_kernels.aot found."""
    tile, small = chosen.kwargs, chosen.num_warps == 4
    if major == 8:  # what spills there
        if kernel is forward_kernel:
            return tile["BN"] != 256
        if kernel is table_gradient_kernel:
            return not (small and tile["BN"] == 256)
        return tile["BM"] < 128 or (tile["BM"] == 128 and not small)
    if major >= 10 and kernel is input_gradient_kernel:  # what spills there with 4 knots in a tile
        return tile["BN"] != 256
    return kernel is not forward_kernel or tile != dict(BM=128, BN=128, BK=64)  # half as fast on an H200


def choices(kernel, kind, major):
    found = [chosen for chosen in CHOICES[kernel, kind] if fits(kernel, chosen, major)]
    assert found, f"no tile of {kernel.fn.__name__} in {kind} for sm_{major}0"
    return found


@functools.cache
def tuned(kernel, kind, major):
    derived = triton.heuristics(DERIVED[kernel])(kernel)
    return triton.autotune(choices(kernel, kind, major), key=["bucket", "F", "O", "N"], cache_results=True)(derived)


def on_gpu(device):
    """The context that a kernel is launched in; ValueError for what is no GPU."""
    if INTERPRETED.value:
        return contextlib.nullcontext()
    if device.type != "cuda":
        raise ValueError(f"impl='triton' needs a CUDA device, got {device}; use impl='auto'")
    return torch.cuda.device(device)


def capability(device):
    """The major number of its compute capability; the interpreter stands for an H100."""
    return 9 if INTERPRETED.value else torch.cuda.get_device_capability(device)[0]


LAUNCHES = {}


def describable(a):
    """Whether TMA can read a matrix: addresses of rows are multiples of 16 bytes."""
    return a.data_ptr() % 16 == 0 and all(stride * a.itemsize % 16 == 0 for stride in a.stride()[:-1])


def launch(kernel, kind, grid, *arguments, **constants):
    """Run a kernel and return all its constants; grid is a function of all sizes by their names.

    What was chosen is kept here for arguments like these: asking Triton's tuner takes longer than a small kernel.
    Raises ValueError for sizes with which a place within a tile, of 64 features or 256 tokens at most, needs more than
    32 bits.
    """
    device, sizes = arguments[0].device, dict(zip(kernel.arg_names, arguments))
    N, F, O = constants["N"], sizes["F"], sizes["O"]
    if max(64 * N * O, 256 * O, 256 * F) >= 2**31:
        raise ValueError(f"impl='triton' is not for {F} x {N} x {O}, which overflows in a tile; use 'embedding_bag'")
    bucket, constants = 1 << max(0, sizes["B"] - 1).bit_length(), dict(constants, TF32=kind == TF32)
    tma = kind == HALF and capability(device) >= 9 and all(describable(sizes[name]) for name in BOXES[kernel])
    key = kernel.__name__, device, tma, *(a.dtype if isinstance(a, Tensor) else a for a in arguments)
    key += tuple(constants.values())
    if tma:
        for name in BOXES[kernel]:
            a = sizes[name]
            sizes[name] = TensorDescriptor(a, a.shape, a.stride(), [16] * a.ndim)  # until set_boxes knows the tile
    arguments = sizes.values()
    with on_gpu(device):
        if key not in LAUNCHES:
            chosen = tile_for(kernel, kind, device, grid, *arguments, bucket, **constants)
            everything = {**sizes, **constants, **chosen}
            for name, derive in DERIVED[kernel].items():
                constants[name] = everything[name] = derive(everything)
            LAUNCHES[key] = grid(everything), {**constants, **chosen}
        where, constants = LAUNCHES[key]
        set_boxes(kernel, {**sizes, **constants})
        kernel[where](*arguments, bucket, **constants)
    return constants


def tile_for(kernel, kind, device, grid, *arguments, **constants):
    """The quickest choice for these arguments, which Triton finds by running all."""
    major = capability(device)
    if INTERPRETED.value:
        return choices(kernel, kind, major)[-1].kwargs
    run = tuned(kernel, kind, major)
    run[grid](*arguments, **constants)
    return run.best_config.all_kwargs()


@functools.cache
def knot_constants(N, KN, device):
    """(4, knots): what hats at u = x * scale are made of, max(u + rise, from) on the left, max(fall - u, from) right.

    The first and the last piece go on beyond the domain, as 1 - t and t do: a hat is cut off at 0, but not at the other
    end of an end piece; what has no such side gets infinity. Knots are filled up to a multiple of KN.

    From memory, since then Triton makes hats in the layout in which tensor cores take them; of what is made of
    tl.arange it makes them in another and exchanges them through shared memory: forward 0.29 ms instead of 0.25 (H200,
    16,384 tokens, 768 to 768, N = 8, Triton 3.6).
    """
    padded, inf = triton.cdiv(N, KN) * KN, float("inf")
    n = torch.arange(padded, dtype=torch.float32)
    rise_from, fall_from = torch.zeros(padded), torch.zeros(padded)
    rise_from[0], rise_from[1], fall_from[N - 1], fall_from[N - 2] = inf, -inf, inf, -inf
    return torch.stack(((N + 1) / 2 - n, rise_from, (3 - N) / 2 + n, fall_from)).to(device)


@functools.cache
def multiprocessors(device):
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def share(total, programs, device, least):
    """(parts, size of one): a sum of so many terms divided, where there would be too few programs, in parts of at least
    so many terms, a multiple of that. The parts' sums are added afterwards, in their order."""
    parts = max(1, min(2 * multiprocessors(device) // max(1, programs), total // least))
    size = triton.cdiv(triton.cdiv(total, parts), least) * least
    return triton.cdiv(total, size), size


# ----------------------------------------------------------------------------------------------------------------------
# Operators: PyTorch knows their shapes and gradients, so they compile, export and work in DDP and FSDP2.


def kind_of(dtype, tf32):
    return HALF if dtype != torch.float32 else TF32 if tf32 else FULL


@torch.library.custom_op("splinegpt_gpu::spline", mutates_args=())
def spline(
    x: Tensor,
    table: Tensor,
    spline_width: float,
    dtype: torch.dtype,
    tf32: bool,
    few: int,
    source: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """y (B, O) in dtype, of x (B, F) and a table (F, N, O); up to `few` tokens are looked up.

    x is float32, or anything shorter where no gradient is wanted.

    If x is the layer norm of a source, that is kept for the backward in place of x.
    """
    (B, F), (_, N, O) = x.shape, table.shape
    x, y, scale = x.contiguous(), x.new_empty(B, O, dtype=dtype), (N - 1) / spline_width
    if 0 < B <= few:  # in the table as it is, since a copy in dtype would read all of it
        with on_gpu(x.device):
            tile = look_up_tile(F)
            if B == 1 and capability(x.device) >= 9 and not INTERPRETED.value:  # with 4 tokens it is slower
                tile |= dict(EARLY=True, launch_pdl=True)
            look_up_kernel[B, triton.cdiv(O, tile["BN"])](x, table.contiguous(), y, F, O, scale, N=N, **tile)
    elif B > 0:
        parts, per_part = share(F, triton.cdiv(B, 128) * triton.cdiv(O, 128), x.device, 64)
        sums = x.new_empty(parts, B, O, dtype=torch.float32) if parts > 1 else y

        def grid(tile):
            return triton.cdiv(B, tile["BM"]) * triton.cdiv(O, tile["BN"]), parts

        x, KN = x.float(), knots_at_once(N)
        table = table.to(dtype).contiguous().transpose(0, 1)
        arguments = x, table, knot_constants(N, KN, x.device), sums, B, F, O, per_part
        launch(forward_kernel, kind_of(dtype, tf32), grid, *arguments, N=N, KN=KN, SCALE=scale)
        if parts > 1:
            add(sums, y)
    return y


def add(sums, out):
    """out, into which the sum of sums (parts, *out.shape) is written, in the parts' order and rounded once."""
    parts, size = len(sums), out.numel()
    with on_gpu(out.device):
        add_kernel[(triton.cdiv(size, ADD),)](sums, out, parts, size, PARTS=triton.next_power_of_2(parts), BN=ADD)
    return out


@torch.library.custom_op("splinegpt_gpu::table_gradient", mutates_args=())
def table_gradient(g: Tensor, x: Tensor, N: int, spline_width: float, dtype: torch.dtype, tf32: bool) -> Tensor:
    """dC (F, N, O) in dtype."""
    (B, F), O = x.shape, g.shape[1]
    g, x = g.contiguous(), x.contiguous()
    if B == 0:
        return g.new_zeros(F, N, O, dtype=dtype)
    out, KN, kind = g.new_empty(F, N, O, dtype=dtype), knots_at_once(N), kind_of(g.dtype, tf32)
    sizes = dict(B=B, F=F, O=O, N=N, KN=KN, multiprocessors=multiprocessors(x.device))
    sums = x.new_empty(most_sums(kind, capability(x.device), **sizes))

    def grid(tile):
        whole, left, parts = divided({**sizes, **tile})
        return (whole + left * parts,)

    arguments = x, g, knot_constants(N, KN, x.device), out, sums, B, F, O, sizes["multiprocessors"]
    tile = launch(table_gradient_kernel, kind, grid, *arguments, N=N, KN=KN, SCALE=(N - 1) / spline_width)
    whole, left, parts = divided({**sizes, **tile})
    if left:
        with on_gpu(x.device):
            shape = dict(N=N, KN=KN, BM=tile["BM"], BN=tile["BN"], PARTS=parts, R=8)
            add_tiles_kernel[left, tile["BM"] // 8](sums, out, F, O, whole, **shape)
    return out


@torch.library.custom_op("splinegpt_gpu::input_gradient", mutates_args=())
def input_gradient(g: Tensor, x: Tensor, table: Tensor, spline_width: float, tf32: bool) -> Tensor:
    """dx (B, F) in float32."""
    (B, F), (_, N, O) = x.shape, table.shape
    g, x, out = g.contiguous(), x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    if B == 0:
        return out
    table, slopes, KN = table.contiguous(), g.new_empty(F, N - 1, O), knots_at_once(N - 1)
    with on_gpu(x.device):
        slopes_kernel[F, triton.cdiv((N - 1) * O, SLOPES)](table, slopes, O, N=N, BN=SLOPES)

    def grid(tile):
        tiles = triton.cdiv(B, tile["BM"]) * triton.cdiv(F, tile["BN"] // KN) * triton.cdiv(N - 1, KN)
        return (min(tiles, multiprocessors(x.device) * tile["PER_SM"]) if tile["TMA"] else tiles,)

    arguments = x, g, slopes.transpose(0, 1), out, B, F, O, (N - 1) / spline_width
    launch(input_gradient_kernel, kind_of(g.dtype, tf32), grid, *arguments, N=N, KN=KN)
    return out


@torch.library.custom_op("splinegpt_gpu::norm_again", mutates_args=())
def norm_again(source: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Layer norm, in the backward: an operator of its own, or torch.compile would keep the forward's result."""
    return torch.nn.functional.layer_norm(source, source.shape[-1:], weight, eps=eps)


norm_again.register_fake(lambda source, weight, eps: torch.empty_like(source, memory_format=torch.contiguous_format))
spline.register_fake(
    lambda x, table, width, dtype, tf32, few, source=None, norm_weight=None, eps=0.0: x.new_empty(
        x.shape[0], table.shape[2], dtype=dtype
    )
)
table_gradient.register_fake(lambda g, x, N, width, dtype, tf32: g.new_empty(x.shape[1], N, g.shape[1], dtype=dtype))
input_gradient.register_fake(
    lambda g, x, table, width, tf32: torch.empty_like(x, memory_format=torch.contiguous_format)
)


def setup(ctx, inputs, output):
    x, table, ctx.spline_width, _, ctx.tf32, _, source, norm_weight, ctx.eps = inputs
    ctx.normed = source is not None
    ctx.save_for_backward(source if ctx.normed else x, table, norm_weight)


def backward(ctx, g):
    (x, table, norm_weight), grad_x, grad_table = ctx.saved_tensors, None, None
    if ctx.normed:
        x = norm_again(x, norm_weight, ctx.eps)
    if ctx.needs_input_grad[0]:
        grad_x = input_gradient(g, x, table, ctx.spline_width, ctx.tf32)
    if ctx.needs_input_grad[1]:
        grad_table = table_gradient(g, x, table.shape[1], ctx.spline_width, table.dtype, ctx.tf32)
    return grad_x, grad_table, None, None, None, None, None, None, None


def twice(ctx, *_):
    raise RuntimeError("impl='triton' has no second derivatives; impl='dense' has")


spline.register_autograd(backward, setup_context=setup)
table_gradient.register_autograd(twice)
input_gradient.register_autograd(twice)
