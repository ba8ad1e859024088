"""KANLayer against its float64 reference, at its edges, and against the mistakes of kanditioned 1.0.4."""

import itertools
import math

import numpy as np
import pytest
import torch
from conftest import CPU_IMPLS as IMPLS
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import reference

import kan_layer
from kan_layer import KANLayer

EPS = {torch.float64: 2**-53, torch.float32: 2**-24, torch.bfloat16: 2**-9, torch.float16: 2**-12}
ALL = [*IMPLS, "auto"]


def run(layer, x, g):
    """Output, grad_x and grad_table of one forward and backward, as float64 arrays."""
    x = x.clone().requires_grad_()
    layer.kan_weight.grad = None
    y = layer(x)
    y.backward(g)
    assert y.dtype == x.dtype and x.grad.dtype == x.dtype and layer.kan_weight.grad.dtype == layer.kan_weight.dtype
    return [a.detach().double().numpy() for a in (y, x.grad, layer.kan_weight.grad)]


def assert_matches_reference(layer, x, g):
    # Sums are made in float32 or better, so their error is that of float32 in units of what was summed; the result is
    # then rounded to dtype. 16 covers the few operations per term; a wrong weight or row is larger by orders.
    inner = 16 * EPS[torch.float64 if x.dtype == torch.float64 else torch.float32]
    table = layer.kan_weight.detach()
    assert_near_reference(run(layer, x, g), x, table, layer.spline_width, g, inner, EPS[x.dtype])


def assert_near_reference(results, x, table, width, g, inner, eps, reference=reference):
    """y and the gradients of x and table, in NumPy: errors up to inner times what was summed, and rounding by eps."""
    y, grad_x, grad_table = results
    want, want_table, left, right, size, table_size, x_size = reference(
        x.double().numpy(), table.double().numpy(), width, g.double().numpy()
    )
    tiny = float(torch.finfo(x.dtype).smallest_normal)
    for got, exact, scale in ((y, want, size), (grad_table, want_table, table_size)):
        bound = inner * scale + 2 * eps * np.abs(exact) + tiny
        assert (np.abs(got - exact) <= bound).all(), np.max(np.abs(got - exact) - bound)
    # On a knot the curve has two slopes; rounding decides which of them the layer gives.
    bound = inner * x_size + 2 * eps * np.maximum(np.abs(left), np.abs(right)) + tiny
    off = np.minimum(np.abs(grad_x - left), np.abs(grad_x - right))
    assert (off <= bound).all(), np.max(off - bound)


@st.composite
def cases(draw):
    B, F, O = draw(st.integers(0, 5)), draw(st.integers(1, 5)), draw(st.integers(1, 6))
    N = draw(st.one_of(st.integers(2, 9), st.sampled_from([16, 33, 130])))
    width = draw(st.sampled_from([0.5, 1.0, 3.7, 4.0, 6.0, 100.0]))
    dtype = draw(st.sampled_from(list(EPS)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    knots = np.linspace(-width / 2, width / 2, N)
    kinds = {
        "inside": rng.uniform(-width / 2, width / 2, (B, F)),
        "outside": rng.uniform(width / 2, 4 * width, (B, F)) * rng.choice([-1, 1], (B, F)),
        "normal": rng.normal(size=(B, F)),
        "knots": rng.choice(knots, (B, F)),
    }
    x = kinds[draw(st.sampled_from(list(kinds)))]
    as_tensor = lambda a: torch.from_numpy(np.asarray(a)).to(dtype)
    return as_tensor(x), as_tensor(rng.normal(size=(F, N, O))), width, as_tensor(rng.normal(size=(B, O)))


@pytest.mark.parametrize("impl", ALL)
@settings(max_examples=300, deadline=None)
@given(case=cases())
def test_value_and_gradients_match_the_reference(impl, case):
    x, table, width, g = case
    F, N, O = table.shape
    layer = KANLayer(F, O, num_control_points=N, spline_width=width, impl=impl, dtype=x.dtype)
    layer.kan_weight.data.copy_(table)
    assert_matches_reference(layer, x, g)


@pytest.mark.parametrize("impl", IMPLS)
def test_many_tokens_in_chunks_match_the_reference(impl, monkeypatch):
    monkeypatch.setattr(kan_layer, "MAX_LOOKUPS", 2 * 3 * 7)  # 7 tokens a chunk, the last one short
    monkeypatch.setattr(kan_layer, "hat_chunk", lambda x, table: 7)
    torch.manual_seed(0)
    layer = KANLayer(3, 4, num_control_points=5, impl=impl)
    torch.nn.init.normal_(layer.kan_weight)
    assert_matches_reference(layer, torch.randn(45, 3), torch.randn(45, 4))


@pytest.mark.parametrize("impl", ALL)
def test_gradcheck_away_from_knots(impl):
    torch.manual_seed(0)
    layer = KANLayer(3, 2, num_control_points=6, impl=impl, dtype=torch.float64)
    torch.nn.init.normal_(layer.kan_weight)
    x = torch.randn(4, 3, dtype=torch.float64) * 2
    u = (x + 2) * 5 / 4
    x = torch.where((u - u.round()).abs() < 0.05, x + 0.08, x).requires_grad_()
    function = lambda x, w: torch.func.functional_call(layer, {"kan_weight": w}, x)
    assert torch.autograd.gradcheck(function, (x, layer.kan_weight))


@pytest.mark.parametrize("impl", ALL)
@pytest.mark.parametrize("shape", [(5,), (2, 5), (2, 3, 5), (2, 1, 3, 5), (0, 5), (2, 0, 5)])
def test_leading_dimensions_are_tokens(impl, shape):
    layer = KANLayer(5, 3, num_control_points=4, impl=impl)
    x = torch.randn(shape, requires_grad=True)
    y = layer(x)
    assert y.shape == (*shape[:-1], 3)
    y.sum().backward()
    assert x.grad.shape == shape and layer.kan_weight.grad.shape == (5, 4, 3)
    for token, out in zip(x.detach().reshape(-1, 5), y.reshape(-1, 3), strict=True):
        torch.testing.assert_close(layer(token), out)


@pytest.mark.parametrize("impl", ALL)
@pytest.mark.parametrize("frozen", ["x", "table"])
def test_only_the_gradient_asked_for(impl, frozen):
    layer = KANLayer(5, 3, num_control_points=4, impl=impl)
    x = torch.randn(2, 5, requires_grad=frozen != "x")
    layer.kan_weight.requires_grad_(frozen != "table")
    layer(x).sum().backward()
    assert (x.grad is None) == (frozen == "x") and (layer.kan_weight.grad is None) == (frozen == "table")


@pytest.mark.parametrize("impl", ALL)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("init", ["random_normal", "zero"])
def test_bad_inputs_show_in_their_own_token_only(impl, bad, init):
    layer = KANLayer(4, 3, init=init, num_control_points=8, impl=impl)
    x = torch.randn(5, 4)
    x[2, 1] = bad
    x.requires_grad_()
    y = layer(x)
    finite = y.isfinite()
    assert not finite[2].any() and finite[[0, 1, 3, 4]].all()
    if math.isnan(bad):
        assert y[2].isnan().all()
    y.sum().backward()  # no wild index in the backward either
    assert x.grad[[0, 1, 3, 4]].isfinite().all()


@pytest.mark.parametrize("impl", ALL)
@pytest.mark.parametrize("big", [1e30, -1e38, 65504.0])
def test_huge_inputs_extrapolate(impl, big):
    layer = KANLayer(1, 1, init="identity", num_control_points=3, spline_width=4.0, impl=impl, dtype=torch.float64)
    torch.testing.assert_close(layer(torch.tensor([[big]], dtype=torch.float64)).item(), big, rtol=1e-9, atol=0)


def test_float16_overflow_is_infinite_not_wild():
    layer = KANLayer(2, 2, init="identity", num_control_points=64, dtype=torch.float16)
    layer.kan_weight.data.mul_(2)
    y = layer(torch.tensor([[60000.0, 1.0], [3.0, 1.0]], dtype=torch.float16))
    assert y[0, 0].isinf() and y[1].isfinite().all()


def test_auto_takes_what_was_measured_to_be_fastest(monkeypatch):
    assert {kan_layer.choose_impl("cpu", N, 768, training) for N in (2, 128) for training in (True, False)} == {"cpp"}
    assert "auto (on cpu, 4,096 tokens: cpp in training, cpp in inference)" in repr(KANLayer(3, 3))
    monkeypatch.setattr(kan_layer.kan_kernels, "available", lambda: False)
    mkl = torch.backends.mkl.is_available()
    for N, tokens, training, want in (
        (8, 768, True, "dense"),
        (8, 768, False, "embedding_bag"),
        (32, 64, True, "dense"),
        (32, 768, True, "csr" if mkl else "dense"),
        (128, 768, True, "embedding_bag"),
        (128, 4096, True, "csr" if mkl else "embedding_bag"),
    ):
        assert kan_layer.choose_impl("cpu", N, tokens, training) == want
        layer, used = KANLayer(2, 3, num_control_points=N), []
        watched = {n: lambda *a, n=n, used=used: used.append(n) or IMPLS[n](*a) for n in IMPLS}
        with monkeypatch.context() as patch:
            patch.setattr(kan_layer, "IMPLS", watched)
            layer.requires_grad_(training)(torch.randn(tokens, 2))
        assert used == [want]
    assert "auto (on cpu, 4,096 tokens: dense in training, embedding_bag in inference)" in repr(
        KANLayer(3, 3, num_control_points=8)
    )


# Initialisation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("N", [2, 3, 8, 32, 128])
@pytest.mark.parametrize("width", [1.0, 4.0, 8.0])
def test_random_normal_gives_unit_variance(N, width):
    torch.manual_seed(0)
    layer = KANLayer(512, 256, num_control_points=N, spline_width=width)
    std = layer(torch.randn(4096, 512)).std().item()
    assert abs(std - 1) < 0.05


@pytest.mark.parametrize("impl", ALL)
@pytest.mark.parametrize("width", [1.0, 4.0, 7.3])
@pytest.mark.parametrize("N", [2, 8, 32, 128])
def test_identity_is_the_identity(impl, N, width):
    torch.manual_seed(0)
    layer = KANLayer(16, 16, init="identity", num_control_points=N, spline_width=width, impl=impl)
    inside, beyond, far = ((torch.rand(2000, 16) - 0.5) * width * k for k in (1, 2, 20))
    torch.testing.assert_close(layer(inside), inside, rtol=1e-6, atol=1e-6)
    if N <= 32:
        torch.testing.assert_close(layer(beyond), beyond, rtol=1e-6, atol=1e-6)
    # Far outside, y is the difference of two terms of |t| * width / 2, each rounded ("embedding" does a little better).
    terms = (2 * far.abs() / width * (N - 1) + N) * width / 2
    assert ((layer(far) - far).abs() <= 4 * 2**-24 * terms + 1e-6).all()
    layer, far = layer.double(), far.double()
    layer.reset_parameters()
    torch.testing.assert_close(layer(far), far, rtol=1e-9, atol=1e-9)


def test_zero_is_zero():
    assert (KANLayer(7, 5, init="zero")(torch.randn(3, 7)) == 0).all()


# dtypes, autocast, compile --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ALL)
@pytest.mark.parametrize("x_dtype, w_dtype", list(itertools.product(EPS, EPS)))
def test_any_mix_of_dtypes_gives_the_input_dtype(impl, x_dtype, w_dtype):
    layer = KANLayer(4, 3, num_control_points=8, impl=impl).to(w_dtype)
    x = torch.randn(5, 4).to(x_dtype)
    y, *_ = run(layer, x, torch.ones(5, 3).to(x_dtype))
    exact = KANLayer(4, 3, num_control_points=8, dtype=torch.float64)
    exact.kan_weight.data.copy_(layer.kan_weight)
    atol = 8 * max(EPS[x_dtype], 2**-24)
    np.testing.assert_allclose(y, exact(x.double()).detach().numpy(), atol=atol, rtol=2 * EPS[x_dtype])


@pytest.mark.parametrize("impl", ALL)
def test_under_autocast_as_a_linear_layer(impl):
    kan, linear = KANLayer(4, 3, num_control_points=8, impl=impl), torch.nn.Linear(4, 3)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.randn(5, 4, dtype=dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = kan(x)
            assert y.dtype == linear(x).dtype == torch.bfloat16
        y.float().sum().backward()
        assert kan.kan_weight.grad.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert kan.double()(x.double()).dtype == linear.double()(x.double()).dtype == torch.float64


@pytest.mark.parametrize("impl", ALL)
def test_positions_keep_their_precision_under_autocast(impl):
    torch.manual_seed(0)
    layer = KANLayer(64, 32, num_control_points=256, impl=impl)
    torch.nn.init.normal_(layer.kan_weight)  # rough curves: another interval is another value
    exact = KANLayer(64, 32, num_control_points=256, dtype=torch.float64)
    exact.kan_weight.data.copy_(layer.kan_weight)
    x = (torch.rand(100, 64) - 0.5) * 4
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    want = exact(x.double())
    torch.testing.assert_close(y.double(), want, rtol=2**-8, atol=1e-3)  # as bfloat16 can say it
    assert (exact(x.bfloat16().double()) - want).abs().max() > 3  # as it would be for inputs rounded first


@pytest.mark.parametrize("impl", ["embedding_bag", "embedding", "dense"])  # csr is never asked for half precision
@pytest.mark.parametrize("N", [8, 32, 128])
def test_half_precision_paths_that_cpus_do_not_take(impl, N):
    """On a GPU the sums are made in bfloat16; here the same functions, called as they would be there."""
    torch.manual_seed(0)
    F, O = 64, 48
    table = KANLayer(F, O, num_control_points=N).kan_weight.detach()
    x, g = torch.randn(200, F), torch.randn(200, O)
    results = []
    for dtype in (torch.float64, torch.bfloat16):
        a, w = x.to(torch.promote_types(dtype, torch.float32)).requires_grad_(), table.clone().requires_grad_()
        y = IMPLS[impl](a, w.double() if dtype == torch.float64 else w, 4.0, dtype)
        assert y.dtype == dtype
        y.backward(g.to(dtype))
        results.append([t.double() for t in (y, a.grad, w.grad)])
    relative = [((b - a).norm() / a.norm()).item() for a, b in zip(*results, strict=True)]
    assert relative[0] < 0.03 and relative[2] < 0.01
    assert relative[1] < (0.005 if impl == "dense" else 0.15)  # see embedding_bag's docstring


def test_second_derivatives_of_dense():
    layer = KANLayer(3, 2, num_control_points=5, impl="dense", dtype=torch.float64)
    torch.nn.init.normal_(layer.kan_weight)
    x = (torch.rand(4, 3, dtype=torch.float64) * 0.6 + 0.2).requires_grad_()  # between two knots
    function = lambda x, w: torch.func.functional_call(layer, {"kan_weight": w}, x)
    assert torch.autograd.gradgradcheck(function, (x, layer.kan_weight))


@pytest.mark.parametrize("impl", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_in_one_graph(impl, dtype):
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer = KANLayer(6, 5, num_control_points=8, impl=impl, dtype=dtype)
    x, g = torch.randn(2, 7, 6, dtype=dtype), torch.randn(2, 7, 5, dtype=dtype)
    eager = run(layer, x, g)
    compiled = torch.compile(layer, fullgraph=True)
    x = x.requires_grad_()
    layer.kan_weight.grad = None
    y = compiled(x)
    y.backward(g)
    for a, b in zip(eager, (y, x.grad, layer.kan_weight.grad), strict=True):
        np.testing.assert_allclose(b.detach().double().numpy(), a, atol=16 * EPS[dtype], rtol=4 * EPS[dtype])


@pytest.mark.parametrize("impl", ALL)
def test_compiles_with_a_transposed_input(impl):
    torch._dynamo.reset()
    layer = KANLayer(6, 5, num_control_points=8, impl=impl)
    x, g = torch.randn(1, 6, 40).transpose(1, 2), torch.randn(1, 40, 5)
    want = run(layer, x, g)
    layer.kan_weight.grad = None
    x = x.detach().requires_grad_()
    y = torch.compile(lambda x: layer(x * 1.0), fullgraph=True)(x)
    y.backward(g)
    for a, b in zip(want, (y, x.grad, layer.kan_weight.grad), strict=True):
        np.testing.assert_allclose(b.detach().double().numpy(), a, atol=1e-5, rtol=1e-5)


def test_either_way_to_ask_for_tf32_is_seen():
    seen = torch.compile(lambda x: x + kan_layer.products_in_tf32(), fullgraph=True, backend="eager")
    precision, matmul = torch.get_float32_matmul_precision(), torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for name in ("high", "highest"):
            torch.set_float32_matmul_precision(name)
            torch._dynamo.reset()
            assert seen(torch.zeros(())) == kan_layer.products_in_tf32() == (name == "high")
        matmul.fp32_precision = "tf32"  # after which reading allow_tf32 raises
        assert kan_layer.products_in_tf32()
    finally:
        matmul.fp32_precision = before
        torch.set_float32_matmul_precision(precision)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_csr_is_a_well_formed_operator(dtype):
    args = (torch.randn(4, 3, requires_grad=True), torch.randn(3, 5, 2, requires_grad=True), 4.0)
    torch.library.opcheck(kan_layer.csr_matmul, args)
    x, table, g = torch.randn(3, 4).t(), torch.randn(2, 5, 3).transpose(0, 2), torch.randn(4, 2)
    torch.library.opcheck(kan_layer.csr_matmul_backward, (g, x, table, 4.0))


def test_half_gradient_probe_survives_compile():
    torch._dynamo.reset()
    kan_layer._probe_half_gradients.cache_clear()
    with torch.inference_mode():
        assert kan_layer.bag_has_half_gradients("cpu", torch.bfloat16)
    probe = torch.compile(
        lambda x: x + 1 if kan_layer.bag_has_half_gradients("cpu", torch.bfloat16) else x - 1, fullgraph=True
    )
    assert probe(torch.zeros(1)).item() == 1  # CPUs have had that gradient for years


@pytest.mark.parametrize("training", [True, False])
def test_dense_saves_only_its_inputs(training):
    layer, x = KANLayer(16, 16, num_control_points=32, impl="dense"), torch.randn(64, 16, requires_grad=training)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    assert sum(t.numel() for t in saved if t.data_ptr() != layer.kan_weight.data_ptr()) <= x.numel()


def test_same_input_twice_is_bitwise_the_same():
    torch.manual_seed(0)
    for impl in ALL:
        layer, x, g = KANLayer(64, 48, num_control_points=8, impl=impl), torch.randn(300, 64), torch.randn(300, 48)
        for a, b in zip(run(layer, x, g), run(layer, x, g), strict=True):
            assert (a == b).all()


# Mistakes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(in_features=0, out_features=3), "in_features must be a whole number of at least 1, got 0"),
        (dict(in_features=3, out_features=2.5), "out_features must be"),
        (dict(in_features=3, out_features=3, num_control_points=1), "num_control_points .* at least 2, got 1"),
        (dict(in_features=3, out_features=3, spline_width=0), "spline_width must be a positive"),
        (dict(in_features=3, out_features=3, spline_width=-4.0), "spline_width must be a positive"),
        (dict(in_features=3, out_features=3, spline_width=math.nan), "spline_width must be a positive"),
        (dict(in_features=3, out_features=3, init="xavier"), "random_normal, identity, zero, got 'xavier'"),
        (dict(in_features=3, out_features=3, impl="magic"), "auto, cpp, triton, embedding_bag, .*got 'magic'"),
        (dict(in_features=3, out_features=2, init="identity"), "in_features == out_features"),
    ],
)
def test_constructor_says_what_is_allowed(arguments, message):
    with pytest.raises(ValueError, match=message):
        KANLayer(**arguments)


@pytest.mark.parametrize("x", [torch.zeros(2, 4), torch.zeros(()), torch.zeros(2, 0)])
def test_wrong_last_dimension(x):
    with pytest.raises(ValueError, match="in_features = 3"):
        KANLayer(3, 3)(x)


def test_integers_are_refused():
    with pytest.raises(ValueError, match="floating point"):
        KANLayer(3, 3)(torch.zeros(2, 3, dtype=torch.long))


# kanditioned 1.0.4: the same function, without its failures -----------------------------------------------------------


def kanditioned_layer(**arguments):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    try:
        from KANditioned.kan_layer import KANLayer as Kanditioned  # the wheel's folder on disk
    except ImportError:
        from kanditioned.kan_layer import KANLayer as Kanditioned  # and as its README imports it
    return Kanditioned(**arguments)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("F, O, N, width", [(3, 5, 8, 4.0), (64, 32, 32, 4.0), (17, 9, 2, 1.5), (128, 128, 64, 6.0)])
def test_kanditioned_weights_give_the_same_function(impl, F, O, N, width):
    torch.manual_seed(0)
    sizes = dict(in_features=F, out_features=O, num_control_points=N, spline_width=width)
    theirs = kanditioned_layer(**sizes, init="random_normal", impl="embedding_bag")
    torch.nn.init.normal_(theirs.kan_weight)
    ours = KANLayer(**sizes, impl=impl)
    ours.load_state_dict(theirs.state_dict())  # strict: their extra buffers are known
    x = torch.randn(100, F) * 2
    scale = F**0.5 * (1 + 2 * N / width)  # of a sum of F terms that extrapolate with slopes of N / width
    assert (ours(x) - theirs(x)).abs().max().item() < 2e-6 * scale
    nested = torch.nn.Sequential(torch.nn.LayerNorm(F), KANLayer(**sizes))
    nested.load_state_dict(torch.nn.Sequential(torch.nn.LayerNorm(F), theirs).state_dict())


def test_failures_of_kanditioned_that_are_not_ours():
    """Each is first shown to happen there, so that a mended kanditioned makes this test fail and be rewritten."""
    x = torch.randn(4, 6)
    theirs = dict(in_features=6, out_features=6, num_control_points=8)
    with pytest.raises(RuntimeError, match="matrix"):
        kanditioned_layer(**theirs, init="zero")(x)  # its default impl
    assert KANLayer(6, 6)(x).shape == (4, 6)

    bag = kanditioned_layer(**theirs, init="identity", impl="embedding_bag")
    assert (bag(x) - x).abs().max() > 0.1  # identity that multiplies by (N - 1) / width
    torch.testing.assert_close(KANLayer(6, 6, init="identity", num_control_points=8)(x), x, rtol=1e-6, atol=1e-6)

    assert bag(x.view(2, 2, 6)).shape == (2, 6)  # sums over the tokens
    assert KANLayer(6, 6)(x.view(2, 2, 6)).shape == (2, 2, 6)

    with pytest.raises(RuntimeError):
        bag(x.bfloat16())
    assert KANLayer(6, 6)(x.bfloat16()).dtype == torch.bfloat16

    with pytest.raises((IndexError, RuntimeError)):
        bag(torch.full((1, 6), math.nan))
    assert KANLayer(6, 6)(torch.full((1, 6), math.nan)).isnan().all()

    wide = kanditioned_layer(in_features=512, out_features=64, init="random_normal", impl="embedding_bag")
    assert wide(torch.randn(512, 512)).std() > 7  # 7.75 at N = 32
    assert abs(KANLayer(512, 64)(torch.randn(512, 512)).std() - 1) < 0.05


# Pictures -------------------------------------------------------------------------------------------------------------


def test_visualize_all_mappings_draws_every_edge(tmp_path, capsys):
    pytest.importorskip("matplotlib").use("Agg")
    KANLayer(3, 2, num_control_points=8).visualize_all_mappings(save_path=tmp_path / "all.png")
    assert (tmp_path / "all.png").stat().st_size > 1000
    assert "Figure saved to" in capsys.readouterr().out


def test_plot_of_a_large_layer_picks_the_most_active_edges(tmp_path, capsys):
    pytest.importorskip("matplotlib").use("Agg")
    layer = KANLayer(768, 768, init="zero", num_control_points=4)
    layer.kan_weight.data[5, :, 7] = torch.tensor([0.0, 1.0, -1.0, 0.0])
    layer.kan_weight.data[11] = 3.0  # far from zero and yet constant: not active
    figure = layer.plot(save_path=tmp_path / "most.png", max_edges=4)
    assert len(figure.axes) == 4 and any("in 5 → out 7" in axis.get_title() for axis in figure.axes)
    assert "589,824 edges are too many to draw: plotting the 4 most active" in capsys.readouterr().out
    layer.visualize_all_mappings(save_path=tmp_path / "all.png")
    assert "most active" in capsys.readouterr().out


def test_plot_draws_the_edges_asked_for(tmp_path):
    pytest.importorskip("matplotlib").use("Agg")
    layer = KANLayer(4, 4, num_control_points=4)
    figure = layer.plot(edges=[(0, 1), (3, 2)], save_path=tmp_path / "two.png")
    assert [axis.get_title() for axis in figure.axes] == ["in 0 → out 1", "in 3 → out 2"]
    curve = figure.axes[1].lines[0]
    np.testing.assert_allclose(curve.get_ydata(), layer.kan_weight[3, :, 2].detach())
    np.testing.assert_allclose(curve.get_xdata(), layer.knots)
    with pytest.raises(ValueError, match=r"edge \(4, 0\) does not exist"):
        layer.plot(edges=[(4, 0)])
    with pytest.raises(ValueError, match="no edges"):
        layer.plot(edges=[])
