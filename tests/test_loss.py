"""The C++ cross-entropy (kan_kernels/loss.cpp) against PyTorch's in float64, and in the GPT."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import kan_kernels
from model import GPT, GPTConfig

assert kan_kernels.available()
ops = torch.ops.splinegpt_cpu


def make(M, V, seed=0, scale=1.0, ignored=0.0):
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(V, (M,), generator=generator)
    targets[torch.rand(M, generator=generator) < ignored] = -100
    return scale * torch.randn(M, V, generator=generator), targets


def both(logits, targets, cross_entropy, g=1.0):
    """The loss and, for a loss weighed with g, the gradient of the logits."""
    logits = logits.clone().requires_grad_()
    loss = cross_entropy(logits, targets)
    return loss.detach(), *torch.autograd.grad(loss * g, logits)


@settings(max_examples=200, deadline=None)
@given(
    M=st.integers(1, 70),
    V=st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 65, 256, 1000, 5003])),
    scale=st.sampled_from([1e-3, 1.0, 30.0]),
    ignored=st.sampled_from([0.0, 0.3]),
    g=st.sampled_from([1.0, -0.25, 0.0]),
    threads=st.sampled_from([1, 2]),
    seed=st.integers(0, 2**31),
)
def test_any_shape_matches_the_reference(M, V, scale, ignored, g, threads, seed):
    logits, targets = make(M, V, seed, scale, ignored)
    targets[0].clamp_(min=0)  # one at least counts
    torch.set_num_threads(threads)
    loss, grad = both(logits, targets, kan_kernels.cross_entropy, g)
    want, want_grad = both(logits.double(), targets, F.cross_entropy, g)
    # Both are made of differences of a logit and the logarithm of a sum.
    rounding = 2e-7 * (1 + logits.abs().max() + want)
    assert (loss - want).abs() <= rounding
    torch.testing.assert_close(
        grad.double(), want_grad, rtol=1e-6, atol=abs(g) * rounding.item() / (targets >= 0).sum().item()
    )


@pytest.mark.parametrize("V", [5, 40, 256])
def test_of_bfloat16_only_the_gradient_is_rounded(V):
    logits, targets = make(33, V, scale=3.0, ignored=0.2)
    logits = logits.bfloat16()
    loss, grad = both(logits, targets, kan_kernels.cross_entropy, 0.3)
    want, want_grad = both(logits.float(), targets, kan_kernels.cross_entropy, 0.3)
    assert loss.dtype == torch.float32 and grad.dtype == torch.bfloat16
    assert torch.equal(loss, want) and torch.equal(grad, want_grad.bfloat16())
    logits[1, 2] = torch.nan
    targets[1] = 3
    loss, grad = both(logits, targets, kan_kernels.cross_entropy)
    assert loss.isnan() and grad[1].isnan().all() and not grad[2:].isnan().any()


def test_logits_that_are_not_numbers():
    logits, targets = make(5, 20)
    logits[1, 3], logits[2, 19], logits[3, 4] = torch.nan, torch.inf, -torch.inf
    targets[3] = 5
    loss, grad = both(logits, targets, kan_kernels.cross_entropy)
    want, want_grad = both(logits, targets, F.cross_entropy)
    assert loss.isnan() and want.isnan()
    torch.testing.assert_close(grad, want_grad, equal_nan=True)


def test_far_apart():
    """Where all but one have no probability, which is the right one or another."""
    logits, targets = torch.zeros(2, 50), torch.tensor([7, 8])
    logits[:, 7] = 1e4
    for got, want in zip(
        *(both(logits, targets, f) for f in (kan_kernels.cross_entropy, F.cross_entropy)), strict=True
    ):
        torch.testing.assert_close(got, want)


def test_without_a_target():
    logits, targets = make(3, 9, ignored=1.0)
    loss, grad = both(logits, targets, kan_kernels.cross_entropy)
    assert loss.isnan() and torch.equal(grad, torch.zeros(3, 9))  # as PyTorch has it
    assert kan_kernels.cross_entropy(torch.zeros(0, 9), targets[:0]).isnan()


def test_does_not_depend_on_the_number_of_threads_or_the_strides():
    logits, targets = make(70, 513, ignored=0.2)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(both(logits, targets, kan_kernels.cross_entropy))
    strided = torch.stack((targets, targets), 1)[:, 0]
    results.append(both(logits.T.contiguous().T, strided, kan_kernels.cross_entropy))
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


def test_well_formed_operators():
    numbers, targets = make(6, 11, ignored=0.3)
    for logits in (numbers, numbers.bfloat16()):
        torch.library.opcheck(ops.cross_entropy.default, (logits.clone().requires_grad_(), targets))
        lse = ops.cross_entropy(logits, targets)[1]
        torch.library.opcheck(ops.cross_entropy_backward.default, (torch.tensor(0.5), logits, targets, lse))


def test_keeps_a_number_for_each_token():
    logits, targets = make(6, 1000)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        kan_kernels.cross_entropy(logits.requires_grad_(), targets)
    others = [t for t in kept if t.data_ptr() not in (logits.data_ptr(), targets.data_ptr())]
    assert len(kept) == 3 and sum(t.numel() for t in others) == 6


def test_no_second_derivatives():
    logits, targets = make(4, 9)
    (grad,) = torch.autograd.grad(
        kan_kernels.cross_entropy(logits.requires_grad_(), targets), logits, create_graph=True
    )
    with pytest.raises(RuntimeError, match="no second derivatives"):
        grad.sum().backward()


def test_second_derivatives_in_float64():
    logits, targets = make(4, 9)
    assert torch.autograd.gradgradcheck(
        lambda x: kan_kernels.cross_entropy(x, targets).double(), logits.double().requires_grad_(), eps=1e-3, atol=1e-2
    )

    def second(cross_entropy, x):
        x = x.requires_grad_()
        (grad,) = torch.autograd.grad(cross_entropy(x, targets), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), x)[0]

    got, want = second(kan_kernels.cross_entropy, logits.double()), second(F.cross_entropy, logits.double())
    assert (got - want).abs().max() < 1e-5 * want.abs().max()  # its sums are in float32


@pytest.mark.parametrize(
    "logits, targets, message",
    [
        (torch.zeros(3, 4), torch.tensor([0, 4, 1]), "target 4 is not among the 4 of the vocabulary"),
        (torch.zeros(3, 4), torch.tensor([0, -1, 1]), "target -1 is not among the 4"),
        (torch.zeros(3, 4), torch.zeros(2, dtype=torch.long), r"targets must be \(3,\) in int64, got \[2\]"),
        (torch.zeros(3, 4), torch.zeros(3), r"targets must be \(3,\) in int64, got \[3\] in Float"),
        (torch.zeros(3, 4).double(), torch.zeros(3, dtype=torch.long), r"logits must be \(M, V\) in float32"),
        (torch.zeros(3, 0), torch.zeros(3, dtype=torch.long), r"logits must be \(M, V\) in float32"),
    ],
)
def test_operators_say_what_is_wrong(logits, targets, message):
    with pytest.raises((RuntimeError, IndexError), match=message):
        ops.cross_entropy(logits, targets)


# In the GPT -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [dict(), dict(logit_softcap=5.0), dict(tie_head=False)])
def test_the_gpt_computes_the_same_with_and_without(options, monkeypatch):
    model = GPT(GPTConfig(block_size=40, vocab_size=61, n_layer=2, n_head=2, n_embd=24, mlp="gelu", **options))
    tokens, results, calls = torch.randint(61, (3, 41)), [], []
    real = ops.cross_entropy
    monkeypatch.setattr(ops, "cross_entropy", lambda *a: calls.append(a) or real(*a))
    for available in (True, False):
        monkeypatch.setattr(kan_kernels, "available", lambda answer=available: answer)
        model.zero_grad()
        loss = model(tokens[:, :-1], tokens[:, 1:])[1]
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    assert len(calls) == 1
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_what_it_is_not_for_goes_the_other_way(monkeypatch):
    def refuse(*arguments):
        raise AssertionError("not here")

    monkeypatch.setattr(ops, "cross_entropy", refuse)
    logits, targets = make(6, 11)
    assert kan_kernels.cross_entropy(logits.double(), targets).dtype == torch.float32
    assert kan_kernels.cross_entropy(logits.to("meta"), targets.to("meta")).shape == ()
    compiled = torch.compile(kan_kernels.cross_entropy, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits, targets), F.cross_entropy(logits, targets))
    for other in (logits, logits.bfloat16()):
        with pytest.raises(AssertionError, match="not here"):
            kan_kernels.cross_entropy(other, targets)
