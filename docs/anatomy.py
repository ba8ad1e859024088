"""What the spline layers of a trained GPT have learned, in numbers, and what of it they need.

    python docs/anatomy.py out/quickstart

For every layer of curves or surfaces, over tokens of the run's own validation data:

    outside      share of its inputs outside the domain, where curves go on as straight lines
    visits       of an interval of a feature (of surfaces a cell of a pair): the fewest and the most, as a multiple of
                 the mean; share never visited
    curvature    root mean square of second differences over the deviation along the knots (see plot.py): 0 if straight
    linear       share of the variance of all curves that straight lines explain, of surfaces planes
    additive     share of the surfaces' variance that sums of two curves explain, one of each input

Then the validation loss of the model as it is, with every curve or surface replaced by the best such fit, with gates at
1, and with the least active share of edges, or as many at random, replaced by their means. An edge is one curve or
surface; its activity is its standard deviation over the same tokens.
"""

import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import cli
import plot
from kan_pairs import knot_weights
from kan_parameterizations import hats, search

SHARES = (0.25, 0.5, 0.75, 0.9)  # of edges that are pruned
RANDOM = 3  # draws of edges to prune at random


@dataclass
class Options:
    run: tyro.conf.Positional[str]  # a folder that train.py wrote
    seed: int = 1  # of the random pruning


def inputs_of(model, layers, batches):
    """{layer: what enters it (tokens, F)}"""
    found = plot.watch_inputs(model, {layer: list(range(layer.in_features)) for layer in layers}, batches)
    return {layer: x.double() for layer, (_, x) in found.items()}


def designs(x, along):
    """What the fits to inputs x (tokens, 1 or 2) are made of, along being the hats there, (tokens, 1 or 2, N): {kind:
    (tokens, terms)}. Curves have no second kind, which would be they themselves."""
    kinds = {"linear": torch.cat((torch.ones(len(x), 1), x), dim=1), "additive": along.flatten(1)}
    return kinds if x.shape[1] == 2 else {"linear": kinds["linear"]}


def look(layer, x):
    """What one layer does with inputs x (tokens, F): facts, and three kinds of tables of its edges, each (P, K, O), P
    being features of curves or pairs of surfaces, K the control points of one, N or N^2.

    Returns a dictionary: outside, visits (P, cells); fits, {"linear", of surfaces "additive": (share of the variance
    that is explained, the best fits' control points)}; means (P, 1, O) and activity (P, O).
    """
    knots, N, table = layer.knots, layer.num_control_points, layer.control_points().detach().double()
    table = table.reshape(len(table), -1, layer.out_features)
    each = layer.in_features // len(table)  # inputs of a spline, 1 or 2
    at = torch.cartesian_prod(*[knots] * each).view(-1, each)  # the control points' inputs (K, each)
    at_knots = designs(at, hats(*search(at, knots), N))
    visits, variance, unexplained = torch.zeros(len(table), (N - 1) ** each), 0.0, dict.fromkeys(at_knots, 0.0)
    fitted, means, activity = {kind: torch.empty_like(table) for kind in at_knots}, [], []
    for p, inputs in enumerate(x.split(each, dim=1)):
        i, t = search(inputs.contiguous(), knots)
        along = hats(i, t, N)  # (tokens, each, N)
        if each == 1:
            cells, weights = i[:, 0], along[:, 0]
        else:
            cells, weights = i[:, 0] * (N - 1) + i[:, 1], knot_weights(along[:, :1], along[:, 1:], along.dtype)
        visits[p] = torch.bincount(cells, minlength=visits.shape[1])
        y = weights @ table[p]  # (tokens, O)
        mean = y.mean(0, keepdim=True)
        for kind, terms in designs(inputs, along).items():
            inverse = torch.linalg.pinv(terms.T @ terms, hermitian=True)  # least squares; where there are no visits, 0
            solution = inverse @ (terms.T @ (y - mean))
            fitted[kind][p] = mean + at_knots[kind] @ solution
            unexplained[kind] += (y - mean - terms @ solution).square().sum().item()
        variance += (y - mean).square().sum().item()
        means.append(mean)
        activity.append((y - mean).square().mean(0).sqrt())
    outside = ((x < knots[0]) | (x > knots[-1])).double().mean().item()
    fits = {kind: (1 - unexplained[kind] / variance if variance else 1.0, fit) for kind, fit in fitted.items()}
    return dict(outside=outside, visits=visits, fits=fits, means=torch.stack(means), activity=torch.stack(activity))


@torch.inference_mode()
def loss_of(model, batches):
    total = sum(model(windows[:, :-1], windows[:, 1:])[1].item() * len(windows) for windows in batches)
    return total / sum(map(len, batches))


@contextlib.contextmanager
def restored(model):
    """What is done to the model's parameters within is undone at the end."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        with torch.no_grad():
            yield
    finally:
        model.load_state_dict(before)


def loss_with(model, tables, batches):
    """The loss with other control points, {layer: (P, K, O)}."""
    with restored(model):
        for layer, table in tables.items():
            layer.set_control_points(table.view_as(layer.kan_weight))
        return loss_of(model, batches)


def pruned(layer, seen, drop):
    """The layer's table (P, K, O) with the edges of the mask drop (P, O) replaced by their means."""
    table = layer.control_points().detach().double().reshape(len(drop), -1, layer.out_features)
    return torch.where(drop.unsqueeze(1), seen["means"], table)


def main(arguments):
    options = cli.parse(Options, arguments)
    model, layers, info = plot.load_splines(options.run)
    windows = plot.validation_windows(info)
    if not windows:
        raise ValueError(f"{options.run} needs the data it was trained on: {info['train']['data']}")
    inputs = inputs_of(model, layers.values(), [w[:, :-1] for w in windows])
    seen = {layer: look(layer, x) for layer, x in inputs.items()}

    replaced = {"linear": "every curve a straight line"}
    if model.config.kan_pairs:
        replaced = {"linear": "every surface a plane", "additive": "every surface a sum of two curves"}
    print(f"| layer | outside | visits, fewest | most | never | curvature | {' | '.join(replaced)} |")
    print("|---" * (6 + len(replaced)) + "|")
    for name, layer in layers.items():
        facts, share = seen[layer], seen[layer]["visits"] / seen[layer]["visits"].mean()
        explained = " | ".join(f"{share:.1%}" for share, _ in facts["fits"].values())
        print(
            f"| {name.removeprefix('transformer.')} | {facts['outside']:.1%} | {share.min():.2f} | {share.max():.2f} | "
            f"{(share == 0).float().mean():.1%} | {plot.curvature(layer):.2f} | {explained} |"
        )
    print("\n| model | validation loss |\n|---|---|")
    print(f"| as it is | {loss_of(model, windows):.4f} |")
    for kind, what in replaced.items():
        loss = loss_with(model, {layer: facts["fits"][kind][1] for layer, facts in seen.items()}, windows)
        print(f"| {what} | {loss:.4f} |")
    if model.config.kan_gate:
        with restored(model):
            for block in model.transformer.h:
                block.mlp.c_gate.weight.zero_()
            print(f"| gates at 1 | {loss_of(model, windows):.4f} |")
    print("\n| edges pruned | least active | at random |\n|---|---|---|")
    generator = torch.Generator().manual_seed(options.seed)
    for share in SHARES:
        drops = {layer: facts["activity"] <= facts["activity"].quantile(share) for layer, facts in seen.items()}
        least = loss_with(model, {layer: pruned(layer, seen[layer], drops[layer]) for layer in seen}, windows)
        chance = []
        for _ in range(RANDOM):
            drops = {la: torch.rand(f["activity"].shape, generator=generator) < share for la, f in seen.items()}
            chance.append(loss_with(model, {la: pruned(la, seen[la], drops[la]) for la in seen}, windows))
        print(f"| {share:.0%} | {least:.4f} | {sum(chance) / RANDOM:.4f} |")


if __name__ == "__main__":
    cli.run(main)
