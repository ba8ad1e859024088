"""Muon (Jordan et al., https://kellerjordan.github.io/posts/muon) on a CPU.

A matrix's step is its momentum, with a little more of the last gradient, all singular values made about 1 by
Newton-Schulz iterations, a handful of matrix products. torch.optim.Muon does them in bfloat16 whatever it runs on. A
CPU without products of those took 7.8 s for a step of a swiglu GPT 256 wide, where AdamW's took 0.22, and takes 0.39 in
float32 (Zen 3, one thread). One that has them multiplies small matrices faster in float32: for a swiglu GPT 64 wide
Muon takes half of torch's time, 4.8 ms and not 9.5 (Zen 4, one thread).

    x = m / |m|    five times: g = x x^T, p = a + b g + c g g, x = p x    W -= lr (0.2 sqrt(longer side) x + decay W)
"""

import math

import torch


class CpuMuon(torch.optim.Muon):
    """torch.optim.Muon(adjust_lr_fn="match_rms_adamw"), with the same state."""

    @torch.no_grad()
    def step(self, closure=None):
        assert closure is None
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            assert group["nesterov"] and group["adjust_lr_fn"] == "match_rms_adamw"
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p.grad)
                buffer = state["momentum_buffer"].lerp_(p.grad, 1 - momentum)
                direction = orthogonal(p.grad.lerp(buffer, momentum), group)
                p.mul_(1 - lr * group["weight_decay"]).add_(direction, alpha=-0.2 * lr * math.sqrt(max(p.shape)))


def orthogonal(matrix, group):
    """The matrix with singular values near 1; a large one of float32 in bfloat16, where the CPU multiplies that."""
    a, b, c = group["ns_coefficients"]
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix  # the smaller of the two products x x^T
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    # At 128 rows both types take as long: Zen 4, one thread.
    rounded = x.dtype == torch.float32 and len(x) > 128 and torch.cpu._is_avx512_bf16_supported()
    x = x.bfloat16() if rounded else x
    x = x / x.norm().clamp(min=group["eps"])
    if rounded:  # as torch.optim.Muon; what is saved below would let singular values grow to 5 and more
        for _ in range(group["ns_steps"]):
            g = x @ x.T
            x = torch.addmm(x, torch.addmm(g, g, g, beta=b, alpha=c), x, beta=a)
    elif 2 * x.shape[1] > 3 * x.shape[0]:
        # x is only ever multiplied by polynomials of g, and g by their squares, so the long one is needed at both ends
        # alone, which from here on takes fewer flops: a swiglu block 64, 128 and 256 wide takes 0.94, 0.76 and 0.74 of
        # the time (Zen 3, one thread).
        g = x @ x.T
        product = p = polynomial(g, a, b, c)
        for _ in range(group["ns_steps"] - 1):
            g = p @ g @ p
            p = polynomial(g, a, b, c)
            product = p @ product
        x = product @ x
    else:
        for _ in range(group["ns_steps"]):
            x = polynomial(x @ x.T, a, b, c) @ x
    return x.T if tall else x


def polynomial(g, a, b, c):
    """a + b g + c g g, the a on the diagonal."""
    p = torch.addmm(g, g, g, beta=b, alpha=c)
    p.diagonal().add_(a)
    return p
