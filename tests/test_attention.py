"""The C++ attention (kan_kernels/attention.cpp) against PyTorch's operators in float64, and in the GPT."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import kan_kernels
from model import GPT, CausalSelfAttention, GPTConfig, KVCache, rotary, rotate

assert kan_kernels.available()
ops = torch.ops.splinegpt_cpu


def angles(T, D):
    return rotary(torch.arange(T), D)


def heads_of(qkv, heads, cos, sin, qk_norm):
    """q, k and v, (B, heads, T, D) each, in float64."""
    B, T, _ = qkv.shape
    q, k, v = qkv.double().view(B, T, 3, heads, -1).permute(2, 0, 3, 1, 4)
    if cos is not None:
        q, k = (x * cos.double() + x.roll(x.shape[-1] // 2, -1) * sin.double() for x in (q, k))
    if qk_norm:
        q, k = (F.rms_norm(x, x.shape[-1:], eps=torch.finfo(torch.float32).eps) for x in (q, k))
    return q, k, v


def shares(q, k, gain):
    """P (B, heads, T, T)"""
    scores = q @ k.mT / q.shape[-1] ** 0.5
    if gain is not None:
        scores = scores * gain.double()[:, None, None]
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(hidden, -torch.inf).softmax(-1)


def reference(qkv, heads, cos, sin, qk_norm, gain=None):
    """As the definition reads, in float64."""
    q, k, v = heads_of(qkv, heads, cos, sin, qk_norm)
    return (shares(q, k, gain) @ v).transpose(1, 2).flatten(2)


def terms_of_gain(qkv, g, heads, cos, sin, qk_norm, gain):
    """(heads,): what the gradient of a gain is the sum of, each without its sign; they may cancel."""
    q, k, v = heads_of(qkv, heads, cos, sin, qk_norm)
    p = shares(q, k, gain)
    dp = g.double().view(*g.shape[:2], heads, -1).transpose(1, 2).abs() @ v.abs().mT
    ds = p * (dp + (p * dp).sum(-1, keepdim=True))
    return (ds * (q.abs() @ k.abs().mT) / q.shape[-1] ** 0.5).sum((0, 2, 3))


def make(B, T, heads, D, turned, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(B, T, 3 * heads * D, generator=generator) * scale
    return qkv, torch.randn(B, T, heads * D, generator=generator), *(angles(T, D) if turned else (None, None))


def make_gain(heads, seed=0):
    """From -1 to 1, so that scores stay as they are or become smaller; the last of them 0, where there are some."""
    gain = 1 - 2 * torch.rand(heads, generator=torch.Generator().manual_seed(seed))
    gain[1:][-1:] = 0
    return gain


def both(qkv, g, heads, cos, sin, qk_norm, attention, gain=None):
    """y, and the gradients of qkv and of the gain, if there is one."""
    inputs = [x.clone().requires_grad_() for x in (qkv, gain) if x is not None]
    y = attention(inputs[0], heads, cos, sin, qk_norm, *inputs[1:])
    return y.detach(), *torch.autograd.grad(y, inputs, g.to(y.dtype))


def in_parts(qkv, heads, cos, sin, qk_norm, parts, keys, values, gain=None):
    """Some tokens at a time, the cache holding those before."""
    y, start = [], 0
    for part in qkv.split(parts, 1):
        now = slice(start, start + part.shape[1])
        rotation = (None, None) if cos is None else (cos[now], sin[now])
        y.append(kan_kernels.attention(part, heads, *rotation, qk_norm, gain, past=(keys, values, start)))
        start = now.stop
    return torch.cat(y, 1)


@settings(max_examples=200, deadline=None)
@given(
    B=st.integers(1, 3),
    T=st.one_of(st.integers(1, 20), st.sampled_from([31, 32, 33, 63, 64, 65, 127, 128, 129, 200])),
    heads=st.integers(1, 3),
    half=st.one_of(st.integers(1, 9), st.sampled_from([16, 20, 24, 32, 33, 64])),
    odd=st.booleans(),
    turned=st.booleans(),
    qk_norm=st.booleans(),
    gained=st.booleans(),
    scale=st.sampled_from([1e-3, 1.0, 4.0]),
    threads=st.sampled_from([1, 2]),
    seed=st.integers(0, 2**31),
)
def test_any_shape_matches_the_reference(B, T, heads, half, odd, turned, qk_norm, gained, scale, threads, seed):
    D = 2 * half + (odd and not turned)
    qkv, g, *rotation = make(B, T, heads, D, turned, seed, scale)
    torch.set_num_threads(threads)
    gain = make_gain(heads, seed) if gained else None
    got = both(qkv, g, heads, *rotation, qk_norm, kan_kernels.attention, gain)
    want = both(qkv, g, heads, *rotation, qk_norm, reference, gain)
    # Scores of scale 4 are sums of terms up to some hundred, whose rounding the softmax passes on. Of few channels with
    # QK-norm next to nothing is left of a gradient, and its rounding is as large as before.
    tolerance = 2e-6 * (max(1.0, scale) ** 2 if not qk_norm else 10 if D < 8 else 1)
    for a, b in zip(got[:2], want[:2], strict=True):
        assert (a - b).abs().max() <= tolerance * b.abs().max(), (a - b).abs().max() / b.abs().max()
    if gained:
        error = (got[2] - want[2]).abs()
        assert (error <= 2e-7 * terms_of_gain(qkv, g, heads, *rotation, qk_norm, gain)).all(), error


@settings(max_examples=100, deadline=None)
@given(
    B=st.integers(1, 2),
    parts=st.lists(st.one_of(st.just(1), st.integers(1, 40)), min_size=1, max_size=6),
    spare=st.integers(0, 3),
    heads=st.integers(1, 3),
    half=st.one_of(st.integers(1, 9), st.sampled_from([16, 20, 33, 64])),
    turned=st.booleans(),
    qk_norm=st.booleans(),
    gained=st.booleans(),
    threads=st.sampled_from([1, 2]),
    seed=st.integers(0, 2**31),
)
def test_a_sequence_in_parts_matches_the_whole(B, parts, spare, heads, half, turned, qk_norm, gained, threads, seed):
    T, D = sum(parts), 2 * half
    qkv, _, cos, sin = make(B, T, heads, D, turned, seed)
    torch.set_num_threads(threads)
    keys, values = torch.full((2, B, heads, T + spare, D), torch.nan)  # nobody looks at what has not been written
    gain = make_gain(heads, seed) if gained else None
    got = in_parts(qkv, heads, cos, sin, qk_norm, parts, keys, values, gain)
    want = reference(qkv, heads, cos, sin, qk_norm, gain)
    assert (got - want).abs().max() <= 2e-6 * (10 if D < 8 else 1) * want.abs().max()
    assert keys[:, :, T:].isnan().all() and values[:, :, T:].isnan().all()
    assert torch.equal(values[:, :, :T].transpose(1, 2).flatten(2), qkv[..., 2 * heads * D :])


def test_scores_far_apart():
    """Keys so far apart that all but one have no weight."""
    qkv, g, *_ = make(1, 40, 2, 16, False, scale=40.0)
    y, grad = both(qkv, g, 2, None, None, False, kan_kernels.attention)
    assert (y - reference(qkv, 2, None, None, False)).abs().max() < 1e-3 * y.abs().max() and grad.isfinite().all()


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, 0x7F800001])  # CPUs', CUDA's, and another
@pytest.mark.parametrize("where", [0, 17, 39])
def test_a_nan_among_the_keys_reaches_all_that_see_it_and_no_other(where, bits):
    qkv, *_ = make(2, 40, 2, 16, False)
    qkv.view(torch.int32)[1, where, 32 + 3] = bits  # a key of the first head
    y = ops.attention(qkv, 2, None, None, False, None).view(2, 40, 2, 16)
    seen = torch.zeros_like(y, dtype=torch.bool)
    seen[1, where:, 0] = True
    assert torch.equal(y.isnan(), seen)


def test_the_past_is_bitwise_the_same_whatever_follows():
    qkv, *_ = make(2, 70, 2, 16, True)
    cos, sin = angles(70, 16)
    whole = ops.attention(qkv, 2, cos, sin, True, None)
    for T in (1, 5, 33, 64):
        part = ops.attention(qkv[:, :T], 2, cos[:T], sin[:T], True, None)
        assert torch.equal(part, whole[:, :T])


def test_does_not_depend_on_the_number_of_threads_or_the_strides():
    qkv, g, cos, sin = make(3, 70, 3, 20, True)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(both(qkv, g, 3, cos, sin, True, kan_kernels.attention, make_gain(3)))
    strided = qkv.transpose(0, 2).contiguous().transpose(0, 2), g.transpose(0, 1).contiguous().transpose(0, 1)
    results.append(both(*strided, 3, cos, sin, True, kan_kernels.attention, make_gain(3)))
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


@pytest.mark.parametrize("D", [8, 16, 24, 32, 64])  # rows that are read as floats, as halves of vectors and as vectors
def test_memory_may_begin_anywhere(D):
    qkv, g, *rotation = make(2, 21, 3, D, True)

    def moved(x):
        return torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape)

    def results(*tensors):
        qkv, g, cos, sin, gain = tensors
        y = ops.attention(qkv, 3, cos, sin, True, gain)
        return y, *ops.attention_backward(g, qkv, 3, cos, sin, True, gain)

    tensors = qkv, g, *rotation, make_gain(3)
    assert all(map(torch.equal, results(*map(moved, tensors)), results(*tensors)))


@pytest.mark.parametrize("turned, qk_norm, gained", [(False, False, False), (True, True, False), (True, True, True)])
def test_well_formed_operators(turned, qk_norm, gained):
    qkv, g, *rotation = make(2, 9, 2, 6, turned)
    gain = make_gain(2).requires_grad_() if gained else None
    torch.library.opcheck(ops.attention.default, (qkv.clone().requires_grad_(), 2, *rotation, qk_norm, gain))
    gain = gain if gain is None else gain.detach()
    torch.library.opcheck(ops.attention_backward.default, (g, qkv, 2, *rotation, qk_norm, gain))


def test_well_formed_with_a_past():
    qkv, _, cos, sin = make(2, 3, 2, 6, True)
    arguments = (qkv, 2, cos, sin, True, make_gain(2), *torch.zeros(2, 2, 2, 7, 6), 4)
    torch.library.opcheck(ops.attention_cached.default, arguments)


@pytest.mark.parametrize(
    "keys, values, start, message",
    [
        (torch.zeros(2, 2, 7, 4), torch.zeros(2, 2, 7, 4), 0, r"keys and values must be \(2, 2, S, 2\)"),
        (torch.zeros(2, 2, 7, 2), torch.zeros(2, 2, 6, 2), 0, r"keys and values must be .* got \[2, 2, 6, 2\]"),
        (torch.zeros(2, 2, 7, 2), torch.zeros(2, 2, 7, 2).double(), 0, "in float32, contiguous, got .* in Double"),
        (torch.zeros(2, 7, 2, 2).mT, torch.zeros(2, 2, 7, 2), 0, "keys and values must be"),
        (torch.zeros(2, 2, 2, 7).mT, torch.zeros(2, 2, 7, 2), 0, "contiguous"),
        (torch.zeros(2, 2, 7, 2), torch.zeros(2, 2, 7, 2), 5, "5 tokens and 3 more do not fit the 7"),
        (torch.zeros(2, 2, 7, 2), torch.zeros(2, 2, 7, 2), -1, "do not fit"),
    ],
)
def test_says_what_is_wrong_with_a_past(keys, values, start, message):
    with pytest.raises(RuntimeError, match=message):
        kan_kernels.attention(torch.zeros(2, 3, 12), 2, past=(keys, values, start))


def test_no_second_derivatives():
    qkv = make(1, 4, 1, 4, False)[0].requires_grad_()
    (grad,) = torch.autograd.grad(kan_kernels.attention(qkv, 1).sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        grad.sum().backward()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((torch.zeros(2, 3, 12), 5, None, None, False, None), r"qkv must be \(B, T, 3 \* heads \* D\)"),
        ((torch.zeros(2, 12), 2, None, None, False, None), r"qkv must be \(B, T, 3 \* heads \* D\)"),
        ((torch.zeros(2, 3, 12).double(), 2, None, None, False, None), "in float32, got .* heads = 2"),
        ((torch.zeros(2, 3, 12), 2, *angles(4, 2), False, None), r"cos and sin must be \(3, 2\)"),
        ((torch.zeros(2, 3, 9), 1, torch.zeros(3, 3), torch.zeros(3, 3), False, None), "D even"),
        ((torch.zeros(2, 3, 12), 2, *torch.zeros(2, 3, 2).double(), False, None), "got .* in Double"),
        ((torch.zeros(2, 3, 12), 2, *torch.zeros(2, 3, 2, requires_grad=True), False, None), "no gradients; detach"),
        ((torch.zeros(2, 3, 12), 2, torch.zeros(3, 2), None, False, None), "come together"),
        ((torch.zeros(2, 3, 12), 2, None, None, True, torch.ones(3)), r"gain must be \(2,\) in float32"),
        ((torch.zeros(2, 3, 12), 2, None, None, True, torch.ones(2).double()), "gain must be .* got .* in Double"),
    ],
)
def test_operators_say_what_is_wrong(arguments, message):
    with pytest.raises(RuntimeError, match=message):
        ops.attention(*arguments)


def test_of_no_tokens():
    for shape in ((0, 5, 12), (2, 0, 12)):
        qkv, g = torch.zeros(shape), torch.zeros(*shape[:2], 4)
        assert ops.attention(qkv, 2, None, None, False, None).shape == g.shape
        dqkv, dgain = ops.attention_backward(g, qkv, 2, None, None, True, torch.ones(2))
        assert dqkv.shape == shape and torch.equal(dgain, torch.zeros(2))


# In the GPT -----------------------------------------------------------------------------------------------------------


def config(**options):
    return GPTConfig(**{**dict(block_size=40, vocab_size=61, n_layer=2, n_head=2, n_embd=24, mlp="gelu"), **options})


@pytest.mark.parametrize("position", ["rope", "learned"])
@pytest.mark.parametrize("norm", [dict(), dict(qk_norm=True), dict(qk_norm=True, qk_gain=1.5)])
def test_the_gpt_computes_the_same_with_and_without(position, norm, monkeypatch):
    model, tokens = GPT(config(position=position, **norm)), torch.randint(61, (3, 41))
    results, calls = [], []
    monkeypatch.setattr(
        kan_kernels, "attention", lambda *a, real=kan_kernels.attention, **k: calls.append(a) or real(*a, **k)
    )
    for available in (True, False):
        monkeypatch.setattr(kan_kernels, "available", lambda answer=available: answer)
        model.zero_grad()
        logits, loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        results.append([logits.detach(), *(p.grad.clone() for p in model.parameters())])
    assert len(calls) == 2  # the layers, once
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("position", ["rope", "learned"])
@pytest.mark.parametrize("norm", [dict(), dict(qk_norm=True), dict(qk_norm=True, qk_gain=1.5)])
def test_a_cache_holds_the_same_with_and_without(position, norm, monkeypatch):
    settings = config(position=position, **norm)
    model, tokens, results = GPT(settings), torch.randint(61, (3, 40)), []
    for available in (True, False):
        monkeypatch.setattr(kan_kernels, "available", lambda answer=available: answer)
        cache = KVCache(settings, 3, "cpu", torch.float32)
        with torch.no_grad():
            logits = [model(part, cache=cache)[0] for part in tokens.split((7, 1, 1, 20, 11), 1)]
        results.append((*logits, *cache.k, *cache.v))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_what_it_is_not_for_goes_the_other_way(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("not here")

    monkeypatch.setattr(kan_kernels, "attention", refuse)
    x, rotation = torch.randn(2, 5, 24), (torch.ones(5, 12), torch.zeros(5, 12))
    dropping = CausalSelfAttention(config(dropout=0.5), 0)
    assert dropping(x, rotation).shape == x.shape
    with pytest.raises(AssertionError, match="not here"):
        dropping.eval()(x, rotation)
    plain, cache = CausalSelfAttention(config(), 0), KVCache(config(), 2, "cpu", torch.float32)
    assert plain(x, rotation, cache).requires_grad  # with a cache it has no gradients
    with torch.no_grad(), pytest.raises(AssertionError, match="not here"):
        plain(x, rotation, cache)
    with torch.no_grad():
        assert plain(x, rotation, KVCache(config(), 2, "cpu", torch.bfloat16)).dtype == torch.float32
    assert plain.double()(x.double(), rotation).dtype == torch.float64
    plain.float()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert plain(x, rotation, cache).dtype == torch.bfloat16  # the cache is of another type
    long = torch.randn(1, 2049, 24)
    assert plain(long).shape == long.shape
    assert plain.to("meta")(x.to("meta"), [t.to("meta") for t in rotation]).shape == x.shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", [dict(), dict(qk_norm=True, qk_gain=1.5)])
def test_shorter_types_are_computed_in_float32(dtype, norm, monkeypatch):
    """Only what comes in, goes out and comes back is rounded: its gradients are those of float32, rounded."""
    layer = CausalSelfAttention(config(**norm), 0)
    if layer.q_gain is not None:
        torch.nn.init.constant_(layer.q_gain, 1.5)
    qkv, g, *rotation = make(2, 40, layer.n_head, 24 // layer.n_head, True)
    qkv, g = qkv.to(dtype), g.to(dtype)
    options = (layer.n_head, *rotation, layer.qk_norm, kan_kernels.attention)
    gain = None if layer.q_gain is None else layer.q_gain.detach()
    got, want = both(qkv, g, *options, gain), both(qkv.float(), g.float(), *options, gain)
    for a, b, kind in zip(got, want, (dtype, dtype, torch.float32), strict=False):
        assert a.dtype == kind
        assert torch.equal(a, b.to(kind))
    if gain is not None:
        gains = both(qkv, g, *options, gain.to(dtype))[2]
        assert gains.dtype == dtype

    calls = []
    monkeypatch.setattr(kan_kernels, "attention", lambda *a, **k: calls.append(a) or a[0][..., :24])
    with torch.autocast("cpu", dtype=dtype):
        assert layer(torch.randn(2, 5, 24), angles(5, 24 // layer.n_head)).dtype == dtype
    assert calls[0][0].dtype == dtype


def test_turned_as_model_py_turns():
    qkv, _, cos, sin = make(2, 9, 2, 8, True)
    q, k, v = qkv.view(2, 9, 3, 2, 8).permute(2, 0, 3, 1, 4)
    turned = torch.stack((rotate(q, cos, sin), rotate(k, cos, sin), v)).permute(1, 3, 0, 2, 4).reshape(qkv.shape)
    got, want = ops.attention(qkv, 2, cos, sin, False, None), ops.attention(turned, 2, None, None, False, None)
    torch.testing.assert_close(got, want)


def test_compiles_as_one_graph():
    model, tokens, graphs = GPT(config(mlp="kan", kan_parameterization="whitened")), torch.randint(61, (2, 20)), []
    watched = torch.compile(model, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    watched(tokens, tokens)
    for operator in ("attention", "change_basis"):
        assert str(graphs[0].graph).count(f"splinegpt_cpu.{operator}") == 2
    compiled, results = torch.compile(model, fullgraph=True, backend="aot_eager"), []
    for forward in (model, compiled):
        model.zero_grad()
        logits, loss = forward(tokens, tokens)
        loss.backward()
        results.append([logits.detach(), *(p.grad.clone() for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mlp", ["swiglu", "kan"])
def test_torch_func_and_exports_do_without(mlp):
    model, tokens = GPT(config(mlp=mlp)), torch.randint(61, (2, 20))
    parameters = dict(model.named_parameters())
    loss = lambda p: torch.func.functional_call(model, p, (tokens, tokens))[1]
    grads = torch.func.grad(loss)(parameters)
    loss(parameters).backward()
    for name, p in parameters.items():
        torch.testing.assert_close(grads[name], p.grad, rtol=1e-4, atol=1e-6)
    graph = str(torch.export.export(model, (tokens, tokens)).graph)
    assert "splinegpt_cpu" not in graph.replace("splinegpt_cpu.spline.", "")  # a KAN's layers stay what they are


def test_a_float32_model_where_that_is_not_the_default():
    model, tokens = GPT(config()), torch.randint(61, (2, 20))
    want = model(tokens, tokens)[1]
    for dtype in (torch.float64, torch.bfloat16):
        torch.set_default_dtype(dtype)
        assert torch.equal(model(tokens, tokens)[1], want)
