"""KANPairLayer: a layer whose every pair of inputs goes through a surface of its own on the way to every output.

A curve sees one input, so a KANLayer is additive: no product of two inputs, no "this, if that". A surface sees two. It
is given by its values on N x N knots, uniform on [-spline_width / 2, spline_width / 2] both ways, and bilinear between
them, so within every cell it has a product of both inputs:

    i, s    interval of x[2 p] and position in it, as kan_layer.locate finds them;    j, t    those of x[2 p + 1]
    y[o] = sum_p (1 - s) (1 - t) C[p, i, j, o] + (1 - s) t C[p, i, j + 1, o]
               + s (1 - t) C[p, i + 1, j, o]   + s t C[p, i + 1, j + 1, o]

Four rows of the table for two inputs are as many as a KANLayer reads, whatever N is; but there are N^2 / 2 control
points for each input and output, where curves have N. At N = 4 that is a KANLayer's of 8 points.

Which inputs make a pair? Neighbours. In a network those are any two: who writes them learns what to put side by side.

Surfaces may be learned in other coordinates (kan_parameterizations.py), the same along both axes: C = M P M^T.

On a CPU it is C++ (kan_kernels/pairs.cpp); elsewhere a matrix product with the weights of all knots, N^2 / 4 times the
flops, or for few tokens PyTorch's look-up.

Legend of shapes
    B  tokens (all leading dimensions, flattened)       F  in_features, even    P = F / 2 pairs    x  (B, F)
    N  num_control_points, along each axis              O  out_features         C  (P, N, N, O), the table; y  (B, O)

Look-up tables of two inputs are lmKAN's (Pozdnyakov and Schwaller, arXiv 2509.07103,
https://github.com/schwallergroup/lmkan).
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

import kan_kernels
import kan_layer
import kan_parameterizations
from kan_layer import (
    at_least_float32,
    bag_has_half_gradients,
    check_arguments,
    check_cpp,
    deviations,
    hat_chunk,
    locate,
    normal_shares,
    output_dtype,
    rounded_slopes,
    split_tokens,
    straight_lines,
    to_float64,
    wants_gradient,
    without_autocast,
)
from kan_parameterizations import hats


def look_up(x, num_control_points, spline_width):
    """What each token reads: rows of the table as (P * N * N, O), and their weights, both (B, P, 4)."""
    N, P = num_control_points, x.shape[1] // 2
    i, t = (a.unflatten(1, (P, 2)) for a in locate(x, N, spline_width))
    corner = (torch.arange(P, device=x.device) * N + i[..., 0]) * N + i[..., 1]
    rows = torch.stack((corner, corner + 1, corner + N, corner + N + 1), dim=2)
    s, t = (torch.stack((1 - a, a), dim=2) for a in t.unbind(2))
    return rows, (s.unsqueeze(3) * t.unsqueeze(2)).flatten(2)


def cpp(x, table, spline_width, dtype):
    """The look-up in C++, for CPUs (kan_kernels/pairs.cpp), in float32 or better. Saves only x."""
    wider = torch.promote_types(x.dtype, at_least_float32(table).dtype)
    return kan_kernels.pairs(x.to(wider), table.to(wider), spline_width).to(dtype)


def embedding_bag(x, table, spline_width, dtype):
    """The look-up by F.embedding_bag; the forward's cost does not depend on N. The backward saves rows and weights."""
    return kan_layer.embedding_bag(x, table, spline_width, dtype, look_up)


def embedding(x, table, spline_width, dtype):
    """The definition, word for word; it holds (B, P, 4, O) numbers: to read, to check with, and for torch.func."""
    rows, weights = look_up(x, table.shape[1], spline_width)
    corners = F.embedding(rows, table.to(dtype).flatten(0, 2))
    return torch.einsum("bpc,bpco->bo", weights.to(dtype), corners)


def dense(x, table, spline_width, dtype):
    """A @ C with A (B, P N^2), every knot's weight, written out, some tokens at a time: B P N^2 O multiply-adds, all in
    matrix products. Saves only x."""
    if kan_kernels.exporting():  # whole, or how many chunks there are would be a guard on the number of tokens
        N = table.shape[1]
        return knot_weights(*weights_along(*locate(x, N, spline_width), N), dtype) @ table.to(dtype).flatten(0, 2)
    return WeightMatmul.apply(x, table, spline_width, dtype)


def weights_along(i, t, N):
    """(B, P, N) for either input of a pair: the weights of its knots, from intervals and positions (B, F)."""
    return hats(i, t, N, t.dtype).unflatten(1, (-1, 2)).unbind(2)


def knot_weights(first, second, dtype):
    """A (B, P N^2)."""
    return (first.unsqueeze(3) * second.unsqueeze(2)).to(dtype).flatten(1)


class WeightMatmul(torch.autograd.Function):
    """y = A @ C; A is N^2 / 2 times as large as all that defines it, so the backward builds it again from x."""

    @staticmethod
    def forward(ctx, x, table, spline_width, dtype):
        ctx.save_for_backward(x, table)
        ctx.spline_width, ctx.dtype = spline_width, dtype
        N, rows, outputs = table.shape[1], table.to(dtype).flatten(0, 2), []
        for chunk in split_tokens(x, hat_chunk(x, table)):
            outputs.append(knot_weights(*weights_along(*locate(chunk, N, spline_width), N), dtype) @ rows)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    @staticmethod
    def backward(ctx, g):
        x, table = ctx.saved_tensors
        P, N, dtype = *table.shape[:2], ctx.dtype
        down, across = (rounded_slopes(table, dtype, axis).flatten(0, 2) for axis in (1, 2))
        grad_table, grad_x = None, []
        tokens = hat_chunk(x, table)
        for chunk, g_chunk in zip(split_tokens(x, tokens), split_tokens(g, tokens), strict=True):
            i, t = locate(chunk, N, ctx.spline_width)
            first, second = weights_along(i, t, N)
            if ctx.needs_input_grad[1]:
                part = at_least_float32(knot_weights(first, second, dtype).t() @ g_chunk)
                grad_table = part if grad_table is None else grad_table + part
            if ctx.needs_input_grad[0]:
                by_first = at_least_float32(g_chunk @ down.t()).view(-1, P, N - 1, N).to(x.dtype)
                by_second = at_least_float32(g_chunk @ across.t()).view(-1, P, N, N - 1).to(x.dtype)
                sides = (by_first @ second.unsqueeze(3)).squeeze(3), (first.unsqueeze(2) @ by_second).squeeze(2)
                slopes = torch.stack(sides, dim=2).flatten(1, 2)  # (B, F, N - 1)
                grad_x.append(slopes.gather(2, i.unsqueeze(2)).squeeze(2) * ((N - 1) / ctx.spline_width))
        grad_x = torch.cat(grad_x) if grad_x else None
        return grad_x, None if grad_table is None else grad_table.view_as(table).to(table.dtype), None, None


IMPLS = dict(cpp=cpp, embedding_bag=embedding_bag, embedding=embedding, dense=dense)


def choose_impl(x, N, training):
    """What impl="auto" means for x (..., F): "cpp" on a CPU, if there is a compiler, and "embedding" within torch.func.

    Else "dense", N^2 / 4 times the flops of a look-up but all in matrix products, unless so few tokens come, and no
    gradient is wanted, that reading the whole table is the larger cost (estimated).
    """
    if torch._C._are_functorch_transforms_active():
        return "embedding"
    if kan_kernels.in_place_of_pytorch(x):
        return "cpp"
    # Tokens last: to torch.export they are a symbol, and asking is a guard.
    few = not training and not kan_kernels.exporting() and x.numel() // x.shape[-1] <= N * N // 4
    return "embedding_bag" if few else "dense"


class KANPairLayer(nn.Module):
    """y[..., o] = sum over p of surface[p, o](x[..., 2 p], x[..., 2 p + 1]), each surface a bilinear spline.

    Args:
        in_features, out_features: sizes of the last dimension of input and output; in_features even.
        init: "random_normal", planes with normal slopes, each output's slopes of unit norm; "identity", y = x (needs
            in_features == out_features); "zero", y = 0.
        num_control_points: knots along each axis, N >= 2. Parameters: in_features / 2 * N^2 * out_features.
        spline_width: the surfaces' domain is [-spline_width / 2, spline_width / 2] both ways, in the units of x;
            outside, the cells at the edge go on, bilinear. Put a LayerNorm in front: 4.0 then holds 95% of a normal
            input.
        impl: "auto" (see choose_impl), "cpp" (CPU), "embedding_bag", "embedding" or "dense".
        parameterization: what kan_weight holds: "bspline", the control points, or coordinates of
            kan_parameterizations.py along both axes.
        smoothness: of "dct_scaled" and the "whitened" ones, see there; None is 100 * ((N - 1) / 31)^4.

    Shapes: input (..., in_features), output (..., out_features). dtypes, NaN and infinities as in KANLayer; sums on a
    CPU are in float32 or better. Second derivatives: "embedding" and "dense" have them, the others raise.
    Raises ValueError for a wrong last dimension, an odd one, a non-floating input, N < 2, a width that is not positive
        and finite, an unknown init, impl or parameterization, smoothness where there is none, and "cpp" off the CPU or
        without a compiler.
    """

    def __init__(
        self,
        in_features,
        out_features,
        init="random_normal",
        num_control_points=7,
        spline_width=4.0,
        impl="auto",
        device=None,
        dtype=None,
        parameterization="bspline",
        smoothness=None,
    ):
        super().__init__()
        check_arguments(in_features, out_features, num_control_points, spline_width, init, impl, IMPLS, least_inputs=2)
        if in_features % 2:
            raise ValueError(f"in_features must be even, got {in_features}: inputs go in pairs; use KANLayer, or pad")
        self.in_features, self.out_features, self.init, self.impl = in_features, out_features, init, impl
        self.num_control_points, self.spline_width = num_control_points, float(spline_width)
        N = num_control_points
        self.kan_weight = nn.Parameter(torch.empty(in_features // 2, N, N, out_features, device=device, dtype=dtype))
        self._set_parameterization(parameterization, smoothness)
        self.reset_parameters()

    @property
    def knots(self):
        """The (N,) positions of the knots along either axis, in units of x, in float64."""
        return kan_parameterizations.uniform_knots(self.num_control_points, self.spline_width)

    @torch.no_grad()
    def reset_parameters(self):
        """Set the control points to self.init: every surface a plane through the origin."""
        lines = straight_lines(self)
        self.set_control_points(lines[::2].unsqueeze(2) + lines[1::2].unsqueeze(1))

    # ------------------------------------------------------------------------------------------------------------------
    # From parameters to control points

    def _set_parameterization(self, name, smoothness):
        kan_parameterizations.check_name(name)
        scaled = kan_parameterizations.uses_smoothness(name)
        if smoothness is not None and not scaled:
            raise ValueError(f"parameterization={name!r} has no smoothness, got {smoothness!r}; leave it out")
        if smoothness is not None and not 0 <= smoothness < math.inf:
            raise ValueError(f"smoothness must be at least 0 and finite, got {smoothness!r}")
        if scaled and smoothness is None:
            smoothness = kan_parameterizations.default_smoothness(self.num_control_points)
        self.parameterization, self.smoothness = name, smoothness
        self._place()

    def basis(self):
        """M (N, N) in float64: the control points of a surface are M P M^T of its parameters P (N, N)."""
        with torch.device("cpu"):  # also while a model is made on the meta device
            return kan_parameterizations.basis(self.parameterization, self.knots, self.smoothness)

    def _place(self):
        """The basis, beside the weight and in float32 or better."""
        dtype = torch.promote_types(self.kan_weight.dtype, torch.float32)
        self._basis = None if self.parameterization == "bspline" else self.basis().to(self.kan_weight.device, dtype)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self._place()
        return self

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        self._place()  # with assign=True the weight may be elsewhere now, or of another dtype

    def control_points(self):
        """The table (P, N, N, O), differentiable with respect to kan_weight; unless bspline in float32 or better."""
        if self._basis is None:
            return self.kan_weight
        p = at_least_float32(self.kan_weight)
        with without_autocast(p.device.type):
            return kan_kernels.change_basis(self._basis.to(p.dtype), p)

    @torch.no_grad()
    def set_control_points(self, table):
        """Set kan_weight so that the control points are table (P, N, N, O), computed in float64.

        Raises ValueError for a table of another shape.
        """
        if table.shape != self.kan_weight.shape:
            raise ValueError(f"the table must be {tuple(self.kan_weight.shape)}, got {tuple(table.shape)}")
        if self._basis is not None and not table.is_meta:
            M, table = self.basis(), to_float64(table)
            table = torch.linalg.solve(M, table)
            table = torch.linalg.solve(M, table.flatten(2)).view_as(table)
        self.kan_weight.copy_(table)

    @torch.no_grad()
    def to_parameterization(self, name, smoothness=None):
        """Learn the same surfaces in other coordinates, in place; an optimizer that knows kan_weight must be made anew.

        Exact up to the rounding of kan_weight's dtype. Returns the layer; ValueError as the constructor's.
        """
        before, table = (self.parameterization, self.smoothness), to_float64(self.kan_weight)
        if self._basis is not None:
            table = kan_kernels.change_basis(self.basis().to(table.device), table)
        try:
            self._set_parameterization(name, smoothness)
        except ValueError:
            self._set_parameterization(*before)
            raise
        self.set_control_points(table)
        return self

    def edge_activity(self):
        """(P, O): how far from constant each surface is, as its standard deviation over two unit-normal inputs."""
        shares = normal_shares(self.knots)
        return deviations(self.control_points().flatten(1, 2), torch.outer(shares, shares).flatten())

    # ------------------------------------------------------------------------------------------------------------------

    def forward(self, x, made_by=None):
        """y (..., out_features) of x (..., in_features). made_by is for KANLayer, in whose place this may be."""
        out_dtype, device, impl = output_dtype(x, self.in_features), x.device.type, self.impl
        if impl == "auto":
            impl = choose_impl(x, self.num_control_points, wants_gradient(x, self.kan_weight))
        elif impl == "cpp":
            check_cpp(x)
        with without_autocast(device):
            x_flat = at_least_float32(x).reshape(-1, self.in_features)
            # Half precision is for matrix units, which CPUs mostly lack, and for a bag that has gradients in it.
            whole = device == "cpu" or (impl == "embedding_bag" and not bag_has_half_gradients(device, out_dtype))
            dtype = x_flat.dtype if whole else out_dtype
            y = IMPLS[impl](x_flat, self.control_points(), self.spline_width, dtype)
        return y.to(out_dtype).view(*x.shape[:-1], self.out_features)

    def extra_repr(self):
        return (
            f"{self.in_features}, {self.out_features}, init={self.init}, num_control_points={self.num_control_points}, "
            f"spline_width={self.spline_width}, impl={self.impl}"
            + (f", parameterization={self.parameterization}" if self.parameterization != "bspline" else "")
            + (f", smoothness={self.smoothness:g}" if self.smoothness is not None else "")
        )
