"""In which coordinates a curve is learned.

A curve is given by its N control points c, but what the optimizer sees may be other numbers p, of which they are a
linear function: c = M @ p with a square M that is the same for every edge. The layer derives its table of control
points so, once a forward; how it is evaluated does not change. Nor does what can be learned, only how soon: a gradient
step on p moves c by M @ M.T times what a step on c would, so M says which curves come cheap.

    bspline       M = 1. Moving one control point makes a tent. Well conditioned for the data.
    prefix_sum    p = (c[0], c[1] - c[0], second differences); M is two cumulative sums. Well conditioned for a penalty
                  on second differences, badly for the data: one second difference bends all that follows.
    dct           p = the orthonormal DCT-II of c, M its transpose: frequencies. For gradient descent the same as
                  bspline; Adam, which scales every coordinate by itself, can treat each frequency as it deserves.
    dct_scaled    the same, with frequency k divided by sqrt(1 + mu * lambda[k]^2): smooth curves come cheap, and the
                  data together with mu times the penalty is nearly isotropic.
    whitened      M.T @ (G + mu * D.T @ D) @ M = 1 exactly, with G what the data say (gram) and D second differences.
                  M = A^(-1/2) is symmetric; whitened_cholesky and whitened_eigenvectors are the same turned, which
                  gradient descent does not notice and Adam does.
    legendre      discrete Legendre (Gram) polynomials on the knots, orthonormal: p[0] the mean, p[1] the slope, ...

mu is the weight of the penalty on second differences that a parameterization is made for: smoothness= of KANLayer. The
same function has second differences in proportion to 1 / (N - 1)^2, so what is equally smooth has mu in proportion to
(N - 1)^4: by default 100 at N = 32 and 0.26 at N = 8 (what each gave in a GPT is in docs/layer.md).

The rank-2 correction. lambda[k] = 2 - 2 cos(pi k / N) are the eigenvalues of the Neumann second difference L, the
(N, N) matrix with rows (-1, 2, -1) inside and (1, -1), (-1, 1) at the ends; the DCT-II diagonalises it, so L.T @ L has
eigenvalues lambda^2 and dct_scaled makes 1 + mu * L.T @ L the identity. The penalty D has the N - 2 inner rows only,
since the ends of a curve are free. So, up to the sign of D,

    L.T @ L = D.T @ D + a a.T + b b.T        a = e[0] - e[1],  b = e[N - 1] - e[N - 2]

dct_scaled also penalises the slope of the two end pieces, twice in a matrix of rank N - 2: that is why the straight
line, which costs nothing in truth, is dear to it, and why it ends at a condition number of 16 where whitened has 1.

Legend of shapes
    N  control points    knots (N,), float64    M (N, N)    D (N - 2, N)    G (N, N)
"""

import math

import torch

PARAMETERIZATIONS = (
    "bspline",
    "prefix_sum",
    "dct",
    "dct_scaled",
    "whitened",
    "whitened_cholesky",
    "whitened_eigenvectors",
    "legendre",
)
DENSITIES = ("normal", "uniform")


def uses_smoothness(name):
    return name == "dct_scaled" or name.startswith("whitened")


def default_smoothness(N):
    return 100.0 * ((N - 1) / 31) ** 4


def check_name(name):
    if name not in PARAMETERIZATIONS:
        raise ValueError(f"parameterization must be one of {', '.join(PARAMETERIZATIONS)}, got {name!r}")


def uniform_knots(N, width):
    """(N,) knots on [-width / 2, width / 2], in float64."""
    return torch.linspace(-width / 2, width / 2, N, dtype=torch.float64, device="cpu")


def second_differences(knots):
    """D (N - 2, N): how much the slope changes at every inner knot, times the mean spacing.

    For uniform knots c[n] - 2 c[n + 1] + c[n + 2]. Zero for straight lines, whatever the knots.
    """
    h = knots.diff()
    slopes = torch.eye(len(knots), dtype=torch.float64, device=knots.device).diff(dim=0) / h[:, None]
    return slopes.diff(dim=0) * h.mean()


def search(x, knots):
    """Interval i of x among knots (N,) and position t in it, shaped like x; t keeps the gradient with respect to x.

    Only inner knots divide: beyond the ends the end pieces go on, with t outside [0, 1].
    """
    i = torch.bucketize(x.detach(), knots[1:-1], right=True)
    return i, (x - knots[i]) / (knots[i + 1] - knots[i])


def hats(i, t, N, dtype=torch.float64):
    """A, dense: (*i.shape, N) with 1 - t at i, t at i + 1 and 0 elsewhere, the weights of the control points."""
    A = torch.zeros(*i.shape, N, dtype=dtype, device=i.device)
    A.scatter_(-1, i.unsqueeze(-1), (1 - t).unsqueeze(-1).to(dtype))
    return A.scatter_(-1, (i + 1).unsqueeze(-1), t.unsqueeze(-1).to(dtype))


def gram(knots, density="normal"):
    """G = (N - 1) * E[A.T @ A], A the hats at x: what inputs of that density say about the control points.

    density: "uniform" on the domain, or "normal", x of mean 0 and variance 1, its tails outside the domain included.
    The factor makes G of uniform knots independent of N away from the ends: 2/3 on the diagonal, 1/6 beside it.
    """
    ends = knots
    if density == "normal":
        tail = torch.linspace(0, 8, 17, dtype=torch.float64)[1:]
        ends = torch.cat((knots[0] - tail.flip(0), knots, knots[-1] + tail))
    # Gauss-Legendre with 16 points a piece: exact for the hats, to rounding for the bell.
    k = torch.arange(1.0, 16, dtype=torch.float64)
    points, vectors = torch.linalg.eigh(torch.diag(k / (4 * k * k - 1).sqrt(), 1), UPLO="U")
    half = ends.diff()[:, None] / 2
    x = (ends[:-1, None] + half * (1 + points)).flatten()
    weight = (half * 2 * vectors[0] ** 2).flatten()
    weight = weight * torch.exp(-(x**2) / 2) if density == "normal" else weight
    A = hats(*search(x, knots), len(knots))
    return (len(knots) - 1) * (A.T * (weight / weight.sum())) @ A


def dct(N):
    """(N, N): row k is the k-th vector of the orthonormal DCT-II."""
    k = torch.arange(N, dtype=torch.float64)
    rows = torch.cos(math.pi / N * torch.outer(k, k + 0.5)) * math.sqrt(2 / N)
    rows[0] /= math.sqrt(2)
    return rows


def legendre(knots):
    """(N, N): column k is a polynomial of degree k on the knots, all orthonormal, by Stieltjes' recurrence.

    Each is x times the one before, made orthogonal to all before it, twice: once is not enough at degree 100.
    """
    columns = [torch.full((len(knots),), len(knots) ** -0.5, dtype=torch.float64)]
    x = knots / knots.abs().max()
    for _ in range(len(knots) - 1):
        Q, new = torch.stack(columns, 1), x * columns[-1]
        for _ in range(2):
            new = new - Q @ (Q.T @ new)
        columns.append(new / new.norm())
    return torch.stack(columns, 1)


def basis(name, knots, smoothness=100.0, density="normal"):
    """M (N, N) in float64, control points = M @ parameters; its inverse is well defined for every name."""
    N = len(knots)
    if name == "bspline":
        return torch.eye(N, dtype=torch.float64)
    if name == "prefix_sum":
        return prefix_sums(torch.eye(N, dtype=torch.float64)[None])[0]
    if name == "dct":
        return dct(N).T
    if name == "dct_scaled":
        eigenvalues = 2 - 2 * torch.cos(math.pi / N * torch.arange(N, dtype=torch.float64))
        return dct(N).T / (1 + smoothness * eigenvalues**2).sqrt()
    if name == "legendre":
        return legendre(knots)
    D = second_differences(knots)
    A = gram(knots, density) + smoothness * D.T @ D
    # What is not finite, eigh would refuse in its own words; zeros are refused below.
    values, vectors = torch.linalg.eigh(A) if A.isfinite().all() else (A.new_zeros(N), A)
    if not values[0] > 1e-12 * values[-1]:
        raise ValueError(
            f"{name} at smoothness {smoothness:g}: inputs of {density} density do not determine the control points, "
            "condition number above 1e12; raise smoothness or bring the knots closer"
        )
    if name == "whitened_cholesky":  # upper triangular
        return torch.linalg.inv(torch.linalg.cholesky(A)).T
    M = vectors / values.sqrt()
    return M if name == "whitened_eigenvectors" else M @ vectors.T


def prefix_sums(p):
    """The control points of prefix_sum's parameters, (F, N, O) both, by two cumulative sums.

    Rounding stays below that of the matrix product; on a CPU it is no faster (docs/layer.md).
    """
    return torch.cat((p[:, :1], p[:, 1:].cumsum(1)), 1).cumsum(1)


def refinement(N, M):
    """R (M, N): the control points of the same curves on M knots, every interval divided in (M - 1) / (N - 1)."""
    position, knots = (torch.arange(n, dtype=torch.float64, device="cpu") for n in (M, N))
    return hats(*search(position * ((N - 1) / (M - 1)), knots), N)
