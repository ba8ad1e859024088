"""The Triton kernels (kan_kernels/gpu.py): their numbers, on a GPU or else in Triton's interpreter, and their code."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import torchrun
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import reference

import kan_kernels
import kan_layer
import train
from bench import saved_bytes
from kan_layer import KANLayer
from log import read_log
from model import Block, GPTConfig

gpu = pytest.importorskip("kan_kernels.gpu", reason="Triton is not installed")
aot = pytest.importorskip("kan_kernels.aot")
ROOT = Path(__file__).parent.parent
DEVICE = "cpu" if gpu.INTERPRETED.value else "cuda"
EPS = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}  # of rounding to the nearest
CUT = 2 if DEVICE == "cpu" else 1  # the interpreter cuts bfloat16 off, which is twice as bad
ops = torch.ops.splinegpt_gpu


@pytest.fixture(autouse=True, scope="module")
def one_tile_each():
    """On a GPU nothing is to be tuned here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "CHOICES", {where: tiles[-1:] for where, tiles in gpu.CHOICES.items()})
        yield


def make(B, F, N, O, dtype, scale=1.5, seed=0):
    """x, table and g, all of numbers that dtype has, so that rounding them costs nothing."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(B, F, generator=generator) * scale
    table, g = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((F, N, O), (B, O)))
    return x.to(DEVICE), table.float().to(DEVICE), g.to(DEVICE)


def run(x, table, g, dtype, width=4.0, few=False):
    x, table = x.clone().requires_grad_(), table.clone().requires_grad_()
    y = gpu.spline(x, table, width, dtype, False, len(x) if few else 0)
    grad_x, grad_table = torch.autograd.grad(y, (x, table), g.to(dtype))
    assert y.dtype == dtype and grad_x.dtype == grad_table.dtype == torch.float32
    return [a.detach().cpu().double().numpy() for a in (y, grad_x, grad_table)]


def assert_matches_reference(x, table, g, dtype, width, few):
    y, grad_x, grad_table = run(x, table, g, dtype, width, few)
    want, want_table, left, right, size, table_size, x_size = reference(
        *(a.cpu().double().numpy() for a in (x, table)), width, g.cpu().double().numpy()
    )
    # In float32 as in test_kan_layer.py. In half precision hats and slopes are rounded besides, an error in proportion
    # to what was summed, and y is rounded.
    inner = 16 * EPS[torch.float32] + (0 if dtype == torch.float32 else CUT * EPS[dtype])
    tiny = float(torch.finfo(dtype).smallest_normal)
    for got, exact, scale in ((y, want, size), (grad_table, want_table, table_size)):
        bound = inner * scale + CUT * EPS[dtype] * np.abs(exact) + tiny
        assert (np.abs(got - exact) <= bound).all(), np.max(np.abs(got - exact) - bound)
    bound = inner * x_size + tiny
    off = np.minimum(np.abs(grad_x - left), np.abs(grad_x - right))
    assert (off <= bound).all(), np.max(off - bound)


@settings(max_examples=60 if DEVICE == "cpu" else 15, deadline=None)  # each takes seconds to compile
@given(
    B=st.one_of(st.integers(0, 20), st.sampled_from([63, 64, 65, 100])),
    F=st.one_of(st.integers(1, 6), st.sampled_from([15, 17, 65]), st.sampled_from([4, 16, 68])),
    N=st.sampled_from([2, 3, 4, 7, 8, 31]),  # few, since on a GPU each is compiled
    O=st.one_of(st.integers(1, 20), st.sampled_from([127, 129]), st.sampled_from([8, 64, 136])),  # the last: by TMA
    dtype=st.sampled_from(list(EPS)),
    width=st.sampled_from([0.7, 4.0, 9.0]),
    scale=st.sampled_from([0.3, 1.5, 6.0]),
    seed=st.integers(0, 2**31),
)
def test_any_shape_matches_the_reference(B, F, N, O, dtype, width, scale, seed):
    B = min(B, 1 + 200 // F)  # the reference is slow
    assert_matches_reference(*make(B, F, N, O, dtype, scale, seed), dtype, width, few=seed % 2 == 0 and B <= 16)


def close(got, want, dtype):
    for a, b in zip(got, want, strict=True):
        assert np.linalg.norm(a - b) <= 2 * EPS[dtype] * np.linalg.norm(b) + 1e-6 * np.linalg.norm(b)


ALL_TILES = dict(gpu.CHOICES)


def forget():
    """What was chosen, and what follows from what there is to choose from."""
    gpu.tuned.cache_clear(), gpu.most_sums.cache_clear(), gpu.LAUNCHES.clear()


@pytest.mark.parametrize(
    "kernel, kind, O",
    [(*key, O) for key in ALL_TILES for O in (260, 264) if O == 260 or key[1] == gpu.HALF],  # 264: by TMA
    ids=lambda v: getattr(v, "__name__", str(v)),
)
def test_every_tile_that_may_be_chosen(kernel, kind, O, monkeypatch):
    """Each in turn, on a shape that is larger than the tile and no multiple of it, against float64."""
    dtype = torch.bfloat16 if kind == gpu.HALF else torch.float32
    x, table, g = make(150, 140, 5, O, dtype)
    a, w = x.double().requires_grad_(), table.double().requires_grad_()
    y = kan_layer.embedding(a, w, 4.0, torch.float64)
    which = [gpu.forward_kernel, gpu.input_gradient_kernel, gpu.table_gradient_kernel].index(kernel)
    want = [y, *torch.autograd.grad(y, (a, w), g.double())][which].detach().cpu().numpy()
    tf32 = kind == gpu.TF32
    call = [
        lambda: gpu.spline(x, table, 4.0, dtype, tf32, 0),
        lambda: gpu.input_gradient(g, x, table, 4.0, tf32),
        lambda: gpu.table_gradient(g, x, 5, 4.0, torch.float32, tf32),
    ][which]
    major = gpu.capability(x.device)
    for tile in ALL_TILES[kernel, kind]:
        if not gpu.fits(kernel, tile, major):
            continue
        forget()
        monkeypatch.setitem(gpu.CHOICES, (kernel, kind), [tile])
        got = call().double().cpu().numpy()
        ((_, constants),) = gpu.LAUNCHES.values()
        assert constants["TMA"] == (kind == gpu.HALF and O == 264 and major >= 9)
        # TF32 has 10 bits of a mantissa, and the interpreter, which does not know it, 23.
        close([got], [want], torch.float16 if tf32 and DEVICE == "cuda" else dtype)
    forget()


@pytest.mark.parametrize("dtype", EPS)
def test_sums_in_parts(dtype, monkeypatch):
    """The table's gradient over parts of the tokens, the others' sums over parts of the features."""
    many, few = make(1500, 20, 3, 5, dtype), make(3, 200, 4, 70, dtype)  # many: two tiles, for two places
    monkeypatch.setattr(gpu, "multiprocessors", lambda device: 1)
    whole = [run(*many, dtype), run(*few, dtype), run(*few, dtype, few=True)]
    monkeypatch.setattr(gpu, "multiprocessors", lambda device: 5_000)
    assert gpu.share(1500, 1, None, 512) == (2, 1024) and gpu.share(100, 1, None, 16) == (4, 32)
    assert gpu.share(200, 1, None, 64) == (2, 128)
    parts = [run(*many, dtype), run(*few, dtype), run(*few, dtype, few=True)]
    for got, want in zip(parts, whole, strict=True):
        close(got, want, dtype)
    close(parts[2], parts[1], dtype)


@pytest.mark.parametrize("dtype", EPS)
def test_the_same_every_time(dtype):
    case = make(70, 20, 8, 40, dtype)
    for a, b in zip(run(*case, dtype), run(*case, dtype), strict=True):
        assert np.array_equal(a, b)


@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("N", [2, 3, 8])
def test_nan_and_infinity_stay_in_their_token(N, few):
    x, table, _ = make(6, 4, N, 5, torch.float32)
    x[1, 2], x[3, 0], x[4, 1] = float("nan"), float("inf"), -float("inf")
    y = gpu.spline(x, table, 4.0, torch.float32, False, len(x) if few else 0)
    finite = y.isfinite().all(1).tolist()
    assert finite == [True, False, True, False, False, True] and y[1].isnan().all()


def layers(N=8, **options):
    torch.manual_seed(0)
    layer = KANLayer(12, 10, num_control_points=N, impl="triton", **options).to(DEVICE)
    return layer, torch.randn(2, 9, 12, device=DEVICE)


@pytest.mark.parametrize("options", [{}, {"parameterization": "whitened"}, {"knots": [-2.0, -0.5, 0.1, 0.7, 3.0]}])
def test_the_layer(options):
    layer, x = layers(**options)
    want = KANLayer(12, 10, num_control_points=layer.num_control_points, impl="embedding", **options).to(DEVICE)
    want.load_state_dict(layer.state_dict())
    results = []
    for each in (layer, want):
        a = x.clone().requires_grad_()
        y = each(a)
        results.append([y, *torch.autograd.grad(y.square().sum(), (a, each.kan_weight))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_compiles_in_one_graph():
    layer, x = layers()
    want = layer(x)
    got = torch.compile(layer, fullgraph=True)(x)
    assert torch.equal(got, want)
    (gradient,) = torch.autograd.grad(got.sum(), layer.kan_weight)
    torch.testing.assert_close(gradient, torch.autograd.grad(want.sum(), layer.kan_weight)[0])


@pytest.mark.parametrize("training", [True, False])
def test_exports_with_any_number_of_tokens(training):
    layer, _ = layers()
    layer.requires_grad_(training)
    x = torch.randn(30, 12, device=DEVICE)
    exported = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("tokens")},))
    assert "splinegpt_gpu.spline" in str(exported.graph)
    for tokens in (3, 40):
        x = torch.randn(tokens, 12, device=DEVICE)
        assert torch.equal(exported.module()(x), layer(x))


@pytest.mark.parametrize("dtype", EPS)
def test_well_formed_operators(dtype):
    x, table, g = make(20, 3, 5, 2, dtype)
    g = g.to(dtype)
    for few in (0, 16, 20):
        torch.library.opcheck(
            ops.spline.default, (x.requires_grad_(), table.requires_grad_(), 4.0, dtype, False, few),
            atol=1e-6, rtol=1e-5,
        )  # fmt: skip
    source, weight = (torch.randn(shape, requires_grad=True, device=DEVICE) for shape in ((20, 3), (3,)))
    norm = source.detach(), weight.detach(), 1e-3
    normed = ops.norm_again(*norm).requires_grad_()
    call = normed, table, 4.0, dtype, False, 0, source, weight, 1e-3
    torch.library.opcheck(ops.spline.default, call, atol=1e-6, rtol=1e-5)
    torch.library.opcheck(ops.norm_again.default, norm)
    torch.library.opcheck(ops.table_gradient.default, (g, x.detach(), 5, 4.0, torch.float32, False))
    torch.library.opcheck(ops.input_gradient.default, (g, x.detach(), table.detach(), 4.0, False))


def test_saves_x_and_the_table_alone():
    layer, x = layers()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x.requires_grad_())
    assert {t.numel() for t in saved} == {x.numel(), layer.kan_weight.numel()} and len(saved) == 2


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("gate", [False, True])
def test_a_block_keeps_what_it_normalises(gate, compiled):
    """And not the layer's input; the gradients are those of a layer that keeps that. Compiled, the norm is computed by
    other operators in the forward, so a position may be rounded to another bfloat16."""
    config = GPTConfig(n_embd=48, n_head=1, n_layer=1, kan_gate=gate, kan_impl="triton", kan_init="random_normal")
    torch.manual_seed(0)
    block, kept = Block(config, 0).to(DEVICE), {}
    torch.nn.init.normal_(block.ln_2.weight, mean=1.0)
    x = torch.randn(20, 48, device=DEVICE, requires_grad=True)

    def gradients(line):
        line = torch.compile(line, fullgraph=True, backend="aot_eager_decomp_partition") if compiled else line
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast(DEVICE, torch.bfloat16):
            y = line()
        return torch.autograd.grad(y.float().square().sum(), [x, block.ln_2.weight, *block.mlp.parameters()])

    def pack(t):
        if t.numel() == x.numel():
            kept[t.data_ptr()] = t.nbytes
        return t

    with_norm = gradients(lambda: block.mlp(block.ln_2(x), (x, block.ln_2)))
    bytes_kept = sum(kept.values())
    without = gradients(lambda: block.mlp(block.ln_2(x)))
    more = 3 * x.numel() * 2 if gate else 0  # the gate, what it multiplies and what it is made of, in bfloat16
    assert bytes_kept == x.nbytes + more and sum(kept.values()) >= bytes_kept + x.nbytes
    for got, want in zip(with_norm, without, strict=True):
        assert torch.equal(got, want) or (compiled and (got - want).norm() < EPS[torch.bfloat16] * want.norm())


def test_a_block_keeps_less_than_a_fifth_of_the_mlps():
    blocks = [Block(GPTConfig(n_embd=96, mlp=mlp, kan_impl="triton"), 0).to(DEVICE) for mlp in ("kan", "gelu")]
    kan, mlp = (saved_bytes(block, 96, DEVICE, torch.bfloat16) / 96 for block in blocks)
    # The norm's input in float32 and its two numbers a token; the MLP's input, hidden layer before and after, besides.
    assert kan == 4 + 2 * 4 / 96 and mlp == kan + 2 + 8 + 8 and kan < 0.2 * mlp


def test_second_derivatives_raise():
    layer, x = layers()
    (gradient,) = torch.autograd.grad(layer(x.requires_grad_()).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="impl='dense' has"):
        gradient.sum().backward()


def test_fsdp(tmp_path):
    """Sharded parameters (FSDP2) give the same gradients; one process, since what may fail is the table's type."""
    from torch.distributed import device_mesh, fsdp

    layer, x = layers(parameterization="whitened")
    (want,) = torch.autograd.grad(layer(x).square().sum(), layer.kan_weight)
    backend = "gloo" if DEVICE == "cpu" else "nccl"
    torch.distributed.init_process_group(backend, init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        fsdp.fully_shard(layer, mesh=device_mesh.init_device_mesh(DEVICE, (1,)))
        layer(x).square().sum().backward()
        torch.testing.assert_close(layer.kan_weight.grad.full_tensor(), want)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.skipif(DEVICE == "cuda", reason="two processes would want two GPUs")
def test_ddp(script, tiny):
    one, two = (tiny(name, kan_impl="triton", max_steps=4) for name in ("one", "two"))
    want = train.train(one)
    done = torchrun(script, 2, two)
    assert done.returncode == 0, done.stderr
    got = read_log(two.out_dir)[1][-1]
    assert abs(got["val_loss"] - want["val_loss"]) < 1e-5


def test_mistakes(monkeypatch):
    layer, x = layers()
    with pytest.raises(ValueError, match=r"float32 at most, got x in torch\.float64"):
        layer.double()(x.double())
    for N, O in ((2, 2**23), (8, 2**22)):
        with pytest.raises(ValueError, match=f"not for 1 x {N} x {O}, which overflows in a tile; use 'embedding_bag'"):
            g, one = (torch.empty(1, size, device=DEVICE) for size in (O, 1))
            gpu.table_gradient(g, one, N, 4.0, torch.float32, tf32=False)
    monkeypatch.setattr(kan_kernels, "load_gpu", lambda: "there is no CUDA device")
    kan_kernels.warn_once.cache_clear()
    with (
        pytest.warns(UserWarning, match="fast GPU kernels are not used.*there is no CUDA device"),
        pytest.raises(ValueError, match="there is no CUDA device; use impl='auto'"),
    ):
        layer.float()(x)


def test_auto_on_cuda(monkeypatch):
    choose = kan_layer.choose_impl
    monkeypatch.setattr(kan_kernels, "gpu_available", lambda: True)
    assert [choose("cuda", N, 4096, True) for N in (2, 8, 512, 513)] == ["triton"] * 3 + ["embedding_bag"]
    assert choose("cuda", 600, 300, False) == "triton" and choose("cuda", 600, 301, False) == "embedding_bag"
    assert choose("cuda", 8, 4096, True, torch.float64) == "dense"
    assert choose("mps", 8, 4096, True) == "dense"
    monkeypatch.setattr(kan_kernels, "gpu_available", lambda: False)
    assert choose("cuda", 8, 4096, True) == "dense"


# The code -------------------------------------------------------------------------------------------------------------


def python(*arguments):
    compiled = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=compiled, capture_output=True, text=True, timeout=600
    )


# Tiles of 8 knots; two of them with some unused, and of 4 intervals, which is where sm_80 and sm_100 may spill.
@pytest.mark.parametrize("N, sms", [(8, list(aot.SHARED)), (13, [80, 100])])
def test_every_tile_compiles_for_every_device(N, sms, monkeypatch):
    monkeypatch.setattr(gpu, "CHOICES", ALL_TILES)
    assert all(gpu.choices(*key, sm // 10) for key in ALL_TILES for sm in aot.SHARED)
    process = python("-m", "kan_kernels.aot", "--points", str(N), "--sm", *map(str, sms))
    assert process.returncode == 0, process.stdout + process.stderr
    assert f"{len(list(aot.everything(sms, N)))} kernels, 0 with something wrong" in process.stdout


def test_what_is_wrong_is_found():
    """A tile too large for the registers, one too large for shared memory, what ptxas makes wait and Triton a trap."""
    code = (
        "from kan_kernels import aot, gpu\n"
        "gpu.fits = lambda *_: True\n"
        "print(aot.build('forward_kernel', gpu.HALF, 80, 0, False, 8).wrong)\n"
        "gpu.CHOICES[gpu.forward_kernel, gpu.HALF] = [gpu.config(8, 8, BM=128, BN=256, BK=64)]\n"
        "print(aot.build('forward_kernel', gpu.HALF, 90, 0, True, 8).wrong)\n"
        "gpu.CHOICES[gpu.forward_kernel, gpu.HALF] = [gpu.config(8, 3, BM=128, BN=256, BK=64)]\n"
        "aot.disassemble = lambda cubin: (dict(REG=99, STACK=0, LOCAL=0), 'WARPGROUP.DEPBAR.LE gsb0, 0x0')\n"
        "print(aot.build('forward_kernel', gpu.HALF, 90, 0, True, 8).wrong)\n"
        "aot.disassemble = lambda cubin: (dict(REG=4, STACK=0, LOCAL=0), 'BPT.TRAP')\n"
        "print(aot.build('forward_kernel', gpu.FULL, 90, 0, False, 8).wrong)\n"
    )
    process = python("-c", code)
    spills, shared, waits, trap = process.stdout.splitlines()
    assert spills == "['spills']" and "KiB shared" in shared and trap == "['nothing but a trap']", process.stderr
    assert waits == "['ptxas waits for every product']"


def test_instructions_in_loops():
    ptx = "mma.sync a;\n$L1:\nadd;\n$L2:\nmma.sync b;\n@%p1 bra $L2;\nmma.sync c;\nbra.uni $L3;\nmma.sync d;\n$L3:\n"
    assert aot.in_loops(ptx, r"\bmma\.sync") == 1
