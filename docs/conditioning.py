"""How well conditioned is a curve in each of its parameterizations? Tables and a figure for docs/layer.md.

    python docs/conditioning.py [--out docs/conditioning.png]           10 s
    python docs/conditioning.py --cost                                  milliseconds of a layer in some of them, 20 s

One curve of N control points on [-2, 2] is fitted to noisy samples y of a function at inputs x, uniform or unit-normal:

    f(p) = (N - 1) * mean((hats(x) @ M @ p - y)^2) / 2 + mu * |D @ M @ p|^2 / 2

so its Hessian is M.T @ (G + mu * D.T @ D) @ M with G the samples' Gram matrix. Printed are condition numbers of penalty
(non-zero eigenvalues), data and sum, with the exact Gram matrix of the density, and how many steps bring f within a
thousandth of its way from p = 0 to its minimum: gradient descent with the best constant step, from the eigenvalues, and
Adam (betas 0.9, 0.99), simulated, with the best of 17 learning rates. "-" is more than MOST.

Numbers of dct_scaled and whitened are at the mu they are made for.
"""

import functools
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cli
from bench import Timer, table, take_turns
from kan_layer import KANLayer
from kan_parameterizations import PARAMETERIZATIONS, basis, gram, hats, search, second_differences

POINTS, MUS, DENSITIES = (8, 32, 128), (0.0, 1.0, 100.0, 1e4), ("uniform", "normal")
MOST = 2000  # Adam's steps that are simulated
SAMPLES = 1000


@dataclass
class Options:
    out: str = str(Path(__file__).with_suffix(".png"))  # the figure to write
    cost: bool = False


def knots(N):
    return torch.linspace(-2, 2, N, dtype=torch.float64)


def condition(A, zeros=0):
    values = torch.linalg.eigvalsh((A + A.T) / 2)
    return (values[-1] / values[zeros]).item()


def samples(density):
    generator = torch.Generator().manual_seed(0)
    draw = torch.rand if density == "uniform" else torch.randn
    x = draw(SAMPLES, generator=generator, dtype=torch.float64)
    x = 4 * x - 2 if density == "uniform" else x
    y = torch.sin(3 * x) + 0.5 * x.abs() + 0.1 * torch.randn(SAMPLES, generator=generator, dtype=torch.float64)
    return x, y


def gradient_steps(H, b, most=10**9):
    """Steps of gradient descent from 0 with the best constant step size, found by bisection over the eigenmodes."""
    values, vectors = torch.linalg.eigh(H)
    values = values.clamp(min=0)
    modes = vectors.T @ b
    keep = values > 1e-13 * values[-1]
    values, modes = values[keep], modes[keep]
    start = modes**2 / values  # twice what each mode adds to f(0) - min f
    step = 2 / (values[-1] + values[0])

    def left(k):
        return (start * (1 - step * values).abs() ** (2 * k)).sum() / start.sum()

    low, high = 0, 1
    while left(high) > 1e-3:
        low, high = high, 2 * high
        if high > most:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if left(middle) > 1e-3 else (low, middle)
    return high


def adam_steps(H, b):
    """Steps of Adam from 0, with the best of 17 learning rates from 1e-4 to 1, all at once."""
    rates = torch.logspace(-4, 0, 17, dtype=torch.float64)[:, None]
    best = torch.linalg.lstsq(H, b[:, None], driver="gelsd").solution[:, 0]
    least, start = -(b @ best) / 2, 0.0
    p = m = v = torch.zeros(len(rates), len(b), dtype=torch.float64)
    for k in range(1, MOST + 1):
        g = p @ H - b
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
        p = p - rates * (m / (1 - 0.9**k)) / ((v / (1 - 0.99**k)).sqrt() + 1e-8)
        f = ((p @ H) * p).sum(1) / 2 - p @ b
        if ((f - least) / (start - least) < 1e-3).any():
            return k
    return None


@functools.cache
def problem(N, mu, density):
    """f(c) = c.H.c / 2 - b.c in control points."""
    x, y = samples(density)
    A, D = hats(*search(x, knots(N)), N), second_differences(knots(N))
    return (N - 1) * A.T @ A / SAMPLES + mu * D.T @ D, (N - 1) * A.T @ y / SAMPLES


def text(value):
    if value is None:
        return "-"
    return f"{value:.2g}" if value >= 1e5 else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def titled(title, header, rows):
    print(title)
    table(header, [[name, *map(text, cells)] for name, *cells in rows])


def cost():
    """Forward and backward of 768 tokens, C to C."""
    names, rows = ("bspline", "whitened", "prefix_sum"), []
    for C, N in ((128, 8), (384, 8), (384, 32), (384, 128)):
        layers = [KANLayer(C, C, num_control_points=N, parameterization=name) for name in names]
        timers = [Timer(layer, C, tokens=768) for layer in layers]
        take_turns(timers, seconds=1.0)
        rows.append((f"{C}, {N}", *(timer.both * 1e3 for timer in timers)))
    table(("C, N", *names), rows)


def main(arguments):
    options = cli.parse(Options, arguments)
    if options.cost:
        return cost()
    out = Path(options.out)
    torch.set_num_threads(1)  # for such small matrices two take twenty times as long
    grams = {(N, density): gram(knots(N), density) for N in POINTS for density in DENSITIES}
    rows = []
    for name in PARAMETERIZATIONS:
        Ms = [basis(name, knots(N), 1e4) for N in POINTS]
        Ds = [second_differences(knots(N)) for N in POINTS]
        rows.append([name, *(condition(M.T @ D.T @ D @ M, zeros=2) for M, D in zip(Ms, Ds, strict=True))])
        for density in DENSITIES:
            rows[-1] += [
                condition(M.T @ grams[N, density] @ M)
                for N, M in zip(POINTS, (basis(name, knots(N), 1e4, density) for N in POINTS), strict=True)
            ]
    header = ["", *(f"{what}, N = {N}" for what in ("penalty", "data, uniform", "data, normal") for N in POINTS)]
    titled("Penalty and data each alone (dct_scaled and whitened made for mu = 1e4)", header, rows)

    sums = {}
    for density in DENSITIES:
        for N in POINTS:
            D = second_differences(knots(N))
            rows, counts = [], []
            for name in PARAMETERIZATIONS:
                Ms = {mu: basis(name, knots(N), mu, density) for mu in MUS}
                sums[density, N, name] = [
                    condition(Ms[mu].T @ (grams[N, density] + mu * D.T @ D) @ Ms[mu]) for mu in MUS
                ]
                rows.append([name, *sums[density, N, name]])
                counts.append([name])
                for mu in MUS:
                    H, b = problem(N, mu, density)
                    H, b = Ms[mu].T @ H @ Ms[mu], Ms[mu].T @ b
                    counts[-1] += [gradient_steps(H, b), adam_steps(H, b)]
            mus = [f"mu = {mu:g}" for mu in MUS]
            titled(f"Data and mu times penalty, condition number, {density} inputs, N = {N}", ["", *mus], rows)
            header = ["", *(f"{mu}: {what}" for mu in mus for what in ("gradient", "Adam"))]
            titled(f"Steps to fit, {density} inputs, N = {N}", header, counts)
    draw(sums, out)
    print(f"figure written to {out}")


def draw(sums, out):
    from matplotlib.figure import Figure

    import plot

    figure = Figure(figsize=(10.5, 5.6), layout="constrained")
    axes = figure.subplots(2, 3, sharex=True, sharey=True)
    colors = {"bspline": "#0072B2", "prefix_sum": "#D55E00", "dct_scaled": "#009E73", "whitened": "#CC79A7"}
    at = [0.1, *MUS[1:]]  # mu = 0 has no place on a logarithmic axis
    for row, density in zip(axes, DENSITIES, strict=True):
        for axis, N in zip(row, POINTS, strict=True):
            for name, color in colors.items():
                values = sums[density, N, name]
                axis.loglog(at, values, "o-", color=color, linewidth=2, markersize=5)
                if POINTS[-1] == N:
                    axis.annotate(name, (at[-1] * 1.6, values[-1]), color=color, va="center", annotation_clip=False)
            axis.set_title(f"{density} inputs, N = {N}", fontsize=10)
            axis.grid(True, linewidth=0.3)
            axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_xticks(at, ["0", "1", "100", "10⁴"])
    axes[0, 0].minorticks_off()
    figure.supxlabel("weight mu of the penalty on second differences", fontsize=10)
    figure.supylabel("condition number of the Hessian", fontsize=10)
    plot.save_figure(figure, out)


if __name__ == "__main__":
    cli.run(main)
