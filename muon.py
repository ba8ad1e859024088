"""Muon (Jordan et al., https://kellerjordan.github.io/posts/muon) for matrices, and for the tables of splines; NorMuon
(Li et al., arXiv 2510.05491).

A matrix's step is its momentum, with a little more of the last gradient, all singular values made about 1 by
Newton-Schulz iterations, a handful of matrix products. A table's (F, N, O) is that of the one matrix (F N, O).

    x = m / |m|    five times: g = x x^T, p = a + b g + c g g, x = p x    W -= lr (0.2 sqrt(longer side) x + decay W)

NorMuon makes the rows of x about equally long, and leaves |x| as it was: each is divided by what its numbers have been
lately, v = mean of x^2 over a row, averaged over steps. A row is an output's of a matrix, and a control point's of a
table: one whose cell is seldom visited takes steps as large as the others', as by AdamW.

torch.optim.Muon takes no tables, and does the products in bfloat16 whatever it runs on. A CPU without products of those
took 7.8 s for a step of a swiglu GPT 256 wide, where AdamW's took 0.22, and takes 0.39 in float32 (Zen 3, one thread).
One that has them multiplies small matrices faster in float32: for a swiglu GPT 64 wide Muon takes half of torch's time,
4.8 ms and not 9.5 (Zen 4, one thread).
"""

import math

import torch

from device import multiplies_bfloat16

COEFFICIENTS, STEPS = (3.4445, -4.7750, 2.0315), 5  # of Newton-Schulz, as published


class Muon(torch.optim.Optimizer):
    """torch.optim.Muon(adjust_lr_fn="match_rms_adamw"), with the same state, for matrices and for (F, N, O) tables.

    row_beta: of the average over steps, 0.95 in NorMuon's paper; 0, Muon, leaves rows as they are.
    """

    def __init__(self, params, lr=1e-3, weight_decay=0.1, momentum=0.95, row_beta=0.0):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum, row_beta=row_beta))

    @torch.no_grad()
    def step(self, closure=None):
        assert closure is None
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            row_beta = group.get("row_beta", 0.0)  # of a checkpoint from before there was NorMuon
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p.grad)
                buffer = state["momentum_buffer"].lerp_(p.grad, 1 - momentum)
                direction = orthogonal(p.grad.lerp(buffer, momentum).flatten(0, -2))
                if row_beta:
                    x = direction.to(p.dtype)  # the average would stand still in bfloat16
                    squares = x.square().mean(1, keepdim=True)
                    average = state.setdefault("row_squares", squares.clone()).lerp_(squares, 1 - row_beta)
                    x = x / (average.sqrt() + 1e-8)
                    direction = x * (direction.norm() / x.norm().clamp(min=1e-7))
                size = 0.2 * lr * math.sqrt(max(direction.shape))  # as large as a step of AdamW's (arXiv 2502.16982)
                p.mul_(1 - lr * group["weight_decay"]).add_(direction.reshape(p.shape), alpha=-size)


def orthogonal(matrix):
    """The matrix with singular values near 1. One of float32 in bfloat16, on a CPU if that is large and the CPU
    multiplies those."""
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix  # the smaller of the two products x x^T
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    # At 128 rows both types take as long: Zen 4, one thread.
    fast = x.device.type != "cpu" or (len(x) > 128 and multiplies_bfloat16())
    rounded = x.dtype == torch.float32 and fast
    x = x.bfloat16() if rounded else x
    x = x / x.norm().clamp(min=1e-7)
    if rounded:  # as torch.optim.Muon; what is saved below would let singular values grow to 5 and more
        for _ in range(STEPS):
            g = x @ x.T
            x = torch.addmm(x, torch.addmm(g, g, g, beta=b, alpha=c), x, beta=a)
    elif 2 * x.shape[1] > 3 * x.shape[0]:
        # x is only ever multiplied by polynomials of g, and g by their squares, so the long one is needed at both ends
        # alone, which from here on takes fewer flops: a swiglu block 64, 128 and 256 wide takes 0.94, 0.76 and 0.74 of
        # the time (Zen 3, one thread).
        g = x @ x.T
        product = p = polynomial(g, a, b, c)
        for _ in range(STEPS - 1):
            g = p @ g @ p
            p = polynomial(g, a, b, c)
            product = p @ product
        x = product @ x
    else:
        for _ in range(STEPS):
            x = polynomial(x @ x.T, a, b, c) @ x
    return x.T if tall else x


def polynomial(g, a, b, c):
    """a + b g + c g g, the a on the diagonal."""
    p = torch.addmm(g, g, g, beta=b, alpha=c)
    p.diagonal().add_(a)
    return p
