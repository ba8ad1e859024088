"""Every way to evaluate the layer that we could think of, side by side: a catalogue to read, to check and to time.

A spline is a look-up, and a look-up is a matrix product with a matrix that is nearly empty. Between these two views
lie all the ways below. They compute the same function, kan_layer.py's, and differ in what they hold in memory, in the
order they read the table in, and in what their backward costs; `python bench.py --evaluations` shows that in numbers.
Those below are its: ms on 2 cores with AVX-512, torch 2.13, 768 tokens, 384 to 384.

The maths. x[f] falls into interval i of the N - 1 between the knots, at t in [0, 1) of its length; outside the domain i
stays the end interval and t goes on:

    y[o] = sum_f (1 - t) * C[f, i, o] + t * C[f, i + 1, o]        a look-up: two rows of C per feature
         = (A @ C)[o]                                             a product: A[f, n] = hat n at x[f], 2F of F*N not zero
    dL/dC = A^T @ g            g = dL/dy; as a look-up: each row of C sums what its tokens sent
    dL/dx[f] = <g, C[f, i + 1] - C[f, i]> / h                     h is the length of the interval

On a knot the curve has two slopes; every entry gives one of them, those here the right one.

Legend of shapes
    B  tokens                  F  in_features              x  (B, F), float32 or float64
    N  control points          O  out_features             C  (F, N, O), the table, of x's dtype; y  (B, O)

Every entry is f(x, table, spline_width) -> y, has gradients with respect to x and table, and is in EVALUATIONS at the
end. A NaN makes its own token NaN and no other. "Holds" is said of numbers, beside x, the table, y and their gradients.
"""

import math

import torch
import torch.nn.functional as F

import kan_kernels
import kan_layer
from kan_layer import locate, look_up, two_rows, unchecked
from kan_parameterizations import hats, search

# ----------------------------------------------------------------------------------------------------------------------
# Bags: the sum is made while the rows are read.


def embedding_bag(x, table, spline_width):
    """F.embedding_bag over indices i, i + 1, i, i + 1, ...: the two rows of an edge, neighbours in memory, are read one
    after the other. Holds 4 * B*F indices and weights. Wins where nothing can be compiled: with `stacked` the fastest
    forward of PyTorch's operators for N = 8, 32 and 128, and from 32 on with its backward too."""
    return kan_layer.embedding_bag(x, table, spline_width, table.dtype)


def embedding_bag_stacked(x, table, spline_width):
    """F.embedding_bag over all i, then all i + 1: the second half comes back to where the first was. Holds as much, and
    takes as long: forward 9.2 against 8.1 for N = 8, 27 against 31 for N = 128."""
    rows, weights = (pair.transpose(1, 2).flatten(1) for pair in look_up(x, table.shape[1], spline_width))  # (B, 2F)
    return F.embedding_bag(rows, table.flatten(0, 1), per_sample_weights=weights, mode="sum")


# ----------------------------------------------------------------------------------------------------------------------
# Gathers: the rows are copied out of the table first, 2 * B*F*O numbers, and summed afterwards. To read, not to run,
# unless torch.compile makes one loop of copying and summing.


def embedding_lerp(x, table, spline_width):
    """The definition: F.embedding fetches both rows of every edge, torch.lerp interpolates, .sum adds the features."""
    return kan_layer.embedding(x, table, spline_width, table.dtype)


def index_select_lerp(x, table, spline_width):
    """The same with two index_select; their backward is an index_add into the table, where F.embedding's has a kernel
    of its own."""
    rows, weights = look_up(x, table.shape[1], spline_width)
    flat = table.flatten(0, 1)
    below, above = (flat.index_select(0, k.flatten()).view(*x.shape, -1) for k in rows.unbind(2))  # (B, F, O) each
    return torch.lerp(below, above, weights[..., 1:]).sum(1)


def index_add(x, table, spline_width):
    """Input-major: edges sorted by feature, so that C is read slab by slab, and index_add sends each edge's row to its
    token. Holds a third B*F*O, the interpolated rows; the additions to one token come from far apart."""
    i, t = locate(x.t(), table.shape[1], spline_width)  # (F, B)
    rows = (torch.arange(len(i), device=x.device).unsqueeze(1) * table.shape[1] + i).flatten()
    flat = table.flatten(0, 1)
    terms = torch.lerp(flat.index_select(0, rows), flat.index_select(0, rows + 1), t.flatten().unsqueeze(1))
    tokens = torch.arange(len(x), device=x.device).repeat(len(i))
    return table.new_zeros(len(x), table.shape[2]).index_add(0, tokens, terms)


def batch_major(x, table, spline_width):
    """Token by token: the 2F rows of a token are gathered into a matrix, and its weights are a vector times that."""
    rows, weights = (pair.flatten(1) for pair in look_up(x, table.shape[1], spline_width))  # (B, 2F)
    return torch.bmm(weights.unsqueeze(1), F.embedding(rows, table.flatten(0, 1))).squeeze(1)


def feature_major(x, table, spline_width):
    """Feature by feature, x as (F, B): all tokens read one slab (N, O) of C while it is in the cache, and add to y.
    Holds a slab's worth in inference, 2 * B*F*O in training. An operator has B*O numbers to do, so F must be small."""
    i, t = locate(x.t().contiguous(), table.shape[1], spline_width)  # (F, B)
    y = table.new_zeros(len(x), table.shape[2])
    for curves, i_f, t_f in zip(table.unbind(), i, t, strict=True):
        y = y + torch.lerp(curves.index_select(0, i_f), curves.index_select(0, i_f + 1), t_f.unsqueeze(1))
    return y


# ----------------------------------------------------------------------------------------------------------------------
# Runs: rows i and i + 1 are neighbours, so an edge reads one run of 2 * O numbers. That needs no copy of the table: a
# view will do in which the runs overlap. Holds 2 * B*F*O; half the indices of a gather, each read twice as long.


def as_strided(x, table, spline_width):
    """The view by hand: run r starts at row r of C. What autograd knows of it is its storage: the backward adds number
    by number, with an index for each of the 2 * F*N*O in the view. Without a gradient a fair gather."""
    in_features, N, O = table.shape
    rows, weights = look_up(x, N, spline_width)
    runs = table.contiguous().as_strided((in_features * N - 1, 2 * O), (O, 1))
    pairs = F.embedding(rows[..., 0], runs).view(len(x), 2 * in_features, O)
    return torch.bmm(weights.view(len(x), 1, -1), pairs).squeeze(1)


def unfold(x, table, spline_width):
    """The view by Tensor.unfold, a window of two that slides along the knots: (F, N - 1, 2, O). Its backward has a
    gradient for every window, 2 * F*N*O numbers again, and adds them up."""
    i, t = locate(x, table.shape[1], spline_width)
    windows = table.unfold(1, 2, 1).transpose(2, 3)
    pairs = windows[torch.arange(x.shape[1], device=x.device), i]  # (B, F, 2, O)
    return torch.einsum("bfk,bfko->bo", torch.stack((1 - t, t), dim=2), pairs)


# ----------------------------------------------------------------------------------------------------------------------
# Products with a sparse A: the formats differ in the order its 2 * B*F numbers are kept in. CPUs need MKL.


def csr(x, table, spline_width):
    """Rows of A one after the other: the look-up in other words. Forward and backward are products of MKL's, the
    gradient of x a product sampled where A is not zero; saves only x."""
    return kan_layer.csr(x, table, spline_width, table.dtype)


def csc(x, table, spline_width):
    """Columns of A one after the other: to build it is to sort the edges by row of C (compare `sort` below), and the
    forward scatters. It pays in A^T, which is in CSR form for the table's gradient. The gradient of x is as for coo."""
    rows, weights = (pair.flatten() for pair in look_up(x, table.shape[1], spline_width))
    flat = table.flatten(0, 1)
    order = rows.argsort(stable=True)
    ends = F.pad(torch.bincount(rows, minlength=len(flat)).cumsum(0), (1, 0))
    A = unchecked(torch.sparse_csc_tensor, ends, order // (2 * x.shape[1]), weights[order], (len(x), len(flat)))
    return A @ flat


def coo(x, table, spline_width):
    """Triples (token, row, weight), the easiest to build. For the gradient of x autograd makes the whole g @ C^T, B*F*N
    numbers, and keeps of it what A has places for: N/2 times the work of csr's sampled product."""
    rows, weights = (pair.flatten() for pair in look_up(x, table.shape[1], spline_width))
    flat = table.flatten(0, 1)
    tokens = torch.arange(len(x), device=x.device).repeat_interleave(2 * x.shape[1])
    A = unchecked(torch.sparse_coo_tensor, torch.stack((tokens, rows)), weights, (len(x), len(flat)), is_coalesced=True)
    return A @ flat


def bsr(x, table, spline_width):
    """Blocks of N tokens by the N knots of a feature (MKL wants them square). Each token has its two numbers in every
    one, so no block is empty: A is dense again, B*F*N numbers, and this is `dense` by way of a sparse library."""
    return BlockProduct.apply(x, table, spline_width)


class BlockProduct(torch.autograd.Function):
    """A @ C with A in BSR form; by hand, since PyTorch multiplies by no transposed one on a CPU."""

    @staticmethod
    def blocks(x, N, spline_width):
        """(B / N, F, N, N), B made up to a multiple of N with rows of zeros."""
        A = F.pad(hats(*locate(x, N, spline_width), N, x.dtype), (0, 0, 0, 0, 0, -len(x) % N))
        return A.view(-1, N, x.shape[1], N).transpose(1, 2)

    @staticmethod
    def matrix(blocks):
        rows, columns, N, _ = blocks.shape
        starts = torch.arange(rows + 1, device=blocks.device) * columns
        places = torch.arange(columns, device=blocks.device).repeat(rows)
        return unchecked(torch.sparse_bsr_tensor, starts, places, blocks.reshape(-1, N, N), (rows * N, columns * N))

    @staticmethod
    def forward(ctx, x, table, spline_width):
        ctx.save_for_backward(x, table)
        ctx.spline_width = spline_width
        blocks = BlockProduct.blocks(x, table.shape[1], spline_width)
        return (BlockProduct.matrix(blocks) @ table.flatten(0, 1))[: len(x)]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        x, table = ctx.saved_tensors
        N = table.shape[1]
        blocks = BlockProduct.blocks(x, N, ctx.spline_width).permute(1, 0, 3, 2)
        grad_table = BlockProduct.matrix(blocks) @ F.pad(g, (0, 0, 0, -len(x) % N))
        along = (g @ table.diff(dim=1).flatten(0, 1).t()).view(*x.shape, N - 1)
        grad_x = along.gather(2, locate(x, N, ctx.spline_width)[0].unsqueeze(2)).squeeze(2)
        return grad_x * ((N - 1) / ctx.spline_width), grad_table.view_as(table), None


# ----------------------------------------------------------------------------------------------------------------------
# Products with a dense A: N/2 times the flops, at the speed of a matrix product. They win for few knots.


def dense_scatter(x, table, spline_width):
    """A of zeros, into which the 2F weights of a token are scattered, a chunk of tokens at a time. Saves only x."""
    return kan_layer.dense(x, table, spline_width, table.dtype)


def dense_formula(x, table, spline_width):
    """A without an index: hat n is relu(1 - |u - n|) = ramp(u - n + 1) - ramp(u - n), where ramp(v) is v cut off at 0
    and 1. Two ramps have an end less: the first goes on below 0 and the last above 1, which is the extrapolation.

    relu and |.| themselves will not do: PyTorch gives both the derivative 0 in their kinks, and so a curve the slope 0
    on its knots. Holds some 5 * B*F*N; with torch.compile the hats are one loop."""
    N = table.shape[1]
    v = ((x + spline_width / 2) * ((N - 1) / spline_width)).unsqueeze(2) - torch.arange(N - 1, device=x.device)
    low, high = v.new_tensor([-math.inf] + [0] * (N - 2)), v.new_tensor([1] * (N - 2) + [math.inf])
    ramp = torch.where(v >= high, high, v.clamp(min=low))  # (B, F, N - 1), of slope 1 on [0, 1), the 1 left out
    hats = F.pad(ramp, (1, 0), value=1.0) - F.pad(ramp, (0, 1))
    return hats.flatten(1) @ table.flatten(0, 1)


# ----------------------------------------------------------------------------------------------------------------------
# Sorted: with a feature's tokens in the order of their intervals, those that read the same two rows stand together. The
# rows are read in order, and the table's gradient is a sum over each run of tokens, without scattered additions.


def sort(x, table, spline_width):
    """By torch.sort. Holds the order, B*F, and works on B*O numbers at a time. Might win where scattered additions to
    the table's gradient collide, as on GPUs; with a call per feature only if features are few and tokens many."""
    return SortedLookUp.apply(x, table, spline_width, order_by_sorting)


def counting_sort(x, table, spline_width):
    """By counting, since keys are few: a token goes to (tokens of lower intervals) + (earlier ones of its own).
    B*N steps a feature, all parallel, where a sort by comparison takes B*log(B). Made of PyTorch's operators it loses
    even for N = 8, forward 71 against 58; in C++ it is what cpp does."""
    return SortedLookUp.apply(x, table, spline_width, order_by_counting)


def order_by_sorting(i, intervals):
    return i.sort(stable=True).indices, torch.bincount(i, minlength=intervals)


def order_by_counting(i, intervals):
    counts = torch.bincount(i, minlength=intervals)
    seen = F.one_hot(i, intervals).cumsum(0).gather(1, i.unsqueeze(1)).squeeze(1)  # of its interval, itself included
    place = (counts.cumsum(0) - counts)[i] + seen - 1
    return torch.empty_like(i).scatter_(0, place, torch.arange(len(i), device=i.device)), counts


class SortedLookUp(torch.autograd.Function):
    """The look-up, feature by feature, tokens in the order of their intervals; by hand, to sum over runs."""

    @staticmethod
    def steps(ctx, table):
        """For each feature: its tokens in order, how many each interval has, and the two rows each token reads."""
        for curves, (order, counts) in zip(table, ctx.orders, strict=True):
            rows = (part.repeat_interleave(counts, 0, output_size=len(order)) for part in (curves[:-1], curves[1:]))
            yield order, counts, *rows

    @staticmethod
    def forward(ctx, x, table, spline_width, order_by):
        N = table.shape[1]
        i, t = locate(x, N, spline_width)
        ctx.save_for_backward(t, table)
        ctx.scale = (N - 1) / spline_width
        ctx.orders = [order_by(i_f, N - 1) for i_f in i.t().contiguous()]
        y = table.new_zeros(len(x), table.shape[2])
        for (order, _, below, above), t_f in zip(SortedLookUp.steps(ctx, table), t.t(), strict=True):
            y.index_add_(0, order, torch.lerp(below, above, t_f[order].unsqueeze(1)))  # and so unsorted again
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        t, table = ctx.saved_tensors
        grad_x, grad_table = torch.empty_like(t), torch.zeros_like(table)
        for f, (order, counts, below, above) in enumerate(SortedLookUp.steps(ctx, table)):
            g_f, t_f = g[order], t[order, f].unsqueeze(1)
            grad_x[order, f] = ((above - below) * g_f).sum(1) * ctx.scale
            grad_table[f, :-1] += torch.segment_reduce((1 - t_f) * g_f, "sum", lengths=counts)
            grad_table[f, 1:] += torch.segment_reduce(t_f * g_f, "sum", lengths=counts)
        return grad_x, grad_table, None, None


# ----------------------------------------------------------------------------------------------------------------------
# Searched, and compiled.


def bucketize(x, table, spline_width, knots=None):
    """The interval by binary search among the knots, log2(N) steps where arithmetic takes one: for knots (N,) anywhere,
    increasing; by default the uniform ones. They are float64, as the length of an interval is a difference of two. What
    is found is read as by embedding_bag."""
    N = table.shape[1]
    if knots is None:
        knots = torch.linspace(-spline_width / 2, spline_width / 2, N, dtype=torch.float64, device=x.device)
    i, t = search(x.double(), knots.double())
    rows, weights = two_rows(i, t.to(x.dtype), N)
    return F.embedding_bag(rows.flatten(1), table.flatten(0, 1), per_sample_weights=weights.flatten(1), mode="sum")


def cpp(x, table, spline_width):
    """kan_kernels/spline.cpp, the layer's own on a CPU: the look-up, sorted where it pays, compiled. Saves only x.
    Needs a C++ compiler."""
    if not kan_kernels.available():
        raise ValueError(f"the kernels can't be built: {kan_kernels.load()}")
    return kan_layer.cpp(x, table, spline_width, table.dtype)


# ----------------------------------------------------------------------------------------------------------------------
# Not here: cuEmbed (https://github.com/NVIDIA/cuEmbed, headers in CUDA C++), read at commit 90dd843, never run.
#
# What it would give us. Its forward is embedding_bag above: EmbeddingForward with fixed hotness, num_hots = 2F, sums
# weighted rows in one kernel, a thread to a vector of up to 16 bytes of the output, its loop over rows unrolled by 8.
# Its backward makes the table's gradient: Transpose sorts the look-ups by row (CUB's radix sort, over all bits of the
# index) and EmbeddingBackward sums each run in registers, with atomics only where a run may go on in another block.
#
# What it would not. There is no gradient with respect to the weights (its own PyTorch example returns None for it), and
# ours is the gradient of x: <g, row> of every look-up would remain to be written, as much reading as the forward.
# Indices and weights come from memory, where x would do; it can't know that i + 1 follows i, so it sorts 2F keys a
# token where F would do. Tables are float32 or float16, no bfloat16, rows a multiple of 4 bytes and at most 16 KB. With
# fixed hotness a token's indices and weights must fit into 48 KB: under 2,048 features with int64 and float32.

EVALUATIONS = {
    "embedding_bag": embedding_bag,
    "embedding_bag, stacked": embedding_bag_stacked,
    "embedding + lerp": embedding_lerp,
    "index_select + lerp": index_select_lerp,
    "index_add": index_add,
    "batch-major": batch_major,
    "feature-major": feature_major,
    "as_strided": as_strided,
    "unfold": unfold,
    "csr": csr,
    "csc": csc,
    "coo": coo,
    "bsr": bsr,
    "dense, scatter": dense_scatter,
    "dense, formula": dense_formula,
    "sort": sort,
    "counting sort": counting_sort,
    "bucketize": bucketize,
    "cpp": cpp,
}
