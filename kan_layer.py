"""KANLayer: a linear layer whose every edge is a learned curve.

Where nn.Linear multiplies input f by one number on its way to output o, KANLayer sends it through a curve of its
own, a uniform linear B-spline. Evaluating a curve is three steps: find the interval, look up its two control
points, interpolate.

The maths. A curve is given by its values at N knots, evenly spaced by h = spline_width / (N - 1) on
[-spline_width / 2, spline_width / 2]:

    u = (x[f] + spline_width / 2) / h        position in knots
    i = clamp(floor(u), 0, N - 2)            interval; clamped, so the end pieces go on as straight lines
    t = u - i                                in [0, 1) inside the domain, beyond it outside
    y[o] = sum_f (1 - t) * C[f, i, o] + t * C[f, i + 1, o]

    dL/dC[f, i]     += (1 - t) * g           g = dL/dy
    dL/dC[f, i + 1] += t * g
    dL/dx[f] = <g, C[f, i + 1] - C[f, i]> / h

Control points are values of the curve at its knots, in the units of x: a curve with C[n] = knot[n] is the identity.

The same sum can be read as a look-up (two rows of C per feature, a cost independent of N) or as a matrix product
A @ C, where row A[b] holds the N hat functions of each feature, two of them non-zero ("hat GEMM": N/2 times the
flops of the look-up, but at the speed of a matrix product). Both are below; impl="auto" chooses. On a CPU it chooses
the look-up as compiled C++, kan_kernels/spline.cpp, wherever a compiler is at hand; on a GPU the matrix product whose A
is never in memory, kan_kernels/gpu.py.

The table may be derived from other parameters (kan_parameterizations.py), the knots may be anywhere (warp), both before
any of this begins; kan_evaluations.py shows a dozen further ways to evaluate.

Legend of shapes
    B  tokens (all leading dimensions, flattened)       F  in_features        x  (B, F)
    N  num_control_points                               O  out_features       C  (F, N, O), the table; y  (B, O)

The idea of the layer is from KANditioned (https://github.com/cats-marin/KANditioned); its saved B-spline weights
load here.
"""

import contextlib
import functools
import math
import warnings

import torch
import torch.nn as nn
import torch.nn.functional as F

import kan_kernels
import kan_parameterizations
from kan_parameterizations import hats

INITS = ("random_normal", "identity", "zero")
FIRST_MOMENTS = ("exp_avg", "momentum_buffer", "grad_avg")  # what torch.optim calls sums of gradients, and of squares
SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum")

# ----------------------------------------------------------------------------------------------------------------------
# Where does x fall?


def locate(x, num_control_points, spline_width):
    """Interval i (int64) and position t within it, both shaped like x; t keeps the gradient with respect to x.

    x is float32 or float64: with 256 knots bfloat16 is off by a whole interval. NaN gets interval 0 and t = NaN,
    infinities an end interval and an infinite t: the index is always valid, and the token's outputs always show it.
    """
    u = (x + spline_width / 2) * ((num_control_points - 1) / spline_width)
    i = u.detach().floor().nan_to_num(0.0).clamp(0, num_control_points - 2)
    return i.long(), u - i


def warp(x, knots):
    """x, moved so that uniform knots on [-(N - 1) / 2, (N - 1) / 2], one apart, see it where knots (N,) see x.

    The interval is found by search, and everything else stays as it is: the derivative with respect to x too, since
    it passes through here. Within rounding of a knot it may mix the slopes of both sides.
    """
    i, t = kan_parameterizations.search(x, knots)
    return i + t - (len(knots) - 1) / 2


@kan_kernels.constant  # torch 2.11's Dynamo does not know the question
def autocast_exists(device_type):
    return torch.amp.is_autocast_available(device_type)


def autocast_is_on(device_type):
    return autocast_exists(device_type) and torch.is_autocast_enabled(device_type)


def without_autocast(device_type):
    """Autocast's own contexts cost time and don't know every device, so only where it is on."""
    return torch.autocast(device_type, enabled=False) if autocast_is_on(device_type) else contextlib.nullcontext()


def at_least_float32(x):
    return x if x.dtype == torch.float64 else x.float()


def look_up(x, num_control_points, spline_width):
    """What each token reads: rows of the table as (F * N, O), and their weights 1 - t and t, both (B, F, 2)."""
    return two_rows(*locate(x, num_control_points, spline_width), num_control_points)


def two_rows(i, t, num_control_points):
    rows = torch.arange(i.shape[1], device=i.device) * num_control_points + i
    return torch.stack((rows, rows + 1), dim=2), torch.stack((1 - t, t), dim=2)


# ----------------------------------------------------------------------------------------------------------------------
# Ways to evaluate the layer. Each takes x (B, F) in float32 or better, the table (F, N, O), the width and the
# dtype to multiply in, and returns y (B, O) in it: control points and weights are rounded to it, positions are not.


def few(num_control_points):
    """Tokens that a GPU is quicker to look up for than to multiply for, which reads the whole table.

    On an H200, bfloat16, microseconds for looking up 4 and 16 tokens against multiplying: 768 to 768, N = 8: 5 and 9
    against 12; 2,048 to 2,048, N = 8: 23 and 64 against 27; N = 32: 25 and 77 against 72.
    """
    return max(4, num_control_points // 2)


MAX_LOOKUPS = 2**26 - 1  # ATen's CUDA kernel numbers its threads, 32 to a look-up, in int32: more would wrap around


def wants_gradient(x, table):
    return torch.is_grad_enabled() and (x.requires_grad or table.requires_grad)


def cpp(x, table, spline_width, dtype):
    """The look-up in C++, for CPUs (kan_kernels/spline.cpp): 2F rows a token, at the speed of a matrix product.

    Saves only x. bfloat16 tables are read as they are, sums are in float32, or float64 where x or the table is. If no
    gradient is wanted, positions in an interval of a bfloat16 table may be rounded to bfloat16 as well. Where dtype is
    bfloat16 and the CPU multiplies it, a float32 table's rows and weights are rounded to it (kan_kernels/bfloat16.cpp).
    """
    rounded = not wants_gradient(x, table)
    if x.dtype == torch.float64 or table.dtype == torch.float64:
        x, table = x.double(), table.double()
    elif table.dtype != torch.bfloat16:
        table = table.float()
        if dtype == torch.bfloat16:
            return kan_kernels.spline_bfloat16(x, table, spline_width)
    return kan_kernels.spline(x, table, spline_width, rounded).to(dtype)


@kan_kernels.constant
def products_in_tf32():
    return torch.backends.cuda.matmul.fp32_precision == "tf32"  # allow_tf32 raises where this has been set


def triton(x, table, spline_width, dtype, *normed):
    """The hat GEMM in Triton, for GPUs (kan_kernels/gpu.py); without a gradient and for few tokens the look-up.

    Saves only x, or if x is the layer norm of something, that: normed is source (B, F), weight, eps. Sums are in
    float32; float32 products are in TF32 if PyTorch's own are (torch.set_float32_matmul_precision).
    """
    if torch.float64 in (x.dtype, dtype):
        raise ValueError(f"impl='triton' computes in float32 at most, got x in {x.dtype}; use impl='dense' or 'auto'")
    tf32 = x.is_cuda and dtype == torch.float32 and products_in_tf32()
    looked_up = 0 if wants_gradient(x, table) else few(table.shape[1])  # at most so many tokens
    return torch.ops.splinegpt_gpu.spline(x, table, spline_width, dtype, tf32, looked_up, *normed)


def embedding_bag(x, table, spline_width, dtype, look_up=look_up):
    """The look-up: F.embedding_bag sums each token's 2F rows as it reads them.

    The forward's cost does not depend on N. The backward needs the indices and weights again and saves them, 20 bytes
    a look-up. Under torch.compile the arithmetic of the addresses becomes one kernel, the bag itself stays ATen's.
    Where dtype is half precision, the gradient of x is a difference of two rounded products: 0.6% off at N = 8, 10% at
    N = 128.
    """
    flat = table.to(dtype).flatten(0, -2)
    outputs = []
    for chunk in split_tokens(x, max(1, MAX_LOOKUPS // (2 * x.shape[1]))):
        rows, weights = (pair.flatten(1) for pair in look_up(chunk, table.shape[1], spline_width))  # (B, 2F)
        outputs.append(F.embedding_bag(rows, flat, per_sample_weights=weights.to(dtype), mode="sum"))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def embedding(x, table, spline_width, dtype):
    """The definition, word for word: gather both control points of every edge, interpolate, sum over the features.

    It holds (B, F, 2, O) numbers, 58 GB for 12 x 1024 tokens of a 768 to 768 layer: to read and to check with.
    """
    rows, weights = look_up(x, table.shape[1], spline_width)
    below, above = F.embedding(rows, table.to(dtype).flatten(0, 1)).unbind(2)  # (B, F, O) each
    return torch.lerp(below, above, weights[..., 1:].to(dtype)).sum(1)


def csr(x, table, spline_width, dtype):
    """A @ C with A stored as a sparse matrix in CSR form: 2F non-zeros a row, all rows of the same length."""
    return csr_matmul(x, table.to(dtype), float(spline_width))


def sparse_embedding_bag(x, table, spline_width, dtype):
    """embedding_bag whose table gradient is a sparse tensor, for sparse_grad=True: it holds the visited rows only."""
    return SparseGradient.apply(x, table, spline_width, dtype)


def dense(x, table, spline_width, dtype):
    """A @ C with A written out, some tokens at a time: 2*B*N*F*O flops, all in matrix products. Saves only x."""
    return HatMatmul.apply(x, table, spline_width, dtype)


def split_tokens(x, tokens):
    return [x[start : start + tokens] for start in range(0, max(1, x.shape[0]), tokens)]


def unchecked(make, *parts, **how):
    """A sparse tensor made without checks, and without PyTorch's notice that its compressed formats are in beta."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse ", category=UserWarning)
        return make(*parts, **how, check_invariants=False)


def sparse_hats(x, table, spline_width):
    """A (B, F*N) in CSR form."""
    in_features, N, _ = table.shape
    columns, values = (pair.flatten() for pair in look_up(x, N, spline_width))
    starts = torch.arange(0, (x.shape[0] + 1) * 2 * in_features, 2 * in_features, device=x.device)
    size = (x.shape[0], in_features * N)
    return unchecked(torch.sparse_csr_tensor, starts, columns, values.to(table.dtype), size)


# An operator of our own, because torch.compile can't trace sparse tensors; saved state is x alone.
@torch.library.custom_op("splinegpt::csr_matmul", mutates_args=())
def csr_matmul(x: torch.Tensor, table: torch.Tensor, spline_width: float) -> torch.Tensor:
    if x.shape[0] == 0:
        return table.new_empty(0, table.shape[2])
    return sparse_hats(x, table, spline_width) @ table.flatten(0, 1)


@torch.library.custom_op("splinegpt::csr_matmul_backward", mutates_args=())
def csr_matmul_backward(
    g: torch.Tensor, x: torch.Tensor, table: torch.Tensor, spline_width: float
) -> tuple[torch.Tensor, torch.Tensor]:
    in_features, N, _ = table.shape
    if x.shape[0] == 0:
        return torch.zeros_like(x), torch.zeros_like(table)
    A = sparse_hats(x, table, spline_width)
    grad_table = (A.t() @ g).view_as(table)
    # The gradient of each non-zero of A is <g, its row of C>: the product g @ C^T, sampled where A is not zero.
    sampled = torch.sparse.sampled_addmm(A, g, table.flatten(0, 1).t().contiguous(), beta=0.0)
    below, above = sampled.values().view(x.shape[0], in_features, 2).unbind(2)
    return ((above - below) * ((N - 1) / spline_width)).to(x.dtype), grad_table


csr_matmul.register_fake(lambda x, table, spline_width: table.new_empty(x.shape[0], table.shape[2]))
csr_matmul_backward.register_fake(
    lambda g, x, table, spline_width: (x.new_empty(x.shape), table.new_empty(table.shape))
)


def _csr_setup(ctx, inputs, output):
    x, table, ctx.spline_width = inputs
    ctx.save_for_backward(x, table)


def _csr_backward(ctx, g):
    return *csr_matmul_backward(g.contiguous(), *ctx.saved_tensors, ctx.spline_width), None


csr_matmul.register_autograd(_csr_backward, setup_context=_csr_setup)


class SparseGradient(torch.autograd.Function):
    """embedding_bag; the table's gradient has sparse dimensions (F, N) and a dense one, O, and is coalesced."""

    @staticmethod
    def forward(ctx, x, table, spline_width, dtype):
        ctx.save_for_backward(x, table)
        ctx.spline_width = spline_width
        return embedding_bag(x, table, spline_width, dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        x, table = ctx.saved_tensors
        in_features, N, O = table.shape
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if distributed and torch.distributed.get_world_size() > 1:
            raise ValueError(  # DDP would leave the gradient as it is, and say nothing
                "sparse_grad does not work with several processes: DistributedDataParallel averages sparse gradients "
                "of nn.Embedding only; use sparse_grad=False"
            )
        rows, weights = look_up(x, N, ctx.spline_width)
        grad_table, grad_x = None, []
        if ctx.needs_input_grad[1]:
            visited, where = rows.unique(return_inverse=True)
            tokens = torch.arange(x.shape[0], device=x.device).view(-1, 1, 1).expand_as(where)
            place = torch.stack((where.flatten(), tokens.flatten()))
            hats = torch.sparse_coo_tensor(place, weights.flatten(), (len(visited), x.shape[0]), check_invariants=False)
            values = torch.sparse.mm(hats, g.to(weights.dtype)).to(table.dtype)
            place = torch.stack((visited // N, visited % N))
            grad_table = torch.sparse_coo_tensor(place, values, table.shape, is_coalesced=True, check_invariants=False)
        if ctx.needs_input_grad[0]:
            flat, tokens = at_least_float32(table).flatten(0, 1), max(1, 2**22 // (in_features * O))
            for below, g_chunk in zip(split_tokens(rows[..., 0], tokens), split_tokens(g, tokens), strict=True):
                grad_x.append(torch.einsum("bfo,bo->bf", flat[below + 1] - flat[below], g_chunk.to(flat.dtype)))
            grad_x = torch.cat(grad_x).to(x.dtype) * ((N - 1) / ctx.spline_width)
        return grad_x if ctx.needs_input_grad[0] else None, grad_table, None, None


class SecondDifferences(torch.autograd.Function):
    """(F, O) sums of (D @ c)^2 over a table (F, N, O), knot by knot: beside the gradient nothing grows with N."""

    @staticmethod
    def forward(ctx, table, D):
        ctx.save_for_backward(table)
        ctx.D = D
        total = torch.zeros_like(table[:, 0])
        for bend, _ in SecondDifferences.bends(table, D):
            total.addcmul_(bend, bend)
        return total

    @staticmethod
    def bends(table, D):
        for n, row in enumerate(D.tolist()):
            below, here, above = row[n : n + 3]
            bend = (table[:, n] * below).add_(table[:, n + 1], alpha=here).add_(table[:, n + 2], alpha=above)
            yield bend, (below, here, above)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        (table,) = ctx.saved_tensors
        grad = torch.zeros_like(table)
        for n, (bend, weights) in enumerate(SecondDifferences.bends(table, ctx.D)):
            bend.mul_(2 * g)
            for k, weight in enumerate(weights):
                grad[:, n + k].add_(bend, alpha=weight)
        return grad, None


def hat_chunk(x, table):
    """Tokens per chunk of A: 32 MB of it on a CPU, 256 MB of bfloat16 elsewhere. Never more than 8 chunks, since
    torch.compile unrolls the loop. Smaller ones cost more in the matrix products than they gain in the cache (measured
    at 768 tokens, 384 to 384, N = 8, forward and backward: 41 ms in chunks of 96 tokens, 33 ms in one)."""
    numbers = 2**23 if x.device.type == "cpu" else 2**27
    return max(1, math.ceil(x.shape[0] / 8), numbers // math.prod(table.shape[:-1]))


def rounded_slopes(table, dtype, axis=1):
    """Differences of neighbouring control points along an axis, rounded to dtype after they were subtracted: those of
    rounded control points, or of two rounded products, are off by 10% in bfloat16 at N = 128."""
    wider = torch.promote_types(torch.promote_types(table.dtype, dtype), torch.float32)
    return table.to(wider).diff(dim=axis).to(dtype)


class HatMatmul(torch.autograd.Function):
    """y = A @ C; A is N/2 times as large as all that defines it, so the backward builds it again from x."""

    @staticmethod
    def forward(ctx, x, table, spline_width, dtype):
        ctx.save_for_backward(x, table)
        ctx.spline_width, ctx.dtype = spline_width, dtype
        N, rows = table.shape[1], table.to(dtype).flatten(0, 1)
        outputs = []
        for chunk in split_tokens(x, hat_chunk(x, table)):
            outputs.append(hats(*locate(chunk, N, spline_width), N, dtype).flatten(1) @ rows)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    @staticmethod
    def backward(ctx, g):
        x, table = ctx.saved_tensors
        (in_features, N, _), dtype = table.shape, ctx.dtype
        slopes = rounded_slopes(table, dtype).flatten(0, 1)  # (F * (N - 1), O)
        grad_table, grad_x = None, []
        tokens = hat_chunk(x, table)
        for chunk, g_chunk in zip(split_tokens(x, tokens), split_tokens(g, tokens), strict=True):
            i, t = locate(chunk, N, ctx.spline_width)
            if ctx.needs_input_grad[1]:
                part = at_least_float32(hats(i, t, N, dtype).flatten(1).t() @ g_chunk)
                grad_table = part if grad_table is None else grad_table + part
            if ctx.needs_input_grad[0]:
                along = at_least_float32(g_chunk @ slopes.t()).view(-1, in_features, N - 1)
                grad_x.append(along.gather(2, i.unsqueeze(2)).squeeze(2) * ((N - 1) / ctx.spline_width))
        grad_x = torch.cat(grad_x).to(x.dtype) if grad_x else None
        return grad_x, None if grad_table is None else grad_table.view_as(table).to(table.dtype), None, None


IMPLS = dict(cpp=cpp, triton=triton, embedding_bag=embedding_bag, embedding=embedding, csr=csr, dense=dense)


def choose_impl(device_type, num_control_points, tokens, training, dtype=torch.float32):
    """What impl="auto" means.

    CPU, measured (2 cores, torch 2.13, ms, forward and backward, 768 tokens, 384 to 384; DIARY.md has the rest):

        with        N    cpp    embedding_bag   dense    csr
        AVX-512     8    5.6    57              31       57
                    32   7.8    68              133      77
                    128  12     124             606      174
        AVX2        8           135             30       58
                    32          149             132      81
                    128         215             788      285

    So cpp, and where it can't be compiled the best of the others: in training dense for small N, then csr (which needs
    MKL; PyTorch for x86 brings it, and with AVX-512 the bag would be a little faster) or for few tokens embedding_bag;
    without a backward embedding_bag.

    CUDA, measured on an H200: triton, whose time grows with N: forward and backward 14 ms at N = 128 (16,384 tokens,
    768 to 768, bfloat16), while embedding_bag's does not: 13.6 ms 256 to 256, so about 120 ms there. They meet near
    N = 1,000 by that; beyond 512 embedding_bag, but for few tokens, where triton looks up. Where there is no Triton,
    and for float64, dense, unless so few tokens come that reading the whole table is the larger cost (estimated).
    """
    N = num_control_points
    if torch._C._are_functorch_transforms_active():
        return "embedding"  # slow and large, but made of what torch.func can transform
    if device_type == "cuda" and dtype != torch.float64 and kan_kernels.gpu_available():
        # tokens last, and only if need be: to torch.export and torch.compile it is a symbol, and asking is a guard
        return "triton" if N <= 512 or (not training and tokens <= few(N)) else "embedding_bag"
    if device_type != "cpu":
        return "dense" if N <= 128 and (training or tokens >= N) else "embedding_bag"
    if kan_kernels.available():
        return "cpp"
    if training and N > 16 and tokens >= 8 * N and torch.backends.mkl.is_available():
        return "csr"
    return "dense" if training and N <= 32 else "embedding_bag"


@kan_kernels.constant
def bag_has_half_gradients(device_type, dtype):
    return _probe_half_gradients(device_type, dtype)


@functools.cache  # in a function of its own: torch.compile looks through a cache, not through the line above
def _probe_half_gradients(device_type, dtype):
    """Whether embedding_bag can differentiate its per-sample weights in half precision on this device.

    On CUDA that came with pytorch/pytorch#185889 (2026-06); before, the forward ran and the backward raised.
    """
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device_type, enabled=False):
        weight = torch.ones(2, 2, device=device_type, dtype=dtype, requires_grad=True)
        psw = torch.ones(1, 2, device=device_type, dtype=dtype, requires_grad=True)
        y = F.embedding_bag(torch.tensor([[0, 1]], device=device_type), weight, per_sample_weights=psw, mode="sum")
        try:
            torch.autograd.grad(y.sum(), (weight, psw))
        except RuntimeError:
            return False
    return True


# ----------------------------------------------------------------------------------------------------------------------
# What KANLayer shares with KANPairLayer


def check_arguments(in_features, out_features, num_control_points, spline_width, init, impl, impls, least_inputs=1):
    for name, value, least in (
        ("in_features", in_features, least_inputs),
        ("out_features", out_features, 1),
        ("num_control_points", num_control_points, 2),
    ):
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
    if not (isinstance(spline_width, (int, float)) and 0 < spline_width < math.inf):
        raise ValueError(f"spline_width must be a positive, finite number, got {spline_width!r}")
    if init not in INITS:
        raise ValueError(f"init must be one of {', '.join(INITS)}, got {init!r}")
    if init == "identity" and in_features != out_features:
        raise ValueError(f"init='identity' needs in_features == out_features, got {in_features} and {out_features}")
    if impl != "auto" and impl not in impls:
        raise ValueError(f"impl must be one of auto, {', '.join(impls)}, got {impl!r}")


def straight_lines(layer):
    """(F, N, O): one through the origin for every edge, by the layer's init, as values at its knots."""
    weight, shape = layer.kan_weight, (layer.in_features, layer.out_features)
    if layer.init == "random_normal":
        slopes = F.normalize(torch.randn(shape, device=weight.device), dim=0)
    elif layer.init == "identity":
        slopes = torch.eye(*shape, device=weight.device)
    else:
        slopes = torch.zeros(shape, device=weight.device)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return layer.knots.to(weight.device, dtype).view(-1, 1) * slopes.to(dtype).unsqueeze(1)


def to_float64(tensor):
    """In float64, on the CPU, for what is done once: Apple's GPUs have none."""
    return (tensor if tensor.is_meta else tensor.detach().cpu()).double()


def normal_shares(knots):
    """(N,) in float64: the share of a unit-normal input that each knot stands for, by the trapezoid rule."""
    ends = torch.cat((knots[:1], knots, knots[-1:]))
    density = torch.exp(-(knots**2) / 2) * (ends[2:] - ends[:-2])
    return density / density.sum()


def deviations(table, shares):
    """The standard deviations of control points (..., K, O) along K, each with its share (K,): (..., O) in float64."""
    table, shares = table.detach().cpu().double(), shares.unsqueeze(1)
    mean = (table * shares).sum(-2, keepdim=True)
    return ((table - mean) ** 2 * shares).sum(-2).sqrt()


def output_dtype(x, in_features):
    """Of a layer whose input is x; ValueError if it can't be."""
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(f"the last dimension must be in_features = {in_features}, got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"input must be floating point, got {x.dtype}; convert it with x.float()")
    if autocast_is_on(x.device.type) and x.dtype != torch.float64:  # as nn.Linear: autocast leaves float64 alone
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def check_cpp(x):
    """ValueError if impl='cpp' was asked for and can't be."""
    if x.device.type != "cpu":
        raise ValueError(f"impl='cpp' needs a CPU, got {x.device}; use impl='auto'")
    if not kan_kernels.available():
        raise ValueError(f"impl='cpp' can't be used: {kan_kernels.load()}; use impl='auto'")


# ----------------------------------------------------------------------------------------------------------------------


class KANLayer(nn.Module):
    """y[..., o] = sum over f of curve[f, o](x[..., f]), each curve a linear B-spline of num_control_points values.

    Args:
        in_features, out_features: sizes of the last dimension of input and output.
        init: "random_normal", straight lines with normal slopes, each output's slopes of unit norm, so that unit-normal
            inputs give outputs of unit variance whatever N and width; "identity", y = x (needs in_features ==
            out_features); "zero", y = 0.
        num_control_points: knots per curve, N >= 2. Parameters: in_features * N * out_features.
        spline_width: the curves' domain is [-spline_width / 2, spline_width / 2], in the units of x; outside, the end
            pieces go on as straight lines. Put a LayerNorm in front: 4.0 then holds 95% of a normal input.
        impl: "cpp", "triton", "embedding_bag", "dense", "csr", "embedding", or "auto" (see choose_impl).
        parameterization: what kan_weight holds: "bspline", the control points, or the coordinates of
            kan_parameterizations.py, from which they are derived once a forward.
        smoothness, density: of "dct_scaled" and the "whitened" ones, see there; None is 100 * ((N - 1) / 31)^4 and
            "normal".
        knots: (N,) increasing positions, in place of uniform ones on the domain; num_control_points and spline_width
            then follow from them. Normal quantiles, say, give every interval as many of a layer-normed input.
        sparse_grad: the gradient of kan_weight is a sparse tensor of the visited rows. Works with torch.optim.SGD
            (without weight decay) and SparseAdam in one process. Adam and AdamW refuse it; with several processes the
            backward raises a ValueError, since DDP would average nothing.

    Shapes: input (..., in_features), output (..., out_features); any leading dimensions, none or empty ones too.
    dtypes: float64, float32, bfloat16, float16. The output has the input's dtype, under autocast the autocast dtype.
        Positions and interpolation weights are computed in float32 or better; on CPUs so is the sum.
    Second derivatives: impl "dense" and "embedding" have them, the others raise. In torch.func "auto" is "embedding".
    NaN and infinite inputs make all outputs of their own token NaN or infinite, and no other token's.
    Raises ValueError for a wrong last dimension, a non-floating input, N < 2, a width that is not positive and finite,
        an unknown init, impl, parameterization or density, knots that do not increase, impl "cpp" off the CPU or
        without a compiler, "triton" without a GPU or Triton or in float64, sparse_grad with another impl than
        embedding_bag or another parameterization than bspline.
    """

    def __init__(
        self,
        in_features,
        out_features,
        init="random_normal",
        num_control_points=32,
        spline_width=4.0,
        impl="auto",
        device=None,
        dtype=None,
        parameterization="bspline",
        smoothness=None,
        density=None,
        knots=None,
        sparse_grad=False,
    ):
        super().__init__()
        self._knots = None
        if knots is not None:
            self._knots = torch.as_tensor(knots, dtype=torch.float64, device="cpu").detach().clone()
            rises = self._knots.float().diff()
            if self._knots.dim() != 1 or not len(rises) or not ((rises > 0) & rises.isfinite()).all():
                raise ValueError(f"knots must be at least two finite numbers, increasing in float32, got {knots!r}")
            num_control_points = len(self._knots)
            spline_width = (self._knots[-1] - self._knots[0]).item()
        check_arguments(in_features, out_features, num_control_points, spline_width, init, impl, IMPLS)
        if sparse_grad and impl not in ("auto", "embedding_bag"):
            raise ValueError(f"sparse_grad needs impl='embedding_bag' or 'auto', got {impl!r}")
        self.in_features = in_features
        self.out_features = out_features
        self.init = init
        self.num_control_points = num_control_points
        self.spline_width = float(spline_width)
        self.impl = impl
        self.sparse_grad = sparse_grad
        self.kan_weight = nn.Parameter(
            torch.empty(in_features, num_control_points, out_features, device=device, dtype=dtype)
        )
        self._set_parameterization(parameterization, smoothness, density)
        self.reset_parameters()

    @property
    def knots(self):
        """The (N,) positions of the knots, in units of x, in float64."""
        if self._knots is not None:
            return self._knots.clone()
        return kan_parameterizations.uniform_knots(self.num_control_points, self.spline_width)

    @torch.no_grad()
    def reset_parameters(self):
        """Set the control points to self.init: every curve a straight line through the origin."""
        self.set_control_points(straight_lines(self))

    # ------------------------------------------------------------------------------------------------------------------
    # From parameters to control points

    def _set_parameterization(self, name, smoothness, density):
        kan_parameterizations.check_name(name)
        if self.sparse_grad and name != "bspline":
            raise ValueError(f"sparse_grad needs parameterization='bspline', got {name!r}: every row has a gradient")
        scaled, whitened = kan_parameterizations.uses_smoothness(name), name.startswith("whitened")
        if (smoothness is not None and not scaled) or (density is not None and not whitened):
            raise ValueError(
                f"parameterization={name!r} has no smoothness or density, got {smoothness!r} and {density!r}; leave "
                "them out, or use dct_scaled (smoothness) or whitened (both)"
            )
        if smoothness is not None and not 0 <= smoothness < math.inf:
            raise ValueError(f"smoothness must be at least 0 and finite, got {smoothness!r}")
        if density is not None and density not in kan_parameterizations.DENSITIES:
            raise ValueError(f"density must be one of {', '.join(kan_parameterizations.DENSITIES)}, got {density!r}")
        self.parameterization = name
        self._smoothness = smoothness  # as given; the default depends on N, which refine changes
        self.density = (density or "normal") if whitened else None
        self._place()

    @property
    def smoothness(self):
        """mu, the weight of the penalty that the parameterization is made for; None where there is none."""
        if not kan_parameterizations.uses_smoothness(self.parameterization):
            return None
        default = kan_parameterizations.default_smoothness(self.num_control_points)
        return default if self._smoothness is None else float(self._smoothness)

    def basis(self):
        """M (N, N) in float64: the control points of an edge are M times its parameters."""
        with torch.device("cpu"):  # also while a model is made on the meta device
            return kan_parameterizations.basis(self.parameterization, self.knots, self.smoothness, self.density)

    def _place(self):
        """Basis and knots, beside the weight and in float32 or better: bfloat16 would spoil what they are for."""
        device, dtype = self.kan_weight.device, torch.promote_types(self.kan_weight.dtype, torch.float32)
        matrix = self.parameterization not in ("bspline", "prefix_sum")
        self._basis = self.basis().to(device, dtype) if matrix else None
        self._search = None if self._knots is None else self._knots.to(device, dtype)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self._place()
        return self

    def control_points(self):
        """The table (F, N, O), differentiable with respect to kan_weight; unless bspline in float32 or better.

        On CUDA it is a matrix product as exact as PyTorch's are set to be, TF32 or not.
        """
        if self.parameterization == "bspline":
            return self.kan_weight
        p = at_least_float32(self.kan_weight)
        if self.parameterization == "prefix_sum":
            return kan_parameterizations.prefix_sums(p)
        with without_autocast(p.device.type):
            return kan_kernels.change_basis(self._basis.to(p.dtype), p)

    def _exact_control_points(self):
        """In float64, to be set again in other coordinates."""
        p = to_float64(self.kan_weight)
        return p if self.parameterization == "bspline" else self.basis().to(p.device) @ p

    @torch.no_grad()
    def set_control_points(self, table):
        """Set kan_weight so that the control points are table (F, N, O), computed in float64."""
        if self.parameterization != "bspline" and not table.is_meta:
            table = torch.linalg.solve(self.basis(), to_float64(table))
        self.kan_weight.copy_(table)

    @torch.no_grad()
    def to_parameterization(self, name, smoothness=None, density=None):
        """Learn the same curves in other coordinates, in place; an optimizer that knows kan_weight must be made anew.

        Exact up to the rounding of kan_weight's dtype. Returns the layer; ValueError as the constructor's.
        """
        before = self.parameterization, self._smoothness, self.density
        table = self._exact_control_points()
        try:
            self._set_parameterization(name, smoothness, density)
        except ValueError:
            self._set_parameterization(*before)
            raise
        self.set_control_points(table)
        return self

    @torch.no_grad()
    def refine(self, num_control_points=None, optimizer=None):
        """More knots, the same curves, in place: kan_weight becomes a new parameter.

        Args:
            num_control_points: M with M - 1 a multiple of N - 1, so that every knot stays one; None for 2 N - 1.
            optimizer: one that trains kan_weight; it trains the new one from then on, with its state carried over. A
                fine control point gets about (N - 1) / (M - 1) of the gradient of the coarse ones around it, in these
                proportions the first moment (Adam's exp_avg, SGD's momentum) is interpolated; the second (exp_avg_sq,
                RMSprop's square_avg, Adagrad's sum) is what it would be if the coarse parameters' gradients had
                nothing to do with each other. What NorMuon (muon.py) knows of rows begins anew.

        Returns the layer; raises ValueError for an M that is not such, a parameterization that can't be had with so
        many knots, and an optimizer's state that is neither moment; then nothing has changed.
        """
        N, M = self.num_control_points, num_control_points
        M = 2 * N - 1 if M is None else M
        if M < N or (M - 1) % (N - 1):
            choices = [k * (N - 1) + 1 for k in (2, 3)]
            raise ValueError(f"num_control_points must keep all {N} knots, as {choices} do, got {M}")
        old, knots = self.kan_weight, self._knots
        state = {} if optimizer is None else optimizer.state.get(old, {})
        tensors = {name: value for name, value in state.items() if torch.is_tensor(value) and name != "row_squares"}
        moments = [name for name, value in tensors.items() if value.shape == old.shape]
        for name in moments:
            if name not in FIRST_MOMENTS + SECOND_MOMENTS:
                known = ", ".join(FIRST_MOMENTS + SECOND_MOMENTS)
                raise ValueError(f"the optimizer's state {name!r} can't be refined, only {known}; make it anew instead")
        R, coarse = kan_parameterizations.refinement(N, M), self.basis()
        table = self._exact_control_points()
        table = R.to(table.device) @ table
        try:
            self.num_control_points, self._knots = M, None if knots is None else R @ knots
            self._place()
        except ValueError:
            self.num_control_points, self._knots = N, knots
            self._place()
            raise
        weight = old.new_empty(self.in_features, M, self.out_features)
        self.kan_weight = nn.Parameter(weight, requires_grad=old.requires_grad)
        self.set_control_points(table)
        if optimizer is not None:
            # A gradient of parameters is M.T times one of control points.
            T = (N - 1) / (M - 1) * self.basis().T @ R @ torch.linalg.inv(coarse).T
            for group in optimizer.param_groups:
                group["params"] = [self.kan_weight if p is old else p for p in group["params"]]
            for name in moments:
                moment = to_float64(state[name])
                carry = (T * T if name in SECOND_MOMENTS else T).to(moment.device)
                state[name] = (carry @ moment).to(state[name])
            state.pop("row_squares", None)
            if state:
                optimizer.state[self.kan_weight] = optimizer.state.pop(old)
        return self

    def second_difference_penalty(self, per_edge=False):
        """The sum of squared second differences of the control points, of all edges or (F, O) of each; differentiable.

        A second difference is c[n] - 2 c[n + 1] + c[n + 2] for uniform knots, in the units of y; else the change of
        slope times the mean spacing. Straight lines cost nothing. The memory it needs does not depend on N.
        """
        D = kan_parameterizations.second_differences(self.knots)
        each = SecondDifferences.apply(at_least_float32(self.control_points()), D)
        return each if per_edge else each.sum()

    # ------------------------------------------------------------------------------------------------------------------

    def forward(self, x, made_by=None):
        """y (..., out_features) of x (..., in_features).

        made_by: (source, norm), where x = norm(source) in float32, with an nn.LayerNorm(in_features, bias=False).
        Training on a GPU then keeps source, which the norm keeps anyway, and not x; the numbers are the same. Anything
        else is as if it were not given.
        """
        out_dtype, device = output_dtype(x, self.in_features), x.device.type
        impl = "embedding_bag" if self.sparse_grad else self.impl
        if impl == "auto":
            training = wants_gradient(x, self.kan_weight)
            tokens = x.numel() // self.in_features
            impl = choose_impl(
                device, self.num_control_points, tokens, training, torch.promote_types(x.dtype, out_dtype)
            )
        elif impl == "cpp":
            check_cpp(x)
        elif impl == "triton" and not kan_kernels.gpu_available():
            raise ValueError(f"impl='triton' can't be used: {kan_kernels.load_gpu()}; use impl='auto'")

        # Half precision is for matrix units and bandwidth that CPUs mostly lack; there the sum is made in float32, and
        # the kernels know themselves where bfloat16 is quicker.
        dtype = out_dtype
        if out_dtype in (torch.bfloat16, torch.float16) and (
            (device == "cpu" and impl != "cpp")
            or impl == "csr"
            or (impl == "embedding_bag" and not bag_has_half_gradients(device, out_dtype))
        ):
            dtype = torch.float32

        with without_autocast(device):
            evaluate = sparse_embedding_bag if self.sparse_grad else IMPLS[impl]
            # Triton's kernels convert x as they read it, which autograd would not see.
            as_it_is = impl == "triton" and self._search is None and not wants_gradient(x, self.kan_weight)
            x_flat, width = x if as_it_is else at_least_float32(x), self.spline_width
            x_flat = x_flat.reshape(-1, self.in_features)
            if self._search is not None:
                x_flat, width = warp(x_flat, self._search.to(x_flat.dtype)), self.num_control_points - 1.0
            normed = ()
            if made_by is not None and impl == "triton" and self._search is None:
                source, norm = made_by
                plain = isinstance(norm, nn.LayerNorm) and norm.bias is None
                if plain and norm.normalized_shape == (self.in_features,) and source.dtype == x.dtype == torch.float32:
                    normed = source.reshape(-1, self.in_features), norm.weight, norm.eps
            y = evaluate(x_flat, self.control_points(), width, dtype, *normed)
        return y.to(out_dtype).view(*x.shape[:-1], self.out_features)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        # kanditioned 1.0.4 saves two index buffers beside kan_weight; they say nothing that its shape does not.
        for name in ("local_bias", "feature_offset"):
            state_dict.pop(prefix + name, None)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._place()  # with assign=True the weight may be elsewhere now, or of another dtype

    def extra_repr(self):
        impl = "embedding_bag" if self.sparse_grad else self.impl
        if impl == "auto":
            device = self.kan_weight.device.type
            chosen = [choose_impl(device, self.num_control_points, 4096, training) for training in (True, False)]
            impl = f"auto (on {device}, 4,096 tokens: {chosen[0]} in training, {chosen[1]} in inference)"
        return (
            f"{self.in_features}, {self.out_features}, init={self.init}, num_control_points={self.num_control_points}, "
            f"spline_width={self.spline_width}, impl={impl}"
            + (f", parameterization={self.parameterization}" if self.parameterization != "bspline" else "")
            + (f", smoothness={self.smoothness:g}" if self.smoothness is not None else "")
            + (", knots given" if self._knots is not None else "")
            + (", sparse_grad" if self.sparse_grad else "")
        )

    # ------------------------------------------------------------------------------------------------------------------
    # Looking at the curves

    @torch.no_grad()
    def edge_activity(self):
        """(F, O): how far from constant each curve is, as its standard deviation over a unit-normal input."""
        return deviations(self.control_points(), normal_shares(self.knots))

    def plot(self, edges=None, save_path=None, max_edges=64, columns=8):
        """Draw curves, one small axis an edge, values against x, and return the matplotlib figure.

        Args:
            edges: an iterable of (in_feature, out_feature) pairs; None for all.
            save_path: where to write the figure; None to leave it open for the caller to show.
            max_edges: if there are more edges, the most active ones (see edge_activity) are drawn, and it is said.

        Raises ValueError for an edge that does not exist.
        """
        import matplotlib.pyplot as plt

        if edges is None:
            wanted = torch.arange(self.in_features * self.out_features)
        else:
            pairs = [tuple(int(k) for k in edge) for edge in edges]
            for pair in pairs:
                if len(pair) != 2 or not (0 <= pair[0] < self.in_features and 0 <= pair[1] < self.out_features):
                    raise ValueError(f"edge {pair} does not exist in a layer {self.in_features} to {self.out_features}")
            wanted = torch.tensor([f * self.out_features + o for f, o in pairs], dtype=torch.long)
        if len(wanted) == 0:
            raise ValueError("no edges to plot; pass at least one (in_feature, out_feature) pair")
        if len(wanted) > max_edges:
            print(f"{len(wanted):,} edges are too many to draw: plotting the {max_edges} most active (max_edges=)")
            wanted = wanted[self.edge_activity().flatten()[wanted].topk(max_edges).indices]

        table = self.control_points().detach().cpu().float().numpy()
        knots = self.knots.numpy()
        columns = min(columns, len(wanted))
        figure, axes = plt.subplots(
            math.ceil(len(wanted) / columns),
            columns,
            figsize=(2.2 * columns, 1.8 * math.ceil(len(wanted) / columns)),
            squeeze=False,
            sharex=True,
            layout="constrained",
        )
        for axis in axes.flat[len(wanted) :]:
            axis.remove()
        for axis, edge in zip(axes.flat, wanted.tolist(), strict=False):
            f, o = divmod(edge, self.out_features)
            axis.plot(knots, table[f, :, o], marker=".", markersize=3, linewidth=1)
            axis.set_title(f"in {f} → out {o}", fontsize=7)
            axis.tick_params(labelsize=6)
            axis.grid(True, linewidth=0.3)
        figure.suptitle(f"{len(wanted)} curves of KANLayer({self.in_features}, {self.out_features})", fontsize=10)
        if save_path:
            figure.savefig(save_path, dpi=150)
            plt.close(figure)
            print(f"Figure saved to {save_path}")
        return figure

    def visualize_all_mappings(self, save_path=None):
        """Draw every curve, one row an input and one column an output, as kanditioned does; save or else show them.

        A layer of more than 1,024 edges would take minutes to draw: its most active 64 are drawn instead (see plot).
        """
        import matplotlib.pyplot as plt

        if self.in_features * self.out_features > 1024:
            self.plot(save_path=save_path)
        else:
            every = [(f, o) for f in range(self.in_features) for o in range(self.out_features)]
            self.plot(every, save_path, max_edges=len(every), columns=self.out_features)
        if not save_path:
            plt.show()
