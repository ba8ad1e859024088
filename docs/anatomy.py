"""What the spline layers of a trained GPT have learned, in numbers, and what of it they need.

    python docs/anatomy.py out/quickstart

For every KANLayer, over tokens of the run's own validation data:

    outside      share of its inputs outside the domain, where curves go on as straight lines
    visits       of an interval of a feature: the fewest and the most, as a multiple of the mean; share never visited
    curvature    root mean square of second differences over the deviation along the knots (see plot.py): 0 if straight
    linear       share of the variance of all curves that straight lines explain

Then the validation loss of the model as it is, with every curve replaced by its best straight line, with gates at 1,
and with the least active share of edges, or as many at random, replaced by their means. An edge's activity is its
standard deviation over the same tokens.
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


def look(layer, x):
    """What one layer does with inputs x (tokens, F): facts, and three tables (F, ., O) of its edges.

    Returns a dictionary: outside, visits (F, N - 1), linear; lines (F, N, O), the best straight lines' control points;
    means (F, 1, O) and activity (F, O).
    """
    knots, table = layer.knots, layer.control_points().detach().double()
    F, N, O = table.shape
    visits, lines, variance, unexplained = torch.zeros(F, N - 1), torch.empty_like(table), 0.0, 0.0
    means, activity = torch.empty(F, 1, O, dtype=torch.float64), torch.empty(F, O, dtype=torch.float64)
    for f in range(F):
        i, t = search(x[:, f : f + 1].contiguous(), knots)
        visits[f] = torch.bincount(i.flatten(), minlength=N - 1)
        y = hats(i, t, N, torch.float64)[:, 0] @ table[f]  # (tokens, O)
        centred, deviation = x[:, f] - x[:, f].mean(), y - y.mean(0)
        slope = centred @ deviation / (centred @ centred)  # (O,), least squares
        lines[f] = y.mean(0) + (knots - x[:, f].mean()).unsqueeze(1) * slope
        variance += deviation.square().sum().item()
        unexplained += (deviation - centred.unsqueeze(1) * slope).square().sum().item()
        means[f, 0], activity[f] = y.mean(0), deviation.square().mean(0).sqrt()
    outside = ((x < knots[0]) | (x > knots[-1])).double().mean().item()
    return dict(outside=outside, visits=visits, linear=1 - unexplained / variance if variance else 1.0, lines=lines,
                means=means, activity=activity)  # fmt: skip


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
    """The loss with other control points, {layer: (F, N, O)}."""
    with restored(model):
        for layer, table in tables.items():
            layer.set_control_points(table)
        return loss_of(model, batches)


def pruned(layer, seen, drop):
    """The layer's table with the edges of the mask drop (F, O) replaced by their means."""
    return torch.where(drop.unsqueeze(1), seen["means"], layer.control_points().detach().double())


def main(arguments):
    options = cli.parse(Options, arguments)
    model, layers, info = plot.load_splines(options.run)
    windows = plot.validation_windows(info)
    if not windows:
        raise ValueError(f"{options.run} needs the data it was trained on: {info['train']['data']}")
    inputs = inputs_of(model, layers.values(), [w[:, :-1] for w in windows])
    seen = {layer: look(layer, x) for layer, x in inputs.items()}

    print("| layer | outside | visits, fewest | most | never | curvature | linear |\n|---|---|---|---|---|---|---|")
    for name, layer in layers.items():
        facts, share = seen[layer], seen[layer]["visits"] / seen[layer]["visits"].mean()
        print(
            f"| {name.removeprefix('transformer.')} | {facts['outside']:.1%} | {share.min():.2f} | {share.max():.2f} | "
            f"{(share == 0).float().mean():.1%} | {plot.curvature(layer):.2f} | {facts['linear']:.1%} |"
        )
    print("\n| model | validation loss |\n|---|---|")
    print(f"| as it is | {loss_of(model, windows):.4f} |")
    lines = loss_with(model, {layer: seen[layer]["lines"] for layer in seen}, windows)
    print(f"| every curve a straight line | {lines:.4f} |")
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
