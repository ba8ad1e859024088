"""KANPairLayer, in every way it is evaluated, and its C++ at the shapes where that changes its ways."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import pairs_reference
from test_kan_layer import EPS, assert_near_reference, run

import checkpoint
import kan_kernels
import kan_layer
import kan_pairs
import kan_parameterizations
import plot
import train
from kan_layer import KANLayer
from kan_pairs import KANPairLayer
from model import GPT, GPTConfig

assert kan_kernels.available()
ops = torch.ops.splinegpt_cpu
IMPLS = ["cpp", "embedding_bag", "embedding", "dense"]


def assert_matches_reference(layer, x, g):
    inner = 16 * EPS[torch.float64 if x.dtype == torch.float64 else torch.float32]
    table = layer.kan_weight.detach()
    assert_near_reference(run(layer, x, g), x, table, layer.spline_width, g, inner, EPS[x.dtype], pairs_reference)


def make(B, P, N, O, dtype=torch.float32, width=4.0, impl="cpp", seed=0):
    generator = torch.Generator().manual_seed(seed)
    layer = KANPairLayer(2 * P, O, num_control_points=N, spline_width=width, impl=impl, dtype=dtype)
    layer.kan_weight.data.copy_(torch.randn(P, N, N, O, generator=generator))
    x = (torch.randn(B, 2 * P, generator=generator) * 1.5).to(dtype)
    return layer, x, torch.randn(B, O, generator=generator).to(dtype)


@st.composite
def cases(draw):
    B, P, O = draw(st.integers(0, 5)), draw(st.integers(1, 4)), draw(st.integers(1, 6))
    N, width = draw(st.integers(2, 9)), draw(st.sampled_from([0.5, 1.0, 3.7, 4.0, 6.0, 100.0]))
    dtype = draw(st.sampled_from(list(EPS)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kinds = {
        "inside": rng.uniform(-width / 2, width / 2, (B, 2 * P)),
        "outside": rng.uniform(width / 2, 4 * width, (B, 2 * P)) * rng.choice([-1, 1], (B, 2 * P)),
        "normal": rng.normal(size=(B, 2 * P)),
        "knots": rng.choice(np.linspace(-width / 2, width / 2, N), (B, 2 * P)),
    }
    x = kinds[draw(st.sampled_from(list(kinds)))]
    as_tensor = lambda a: torch.from_numpy(np.asarray(a)).to(dtype)
    return as_tensor(x), as_tensor(rng.normal(size=(P, N, N, O))), width, as_tensor(rng.normal(size=(B, O)))


@pytest.mark.parametrize("impl", IMPLS)
@settings(max_examples=100, deadline=None)
@given(case=cases())
def test_value_and_gradients_match_the_reference(impl, case):
    x, table, width, g = case
    P, N, _, O = table.shape
    layer = KANPairLayer(2 * P, O, num_control_points=N, spline_width=width, impl=impl, dtype=x.dtype)
    layer.kan_weight.data.copy_(table)
    assert_matches_reference(layer, x, g)


@settings(max_examples=100, deadline=None)
@given(
    B=st.sampled_from([1, 2, 7, 8, 9, 33, 65, 100, 200]),
    P=st.one_of(st.integers(1, 5), st.sampled_from([7, 8, 9, 17])),
    N=st.integers(2, 8),
    O=st.one_of(st.integers(1, 150), st.sampled_from([16, 32, 64, 96, 128])),
    dtype=st.sampled_from([torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    threads=st.sampled_from([1, 2]),
    seed=st.integers(0, 2**31),
)
def test_any_shape_of_the_kernel(B, P, N, O, dtype, threads, seed):
    B = max(1, min(B, 400 // P))  # the reference is slow
    torch.set_num_threads(threads)
    assert_matches_reference(*make(B, P, N, O, dtype, seed=seed))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "B, P, N, O",
    [
        (3, 30, 7, 70),  # few tokens, pairs shared out
        (500, 9, 7, 136),  # sorted: tiles of different widths, groups of pairs with one left over
        (400, 40, 4, 33),  # several groups of pairs, outputs padded
        (9000, 1, 2, 5),  # one pair, several blocks of tokens, fewer pairs than threads
        (1, 1, 2, 1),
    ],
)
def test_every_path_of_the_kernel(B, P, N, O, dtype, threads):
    torch.set_num_threads(threads)
    assert_matches_reference(*make(B, P, N, O, dtype))


@pytest.mark.parametrize("P, N", [(32, 7), (9, 4)])
def test_gradients_do_not_depend_on_the_number_of_threads(P, N):
    layer, x, g = make(700, P, N, 200)
    results = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        results.append(run(layer, x, g))
    for a, b in zip(*results[:2], strict=True):
        np.testing.assert_array_equal(a, b)  # y's too, token by token
    for a, b in zip(*results[1:], strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_operators_are_well_formed():
    layer, x, g = make(7, 3, 4, 5)
    table = layer.kan_weight
    torch.library.opcheck(ops.pairs.default, (x.clone().requires_grad_(), table, 4.0))
    torch.library.opcheck(ops.pairs_backward.default, (g, x, table.detach(), 4.0))
    for arguments, message in (
        ((x[:, :4], table, 4.0), "x must be"),
        ((x, table.double(), 4.0), "both float32 or both float64"),
        ((x.half(), table.half(), 4.0), "both float32 or both float64"),
        ((x, table[:, :, :3], 4.0), "x must be"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.pairs(*arguments)
    with pytest.raises(RuntimeError, match="g must be"):
        ops.pairs_backward(g[:, :2], x, table, 4.0)


@pytest.mark.parametrize("impl", IMPLS)
def test_gradcheck_away_from_knots(impl):
    layer, x, _ = make(4, 2, 4, 3, torch.float64, impl=impl)
    x = (x.round(decimals=1) + 0.017).requires_grad_()
    evaluate = lambda x, table: torch.func.functional_call(layer, dict(kan_weight=table), x)
    assert torch.autograd.gradcheck(evaluate, (x, layer.kan_weight))
    if impl in ("embedding", "dense"):
        assert torch.autograd.gradgradcheck(evaluate, (x, layer.kan_weight))
    else:
        first = torch.autograd.grad(layer(x).sum(), x, create_graph=True)[0]
        with pytest.raises(RuntimeError, match=r"no second derivatives|not implemented"):
            first.sum().backward()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(6,), (2, 6), (2, 3, 6), (0, 6), (2, 0, 6)])
def test_leading_dimensions_are_tokens(impl, shape):
    layer = KANPairLayer(6, 5, impl=impl)
    x = torch.randn(shape)
    y = layer(x)
    assert y.shape == (*shape[:-1], 5)
    torch.testing.assert_close(y.reshape(-1, 5), layer(x.reshape(-1, 6)))
    torch.testing.assert_close(layer(x.mT.contiguous().mT) if x.dim() > 1 else y, y)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("tokens", [3, 300])
def test_bad_inputs_show_in_their_own_token_only(impl, bad, tokens):
    layer, x = KANPairLayer(6, 5, impl=impl), torch.randn(tokens, 6)
    x[1, 3] = bad
    y = layer(x)
    assert not y[1].isfinite().any() and y[[0, *range(2, tokens)]].isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", kan_parameterizations.PARAMETERIZATIONS)
def test_inits_in_all_coordinates(impl, name):
    for N, width in ((2, 1.0), (5, 4.0), (8, 7.3)):
        options = dict(num_control_points=N, spline_width=width, impl=impl, parameterization=name)
        x = torch.randn(50, 6) * 2
        identity = KANPairLayer(6, 6, "identity", **options)
        torch.testing.assert_close(identity(x), x, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(identity.to_parameterization("bspline")(x), x, atol=2e-5, rtol=1e-5)
        assert not KANPairLayer(6, 6, "zero", **options)(x).any()
        normal = KANPairLayer(64, 500, **options)(torch.randn(500, 64))
        assert abs(normal.std().item() - 1) < 0.05


def test_whitened_is_white():
    """E[A^T A] + the penalty, of both axes, is 1 in whitened coordinates: moving any by 1 costs as much."""
    layer = KANPairLayer(2, 1, num_control_points=5, parameterization="whitened")
    knots = layer.knots
    D = kan_parameterizations.second_differences(knots)
    A = kan_parameterizations.gram(knots) + layer.smoothness * D.T @ D
    M = torch.kron(layer.basis(), layer.basis())
    torch.testing.assert_close(M.T @ torch.kron(A, A) @ M, torch.eye(25, dtype=torch.float64))
    table = torch.randn(1, 5, 5, 1, dtype=torch.float64)
    layer.double().kan_weight.data.copy_(table)
    torch.testing.assert_close(layer.control_points().flatten(), M @ table.flatten())


@pytest.mark.parametrize("impl", ["auto", *IMPLS])
@pytest.mark.parametrize("name", ["bspline", "whitened"])
def test_compiles_and_exports(impl, name):
    layer, x = KANPairLayer(6, 5, num_control_points=4, impl=impl, parameterization=name), torch.randn(2, 7, 6)
    g = torch.randn(2, 7, 5)
    eager = run(layer, x, g)
    x, layer.kan_weight.grad = x.requires_grad_(), None
    y = torch.compile(layer, fullgraph=True)(x)
    y.backward(g)
    for a, b in zip(eager, (y, x.grad, layer.kan_weight.grad), strict=True):
        np.testing.assert_allclose(b.detach().double().numpy(), a, atol=1e-5, rtol=1e-5)
    exported = torch.export.export(layer, (x.detach(),))
    assert ("splinegpt_cpu" in str(exported.graph)) == (impl == "cpp")  # auto exports what runs anywhere
    torch.testing.assert_close(exported.module()(x), y, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("impl", ["auto", *IMPLS])
@pytest.mark.parametrize("dtype", list(EPS))
def test_under_autocast_as_a_linear_layer(impl, dtype):
    layer, x = KANPairLayer(6, 5, impl=impl, dtype=dtype), torch.randn(7, 6).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        assert y.dtype == torch.nn.Linear(6, 5, dtype=dtype)(x).dtype
    torch.testing.assert_close(y.float(), layer(x).float(), atol=0.05, rtol=0.02)


@pytest.mark.parametrize("impl", ["embedding_bag", "dense"])
def test_many_tokens_in_chunks_match_the_reference(impl, monkeypatch):
    monkeypatch.setattr(kan_layer, "MAX_LOOKUPS", 2 * 6 * 7)  # 7 tokens a chunk, the last one short
    monkeypatch.setattr(kan_pairs, "hat_chunk", lambda x, table: 7)
    assert_matches_reference(*make(45, 3, 5, 4, impl=impl))


@pytest.mark.parametrize("N", [4, 9, 32])
def test_dense_in_bfloat16_loses_no_slopes(N):
    """As on a GPU: of surfaces that are nearly planes, whose neighbouring control points differ by little."""
    layer, x, g = make(50, 4, N, 24)
    x = x.clamp(-2, 2)  # further out the forward's own rounding grows
    planes = layer.knots.view(N, 1, 1) + layer.knots.view(1, N, 1) * torch.randn(4, 1, 1, 24).double()
    table = (planes + 0.01 * layer.kan_weight.detach()).float()
    found = []
    for impl, dtype in ((kan_pairs.dense, torch.bfloat16), (kan_pairs.embedding, torch.float64)):
        x_, table_ = (a.to(torch.promote_types(dtype, torch.float32)).requires_grad_() for a in (x, table))
        y = impl(x_, table_, layer.spline_width, dtype)
        found.append([y.detach(), *torch.autograd.grad(y, (x_, table_), g.to(dtype))])
    for got, want in zip(*found, strict=True):
        assert (got - want).norm() < 4e-3 * want.norm()


def test_dense_saves_only_its_inputs():
    layer, x, _ = make(20, 3, 5, 4, impl="dense")
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x.requires_grad_())
    assert sorted(t.numel() for t in saved) == sorted((x.numel(), layer.kan_weight.numel()))


def test_what_auto_means():
    far, here = torch.empty(4, 5, 6, device="meta"), torch.empty(4, 5, 6)
    choose = kan_pairs.choose_impl
    assert [choose(far, N, training=False) for N in (8, 9)] == ["dense", "embedding_bag"]  # 20 tokens, 16 or 20 are few
    assert choose(far, 9, training=True) == "dense" and choose(here, 9, training=True) == "cpp"


def test_exports_with_any_number_of_tokens():
    layer = KANPairLayer(6, 5).requires_grad_(False)
    exported = torch.export.export(
        layer, (torch.randn(30, 6),), dynamic_shapes=({0: torch.export.Dim("tokens", min=2, max=100)},)
    )
    for tokens in (3, 40):
        x = torch.randn(tokens, 6)
        torch.testing.assert_close(exported.module()(x), layer(x), atol=1e-5, rtol=1e-5)


def test_per_sample_gradients():
    layer, x = KANPairLayer(4, 3, num_control_points=3), torch.randn(5, 4)
    table = layer.kan_weight.detach()
    loss = lambda table, x: torch.func.functional_call(layer, dict(kan_weight=table), x).square().sum()
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(table, x)
    torch.testing.assert_close(each.sum(0), torch.func.grad(loss)(table, x))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(in_features=5), "in_features must be even, got 5"),
        (dict(in_features=0), "in_features must be a whole number of at least 2, got 0"),
        (dict(num_control_points=1), "num_control_points must be a whole number of at least 2, got 1"),
        (dict(spline_width=0), "spline_width must be a positive"),
        (dict(init="ones"), "init must be one of"),
        (dict(init="identity"), "in_features == out_features, got 4 and 3"),
        (dict(impl="triton"), "impl must be one of auto, cpp, embedding_bag, embedding, dense, got 'triton'"),
        (dict(parameterization="fourier"), "parameterization must be one of"),
        (dict(smoothness=1.0), "has no smoothness, got 1.0"),
        (dict(parameterization="whitened", smoothness=-1.0), "smoothness must be at least 0"),
    ],
)
def test_constructor_says_what_is_allowed(arguments, message):
    with pytest.raises(ValueError, match=message):
        KANPairLayer(**{**dict(in_features=4, out_features=3), **arguments})


def test_coordinates_that_cannot_be_had_change_nothing():
    layer = KANPairLayer(4, 3, num_control_points=8, spline_width=1e4)
    with pytest.raises(ValueError, match="whitened"):
        layer.to_parameterization("whitened")
    assert layer.parameterization == "bspline" and layer.double()(torch.zeros(2, 4).double()).shape == (2, 3)
    layer = KANPairLayer(4, 3).to_parameterization("whitened", smoothness=2.0)
    assert layer.smoothness == 2.0 and layer.to_parameterization("dct").smoothness is None


def test_wrong_inputs(monkeypatch):
    layer = KANPairLayer(4, 3)
    for x in (torch.zeros(2, 3), torch.zeros(()), torch.zeros(2, 0)):
        with pytest.raises(ValueError, match="last dimension must be in_features = 4"):
            layer(x)
    with pytest.raises(ValueError, match="must be floating point"):
        layer(torch.zeros(2, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="table must be"):
        layer.set_control_points(torch.zeros(1))
    with pytest.raises(ValueError, match="parameterization must be one of"):
        layer.to_parameterization("fourier")
    assert layer.parameterization == "bspline"
    monkeypatch.setattr(kan_kernels, "load", lambda: "no C++ compiler found")
    kan_kernels.warn_once.cache_clear()
    with pytest.warns(UserWarning, match="no C.. compiler found"):
        assert layer(torch.zeros(2, 4)).shape == (2, 3)  # auto is dense then
    layer.impl = "cpp"
    with pytest.raises(ValueError, match="impl='cpp' can't be used: no C"):
        layer(torch.zeros(2, 4))
    kan_kernels.warn_once.cache_clear()


def test_a_gpt_of_pairs_sees_products_of_channels():
    """What a KANLayer can't: the second difference across both channels of a pair is not zero."""
    for pairs in (False, True):
        config = GPTConfig(vocab_size=5, block_size=4, n_layer=1, n_head=1, n_embd=4, kan_pairs=pairs)
        layer = GPT(config).transformer.h[0].mlp.proj
        torch.nn.init.normal_(layer.kan_weight)
        corners = torch.tensor([[a, b, 0.0, 0.0] for a in (0.0, 1.0) for b in (0.0, 1.0)])
        y = layer(corners)
        assert ((y[0] - y[1] - y[2] + y[3]).abs().max() > 0.1) == pairs
        assert len(GPT(config).kan_layers()) == 1
    flops = GPT(config).flops_per_token()
    assert flops["kan_lookup"] == 12 * 16 and flops["kan_hat_gemm"] == 6 * layer.kan_weight.numel()


def test_it_trains_and_is_loaded_by_its_control_points(tiny):
    """In whitened coordinates, by AdamW and by Muon."""
    for optimizer in ("adamw", "muon", "normuon"):
        config = tiny(kan_pairs=True, kan_control_points=4, kan_gate=True, kan_parameterization="whitened")
        config = replace(
            config,
            table_learning_rate=1e-2,
            table_optimizer=optimizer,
            max_steps=40,
            out_dir=config.out_dir + optimizer,
        )
        assert train.train(config)["val_loss"] < 3
        model, _, _ = checkpoint.load_model(config.out_dir)
        layers = model.kan_layers()
        assert [type(layer) for layer in layers] == [KANPairLayer] * 2
        assert all(layer.parameterization == "bspline" and layer.kan_weight.any() for layer in layers)
        assert list(plot.load_splines(config.out_dir)[1]) == ["transformer.h.0.mlp.proj", "transformer.h.1.mlp.proj"]


def test_activity_of_a_sum_of_curves_is_theirs():
    curves = KANLayer(6, 5, num_control_points=7)
    torch.nn.init.normal_(curves.kan_weight)
    surfaces = KANPairLayer(6, 5, num_control_points=7, parameterization="whitened")
    a, b = curves.kan_weight[::2], curves.kan_weight[1::2]
    surfaces.set_control_points(a.unsqueeze(2) + b.unsqueeze(1))
    want = curves.edge_activity().view(3, 2, 5).square().sum(1).sqrt()
    torch.testing.assert_close(surfaces.edge_activity(), want, rtol=1e-5, atol=0)


def test_what_is_for_curves_is_refused(tiny):
    for extra in (dict(kan_refine_at=(5,)), dict(kan_smoothness=1e-3)):
        with pytest.raises(ValueError, match="are for curves, not with kan_pairs"):
            tiny(kan_pairs=True, **extra).check()
