"""Pictures of runs: loss curves of one or several, and the curves a trained KAN has learned.

    python plot.py out/kan out/mlp --against=seconds --out=loss.png
    python plot.py out/kan --curves --out=curves.png

matplotlib is imported where it is used.
"""

import os
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
    curves: bool = False  # draw the first run's splines, the most active ones of every layer, instead
    per_layer: int = 8  # of them in each layer
    out: str = "loss.png"  # the picture to write


def save_figure(figure, path):
    """Write a figure whole or not at all."""
    import matplotlib.pyplot as plt

    path = Path(path) if Path(path).suffix else Path(f"{path}.png")
    if path.suffix[1:] not in figure.canvas.get_supported_filetypes() or path.is_dir():
        raise ValueError(f"can't write a picture to {path}; name a .png, .pdf or .svg file")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    figure.savefig(temporary, dpi=150)
    os.replace(temporary, path)
    plt.close(figure)
    return path


def loss_figure(runs, path, against="steps"):
    """Training loss (faint: each step; a running mean) and validation loss (dots) of runs; returns the path."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    for number, run in enumerate(runs):
        header, records = read_log(run)
        tokens = header["config"]["batch_tokens"]
        where = {
            "steps": lambda r: r["step"],
            "tokens": lambda r, tokens=tokens: r["step"] * tokens,
            "seconds": lambda r: r.get("seconds", 0.0),
        }[against]
        color, name = f"C{number}", Path(run).name
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
    axis.legend()
    return save_figure(figure, path)


def curves_figure(run, path, per_layer=8):
    """The most active curves of every KANLayer of a run's model, a row a layer, over the knots; returns the path."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    import checkpoint
    from kan_layer import KANLayer

    model, _, _ = checkpoint.load_model(run)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, KANLayer)}
    if not layers:
        raise ValueError(f"the model in {run} has no splines: its mlp is {model.config.mlp}")
    figure, axes = plt.subplots(
        len(layers), per_layer, figsize=(1.5 * per_layer, 1.5 * len(layers)), squeeze=False, layout="constrained"
    )
    for row, (name, layer) in zip(axes, layers.items(), strict=True):
        top = layer.edge_activity().flatten().topk(min(per_layer, layer.in_features * layer.out_features)).indices
        for axis, edge in zip(row, top.tolist(), strict=False):
            f, o = divmod(edge, layer.out_features)
            axis.plot(layer.knots, layer.kan_weight[f, :, o].detach(), marker=".", markersize=3, linewidth=1)
            axis.set_title(f"{f} → {o}", fontsize=7)
            axis.tick_params(labelsize=5)
            axis.grid(True, linewidth=0.3)
        row[0].set_ylabel(name.removeprefix("transformer."), fontsize=7)
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
