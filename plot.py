"""Pictures of runs: loss curves of one or several, and a trained network: its curves or surfaces and what enters them.

    python plot.py out/kan out/mlp --against=seconds --out=loss.png
    python plot.py out/kan --curves --out=curves.png

matplotlib is imported where it is used.
"""

import math
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

import cli
from log import read_log


@dataclass
class Options:
    runs: tyro.conf.Positional[tuple[str, ...]]  # folders that train.py wrote
    against: Literal["steps", "tokens", "seconds"] = "steps"
    curves: bool = False  # draw the first run's network instead: the most active splines of every layer
    per_layer: int = 6  # of them in each layer
    out: str = "loss.png"  # the picture to write


def save_figure(figure, path, dpi=150):
    """Write a matplotlib.figure.Figure whole or not at all."""
    path = Path(path) if Path(path).suffix else Path(f"{path}.png")
    if path.suffix[1:] not in figure.canvas.get_supported_filetypes() or path.is_dir():
        raise ValueError(f"can't write a picture to {path}; name a .png, .pdf or .svg file")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    figure.savefig(temporary, dpi=dpi)
    os.replace(temporary, path)
    return path


def run_name(run):
    """As matplotlib takes it: $ begins a formula, and what begins with _ is left out of a legend."""
    return Path(run).name.lstrip("_").replace("$", r"\$")


def loss_figure(runs, path, against="steps"):
    """Training loss (faint: each step; a running mean) and validation loss (dots) of runs; returns the path."""
    from matplotlib.figure import Figure  # not pyplot, which would look for a screen, and takes a second to import

    figure = Figure(figsize=(8, 5), layout="constrained")
    axis = figure.subplots()
    for number, run in enumerate(runs):
        header, records = read_log(run)
        tokens = header["config"]["batch_tokens"]
        where = {
            "steps": lambda r: r["step"],
            "tokens": lambda r, tokens=tokens: r["step"] * tokens,
            "seconds": lambda r: r.get("seconds", 0.0),
        }[against]
        color, name = f"C{number}", run_name(run)
        steps = [r for r in records if "train_loss" in r]
        if steps:
            smooth, mean = [], steps[0]["train_loss"]
            for r in steps:
                mean += 0.05 * (r["train_loss"] - mean)
                smooth.append(mean)
            axis.plot(
                [where(r) for r in steps], [r["train_loss"] for r in steps], color=color, alpha=0.15, linewidth=0.5
            )
            axis.plot([where(r) for r in steps], smooth, color=color, linewidth=0.8, label=f"{name}, training")
        vals = [r for r in records if "val_loss" in r]
        if vals:
            label = f"{name}, validation ({vals[-1]['val_loss']:.3f})"
            axis.plot(
                [where(r) for r in vals], [r["val_loss"] for r in vals], "o-", color=color, markersize=4, label=label
            )
    axis.set_xlabel({"steps": "steps", "tokens": "tokens", "seconds": "seconds of training"}[against])
    axis.set_ylabel("loss, nats per token")
    axis.grid(True, linewidth=0.3)
    if axis.get_legend_handles_labels()[0]:
        axis.legend()
    return save_figure(figure, path)


# ----------------------------------------------------------------------------------------------------------------------
# A trained network

BLUE, ORANGE, INK = "#0072B2", "#D55E00", "#3b4148"  # the colours are Okabe and Ito's, for the colour-blind too
PALE, PALE_ORANGE = "#d9e0e8", "#f0b890"  # of histograms, inside the domain and outside
TOKENS = 16_384  # of the validation data, for the histograms
DOTS = 500  # of those, on a surface


def curvature(layer):
    """How bent a layer's curves are, all together: the root mean square of their control points' second differences,
    over their standard deviation along the knots. 0 for straight lines, sqrt(6) for unrelated control points; the same
    curves given by more knots have less. A surface's curves are its rows and its columns.
    """
    points, inner = layer.control_points().detach(), layer.num_control_points - 2
    if points.dim() == 4:  # surfaces
        bends = sum(points.diff(n=2, dim=along).square().sum().item() for along in (1, 2))
        spread = sum(points.var(dim=along).sum().item() for along in (1, 2)) * inner
    else:
        bends, spread = layer.second_difference_penalty().item(), points.var(dim=1).sum().item() * inner
    return math.sqrt(bends / spread) if spread > 0 else 0.0


def watch_inputs(model, features, batches):
    """What enters layers of a model that sees some batches, features saying which of their inputs matter:
    {layer: [f, ...]} -> {layer: (share of all its inputs outside the domain, values (tokens, features) of those)}."""
    import torch

    seen = {layer: [] for layer in features}

    def look(layer, inputs):
        x, knots = inputs[0].flatten(0, -2).float(), layer.knots
        outside = (x < knots[0].item()) | (x > knots[-1].item())
        seen[layer].append((outside.double().mean(1), x[:, features[layer]]))

    hooks = [layer.register_forward_pre_hook(look) for layer in features]
    with torch.inference_mode():
        for batch in batches:
            model(batch)
    for hook in hooks:
        hook.remove()
    parts = {layer: [torch.cat(part) for part in zip(*records, strict=True)] for layer, records in seen.items()}
    return {layer: (outside.mean().item(), x) for layer, (outside, x) in parts.items()}


def validation_windows(info):
    """Batches of a run's validation windows (8, block_size + 1), evenly spread; none, and a warning, without data."""
    import torch

    from data.bins import TokenData

    try:
        data = TokenData(info["train"]["data"], info["model"]["block_size"])
        if data.fingerprint != info["data_fingerprint"]:
            raise ValueError(f"{data.folder} holds other data than the run was trained on")
    except ValueError as error:
        warnings.warn(f"the run's inputs are not shown: {error}", stacklevel=2)
        return []
    starts = data.val_starts(TOKENS)
    return [torch.from_numpy(data.val_batch(starts[i : i + 8])) for i in range(0, len(starts), 8)]


def frame(axis, knots):
    """(left, right) of an axis for a spline's inputs, 3/8 of its domain beyond either end, whose ticks are the domain's
    ends and middle; nothing is drawn around it."""
    low, high, beyond = knots[0], knots[-1], 0.375 * (knots[-1] - knots[0])
    axis.set(xlim=(low - beyond, high + beyond), xticks=(low, (low + high) / 2, high))
    axis.tick_params(length=0, labelsize=8, labelcolor=INK)
    axis.spines[:].set_visible(False)
    return low - beyond, high + beyond


def draw_edge(axis, knots, points, x=None):
    """One curve, dashed where it goes on outside its domain, over the histogram of its inputs x where there are any."""
    import numpy as np

    left, right = frame(axis, knots)
    if x is not None:
        heights, edges = np.histogram(x, np.linspace(left, right, 29))
        for first, last, color in ((0, 6, PALE_ORANGE), (6, 22, PALE), (22, 28, PALE_ORANGE)):  # low and high are edges
            scaled = heights[first:last] / max(1, heights.max()) * 0.55  # of the axis' height
            height_of_axis = axis.get_xaxis_transform()
            axis.stairs(scaled, edges[first : last + 1], fill=True, color=color, linewidth=0, transform=height_of_axis)
    for end, inner, far in ((0, 1, left), (-1, -2, right)):
        slope = (points[end] - points[inner]) / (knots[end] - knots[inner])
        beyond = points[end] + slope * (far - knots[end])
        axis.plot((knots[end], far), (points[end], beyond), "--", color=BLUE, linewidth=1)
        axis.axvline(knots[end], color=INK, linewidth=0.5, alpha=0.5)
    axis.plot(knots, points, "o-", color=BLUE, linewidth=1.8, markersize=3)
    axis.set_axisbelow(True)
    axis.locator_params(axis="y", nbins=4)
    axis.grid(True, color="#e8ebef", linewidth=0.6)


def draw_surface(axis, knots, points, scale, x=None):
    """One surface, points (N, N), on its domain, blue at -scale and orange at scale, and some inputs x, pairs."""
    import numpy as np
    from matplotlib.colors import LinearSegmentedColormap

    low, high = knots[0], knots[-1]
    fine = np.linspace(low, high, 97)
    rows = np.stack([np.interp(fine, knots, row) for row in points])
    values = np.stack([np.interp(fine, knots, column) for column in rows.T])  # (second input, first): up, and across
    colors = LinearSegmentedColormap.from_list("", [BLUE, "white", ORANGE])
    how = dict(origin="lower", aspect="auto", vmin=-scale, vmax=scale, cmap=colors)
    axis.imshow(values, extent=(low, high, low, high), **how)
    if x is not None:
        x = x[:: max(1, len(x) // DOTS)]
        outside = (abs(x) > high).any(1)
        for part, color in ((x[~outside], INK), (x[outside], PALE_ORANGE)):
            axis.scatter(*part.T, s=2, color=color, alpha=0.4, linewidths=0)
    limits = frame(axis, knots)  # at the end, since a picture sets limits of its own
    axis.set(ylim=limits, yticks=axis.get_xticks())


def load_splines(run):
    """(model, {name: KANLayer or KANPairLayer}, info) of a run's folder; ValueError if it has none."""
    import checkpoint

    model, _, info = checkpoint.load_model(run)
    layers = {name: module for name, module in model.named_modules() if module in model.kan_layers()}
    if not layers:
        raise ValueError(f"the model in {run} has no curves: its mlp is {model.config.mlp}")
    return model, layers, info


def curves_figure(run, path, per_layer=6):
    """A trained network, a row a layer: its most active curves or surfaces and what enters them, the share of its
    inputs outside the domain, and its curvature. Returns the path.

    Inputs are those of the run's validation data; without it, curves and curvature are drawn alone.
    """
    from matplotlib.figure import Figure

    if per_layer < 1:
        raise ValueError(f"per_layer must be at least 1, got {per_layer}")
    model, layers, info = load_splines(run)
    surfaces, edges = model.config.kan_pairs, {}
    each = 2 if surfaces else 1  # inputs of a spline, which are neighbours
    for layer in layers.values():
        activity = layer.edge_activity().flatten()
        top = activity.topk(min(per_layer, len(activity))).indices.tolist()
        edges[layer] = [divmod(edge, layer.out_features) for edge in top]
    batches = [windows[:, :-1] for windows in validation_windows(info)]
    wanted = {layer: [each * p + k for p, _ in found for k in range(each)] for layer, found in edges.items()}
    inputs = watch_inputs(model, wanted, batches) if batches else {}

    shape, size, widths = (len(layers), per_layer + 1), (10.5, 1 + 1.4 * len(layers)), [1] * per_layer + [0.75]
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(*shape, squeeze=False, width_ratios=widths)
    for number, ((name, layer), row) in enumerate(zip(layers.items(), axes, strict=True), start=1):
        knots, table = layer.knots.numpy(), layer.control_points().detach().cpu().double().numpy()
        drawn = [table[p, ..., o] for p, o in edges[layer]]
        low, high = min(points.min() for points in drawn), max(points.max() for points in drawn)
        scale, margin = max(-low, high) or 1.0, 0.1 * (high - low) or 1.0  # one scale a row
        for k, points in enumerate(drawn):
            mine = slice(each * k, each * (k + 1))
            x = inputs[layer][1][:, mine].numpy() if inputs else None
            if surfaces:
                draw_surface(row[k], knots, points, scale, x)
            else:
                draw_edge(row[k], knots, points, x)
                row[k].set_ylim(low - margin, high + margin)
            enters = ", ".join(map(str, wanted[layer][mine]))
            row[k].set_title(f"{enters} → {edges[layer][k][1]}", fontsize=9, color=INK, pad=3)
            row[k].tick_params(labelleft=k == 0, labelbottom=number == len(layers))
        for axis in row[len(drawn) :]:
            axis.axis("off")
        row[0].set_ylabel(name.removeprefix("transformer."), fontsize=9, color=INK)
        facts = [(f"{curvature(layer):.2f}", "curvature", BLUE)]
        if inputs:
            facts.append((f"{inputs[layer][0]:.1%}", "of inputs outside", ORANGE))
        if surfaces:
            facts.append((f"±{scale:.2g}", "blue to orange", INK))
        apart, large = (0.32, 12) if surfaces else (0.5, 15)
        for place, (value, label, color) in enumerate(facts):
            row[-1].text(0, 0.1 + place * apart + 0.01 * large, value, fontsize=large, color=color, weight="bold")
            row[-1].text(0, 0.1 + place * apart, label, fontsize=9, color=color)
    figure.align_ylabels(axes[:, 0])
    loss = "" if info["best_val_loss"] is None else f", best validation loss {info['best_val_loss']:.3f}"
    title = f"{run_name(run)}: what it learned in {info['step']:,} steps{loss}"
    figure.suptitle(title, x=0.01, ha="left", fontsize=14, color=INK, weight="bold")
    if surfaces:
        caption = (
            "The most active surfaces of each KANPairLayer, input channels → output channel, the first input across."
        )
        behind = "On them some of the pairs that enter, orange outside the domain. " if inputs else ""
    else:
        caption = (
            "The most active curves of each KANLayer, input channel → output channel, dashed where they go on outside "
            "their domain."
        )
        behind = "Behind them the histogram of what enters, orange outside the domain. " if inputs else ""
    caption += f"\n{behind}Curvature: 0 for straight lines, 2.45 for unrelated control points."
    figure.supxlabel(caption, x=0.01, ha="left", fontsize=9, color=INK)
    return save_figure(figure, path)


def main(arguments):
    options = cli.parse(Options, arguments)
    if not options.runs:
        raise ValueError("name at least one folder that train.py wrote")
    if options.curves:
        print(curves_figure(options.runs[0], options.out, options.per_layer))
    else:
        print(loss_figure(options.runs, options.out, options.against))


if __name__ == "__main__":
    cli.run(main)
