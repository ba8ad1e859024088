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

On a CPU it is C++ (kan_kernels/pairs.cpp); elsewhere, and where second derivatives are wanted, a matrix product with
the weights of all knots, N^2 / 4 times the flops.

Legend of shapes
    B  tokens (all leading dimensions, flattened)       F  in_features, even    P = F / 2 pairs    x  (B, F)
    N  num_control_points, along each axis              O  out_features         C  (P, N, N, O), the table; y  (B, O)

Look-up tables of two inputs are lmKAN's (Pozdnyakov and Schwaller, arXiv 2509.07103,
https://github.com/schwallergroup/lmkan).
"""

import math

import torch
import torch.nn as nn

import kan_kernels
import kan_parameterizations
from kan_layer import (
    at_least_float32,
    check_arguments,
    check_cpp,
    deviations,
    locate,
    normal_shares,
    output_dtype,
    straight_lines,
    without_autocast,
)

IMPLS = ("cpp", "dense")


def dense(x, table, spline_width, dtype):
    """y (B, O) in dtype, of x (B, F) in float32 or better. Keeps P N^2 weights a token for the backward."""
    P, N, _, O = table.shape
    i, t = (a.unflatten(1, (P, 2)).unsqueeze(-1) for a in locate(x, N, spline_width))
    knots = torch.arange(N, device=x.device)
    along = torch.where(knots == i, 1 - t, 0.0) + torch.where(knots == i + 1, t, 0.0)  # (B, P, 2, N): hats
    weights = along[:, :, 0, :, None] * along[:, :, 1, None, :]  # (B, P, N, N)
    return weights.flatten(1).to(dtype) @ table.reshape(-1, O).to(dtype)


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
        impl: "cpp", "dense", or "auto": "cpp" on a CPU, outside torch.func, if there is a compiler, and "dense" else.
        parameterization: what kan_weight holds: "bspline", the control points, or coordinates of
            kan_parameterizations.py along both axes.
        smoothness: of "dct_scaled" and the "whitened" ones, see there; None is 100 * ((N - 1) / 31)^4.

    Shapes: input (..., in_features), output (..., out_features). dtypes, NaN and infinities as in KANLayer; sums on a
    CPU are in float32 or better. Second derivatives: "dense" has them, "cpp" raises.
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
        if self._basis is not None and table.device.type != "meta":
            M = self.basis().to(table.device)
            table = torch.linalg.solve(M, table.double())
            table = torch.linalg.solve(M, table.flatten(2)).view_as(table)
        self.kan_weight.copy_(table)

    @torch.no_grad()
    def to_parameterization(self, name):
        """Learn the same surfaces in other coordinates, in place; an optimizer that knows kan_weight must be made anew.

        Exact up to the rounding of kan_weight's dtype. Returns the layer; ValueError for an unknown name.
        """
        table = self.kan_weight.double()
        if self._basis is not None:
            table = kan_kernels.change_basis(self.basis().to(table.device), table)
        self._set_parameterization(name, None)
        self.set_control_points(table)
        return self

    def edge_activity(self):
        """(P, O): how far from constant each surface is, as its standard deviation over two unit-normal inputs."""
        shares = normal_shares(self.knots)
        return deviations(self.control_points().flatten(1, 2), torch.outer(shares, shares).flatten())

    # ------------------------------------------------------------------------------------------------------------------

    def forward(self, x, made_by=None):
        """y (..., out_features) of x (..., in_features). made_by is for KANLayer, in whose place this may be."""
        out_dtype, device = output_dtype(x, self.in_features), x.device.type
        if self.impl == "cpp":
            check_cpp(x)
        cpp = self.impl == "cpp" or (self.impl == "auto" and kan_kernels.in_place_of_pytorch(x))
        with without_autocast(device):
            x_flat, table = at_least_float32(x).reshape(-1, self.in_features), self.control_points()
            if cpp:
                wider = torch.promote_types(x_flat.dtype, at_least_float32(table).dtype)
                y = kan_kernels.pairs(x_flat.to(wider), table.to(wider), self.spline_width)
            else:  # half precision is for matrix units, which CPUs mostly lack
                y = dense(x_flat, table, self.spline_width, x_flat.dtype if device == "cpu" else out_dtype)
        return y.to(out_dtype).view(*x.shape[:-1], self.out_features)

    def extra_repr(self):
        return (
            f"{self.in_features}, {self.out_features}, init={self.init}, num_control_points={self.num_control_points}, "
            f"spline_width={self.spline_width}, impl={self.impl}"
            + (f", parameterization={self.parameterization}" if self.parameterization != "bspline" else "")
            + (f", smoothness={self.smoothness:g}" if self.smoothness is not None else "")
        )
