"""The C++ kernels (kan_kernels/) at the shapes where they change their ways, and how they are built."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import reference
from test_kan_layer import EPS, assert_matches_reference, assert_near_reference

import kan_kernels
from kan_layer import KANLayer

ROOT = Path(__file__).parent.parent

assert kan_kernels.available()
ops = torch.ops.splinegpt_cpu


@pytest.fixture(params=[1, 2])
def threads(request):
    torch.set_num_threads(request.param)
    return request.param


def make(B, F, N, O, dtype=torch.float32, width=4.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    layer = KANLayer(F, O, num_control_points=N, spline_width=width, impl="cpp", dtype=dtype)
    layer.kan_weight.data.copy_(torch.randn(F, N, O, generator=generator))
    x = (torch.randn(B, F, generator=generator) * 1.5).to(dtype)
    return layer, x, torch.randn(B, O, generator=generator).to(dtype)


@settings(max_examples=200, deadline=None)
@given(
    B=st.sampled_from([1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 40, 63, 64, 65, 100]),
    F=st.one_of(st.integers(1, 5), st.sampled_from([15, 16, 17, 33])),
    N=st.one_of(st.integers(2, 20), st.sampled_from([31, 32, 33, 64, 130])),
    O=st.one_of(st.integers(1, 300), st.sampled_from([16, 32, 64, 96, 128, 192, 256])),
    dtype=st.sampled_from([torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    width=st.sampled_from([0.7, 4.0, 9.0]),
    threads=st.sampled_from([1, 2]),
    seed=st.integers(0, 2**31),
)
def test_any_shape_matches_the_reference(B, F, N, O, dtype, width, threads, seed):
    B = max(1, min(B, 400 // F))  # the reference is slow
    torch.set_num_threads(threads)
    assert_matches_reference(*make(B, F, N, O, dtype, width, seed))


# One case for each way through the code, large enough for two threads to share it out.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "B, F, N, O",
    [
        (3, 60, 8, 70),  # direct: few tokens, features shared out
        (90, 20, 8, 200),  # pairs: tiles of outputs shared out
        (300, 9, 5, 33),  # pairs and one left over: one tile, tokens shared out
        (120, 16, 70, 150),  # one by one
        (300, 71, 6, 40),  # pairs and one left over, of several groups
        (300, 19, 30, 70),  # the forward gathered, in several groups
        (2600, 3, 22, 40),  # gathered, several blocks of tokens
        (330, 128, 8, 1056),  # pairs, as many as go together, the gradient written past the caches
        (2600, 2, 4, 40),  # a pair, several blocks of tokens
        (2100, 2, 130, 300),  # one by one, in smaller tiles with AVX-512, lest their sums overflow the cache
        (4500, 1, 70, 40),  # one, several blocks of tokens, the last shorter
        (1, 1, 2, 1),
    ],
)
def test_every_path_matches_the_reference(B, F, N, O, dtype, threads):
    assert_matches_reference(*make(B, F, N, O, dtype))


def gradients(layer, x, g):
    x = x.clone().requires_grad_()
    y = layer(x)
    return [y.detach(), *torch.autograd.grad(y, (x, layer.kan_weight), g)]


def test_the_same_whatever_else_happens(threads):
    """Bitwise the same every time, whatever an earlier call left behind in scratch memory and recycled gradients."""
    layer, x, g = make(700, 64, 8, 1000)  # 2 MB of gradient: recycled
    first = gradients(layer, x, g)
    for N in (40, 2, 8):
        other, a, b = make(700, 64, N, 1000, seed=1)
        gradients(other, a * float("nan"), b)
    for a, b in zip(first, gradients(layer, x, g), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("F, N", [(64, 8), (21, 8), (19, 32)])
def test_gradients_do_not_depend_on_the_number_of_threads(F, N):
    layer, x, g = make(700, F, N, 200)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(gradients(layer, x, g)[1:])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_gradients_are_separate_tensors():
    """Recycled memory never serves two tensors that are alive."""
    layer, x, g = make(64, 64, 8, 1000)
    kept = [gradients(layer, x, g * k)[2] for k in (1, 2, 4)]
    assert len({t.data_ptr() for t in kept}) == 3
    assert torch.equal(kept[1], kept[0] * 2) and torch.equal(kept[2], kept[0] * 4)


def test_openmp_is_on(threads):
    assert ops.threads() == threads


def test_any_strides():
    layer, x, g = make(40, 12, 8, 30)
    want = gradients(layer, x, g)
    layer.kan_weight.data = layer.kan_weight.data.transpose(0, 2).contiguous().transpose(0, 2)
    got = gradients(layer, x.t().contiguous().t(), g.t().contiguous().t())
    for a, b in zip(want, got, strict=True):
        assert torch.equal(a, b)
    y = layer(x.clone().requires_grad_())
    y.sum().backward()  # the gradient of a sum is one number, expanded


@pytest.mark.parametrize(
    "x_dtype, table_dtype", [(torch.float32,) * 2, (torch.float64,) * 2, (torch.float32, torch.bfloat16)]
)
def test_well_formed_operators(x_dtype, table_dtype):
    for strided in (False, True):
        x, table = torch.randn(40, 3, dtype=x_dtype), torch.randn(3, 5, 2).to(table_dtype)
        if strided:
            x, table = x.t().contiguous().t(), table.transpose(0, 2).contiguous().transpose(0, 2)
        torch.library.opcheck(ops.spline.default, (x.requires_grad_(), table.requires_grad_(), 4.0))
        g = torch.randn(40, 2, dtype=x_dtype)
        torch.library.opcheck(ops.spline_backward.default, (g, x.detach(), table.detach(), 4.0))


def test_exports():
    layer = KANLayer(6, 5, num_control_points=8)
    exported = torch.export.export(layer, (torch.randn(30, 6),), dynamic_shapes=({0: torch.export.Dim("tokens")},))
    x = torch.randn(77, 6)
    assert "splinegpt_cpu.spline" in str(exported.graph) and torch.equal(exported.module()(x), layer(x))


def test_saves_only_x():
    layer, x, _ = make(50, 16, 8, 40)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x.requires_grad_())
    assert sum(t.numel() for t in saved if t.data_ptr() != layer.kan_weight.data_ptr()) <= x.numel()


def test_no_second_derivatives():
    layer, x, _ = make(4, 3, 8, 2)
    (grad,) = torch.autograd.grad(layer(x.requires_grad_()).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="impl='dense' has"):
        grad.sum().backward()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((torch.zeros(2, 3), torch.zeros(4, 5, 6), 4.0), r"must be \(B, F\) and the table \(F, N, O\)"),
        ((torch.zeros(2, 3), torch.zeros(3, 1, 6), 4.0), "N >= 2"),
        ((torch.zeros(2, 0), torch.zeros(0, 5, 6), 4.0), "F and O >= 1"),
        ((torch.zeros(2, 3), torch.zeros(3, 5, 0), 4.0), "F and O >= 1"),
        ((torch.zeros(2, 3), torch.zeros(3, 5, 6).half(), 4.0), "float32 and bfloat16, got Float and Half"),
    ],
)
def test_operators_say_what_is_wrong(arguments, message):
    with pytest.raises(RuntimeError, match=message):
        ops.spline(*arguments)


@settings(max_examples=100, deadline=None)
@given(
    F=st.integers(1, 40),
    N=st.integers(1, 16),
    O=st.one_of(st.integers(1, 100), st.sampled_from([128, 256])),
    both=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    strided=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_change_of_basis_is_a_matrix_product(F, N, O, both, dtype, strided, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = (F, N, N, O) if both else (F, N, O)
    matrix, p, g = (torch.randn(s, generator=generator, dtype=dtype) for s in ((N, N), shape, shape))
    if strided:
        matrix, p, g = matrix.t(), *(a.transpose(0, -1).contiguous().transpose(0, -1) for a in (p, g))
    along = lambda M, p: torch.einsum("lk,ij,fkjo->flio", M, M, p) if both else M @ p
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        c = kan_kernels.change_basis(matrix, p.requires_grad_())
        assert "ChangeBasis" in c.grad_fn.name()
        results.append((c, *torch.autograd.grad(c, p, g)))
    M, p, g = matrix.double(), p.detach().double(), g.double()
    exact, total, back, total_back = along(M, p), along(M.abs(), p.abs()), along(M.t(), g), along(M.t().abs(), g.abs())
    eps = (1 + both) * N * torch.finfo(dtype).eps
    assert ((results[0][0] - exact).abs() <= eps * total).all()
    assert ((results[0][1] - back).abs() <= eps * total_back).all()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_well_formed_change_of_basis(dtype):
    matrix, p = torch.randn(5, 5, dtype=dtype), torch.randn(3, 5, 4, dtype=dtype, requires_grad=True)
    torch.library.opcheck(ops.change_basis.default, (matrix, p))
    torch.library.opcheck(
        ops.change_basis.default, (matrix.t(), p.detach().transpose(0, 2).contiguous().transpose(0, 2))
    )
    torch.library.opcheck(ops.change_basis.default, (matrix, torch.randn(2, 5, 5, 4, dtype=dtype, requires_grad=True)))
    if dtype == torch.float64:
        change = lambda p: kan_kernels.change_basis(matrix, p)
        assert torch.autograd.gradcheck(change, p) and torch.autograd.gradgradcheck(change, p)


@pytest.mark.parametrize(
    "matrix, p", [((4, 4), (3, 5, 6)), ((5, 4), (3, 5, 6)), ((5, 5), (5, 6)), ((5, 5), (3, 5, 4, 6))]
)
def test_change_of_basis_says_what_is_wrong(matrix, p):
    with pytest.raises(RuntimeError, match=r"p must be \(F, N, O\) and the matrix \(N, N\)"):
        ops.change_basis(torch.zeros(matrix), torch.zeros(p))


def test_the_matrix_of_a_change_of_basis_has_no_gradient():
    with pytest.raises(RuntimeError, match="the matrix has no gradient"):
        ops.change_basis(torch.eye(5, requires_grad=True), torch.zeros(3, 5, 6))


def test_change_of_basis_by_pytorch_where_it_must(monkeypatch):
    layer, x = KANLayer(6, 5, num_control_points=7, parameterization="whitened", impl="dense"), torch.randn(30, 6)
    loss = lambda p: kan_kernels.change_basis(layer._basis, p).square().sum()
    (want,) = torch.autograd.grad(loss(layer.kan_weight), layer.kan_weight)
    torch.testing.assert_close(torch.func.grad(loss)(layer.kan_weight.detach()), want)
    assert "change_basis" not in str(torch.export.export(layer, (x,)).graph)
    many = KANLayer(6, 5, num_control_points=17, parameterization="whitened")
    assert "ChangeBasis" not in many.control_points().grad_fn.name()
    monkeypatch.setattr(kan_kernels, "available", lambda: False)
    assert "ChangeBasis" not in layer.control_points().grad_fn.name()
    torch.testing.assert_close(torch.autograd.grad(loss(layer.kan_weight), layer.kan_weight)[0], want)


def test_off_the_cpu_is_an_error():
    with pytest.raises(ValueError, match="impl='cpp' needs a CPU"):
        KANLayer(3, 3, impl="cpp", device="meta")(torch.zeros(2, 3, device="meta"))


# Building -------------------------------------------------------------------------------------------------------------

USE = """
import torch, warnings
from kan_layer import KANLayer
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        y = KANLayer(8, 8)(torch.randn(40, 8))
print(y.shape, [str(w.message) for w in caught if "kernels" in str(w.message)])
"""


def python(*arguments, **environment):
    environment = {**os.environ, "PYTHONPATH": "tests", **environment}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, env=environment)


@pytest.mark.parametrize(
    "environment, reason",
    [
        ({"CXX": "", "PATH": ""}, "no C++ compiler found"),
        ({"CXX": "false"}, "false failed"),
        ({"CXX": '"'}, "No closing quotation"),
        ({"SPLINEGPT_CACHE": "/dev/null/cache"}, "can't write to /dev/null/cache"),
    ],
)
def test_without_kernels_one_warning_and_the_operators_of_pytorch(environment, reason, tmp_path):
    environment = {"SPLINEGPT_CACHE": str(tmp_path), **environment}
    done = python("-c", USE, **environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("fast CPU kernels are not used") == 1 and reason in done.stdout
    done = python("-m", "kan_kernels", **environment)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("error: ") and reason in done.stderr
    assert not [path for path in tmp_path.iterdir() if path.name != "lock"]


def test_built_once_and_found_again():
    done = python("-m", "kan_kernels")
    assert done.returncode == 0 and done.stderr == "" and "threads" in done.stdout
    path = kan_kernels.build()
    assert path.exists() and kan_kernels.build() == path


def test_another_cpu_or_compiler_is_another_build(monkeypatch):
    command = kan_kernels.compiler()
    here = kan_kernels.library(command)
    assert kan_kernels.library(["true"]) != here
    monkeypatch.setattr(kan_kernels, "cpu", lambda: "flags: none")
    assert kan_kernels.library(command) != here


def test_what_was_built_by_another_user_is_used(monkeypatch, tmp_path):
    monkeypatch.setenv("SPLINEGPT_CACHE", str(tmp_path))
    built = kan_kernels.library(kan_kernels.compiler())
    built.touch()

    def read_only(path):
        raise PermissionError(path)

    monkeypatch.setattr(kan_kernels, "one_at_a_time", read_only)
    assert kan_kernels.build() == built


CHECK = """
import torch, kan_kernels
from kan_layer import KANLayer
from kan_pairs import KANPairLayer
from test_attention import both, in_parts, make, reference
assert kan_kernels.available()
torch.manual_seed(0)
torch.set_num_threads(2)
SHAPES = (3, 40, 8, 70), (300, 33, 8, 200), (300, 20, 40, 75), (1200, 9, 3, 16)
SHAPES = *SHAPES, *((B, 64, 8, 300) for B in (1, 4, 16, 64, 300))
PAIRS = ((B, F + F % 2, min(N, 7), O) for B, F, N, O in SHAPES)
for Layer, (B, F, N, O) in (*((KANLayer, shape) for shape in SHAPES), *((KANPairLayer, shape) for shape in PAIRS)):
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        exact = Layer(F, O, num_control_points=N, impl="dense", dtype=torch.float64)
        exact.kan_weight.data.normal_()
        exact.kan_weight.data = exact.kan_weight.data.to(dtype).double()
        layer = Layer(F, O, num_control_points=N, impl="cpp", dtype=dtype)
        layer.kan_weight.data.copy_(exact.kan_weight)
        x, g = torch.rand(B, F).to(dtype) * 3, torch.randn(B, O).to(dtype)
        results = []
        for module, kind in ((layer, dtype), (exact, torch.float64)):
            a = x.to(kind).requires_grad_()
            y = module(a)
            results.append([y, *torch.autograd.grad(y, (a, module.kan_weight), g.to(kind))])
        for got, want in zip(*results):
            bound = {2: 3e-3, 4: 1e-5, 8: 1e-13}[dtype.itemsize]
            assert (got - want).norm() < bound * want.norm(), (Layer, B, F, N, O, dtype)
        if dtype == torch.float32 and Layer is KANLayer:
            x, table = x.requires_grad_(), layer.kan_weight
            y = kan_kernels.spline_bfloat16(x, table, 4.0)
            for got, want in zip([y, *torch.autograd.grad(y, (x, table), g.bfloat16())], results[1]):
                assert (got - want).norm() < 6e-3 * want.norm(), (B, F, N, O)
for N, O in (7, 70), (16, 33):
    matrix, p = torch.randn(N, N), torch.randn(9, N, N, O)
    want = matrix @ p
    assert (kan_kernels.change_basis(matrix, p[0]) - want[0]).norm() < 1e-6 * p[0].norm() * N, (N, O)
    want = torch.einsum("ij,fjko->fiko", matrix, want)
    assert (kan_kernels.change_basis(matrix, p) - want).norm() < 2e-6 * p.norm() * N**2, (N, O)
for B, T, heads, D, turned in (2, 70, 2, 20, True), (1, 33, 1, 3, False):
    qkv, g, *rotation = make(B, T, heads, D, turned)
    results = [both(qkv, g, heads, *rotation, turned, f) for f in (kan_kernels.attention, reference)]
    for got, want in zip(*results):
        assert (got - want).norm() < 1e-6 * want.norm(), (B, T, heads, D)
    y = in_parts(qkv, heads, *rotation, turned, [T - 9, 1, 8], *torch.empty(2, B, heads, T, D))
    assert (y - results[1][0]).norm() < 1e-6 * y.norm(), (B, T, heads, D)
print(torch.ops.splinegpt_cpu.instruction_set())
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names of x86 instruction sets")
@pytest.mark.parametrize(
    "march, name, flag",
    [("x86-64-v4", "AVX-512", "avx512bw"), ("x86-64-v3", "AVX2", "avx2"), ("x86-64", "128-bit vectors", "sse2")],
)
def test_cpus_with_less_are_served_too(march, name, flag, tmp_path):
    if flag not in kan_kernels.cpu().split():
        pytest.skip(f"this CPU has no {name}")
    if name == ops.instruction_set():
        pytest.skip(f"all other tests ran with {name}")
    done = python("-c", CHECK, SPLINEGPT_MARCH=march, SPLINEGPT_CACHE=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == name


def test_importing_builds_nothing(tmp_path):
    done = python("-c", "import kan_layer, kan_kernels", SPLINEGPT_CACHE=str(tmp_path))
    assert done.returncode == 0 and not list(tmp_path.iterdir())


def test_a_numpy_reference_is_not_the_only_witness():
    """At a size where both cores and all blocks are busy, against dense float64 (itself held to the reference)."""
    layer, x, g = make(3000, 130, 9, 150)
    exact = KANLayer(130, 150, num_control_points=9, impl="dense", dtype=torch.float64)
    exact.kan_weight.data.copy_(layer.kan_weight)
    for a, b in zip(gradients(layer, x, g), gradients(exact, x.double(), g.double()), strict=True):
        off = (a.double() - b).abs() / b.abs().max()
        assert np.quantile(off.detach().numpy(), 0.999) < 1e-5  # a knot or two may fall on the other side


# In bfloat16 ----------------------------------------------------------------------------------------------------------


def in_bfloat16(x, table, g, width=4.0):
    """y and the gradients of x and the table."""
    x, table = (a.clone().requires_grad_() for a in (x, table))
    y = kan_kernels.spline_bfloat16(x, table, width)
    return [y.detach(), *torch.autograd.grad(y, (x, table), g)]


def make_bfloat16(B, F, N, O, seed=0):
    layer, x, g = make(B, F, N, O, seed=seed)
    return x, layer.kan_weight.detach(), g.bfloat16()


@settings(max_examples=100, deadline=None)
@given(
    tokens=st.sampled_from([3, 8, 9, 20]),
    F=st.one_of(st.integers(1, 4), st.sampled_from([15, 17, 33])),
    N=st.integers(2, 9),
    O=st.one_of(st.integers(1, 140), st.sampled_from([16, 32, 64, 128, 192])),
    width=st.sampled_from([0.7, 4.0, 9.0]),
    threads=st.sampled_from([1, 2]),
    seed=st.integers(0, 2**31),
)
def test_any_shape_in_bfloat16(tokens, F, N, O, width, threads, seed):
    B = max(1, min(tokens * N + seed % 2, 500 // F))
    torch.set_num_threads(threads)
    x, table, g = make_bfloat16(B, F, N, O, seed)
    y, grad_x, grad_table = (a.double().numpy() for a in in_bfloat16(x, table, g, width))
    # Rows, their differences and positions are rounded, each to 2^-9.
    eps = EPS[torch.bfloat16]
    assert_near_reference((y, grad_x, grad_table), x, table, width, g, 2 * eps, eps)


@pytest.mark.parametrize(
    "B, F, N, O",
    [
        (300, 9, 5, 33),  # pairs and one left over, a tile not full
        (300, 40, 8, 200),  # pairs, four tiles, the last not full
        (300, 40, 12, 20),  # one by one, small tiles
        (1400, 17, 16, 70),  # pairs of as many points as they may have
        (400, 20, 40, 192),  # one by one, three tiles
        (4500, 3, 22, 40),  # several blocks of tokens
        (9000, 2, 8, 1000),  # the gradient in several passes
        (700, 128, 8, 1088),  # the gradient past the caches
        (40, 5, 8, 30),  # too few
    ],
)
def test_every_path_in_bfloat16(B, F, N, O, threads):
    x, table, g = make_bfloat16(B, F, N, O)
    want = [ops.spline(x.double(), table.double(), 4.0)]
    want += ops.spline_backward(g.double(), x.double(), table.double(), 4.0)
    first, second = in_bfloat16(x, table, g), in_bfloat16(x, table, g)
    for a, b, exact in zip(first, second, want, strict=True):
        assert torch.equal(a, b)
        assert (a - exact).norm() < 0.004 * exact.norm()
    assert first[0].dtype == torch.bfloat16 and first[1].dtype == first[2].dtype == torch.float32
    torch.set_num_threads(3 - threads)
    others = in_bfloat16(x, table, g)
    for a, b in zip(first[1:], others[1:], strict=True):  # where spline.cpp makes y, that goes by the number of threads
        assert torch.equal(a, b)


def test_far_outside_in_bfloat16():
    """Weights still sum to one, and of tokens so far out that they could not, nothing is rounded but y."""
    table, g = torch.ones(6, 32, 40), torch.ones(300, 40).bfloat16()
    x = torch.tensor([0.1, 3.0, -3.3, 8.7, 9.3, -1.0]).repeat(300, 1)
    y, grad_x, _ = in_bfloat16(x, table, g)
    assert (y == 6).all() and (grad_x == 0).all()
    x, table, g = make_bfloat16(300, 6, 32, 40)
    x[7, 3] = 1e4
    exact = x.clone().requires_grad_(), table.clone().requires_grad_()
    y = kan_kernels.spline(*exact, 4.0)
    for a, b in zip(in_bfloat16(x, table, g), [y, *torch.autograd.grad(y, exact, g.float())], strict=True):
        assert torch.equal(a, b.to(a.dtype))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_token_is_alone_in_bfloat16(bad):
    x, table, g = make_bfloat16(300, 6, 8, 40)
    x[7, 3] = bad
    finite = in_bfloat16(x, table, g)[0].isfinite()
    assert not finite[7].any() and finite[:7].all() and finite[8:].all()


def test_under_autocast_in_bfloat16():
    layer, x, _ = make(300, 6, 8, 40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert torch.equal(y, kan_kernels.spline_bfloat16(x, layer.kan_weight, 4.0))


@pytest.mark.parametrize("B", [20, 100])
def test_well_formed_operators_in_bfloat16(B):
    x, table, g = make_bfloat16(B, 3, 5, 2)
    torch.library.opcheck(ops.spline_bfloat16.default, (x.requires_grad_(), table.requires_grad_(), 4.0))
    torch.library.opcheck(ops.spline_bfloat16_backward.default, (g, x.detach(), table.detach(), 4.0))
    (grad,) = torch.autograd.grad(ops.spline_bfloat16(x, table, 4.0).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="impl='dense' has"):
        grad.sum().backward()


def test_bfloat16_says_what_is_wrong():
    x, table, g = make_bfloat16(20, 3, 5, 2)
    with pytest.raises(RuntimeError, match="x and table must be float32, got Float and BFloat16"):
        ops.spline_bfloat16(x, table.bfloat16(), 4.0)
    with pytest.raises(RuntimeError, match=r"must be \(B, F\) and the table \(F, N, O\)"):
        ops.spline_bfloat16(x, table[1:], 4.0)
    with pytest.raises(RuntimeError, match=r"g must be \(20, 2\) in bfloat16, got \[20, 2\] in Float"):
        ops.spline_bfloat16_backward(g.float(), x, table, 4.0)


def test_bfloat16_inference_far_outside():
    """Weights t and 1 - t still sum to one where bfloat16 has no t left: a constant stays what it is."""
    layer = KANLayer(6, 40, num_control_points=32, impl="cpp", dtype=torch.bfloat16)
    layer.kan_weight.data.fill_(1.0)
    x = torch.tensor([0.1, 30.0, -33.0, 38.7, 90.3, -1e4]).repeat(3, 1).bfloat16()
    with torch.no_grad():
        assert torch.equal(layer(x), torch.full((3, 40), 6.0, dtype=torch.bfloat16))


@pytest.mark.parametrize("limit", ["OMP_THREAD_LIMIT=1", "OMP_MAX_ACTIVE_LEVELS=0", "OMP_DYNAMIC=true"])
def test_fewer_threads_than_asked_for(limit):
    done = python("-c", CHECK, **dict([limit.split("=")]))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "B, F, N, O", [(100, 5, 8, 70), (10, 30, 16, 200), (5, 6, 3, 130), (80, 20, 40, 64), (2, 9, 8, 33), (1, 4, 8, 31)]
)
def test_bfloat16_inference_rounds_positions_at_most(B, F, N, O):
    layer, x, g = make(B, F, N, O, torch.bfloat16)
    with torch.no_grad():
        y = layer(x).double().numpy()
    want, *_, size, _, _ = reference(
        *(a.double().detach().numpy() for a in (x, layer.kan_weight)), 4.0, g.double().numpy()
    )
    assert (np.abs(y - want) <= 2**-8 * (size + np.abs(want))).all()
    assert np.linalg.norm(y - want) < 0.005 * np.linalg.norm(want)
