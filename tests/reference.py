"""The layers as their definitions read: sums of hat functions, in float64 NumPy, one token, feature and knot at a time.

Slow on purpose, and written without looking at the layers' code: every implementation is held to it. Besides the values
it returns how large the terms of each sum were, which is what rounding errors are proportional to.
"""

import numpy as np


def hat_weights(x, N, width):
    """(N,) weights of the knots for one input: two are not zero, and they add up to 1 also outside the domain."""
    step = width / (N - 1)
    position = (x + width / 2) / step
    interval = int(min(max(np.floor(position), 0), N - 2))
    weights = np.zeros(N)
    weights[interval] = interval + 1 - position
    weights[interval + 1] = position - interval
    return weights, interval


def reference(x, table, width, g):
    """For x (B, F), table (F, N, O) and the output's gradient g (B, O), all float64.

    Returns y (B, O), grad_table (F, N, O), the one-sided slopes' grad_x to the left and to the right of x (B, F), and
    the magnitudes of y and grad_table: the same sums over absolute values, with the positions' own rounding included.
    """
    B, F = x.shape
    _, N, O = table.shape
    step = width / (N - 1)
    y, y_size = np.zeros((B, O)), np.zeros((B, O))
    grad_table, grad_table_size = np.zeros_like(table), np.zeros_like(table)
    left, right, grad_x_size = np.zeros((B, F)), np.zeros((B, F)), np.zeros((B, F))
    for b in range(B):
        for f in range(F):
            weights, interval = hat_weights(x[b, f], N, width)
            y[b] += weights @ table[f]
            # A position is rounded in proportion to the numbers it is made from, and every slope carries that on.
            position_size = (abs(x[b, f]) + width / 2) / step
            slopes = np.diff(table[f], axis=0)
            near = [min(max(interval + k, 0), N - 2) for k in (-1, 0, 1)]
            y_size[b] += np.abs(weights) @ np.abs(table[f]) + position_size * np.abs(slopes[near]).max(0)
            grad_table[f] += np.outer(weights, g[b])
            sizes = np.abs(weights)
            for k in near:
                sizes[k] += position_size
                sizes[k + 1] += position_size
            grad_table_size[f] += np.outer(sizes, np.abs(g[b]))
            eps = 1e-6 * max(1.0, position_size) * step
            for side, out in ((-eps, left), (eps, right)):
                _, interval = hat_weights(x[b, f] + side, N, width)
                out[b, f] = g[b] @ slopes[interval] / step
            grad_x_size[b, f] = (np.abs(g[b]) @ (np.abs(table[f]).max(0))) * 2 / step
    return y, grad_table, left, right, y_size, grad_table_size, grad_x_size


def pairs_reference(x, table, width, g):
    """For x (B, 2 P), table (P, N, N, O) and the output's gradient g (B, O), all float64: what reference returns."""
    B, F = x.shape
    P, N, _, O = table.shape
    step = width / (N - 1)
    y, y_size = np.zeros((B, O)), np.zeros((B, O))
    grad_table, grad_table_size = np.zeros_like(table), np.zeros_like(table)
    left, right, grad_x_size = np.zeros((B, F)), np.zeros((B, F)), np.zeros((B, F))
    for b in range(B):
        for p in range(P):
            weights, sizes, corners = [], [], []
            for f in (2 * p, 2 * p + 1):
                along, interval = hat_weights(x[b, f], N, width)
                # All four corners may be made of 1, s, t and s t: a small (1 - s) (1 - t) of larger terms. Near
                # a knot they may be those of the next cell.
                beside = np.abs(np.arange(N) - interval - 0.5) < 2
                corners.append(beside * (1 + np.abs(along).max()))
                # As in reference: how far rounding may move a position, in the weights of all knots it may come near.
                moved = np.abs(along)
                for k in range(max(interval - 1, 0), min(interval + 3, N)):
                    moved[k] += 2 * (abs(x[b, f]) + width / 2) / step
                weights.append(along)
                sizes.append(moved)
            both = np.outer(*weights)
            size = np.outer(sizes[0], np.abs(weights[1])) + np.outer(np.abs(weights[0]), sizes[1]) + np.outer(*corners)
            y[b] += np.einsum("ij,ijo->o", both, table[p])
            y_size[b] += np.einsum("ij,ijo->o", size, np.abs(table[p]))
            grad_table[p] += both[:, :, None] * g[b]
            grad_table_size[p] += size[:, :, None] * np.abs(g[b])
            # Curves along one input, the other held: their slopes on both sides.
            for k, curves in enumerate(
                (np.einsum("j,ijo->io", weights[1], table[p]), np.einsum("i,ijo->jo", weights[0], table[p]))
            ):
                f = 2 * p + k
                slopes = np.diff(curves, axis=0) / step
                eps = 1e-6 * max(1.0, (abs(x[b, f]) + width / 2) / step) * step
                for side, out in ((-eps, left), (eps, right)):
                    out[b, f] = g[b] @ slopes[hat_weights(x[b, f] + side, N, width)[1]]
                other = sizes[1 - k].sum()
                grad_x_size[b, f] = np.abs(g[b]) @ np.abs(table[p]).max((0, 1)) * 2 / step * other
    return y, grad_table, left, right, y_size, grad_table_size, grad_x_size
