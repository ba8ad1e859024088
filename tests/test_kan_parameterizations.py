"""Coordinates of a curve: exact both ways, as well conditioned as they claim, and what rests on them: the penalty,
refinement, knots anywhere, sparse gradients."""

import copy
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CPU_IMPLS as IMPLS
from conftest import assert_one_line
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import reference

import kan_parameterizations
import train
from kan_layer import KANLayer
from kan_parameterizations import PARAMETERIZATIONS, basis, dct, gram, second_differences
from log import read_log
from model import GPT, GPTConfig

OTHERS = [name for name in PARAMETERIZATIONS if name != "bspline"]


def uniform(N, width=4.0):
    return torch.linspace(-width / 2, width / 2, N, dtype=torch.float64)


def random_knots(N):
    """Increasing, from -2 to 2."""
    steps = torch.rand(N - 1, dtype=torch.float64) + 0.2
    return torch.cat((torch.zeros(1, dtype=torch.float64), steps.cumsum(0))) * (4 / steps.sum()) - 2


def random_layer(F, O, N, dtype=torch.float32, **options):
    layer = KANLayer(F, O, num_control_points=N, dtype=dtype, **options)
    layer.set_control_points(torch.randn(F, N, O, dtype=torch.float64))
    return layer


def condition(A):
    values = torch.linalg.eigvalsh(A)
    return (values[-1] / values[0]).item()


# ----------------------------------------------------------------------------------------------------------------------
# The matrices


@pytest.mark.parametrize("N", [2, 3, 8, 33, 128])
def test_the_orthonormal_ones_are(N):
    for M in (dct(N), kan_parameterizations.legendre(uniform(N))):
        assert torch.allclose(M.T @ M, torch.eye(N, dtype=torch.float64), atol=1e-10)


def test_legendre_coordinate_k_is_a_polynomial_of_degree_k():
    knots = uniform(12)
    M = kan_parameterizations.legendre(knots)
    for k in range(12):
        fit = np.polynomial.Polynomial.fit(knots.numpy(), M[:, k].numpy(), k)
        assert np.allclose(fit(knots.numpy()), M[:, k].numpy(), atol=1e-8)
        assert k == 0 or not np.allclose(
            np.polynomial.Polynomial.fit(knots.numpy(), M[:, k].numpy(), k - 1)(knots.numpy()), M[:, k].numpy()
        )


@pytest.mark.parametrize("N", [3, 8, 32])
def test_prefix_sums_are_second_differences_and_two_boundary_terms(N):
    p = torch.randn(2, N, 3, dtype=torch.float64)
    c = kan_parameterizations.prefix_sums(p)
    assert torch.allclose(c[:, 0], p[:, 0]) and torch.allclose(c[:, 1] - c[:, 0], p[:, 1])
    assert torch.allclose(c.diff(dim=1).diff(dim=1), p[:, 2:])
    assert torch.allclose(basis("prefix_sum", uniform(N)) @ p, c)


@pytest.mark.parametrize("N", [3, 8, 32, 128])
def test_the_rank_2_correction(N):
    """The DCT diagonalises the Neumann operator, which differs from the true penalty by its two end rows."""
    L = 2 * torch.eye(N, dtype=torch.float64)
    L[0, 0] = L[-1, -1] = 1
    off = torch.arange(N - 1)
    L[off, off + 1] = L[off + 1, off] = -1
    eigenvalues = 2 - 2 * torch.cos(math.pi / N * torch.arange(N, dtype=torch.float64))
    assert torch.allclose(dct(N) @ L @ dct(N).T, torch.diag(eigenvalues), atol=1e-12)
    D = second_differences(uniform(N))
    a, b = torch.zeros(N, dtype=torch.float64), torch.zeros(N, dtype=torch.float64)
    a[0], a[1], b[-1], b[-2] = 1, -1, 1, -1
    assert torch.allclose(L.T @ L, D.T @ D + torch.outer(a, a) + torch.outer(b, b), atol=1e-12)
    assert torch.linalg.matrix_rank(L.T @ L - D.T @ D, atol=1e-9) == 2
    M = basis("dct_scaled", uniform(N), smoothness=7.0)
    assert torch.allclose(
        M.T @ (torch.eye(N, dtype=torch.float64) + 7 * L.T @ L) @ M, torch.eye(N, dtype=torch.float64), atol=1e-10
    )


def test_gram_is_what_samples_say():
    knots, generator = uniform(6), torch.Generator().manual_seed(0)
    for density in ("uniform", "normal"):
        x = (
            torch.rand(400_000, generator=generator, dtype=torch.float64) * 4 - 2
            if density == "uniform"
            else torch.randn(400_000, generator=generator, dtype=torch.float64)
        )
        A = kan_parameterizations.hats(*kan_parameterizations.search(x, knots), len(knots))
        sampled = 5 * A.T @ A / len(x)
        assert (sampled - gram(knots, density)).abs().max() < 0.02
    G = gram(uniform(32), "uniform")
    assert torch.allclose(torch.diag(G)[1:-1], torch.full((30,), 2 / 3, dtype=torch.float64))
    assert torch.allclose(torch.diag(G, 1), torch.full((31,), 1 / 6, dtype=torch.float64))


@pytest.mark.parametrize("density", ["uniform", "normal"])
@pytest.mark.parametrize("mu", [0.0, 1.0, 100.0, 1e4])
@pytest.mark.parametrize("N", [2, 8, 32, 128])
def test_whitened_has_condition_number_one(N, mu, density):
    knots, D = uniform(N), second_differences(uniform(N))
    A = gram(knots, density) + mu * D.T @ D
    for name in ("whitened", "whitened_cholesky", "whitened_eigenvectors"):
        M = basis(name, knots, mu, density)
        assert abs(condition(M.T @ A @ M) - 1) < 1e-6
    assert torch.allclose(basis("whitened", knots, mu, density), basis("whitened", knots, mu, density).T, atol=1e-8)


@pytest.mark.parametrize("mu, most", [(0.0, 4.0), (1.0, 2.63), (100.0, 5.2), (1e4, 16.5)])
def test_dct_scaled_at_its_own_mu(mu, most):
    knots = uniform(32)
    D, M = second_differences(knots), basis("dct_scaled", knots, mu)
    assert condition(M.T @ (gram(knots, "uniform") + mu * D.T @ D) @ M) < most


# ----------------------------------------------------------------------------------------------------------------------
# The layer


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(OTHERS),
    back=st.sampled_from(PARAMETERIZATIONS),
    N=st.sampled_from([2, 3, 8, 32]),
    mu=st.sampled_from([0.0, 1.0, 100.0]),
    given_knots=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_a_change_of_basis_leaves_the_function_alone(name, back, N, mu, given_knots, seed):
    torch.manual_seed(seed)
    knots = random_knots(N) if given_knots else None
    layer = random_layer(3, 4, N, knots=knots)
    x = torch.randn(20, 3)
    want, scale = layer(x), layer.control_points().abs().max()
    for next_name in (name, back, "bspline"):
        smoothness = mu if kan_parameterizations.uses_smoothness(next_name) else None
        assert layer.to_parameterization(next_name, smoothness) is layer
        assert (layer(x) - want).abs().max() < 1e-5 * scale * (1 + x.abs().max() * N)


@pytest.mark.parametrize("name", OTHERS)
def test_all_impls_apply_unchanged(name):
    layer = random_layer(5, 6, 8, torch.float64, parameterization=name)
    x = torch.randn(40, 5, dtype=torch.float64)
    layer.impl, wanted = "embedding", None
    for impl in IMPLS:
        layer.impl = impl
        layer.zero_grad()
        inputs = x.clone().requires_grad_()
        layer(inputs).square().sum().backward()
        found = inputs.grad, layer.kan_weight.grad
        wanted = wanted or found
        for a, b in zip(found, wanted, strict=True):
            assert torch.allclose(a, b, atol=1e-8 * b.abs().max())


@pytest.mark.parametrize("name", OTHERS)
def test_the_gradient_is_the_basis_times_the_gradient_of_control_points(name):
    layer = random_layer(4, 3, 8, torch.float64, parameterization=name)
    plain = copy.deepcopy(layer).to_parameterization("bspline")
    x, g = torch.randn(30, 4, dtype=torch.float64), torch.randn(30, 3, dtype=torch.float64)
    layer(x).backward(g), plain(x).backward(g)
    want = reference(x.numpy(), plain.kan_weight.detach().numpy(), 4.0, g.numpy())[1]
    assert np.allclose(plain.kan_weight.grad.numpy(), want)
    assert torch.allclose(layer.kan_weight.grad, layer.basis().T @ plain.kan_weight.grad, atol=1e-9)


@pytest.mark.parametrize("name", PARAMETERIZATIONS)
@pytest.mark.parametrize("init", ["random_normal", "identity", "zero"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inits_mean_the_same_in_every_parameterization(name, init, dtype):
    torch.manual_seed(3)
    layer = KANLayer(6, 6, init=init, num_control_points=32, parameterization=name, dtype=dtype)
    torch.manual_seed(3)
    plain = KANLayer(6, 6, init=init, num_control_points=32, dtype=dtype)
    atol = 1e-5 if dtype == torch.float32 else 1e-11
    assert torch.allclose(layer.control_points(), plain.kan_weight, atol=atol)


@pytest.mark.parametrize("name", OTHERS)
def test_sums_are_float32_under_bfloat16(name):
    """The table is derived in float32 from bfloat16 parameters, and under autocast: only the parameters are rounded."""
    layer = random_layer(4, 5, 32, parameterization=name).bfloat16()
    assert layer.control_points().dtype == torch.float32
    exact = layer.basis() @ layer.kan_weight.double()
    assert (layer.control_points() - exact).abs().max() < 1e-5 * exact.abs().max()
    layer = random_layer(4, 5, 32, parameterization=name)
    x = torch.randn(9, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16 and torch.equal(y, layer(x).bfloat16())


@pytest.mark.parametrize("name", ["prefix_sum", "whitened"])
def test_compiles_exports_copies_and_moves(name):
    layer = random_layer(4, 5, 8, parameterization=name)
    x = torch.randn(12, 4)
    want = layer(x)
    assert torch.allclose(torch.compile(layer, fullgraph=True)(x), want, atol=1e-6)
    assert torch.allclose(copy.deepcopy(layer)(x), want)
    assert torch.allclose(layer.double()(x.double()).float(), want, atol=1e-4)
    with torch.device("meta"):
        empty = KANLayer(4, 5, num_control_points=8, parameterization=name)
    empty.to_empty(device="cpu").load_state_dict(layer.float().state_dict())
    assert torch.allclose(empty(x), want, atol=1e-4)


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(parameterization="fourier"), "must be one of bspline"),
        (dict(smoothness=3.0), "has no smoothness"),
        (dict(parameterization="dct_scaled", density="normal"), "density"),
        (dict(parameterization="whitened", smoothness=-1.0), "at least 0"),
        (dict(parameterization="whitened", density="beta"), "one of normal, uniform"),
        (dict(parameterization="whitened", smoothness=0.0, spline_width=30.0), "do not determine"),
        (dict(knots=[0.0, 1.0, 1.0]), "increasing"),
        (dict(knots=[0.0]), "increasing"),
        (dict(sparse_grad=True, impl="dense"), "embedding_bag"),
        (dict(sparse_grad=True, parameterization="dct"), "bspline"),
    ],
)
def test_what_cannot_be_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        KANLayer(3, 3, **options)


def test_a_refused_change_changes_nothing():
    layer = random_layer(3, 3, 8, parameterization="whitened", smoothness=5.0)
    weight = layer.kan_weight.clone()
    with pytest.raises(ValueError, match="fourier"):
        layer.to_parameterization("fourier")
    assert layer.parameterization == "whitened" and layer.smoothness == 5.0 and torch.equal(weight, layer.kan_weight)


# ----------------------------------------------------------------------------------------------------------------------
# The penalty


@settings(max_examples=40, deadline=None)
@given(name=st.sampled_from(PARAMETERIZATIONS), N=st.integers(2, 12), seed=st.integers(0, 2**31))
def test_the_penalty_and_its_gradient(name, N, seed):
    torch.manual_seed(seed)
    layer = random_layer(3, 4, N, torch.float64, parameterization=name)
    c = layer.control_points()
    want = (c[:, 2:] - 2 * c[:, 1:-1] + c[:, :-2]).square().sum(1)
    assert torch.allclose(layer.second_difference_penalty(per_edge=True), want)
    (found,) = torch.autograd.grad(layer.second_difference_penalty(), layer.kan_weight)
    if N > 2:
        (wanted,) = torch.autograd.grad(want.sum(), layer.kan_weight)
        assert torch.allclose(found, wanted, atol=1e-9 * (1 + wanted.abs().max()))
    else:
        assert not found.any()


def test_straight_lines_cost_nothing_whatever_the_knots():
    layer = KANLayer(3, 4, knots=[-2.0, -1.9, 0.0, 0.3, 5.0], dtype=torch.float64)
    assert layer.second_difference_penalty() < 1e-20
    layer.kan_weight.data[:, 2] += 1
    assert layer.second_difference_penalty() > 1


# ----------------------------------------------------------------------------------------------------------------------
# More control points


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(PARAMETERIZATIONS),
    N=st.sampled_from([2, 3, 8, 16]),
    times=st.integers(1, 4),
    given_knots=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_refine_leaves_the_function_alone(name, N, times, given_knots, seed):
    torch.manual_seed(seed)
    knots = random_knots(N) if given_knots else None
    layer = random_layer(3, 4, N, torch.float64, parameterization=name, knots=knots)
    x = torch.randn(30, 3, dtype=torch.float64) * 2
    want = layer(x)
    assert layer.refine(times * (N - 1) + 1) is layer
    assert layer.kan_weight.shape == (3, times * (N - 1) + 1, 4)
    assert torch.allclose(layer(x), want, atol=1e-7 * want.abs().max().item())


def fit(name, refine, steps, lr=1e-3):
    """Fit a sine with AdamW, refining after 40 steps or not; returns (layer, optimizer, x, the loss at every step)."""
    torch.manual_seed(0)
    layer = KANLayer(1, 1, num_control_points=9, parameterization=name, init="zero", dtype=torch.float64)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=lr, weight_decay=0.0)
    x = torch.randn(4000, 1, dtype=torch.float64)
    losses = []
    for step in range(steps):
        if step == 40 and refine:
            layer.refine(optimizer=optimizer)
        optimizer.zero_grad()
        loss = (layer(x) - torch.sin(2 * x)).square().mean()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert optimizer.param_groups[0]["params"] == [layer.kan_weight] and len(optimizer.state) == 1
    assert optimizer.state[layer.kan_weight]["step"] == steps
    return layer, optimizer, x, losses


def test_a_step_after_refining_is_about_the_step_that_would_have_been():
    before = fit("bspline", False, 40)[0]
    coarse, fine = (fit("bspline", refine, 41) for refine in (False, True))
    x = coarse[2]
    coarse, fine = ((run[0](x) - before(x)).detach().flatten() for run in (coarse, fine))
    assert torch.nn.functional.cosine_similarity(coarse, fine, dim=0) > 0.98
    assert 0.8 < fine.norm() / coarse.norm() < 1.25


@pytest.mark.parametrize("name", OTHERS)
def test_training_goes_on_after_refining(name):
    losses = fit(name, True, 100)[3]
    assert abs(losses[40] / fit(name, False, 41)[3][40] - 1) < 1e-9
    assert max(losses[41:]) < 1.02 * losses[40] and losses[-1] < losses[40]


def test_the_default_smoothness_goes_with_the_control_points():
    layer = random_layer(2, 2, 32, parameterization="whitened")
    assert layer.smoothness == 100 and layer.refine().smoothness == 100 * (62 / 31) ** 4
    given_one = random_layer(2, 2, 32, parameterization="whitened", smoothness=3.0)
    assert given_one.smoothness == 3.0 and given_one.refine().smoothness == 3.0
    assert given_one.to_parameterization("dct").smoothness is None


def test_refine_refuses_what_would_not_keep_the_knots():
    for number in (16, 0):
        with pytest.raises(ValueError, match="keep all 8 knots"):
            KANLayer(2, 2, num_control_points=8).refine(number)


def test_a_domain_without_inputs_is_refused():
    for width in (1e3, 1e30):  # the latter's Gram matrix is not finite
        with pytest.raises(ValueError, match="do not determine the control points"):
            KANLayer(2, 2, num_control_points=8, parameterization="whitened", spline_width=width, smoothness=0.0)


def test_a_refused_refinement_changes_nothing():
    layer = random_layer(3, 2, 4, parameterization="whitened", smoothness=0.0, spline_width=16.0)
    x, weight = torch.randn(5, 3), layer.kan_weight
    before = layer(x)
    with pytest.raises(ValueError, match="do not determine the control points"):
        layer.refine(25)
    assert layer.kan_weight is weight and layer.num_control_points == 4 and torch.equal(layer(x), before)
    optimizer = torch.optim.Adadelta(layer.parameters())
    layer(x).sum().backward()
    optimizer.step()
    weight = layer.kan_weight
    with pytest.raises(ValueError, match="'acc_delta' can't be refined"):
        layer.refine(optimizer=optimizer)
    assert layer.kan_weight is weight and layer.num_control_points == 4


def test_what_is_frozen_stays_frozen_when_refined():
    assert not KANLayer(2, 2).requires_grad_(False).refine().kan_weight.requires_grad


@pytest.mark.parametrize("make", [torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.Adam, torch.optim.SGD])
def test_other_optimizers_go_on_after_refining(make):
    torch.manual_seed(0)
    layer = random_layer(2, 3, 8, parameterization="dct")
    optimizer = make(layer.parameters(), lr=1e-3, **(dict(momentum=0.9) if make is torch.optim.SGD else {}))
    x = torch.randn(200, 2)
    losses = []
    for step in range(30):
        if step == 10:
            layer.refine(optimizer=optimizer)
            state = optimizer.state[layer.kan_weight]
            for name in ("square_avg", "sum", "exp_avg_sq"):
                assert name not in state or (state[name] >= 0).all()
        optimizer.zero_grad()
        loss = (layer(x) - torch.sin(2 * x).sum(1, keepdim=True)).square().mean()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert losses[-1] < losses[11] < losses[0]


# ----------------------------------------------------------------------------------------------------------------------
# What happens around a layer


@pytest.mark.parametrize("name", ["whitened", "dct"])
def test_autocast_does_not_reach_the_control_points(name):
    layer = KANLayer(4, 4, "identity", num_control_points=32, parameterization=name)
    want = layer.control_points()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.control_points(), want) and want.dtype == torch.float32
        assert layer.second_difference_penalty() < 1e-9


@pytest.mark.parametrize("options", [dict(parameterization="whitened"), dict(knots=[-2.0, -0.5, 0.1, 2.0])])
def test_made_on_meta_and_loaded_by_assignment(options):
    weights = random_layer(3, 4, 4, torch.float64, **options)
    layer = KANLayer(3, 4, num_control_points=4, device="meta", **options)
    layer.load_state_dict(weights.state_dict(), assign=True)
    x = torch.randn(9, 3, dtype=torch.float64)
    assert torch.equal(layer(x), weights(x))


def test_a_default_device_elsewhere_is_no_matter():
    layer = random_layer(3, 4, 4)
    with torch.device("meta"):
        assert layer.second_difference_penalty().device.type == "cpu"
        layer.refine()
    assert layer(torch.randn(5, 3)).shape == (5, 4)


@pytest.mark.parametrize("knots", [[1.0, 1.0 + 1e-9, 2.0], [1.0, 2.0, math.inf], [1.0], [2.0, 1.0], [math.nan, 1.0]])
def test_knots_that_cannot_be_told_apart_are_refused(knots):
    with pytest.raises(ValueError, match="at least two finite numbers, increasing"):
        KANLayer(2, 2, knots=knots)


# ----------------------------------------------------------------------------------------------------------------------
# Knots anywhere


@settings(max_examples=60, deadline=None)
@given(N=st.integers(2, 12), impl=st.sampled_from(sorted(IMPLS)), seed=st.integers(0, 2**31))
def test_given_knots_match_interpolation(N, impl, seed):
    torch.manual_seed(seed)
    knots = torch.rand(N, dtype=torch.float64).add(0.05).cumsum(0).sub(1.5)
    layer = random_layer(2, 3, N, torch.float64, knots=knots, impl=impl)
    x = torch.cat((torch.randn(20, 2, dtype=torch.float64) * 2, knots[:, None].expand(N, 2))).requires_grad_()
    y = layer(x)
    g = torch.randn_like(y)
    grad_x, grad_table = torch.autograd.grad(y, (x, layer.kan_weight), g)
    table = layer.kan_weight.detach()
    i = torch.searchsorted(knots, x.detach(), right=True).sub(1).clamp(0, N - 2)
    t = (x.detach() - knots[i]) / (knots[i + 1] - knots[i])
    A = torch.zeros(len(x), 2, N, dtype=torch.float64)
    A.scatter_(2, i[..., None], (1 - t)[..., None]).scatter_(2, i[..., None] + 1, t[..., None])
    assert torch.allclose(y, torch.einsum("bfn,fno->bo", A, table), atol=1e-8)
    assert torch.allclose(grad_table, torch.einsum("bfn,bo->fno", A, g), atol=1e-8)
    inner = slice(0, 20)  # on a knot either slope will do
    slopes = (table.diff(dim=1) / knots.diff()[:, None]).transpose(0, 1)  # (N - 1, F, O)
    want = torch.einsum("bfo,bo->bf", slopes[i, torch.arange(2)], g)
    assert torch.allclose(grad_x[inner], want[inner], atol=1e-7)
    if impl == "embedding":
        inside = np.clip(x.detach().numpy()[:, 0], knots[0].item(), knots[-1].item())
        alone = random_layer(1, 1, N, torch.float64, knots=knots, impl=impl)
        found = alone(torch.from_numpy(inside)[:, None]).detach().numpy()[:, 0]
        assert np.allclose(found, np.interp(inside, knots.numpy(), alone.kan_weight.detach().numpy()[0, :, 0]))


def test_uniform_knots_given_are_the_uniform_ones():
    torch.manual_seed(0)
    given_knots = KANLayer(3, 4, knots=uniform(8))
    torch.manual_seed(0)
    plain = KANLayer(3, 4, num_control_points=8)
    x = torch.randn(50, 3)
    assert given_knots.spline_width == 4.0 and torch.allclose(given_knots(x), plain(x), atol=1e-5)
    x[3, 1] = float("nan")
    assert given_knots(x)[3].isnan().all() and given_knots(x)[:3].isfinite().all()


def test_normal_quantiles_are_visited_evenly():
    knots = torch.distributions.Normal(0.0, 1.0).icdf(torch.linspace(0.02, 0.98, 9, dtype=torch.float64))
    layer = KANLayer(1, 1, knots=knots, init="identity")
    x = torch.randn(100_000, 1)
    counts = torch.bucketize(x.flatten(), layer.knots[1:-1]).bincount()
    assert torch.allclose(layer(x), x, atol=1e-4) and counts.max() < 1.3 * counts.min()


# ----------------------------------------------------------------------------------------------------------------------
# Sparse gradients


@settings(max_examples=40, deadline=None)
@given(
    B=st.integers(1, 20),
    F=st.integers(1, 5),
    N=st.integers(2, 40),
    O=st.integers(1, 9),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**31),
)
def test_sparse_gradients_match_the_reference(B, F, N, O, dtype, seed):
    torch.manual_seed(seed)
    layer = random_layer(F, O, N, dtype, sparse_grad=True)
    x, g = (torch.randn(B, F) * 1.5).to(dtype).requires_grad_(), torch.randn(B, O).to(dtype)
    y = layer(x)
    y.backward(g)
    arrays = (a.detach().double().numpy() for a in (x, layer.kan_weight))
    want, grad_table, left, right, *sizes = reference(*arrays, 4.0, g.double().numpy())
    eps = 8 * (B + F) * torch.finfo(dtype).eps
    assert layer.kan_weight.grad.is_sparse
    assert (np.abs(y.detach().numpy() - want) <= eps * sizes[0]).all()
    assert (np.abs(layer.kan_weight.grad.to_dense().numpy() - grad_table) <= eps * (sizes[1] + 1e-30)).all()
    near = np.minimum(np.abs(x.grad.numpy() - left), np.abs(x.grad.numpy() - right))
    assert (near <= eps * sizes[2]).all()
    visited = layer.kan_weight.grad._indices()  # every row once, and no more than were visited
    assert visited.unique(dim=1).shape == visited.shape and visited.shape[1] <= min(2 * B * F, F * N)


@pytest.mark.parametrize("make", [lambda p: torch.optim.SGD(p, 0.1), lambda p: torch.optim.SparseAdam(p, 0.01)])
def test_sparse_gradients_train_with_sgd_and_sparse_adam(make):
    torch.manual_seed(0)
    layer = KANLayer(2, 1, num_control_points=32, sparse_grad=True, init="zero")
    optimizer = make(list(layer.parameters()))
    x = torch.rand(64, 2) - 0.5  # visits the middle only
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (layer(x)[:, 0] - torch.sin(5 * x[:, 0])).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert not layer.kan_weight[:, :5].any() and not layer.kan_weight[:, -5:].any()


def test_sgd_on_sparse_gradients_is_sgd_on_dense_ones():
    torch.manual_seed(0)
    sparse = random_layer(3, 4, 8, torch.float64, sparse_grad=True)
    dense = random_layer(3, 4, 8, torch.float64)
    dense.kan_weight.data.copy_(sparse.kan_weight.data)
    x = torch.randn(10, 3, dtype=torch.float64)
    for layer in (sparse, dense):
        layer(x).square().sum().backward()
        torch.optim.SGD(layer.parameters(), 0.1).step()
    assert torch.allclose(sparse.kan_weight, dense.kan_weight)


def test_adamw_refuses_sparse_gradients():
    layer = KANLayer(2, 2, sparse_grad=True)
    layer(torch.randn(3, 2)).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        torch.optim.AdamW(layer.parameters()).step()


def test_several_processes_are_refused_with_sparse_gradients(tmp_path):
    """DDP averages sparse gradients of nn.Embedding alone; for others it does nothing and says nothing."""
    script = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
import torch, torch.distributed as dist
from kan_layer import KANLayer
dist.init_process_group("gloo")
layer = KANLayer(3, 4, num_control_points=8, sparse_grad=True)
torch.nn.parallel.DistributedDataParallel(layer)(torch.randn(5, 3)).sum().backward()
"""
    (tmp_path / "ddp.py").write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "ddp.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and "ValueError: sparse_grad does not work with several processes" in done.stderr


# ----------------------------------------------------------------------------------------------------------------------
# In the model and in training


@pytest.mark.parametrize("name", PARAMETERIZATIONS)
def test_the_model_is_the_same_function_at_the_start(name):
    models = []
    for parameterization in ("bspline", name):
        torch.manual_seed(0)
        models.append(
            GPT(
                GPTConfig(
                    vocab_size=11, n_layer=2, n_head=2, n_embd=16, block_size=8, kan_init="random_normal",
                    kan_parameterization=parameterization,
                )
            )
        )  # fmt: skip
    idx = torch.randint(11, (2, 8))
    assert torch.allclose(models[0](idx, idx)[0], models[1](idx, idx)[0], atol=1e-5)


def test_refining_in_training_leaves_the_loss_alone(tiny, capsys):
    config = tiny(kan_control_points=3, kan_refine_at=(5, 8), kan_parameterization="dct_scaled", kan_mu=1.0)
    train.train(config)
    said = [line for line in capsys.readouterr().out.splitlines() if "control points from here" in line]
    assert [line.split()[:3] for line in said] == [["step", "5:", "5"], ["step", "8:", "9"]]
    for line in said:
        before, after = (float(word) for word in line.replace(",", "").split() if word.startswith(("2.", "3.", "4.")))
        assert abs(before - after) < 1e-5
    saved = json.loads((Path(config.out_dir) / "latest" / "config.json").read_text())
    assert saved["model"]["kan_control_points"] == 9 and saved["train"]["kan_control_points"] == 3


@pytest.mark.parametrize("table_optimizer", ["adamw", "muon", "normuon"])
@pytest.mark.parametrize("stop", [5, 7, 9])
def test_a_refined_run_resumes_bitwise(tiny, stop, table_optimizer):
    options = dict(kan_control_points=3, kan_refine_at=(5, 8), decay_steps=12, table_optimizer=table_optimizer)
    whole = train.train(tiny("whole", **options))
    train.train(tiny("parts", max_steps=stop, **options))
    parts = train.train(tiny("parts", resume=True, **options))
    assert parts["val_loss"] == whole["val_loss"]
    headers = [read_log(tiny(name).out_dir)[0] for name in ("whole", "parts")]
    assert headers[0]["parameters"] == headers[1]["parameters"]  # as it began


def test_the_smoothness_penalty_makes_curves_smoother(tiny):
    import checkpoint

    penalties, losses = [], []
    for name, changes in (("rough", {}), ("smooth", dict(kan_smoothness=1.0, kan_smoothness_end=0.5))):
        config = tiny(name, table_learning_rate=1e-2, **changes)
        train.train(config)
        model, *_ = checkpoint.load_model(config.out_dir)
        penalties.append(sum(layer.second_difference_penalty().item() for layer in model.kan_layers()))
        losses.append(next(r["train_loss"] for r in read_log(config.out_dir)[1] if r["step"] == 1))
    assert penalties[1] < 0.5 * penalties[0]
    assert losses[0] == losses[1]  # the penalty is not part of the loss that is reported


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--kan_refine_at", "8", "5"], "increasing"),
        (["--mlp=gelu", "--kan_refine_at", "5"], "mlp = kan"),
        (["--kan_smoothness_end=0"], "above 0"),
        (["--kan_mu=-1"], "kan_mu"),
        (["--kan_mu=2"], "leave it out"),
    ],
)
def test_settings_that_cannot_be(script, tiny, arguments, words):
    options = [f"--{k}={v}" for k, v in vars(tiny()).items() if k in ("data", "out_dir", "device")]
    assert_one_line(script("train.py", *options, *arguments), words)


def test_the_schedule_of_the_penalty_falls_geometrically(tiny):
    config = tiny(kan_smoothness=2.0, kan_smoothness_end=0.01, max_steps=10)
    assert [round(train.smoothness(config, step), 6) for step in (0, 5, 10, 20)] == [2.0, 0.2, 0.02, 0.02]
