"""The spline layer on a GPU, in Triton: hats made in registers and a matrix product, or for few tokens the look-up.

y = A @ C with A[b, f, n] = hat n at x[b, f] has N/2 times the flops of the look-up, on tensor cores, which are worth it
up to N of about 128 [estimated], and reads every control point once for a whole tile of tokens. A is never in memory: a
tile of it is made from x, which is N times smaller, and fed to tl.dot. At N = 8 the flops are those of the MLP of equal
parameters.

    forward         y[b, o]      = sum_f sum_n hat_n(u[b, f]) C[f, n, o]       tiles of tokens x outputs
    table_gradient  dC[f, n, o]  = sum_b hat_n(u[b, f]) g[b, o]                tiles of features x outputs, for each n
    input_gradient  dx[b, f]     = scale * sum_o g[b, o] S[f, i[b, f], o]      tiles of tokens x features, for each n:
                                   S[f, n] = C[f, n + 1] - C[f, n]             it keeps what lies in its interval, i = n
    look_up         y[b, o]      = sum_f (1 - t) C[f, i, o] + t C[f, i + 1, o] 1 to 16 tokens, features shared out

    u = x * scale + (N - 1) / 2  position in knots, float32; scale = (N - 1) / spline_width

Knots are a loop, not a dimension of a tile: N may be any number, and hat n at all positions of a tile takes five
operations, with numbers that are in registers already. Nothing is added atomically: results are the same every time.
Saved is x.

Sums are in float32. Products are of bfloat16, float16, or float32, the latter in full or, if PyTorch is told to use it
(torch.backends.cuda.matmul.allow_tf32), in TF32; hats and slopes are made in float32 and then rounded to that.

    TRITON_INTERPRET=1 python ...       the numbers, without a GPU
    python -m kan_kernels.aot           the code for sm_80, sm_90 and sm_100, without a GPU

Legend of shapes
    B  tokens       F  features     x  (B, F), float32          g  (B, O), the gradient of y
    N  knots        O  outputs      C  (F, N, O), the table     y  (B, O)
"""

import contextlib
import functools

import torch
import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
NAN = tl.constexpr(tl.PropagateNan.ALL)

# ----------------------------------------------------------------------------------------------------------------------
# Kernels. All matrices are contiguous. Addresses are 64 bits: tables of more than 2^31 numbers exist. bucket is there
# for the tuner alone: the power of two that B is rounded up to.


# Whether B is a multiple of 16 makes no better code: it need not be compiled anew for those that are.
jit = triton.jit(do_not_specialize=["B", "bucket"])


@triton.jit
def hat(x, n, scale, N: tl.constexpr):
    """Hat n at x. The first and the last piece go on beyond the domain, as 1 - t and t do. NaN stays NaN."""
    inf = float("inf")
    rising, falling = x * scale + ((N + 1) / 2 - n), -x * scale + ((3 - N) / 2 + n)
    # Each side is cut off at 0, but not at the other end of an end piece; what has no such side gets infinity.
    rising = tl.maximum(rising, tl.where(n == 0, inf, tl.where(n == 1, -inf, 0.0)), propagate_nan=NAN)
    falling = tl.maximum(falling, tl.where(n == N - 1, inf, tl.where(n == N - 2, -inf, 0.0)), propagate_nan=NAN)
    return tl.minimum(rising, falling, propagate_nan=NAN)


@triton.jit
def inner_hat(x, n, scale, N: tl.constexpr):
    """The same for 1 < n < N - 2, where no piece is an end piece."""
    return tl.maximum(1 - tl.abs(x * scale + ((N - 1) / 2 - n)), 0.0)


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
    x, table, y, B, F, O, scale, per_part, bucket,
    N: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BF: tl.constexpr, KNOTS: tl.constexpr, TF32: tl.constexpr,
):  # fmt: skip
    """A tile (BM, BN) of y, (parts, B, O), over a part of the features: BF of them, KNOTS of their knots a step.

    per_part is a multiple of BF.
    """
    row, column = tile_of(tl.program_id(0), tl.cdiv(B, BM), tl.cdiv(O, BN), 8)
    b, f, o = row * BM + tl.arange(0, BM), tl.arange(0, BF), column * BN + tl.arange(0, BN)
    first = tl.program_id(1) * per_part
    last = tl.minimum(F, first + per_part)
    x += row.to(tl.int64) * BM * F
    at_x, at_table = tl.arange(0, BM)[:, None] * F + f[None, :], f[:, None] * (N * O) + o[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    ends: tl.constexpr = 4 if KNOTS > 1 else 0
    if ends > 0:  # the first two and the last two knots
        for f0 in range(first, last, BF):
            inside = f0 + f < F
            p = tl.load(x + f0 + at_x, mask=(b < B)[:, None] & inside[None, :], other=0.0)
            for k in tl.static_range(ends):
                at = table + (wide(f0) * N + (k if k < 2 else N - ends + k)) * O + at_table
                c = tl.load(at, mask=inside[:, None] & (o < O)[None, :], other=0.0)
                a = hat(p, k if k < 2 else N - ends + k, scale, N)
                acc = multiply(a.to(c.dtype), c, acc, TF32)
    left: tl.constexpr = N - ends
    groups: tl.constexpr = (left + KNOTS - 1) // KNOTS
    for step in range(tl.cdiv(last - first, BF) * groups):
        f0, n0 = first + step // groups * BF, step % groups * KNOTS + ends // 2
        inside = f0 + f < F
        p = tl.load(x + f0 + at_x, mask=(b < B)[:, None] & inside[None, :], other=0.0)
        for k in tl.static_range(KNOTS):
            there = inside[:, None] & (o < O)[None, :]
            if left % KNOTS != 0:
                there = there & (n0 + k < N - ends // 2)
            c = tl.load(table + (wide(f0) * N + n0 + k) * O + at_table, mask=there, other=0.0)
            a = inner_hat(p, n0 + k, scale, N) if ends > 0 else hat(p, n0 + k, scale, N)
            acc = multiply(a.to(c.dtype), c, acc, TF32)
    y += (tl.program_id(1).to(tl.int64) * B + b)[:, None] * O + o[None, :]
    tl.store(y, acc.to(y.dtype.element_ty), mask=(b < B)[:, None] & (o < O)[None, :])


@jit
def table_gradient_kernel(
    x, g, out, B, F, O, scale, per_part, bucket,
    N: tl.constexpr, BF: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, KNOTS: tl.constexpr, TF32: tl.constexpr,
):  # fmt: skip
    """Tiles (BF, BN) of dC, for one knot or (KNOTS = 2) two, over a part of the tokens; out is (parts, F, N, O)."""
    groups: tl.constexpr = (N + KNOTS - 1) // KNOTS
    pid, part = tl.program_id(0), tl.program_id(1)  # neighbours differ in their knot and read the same
    n, tile = pid % groups * KNOTS, pid // groups
    row, column = tile_of(tile, tl.cdiv(F, BF), tl.cdiv(O, BN), 8)
    f, b, o = row * BF + tl.arange(0, BF), tl.arange(0, BK), column * BN + tl.arange(0, BN)
    here, there = (f < F)[:, None], (o < O)[None, :]
    at_x, at_g = b[None, :] * F + f[:, None], b[:, None] * O + o[None, :]
    acc = tl.zeros((BF, BN), tl.float32)
    more = tl.zeros((BF, BN), tl.float32)
    first = part * per_part
    last = tl.minimum(B, first + per_part)
    for start in range(first, last, BK):
        inside = start + b < last
        p = tl.load(x + wide(start) * F + at_x, mask=inside[None, :] & here, other=0.0)
        c = tl.load(g + wide(start) * O + at_g, mask=inside[:, None] & there, other=0.0)
        acc = multiply(hat(p, n, scale, N).to(c.dtype), c, acc, TF32)
        if KNOTS == 2:
            more = multiply(hat(p, n + 1, scale, N).to(c.dtype), c, more, TF32)
    out += ((part.to(tl.int64) * F + f)[:, None] * N + n) * O + o[None, :]
    tl.store(out, acc.to(out.dtype.element_ty), mask=here & there)
    if KNOTS == 2:
        tl.store(out + O, more.to(out.dtype.element_ty), mask=here & there & (n + 1 < N))


@jit
def input_gradient_kernel(
    x, g, slopes, out, B, F, O, scale, bucket,
    N: tl.constexpr, BM: tl.constexpr, BF: tl.constexpr, BK: tl.constexpr, TF32: tl.constexpr,
):  # fmt: skip
    """A tile (BM, BF) of g @ S_n^T for one interval n; of it is kept what lies in that interval. slopes (F, N - 1, O).

    Every number of dx lies in one interval, so it is written once, by one of N - 1 programs.
    """
    blocks = tl.cdiv(F, BF)
    row, column = tile_of(tl.program_id(0), tl.cdiv(B, BM), blocks * (N - 1), 8)
    n, b, f = column // blocks, row * BM + tl.arange(0, BM), column % blocks * BF + tl.arange(0, BF)
    o = tl.arange(0, BK)
    g += row.to(tl.int64) * BM * O
    slopes += ((column % blocks).to(tl.int64) * BF * (N - 1) + n) * O
    at_g, at_slopes = tl.arange(0, BM)[:, None] * O + o[None, :], tl.arange(0, BF)[None, :] * ((N - 1) * O) + o[:, None]
    acc = tl.zeros((BM, BF), tl.float32)
    for start in range(0, O, BK):
        inside = start + o < O
        c = tl.load(g + start + at_g, mask=(b < B)[:, None] & inside[None, :], other=0.0)
        s = tl.load(slopes + start + at_slopes, mask=(f < F)[None, :] & inside[:, None], other=0.0)
        acc = multiply(c, s, acc, TF32)
    at, inside = b.to(tl.int64)[:, None] * F + f[None, :], (b < B)[:, None] & (f < F)[None, :]
    u = tl.load(x + at, mask=inside, other=0.0) * scale + (N - 1) / 2
    tl.store(out + at, acc * scale, mask=inside & (interval(u, N) == n))


@jit
def look_up_kernel(
    x, table, out, B, F, O, scale, per_part,
    N: tl.constexpr, BF: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Part of the features of one token and BN outputs; out is (parts, B, O)."""
    b, part = tl.program_id(0), tl.program_id(1)
    o = tl.program_id(2) * BN + tl.arange(0, BN)
    acc = tl.zeros((BN,), tl.float32)
    first = part * per_part
    last = tl.minimum(F, first + per_part)
    for start in range(first, last, BF):
        f = start + tl.arange(0, BF)
        inside = (f < last)[:, None] & (o < O)[None, :]
        u = tl.load(x + b.to(tl.int64) * F + f, mask=f < last, other=0.0) * scale + (N - 1) / 2
        i = interval(u, N)
        t = (u - i)[:, None]
        at = table + (f.to(tl.int64) * N + i.to(tl.int32))[:, None] * O + o[None, :]
        below = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        above = tl.load(at + O, mask=inside, other=0.0).to(tl.float32)
        acc += tl.sum(below + t * (above - below), 0)
    tl.store(out + (part.to(tl.int64) * B + b) * O + o, acc.to(out.dtype.element_ty), mask=o < O)


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

HALF, TF32, FULL = "half", "tf32", "full"  # of what the products are


def config(warps, stages, registers=None, **tile):
    return triton.Config(tile, num_warps=warps, num_stages=stages, maxnreg=registers)


CHOICES = {
    (forward_kernel, HALF): [
        config(8, 3, BM=128, BN=256, BF=64, KNOTS=1),
        config(8, 2, BM=128, BN=256, BF=32, KNOTS=4),
        config(4, 3, BM=128, BN=128, BF=16, KNOTS=4),
        config(8, 3, BM=128, BN=128, BF=64, KNOTS=1),
        config(4, 3, BM=64, BN=128, BF=32, KNOTS=1),
    ],
    (forward_kernel, TF32): [config(8, 3, BM=128, BN=128, BF=32, KNOTS=1)],
    (forward_kernel, FULL): [config(4, 2, BM=64, BN=64, BF=16, KNOTS=1)],
    (table_gradient_kernel, HALF): [
        config(8, 3, BF=128, BN=256, BK=64, KNOTS=1),
        config(8, 3, BF=64, BN=256, BK=64, KNOTS=2),
        config(8, 3, BF=128, BN=128, BK=64, KNOTS=1),
        config(4, 3, BF=64, BN=128, BK=32, KNOTS=2),
    ],
    (table_gradient_kernel, TF32): [config(8, 3, BF=128, BN=128, BK=32, KNOTS=1)],
    (table_gradient_kernel, FULL): [config(4, 2, BF=64, BN=64, BK=16, KNOTS=1)],
    (input_gradient_kernel, HALF): [
        config(8, 3, BM=128, BF=128, BK=64),
        config(8, 3, 128, BM=128, BF=128, BK=64),  # two blocks a multiprocessor; Triton 3.6 takes 176 otherwise
        config(4, 3, BM=64, BF=128, BK=64),
    ],
    (input_gradient_kernel, TF32): [config(8, 3, BM=128, BF=128, BK=32)],
    (input_gradient_kernel, FULL): [config(4, 2, BM=64, BF=64, BK=16)],
}
LOOK_UP = dict(BF=16, BN=128)  # nothing to tune: at few tokens the launch takes longer than the kernel
ADD = 128


def fits(kernel, chosen, major, N):
    """Whether a choice is any good on devices of this compute capability: what python -m kan_kernels.aot found."""
    tile = chosen.kwargs
    if chosen.maxnreg:
        return major == 9  # spills elsewhere
    if kernel is forward_kernel:
        if tile["KNOTS"] > 1 and major in (10, 11):  # several products in a row to one accumulator: a trap
            return False
        if major == 8 and (tile["KNOTS"] > 1 or tile["BN"] == 256):  # spills, or nearly
            return False
        return tile["KNOTS"] == 1 or N > 4  # there are inner knots
    if kernel is table_gradient_kernel and tile["KNOTS"] == 1 and tile["BN"] == 256:
        return major not in (10, 11)  # spills, with Triton 3.6
    return True


def choices(kernel, kind, major, N):
    return [chosen for chosen in CHOICES[kernel, kind] if fits(kernel, chosen, major, N)]


@functools.cache
def tuned(kernel, kind, major, N):
    return triton.autotune(choices(kernel, kind, major, N), key=["bucket", "F", "O", "N"], cache_results=True)(kernel)


def on_gpu(device):
    """The context that a kernel is launched in; ValueError for what is no GPU."""
    if INTERPRETED.value:
        return contextlib.nullcontext()
    if device.type != "cuda":
        raise ValueError(f"impl='triton' needs a CUDA device, got {device}; use impl='auto'")
    return torch.cuda.device(device)


def launch(kernel, kind, grid, *arguments, B, N):
    """Run a kernel; grid is a function of the tile's sizes."""
    bucket, more = 1 << (B - 1).bit_length(), dict(N=N, TF32=kind == TF32)
    if INTERPRETED.value:
        tile = choices(kernel, kind, 9, N)[-1].kwargs
        kernel[grid(tile)](*arguments, bucket, **more, **tile)
        return
    device = arguments[0].device
    with on_gpu(device):
        tuned(kernel, kind, torch.cuda.get_device_capability(device)[0], N)[grid](*arguments, bucket, **more)


@functools.cache
def programs_wanted(device):
    """Two for every multiprocessor."""
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


def share(total, programs, device, least):
    """(parts, size of one): a sum of so many terms divided, where there would be too few programs, in parts of at least
    so many terms, a multiple of that. The parts' sums are added afterwards, in their order."""
    parts = max(1, min(programs_wanted(device) // max(1, programs), total // least))
    size = triton.cdiv(triton.cdiv(total, parts), least) * least
    return triton.cdiv(total, size), size


# ----------------------------------------------------------------------------------------------------------------------
# Operators: PyTorch knows their shapes and gradients, so they compile, export and work in DDP and FSDP2.

Tensor = torch.Tensor


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
    """y (B, O) in dtype, of x (B, F) in float32 and a table (F, N, O); up to `few` tokens are looked up.

    If x is the layer norm of a source, that is kept for the backward in place of x.
    """
    (B, F), (_, N, O) = x.shape, table.shape
    x, y = x.contiguous(), x.new_empty(B, O, dtype=dtype)
    if B == 0:
        return y
    looked_up, scale = few >= B, (N - 1) / spline_width
    blocks = triton.cdiv(O, 128)
    programs, least = (B * blocks, LOOK_UP["BF"]) if looked_up else (triton.cdiv(B, 128) * blocks, 64)
    parts, per_part = share(F, programs, x.device, least)
    sums = x.new_empty(parts, B, O) if parts > 1 else y
    if looked_up:  # in the table as it is, since a copy in dtype would read all of it
        with on_gpu(x.device):
            arguments = x, table.contiguous(), sums, B, F, O, scale, per_part
            look_up_kernel[B, parts, blocks](*arguments, N=N, **LOOK_UP)
    else:

        def grid(tile):
            return triton.cdiv(B, tile["BM"]) * triton.cdiv(O, tile["BN"]), parts

        arguments = x, table.to(dtype).contiguous(), sums, B, F, O, scale, per_part
        launch(forward_kernel, kind_of(dtype, tf32), grid, *arguments, B=B, N=N)
    return add(sums, y) if parts > 1 else y


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
    parts, per_part = share(B, triton.cdiv(F, 128) * N * triton.cdiv(O, 128), x.device, 512)
    out = g.new_empty(F, N, O, dtype=dtype)
    sums = g.new_empty(parts, F, N, O, dtype=torch.float32) if parts > 1 else out

    def grid(tile):
        knots = triton.cdiv(N, tile["KNOTS"])
        return (knots * triton.cdiv(F, tile["BF"]) * triton.cdiv(O, tile["BN"]), parts)

    arguments = x, g, sums, B, F, O, (N - 1) / spline_width, per_part
    launch(table_gradient_kernel, kind_of(g.dtype, tf32), grid, *arguments, B=B, N=N)
    return add(sums, out) if parts > 1 else out


@torch.library.custom_op("splinegpt_gpu::input_gradient", mutates_args=())
def input_gradient(g: Tensor, x: Tensor, table: Tensor, spline_width: float, tf32: bool) -> Tensor:
    """dx (B, F) in float32."""
    (B, F), (_, N, O) = x.shape, table.shape
    g, x, out = g.contiguous(), x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    if B == 0:
        return out
    # Differences are rounded, not made of what is rounded: that is 10% off in bfloat16 at N = 128.
    slopes = table.float().diff(dim=1).to(g.dtype).contiguous()

    def grid(tile):
        return (triton.cdiv(B, tile["BM"]) * triton.cdiv(F, tile["BF"]) * (N - 1),)

    arguments = x, g, slopes, out, B, F, O, (N - 1) / spline_width
    launch(input_gradient_kernel, kind_of(g.dtype, tf32), grid, *arguments, B=B, N=N)
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
