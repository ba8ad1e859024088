"""Every entry of the catalogue is the same function: held to the reference, in value and both gradients."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import reference

import kan_kernels
from kan_evaluations import EVALUATIONS, bucketize

EPS = {torch.float64: 2**-53, torch.float32: 2**-24}
ENTRIES = [
    pytest.param(f, id=name, marks=pytest.mark.skipif(name == "cpp" and not kan_kernels.available(), reason="compiler"))
    for name, f in EVALUATIONS.items()
]


def run(f, x, table, g, *arguments):
    """y, grad_x and grad_table, as float64 arrays."""
    x, table = x.clone().requires_grad_(), table.clone().requires_grad_()
    y = f(x, table, *arguments)
    y.backward(g)
    assert y.dtype == x.dtype == x.grad.dtype == table.grad.dtype
    assert y.shape == g.shape and table.grad.layout == torch.strided
    return [a.detach().double().numpy() for a in (y, x.grad, table.grad)]


@st.composite
def cases(draw):
    B, F, O = draw(st.integers(1, 5)), draw(st.integers(1, 5)), draw(st.integers(1, 6))
    N = draw(st.one_of(st.integers(2, 9), st.sampled_from([16, 33, 130])))
    width = draw(st.sampled_from([0.5, 1.0, 3.7, 4.0, 100.0]))
    dtype = draw(st.sampled_from(list(EPS)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kinds = [
        rng.uniform(-width / 2, width / 2, (B, F)),
        rng.uniform(width / 2, 4 * width, (B, F)) * rng.choice([-1, 1], (B, F)),
        rng.normal(size=(B, F)),
        rng.choice(np.linspace(-width / 2, width / 2, N), (B, F)),
    ]
    x = np.choose(rng.integers(0, 4, (B, F)), kinds) if draw(st.booleans()) else draw(st.sampled_from(kinds))
    as_tensor = lambda a: torch.from_numpy(np.asarray(a)).to(dtype)
    return as_tensor(x), as_tensor(rng.normal(size=(F, N, O))), as_tensor(rng.normal(size=(B, O))), width


def assert_matches_reference(f, x, table, g, width):
    y, grad_x, grad_table = run(f, x, table, g, width)
    want, want_table, left, right, size, table_size, x_size = reference(
        *(a.double().numpy() for a in (x, table)), width, g.double().numpy()
    )
    # The bounds of test_kan_layer.py: rounding in units of what was summed, and the result rounded once more.
    eps, tiny = EPS[x.dtype], float(torch.finfo(x.dtype).smallest_normal)
    most = 16 * eps
    if f is bucketize:  # the length of an interval is the difference of two rounded float64 knots, up to N / 2 as large
        most += 2**-53 * 2 * table.shape[1]
    for got, exact, scale in ((y, want, size), (grad_table, want_table, table_size)):
        bound = most * scale + 2 * eps * np.abs(exact) + tiny
        assert (np.abs(got - exact) <= bound).all(), np.max(np.abs(got - exact) - bound)
    # On a knot the curve has two slopes; rounding decides which of them an entry gives.
    bound = most * x_size + 2 * eps * np.maximum(np.abs(left), np.abs(right)) + tiny
    off = np.minimum(np.abs(grad_x - left), np.abs(grad_x - right))
    assert (off <= bound).all(), np.max(off - bound)


@pytest.mark.parametrize("f", ENTRIES)
@settings(max_examples=100, deadline=None)
@given(case=cases())
def test_value_and_gradients_match_the_reference(f, case):
    assert_matches_reference(f, *case)


@pytest.mark.parametrize("f", ENTRIES)
def test_many_tokens_match_the_reference(f):
    """Enough of them for every interval to have several, and for the parallel and blocked loops of libraries."""
    assert_matches_reference(f, torch.randn(300, 3), torch.randn(3, 7, 40), torch.randn(300, 40), 4.0)


@pytest.mark.parametrize("f", ENTRIES)
def test_on_a_knot_the_slope_is_the_right_one(f):
    """With knots and positions that floating point holds exactly, no rounding is left to decide."""
    x, table, g = torch.arange(-2.0, 3).view(5, 1), torch.randn(1, 5, 3), torch.randn(5, 3)
    _, grad_x, _ = run(f, x, table, g, 4.0)
    slopes = table[0].diff(dim=0)[[0, 1, 2, 3, 3]]
    np.testing.assert_allclose(grad_x[:, 0], (g * slopes).sum(1).double().numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("f", ENTRIES)
@pytest.mark.parametrize("frozen", [0, 1])
def test_one_gradient_alone(f, frozen):
    """Both inputs differentiable, or only one: what is asked for is the same."""
    inputs, g = [torch.randn(6, 3), torch.randn(3, 5, 4)], torch.randn(6, 4)
    both = run(f, *inputs, g, 4.0)
    inputs[1 - frozen].requires_grad_()
    f(*inputs, 4.0).backward(g)
    assert inputs[frozen].grad is None
    np.testing.assert_array_equal(inputs[1 - frozen].grad.double().numpy(), both[2 - frozen])


@pytest.mark.parametrize("f", ENTRIES)
def test_nan_is_kept_to_its_token(f):
    x, table = torch.randn(5, 4), torch.randn(4, 8, 3)
    x[2, 1] = math.nan
    x.requires_grad_(), table.requires_grad_()
    y = f(x, table, 4.0)
    others = [0, 1, 3, 4]
    assert y[2].isnan().all()
    clean = f(x.detach()[others], table.detach(), 4.0)
    torch.testing.assert_close(y[others], clean)
    y.sum().backward()  # no wild index in the backward either
    assert x.grad[others].isfinite().all()


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), B=st.integers(1, 6), F=st.integers(1, 4), N=st.integers(2, 20))
def test_bucketize_takes_knots_anywhere(seed, B, F, N):
    rng = np.random.default_rng(seed)
    knots = np.cumsum(rng.uniform(0.1, 2.0, N)) - N / 2
    x = rng.normal(size=(B, F)) * N
    x[rng.random((B, F)) < 0.3] = rng.choice(knots)
    table, g = rng.normal(size=(F, N, 3)), rng.normal(size=(B, 3))
    got = run(bucketize, *map(torch.from_numpy, (x, table, g)), math.nan, torch.from_numpy(knots))

    slopes = np.diff(table, axis=1) / np.diff(knots)[:, None]
    y, grad_x = np.zeros((B, 3)), np.zeros((B, F))
    for b, f in np.ndindex(B, F):
        before, after = min(0, x[b, f] - knots[0]), max(0, x[b, f] - knots[-1])  # how far outside
        piece = min(max(np.searchsorted(knots, x[b, f], side="right") - 1, 0), N - 2)
        grad_x[b, f] = g[b] @ slopes[f, piece]
        for o in range(3):
            y[b, o] += np.interp(x[b, f], knots, table[f, :, o]) + before * slopes[f, 0, o] + after * slopes[f, -1, o]
    # An intermediate number is at most some 100 in size: x - knot over a piece of 0.1 and up, times a control point.
    scale = F * (1 + np.abs(x).max() / 0.1) * np.abs(table).max()
    np.testing.assert_allclose(got[0], y, rtol=0, atol=16 * 2**-53 * scale)
    np.testing.assert_allclose(
        got[1], grad_x, rtol=0, atol=16 * 2**-53 * 3 * np.abs(g).max() * np.abs(table).max() / 0.1
    )
    # The function is linear in the table, so its gradient is the transpose: <g, y> = <grad_table, table>.
    assert abs((got[2] * table).sum() - (g * got[0]).sum()) <= 16 * 2**-53 * 3 * B * scale * np.abs(g).max()


def test_bucketize_without_knots_is_the_uniform_one():
    x, table = torch.randn(20, 3), torch.randn(3, 6, 4)
    knots = torch.linspace(-2, 2, 6, dtype=torch.float64)
    torch.testing.assert_close(bucketize(x, table, 4.0), bucketize(x, table, math.nan, knots), rtol=0, atol=0)


def test_the_catalogue_names_each_function_once():
    assert len(set(EVALUATIONS.values())) == len(EVALUATIONS) == 19
