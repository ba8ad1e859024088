"""The KAN's loss less the MLP's, by corpus and size: the picture of docs/results.md, and the numbers in it.

    python docs/leads.py [--out docs/results/leads.png]

It reads what ablate.py left in docs/results and trains nothing; the three corpora must be prepared, by which runs are
known. Above, the difference of means over seeds with its standard error: below zero the KAN is better. Below, loss
against seconds of training in five of those comparisons, the mean with its standard error as a band.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ablate
import cli
from bench import markdown
from plot import save_figure

CORPORA = dict(shakespeare_char="tiny Shakespeare", python_stdlib="the library", debian_handbook="the handbook")
LARGE, SMALLER, TOKENS = "the MLP as large", "the best smaller MLP", "the MLP as large, bfloat16, 1,536 tokens a step"
KAN, KAN_BY_TOKENS = "kan_muon_3_layers", "kan_tables_muon"
KANS_OF_PAIRS = "kan_pairs_64_no_gate", "kan_pairs_96_no_gate", "kan_pairs_112_no_gate", "kan_pairs_112_more_decay"
KANS_AS_LARGE = "kan_pairs_64_5_points", "kan_pairs_96_7_points", "kan_pairs_96_15_points", "kan_pairs_96_more_decay"
STYLES = {LARGE: "o-", SMALLER: "s--", TOKENS: "^:"}
# Panel; plan; what is equal; the KAN among its arms; what the MLP as large is called, where that says too little
COMPARED = (
    ("equal seconds, float32", "momentum", "seconds", KAN),
    *(("equal seconds, float32, surfaces", "decay", "seconds", kan) for kan in KANS_OF_PAIRS),
    *(("equal seconds, float32, surfaces, as large", "as_large", "seconds", kan) for kan in KANS_AS_LARGE),
    ("equal seconds, bfloat16", "bfloat16", "seconds", KAN),
    ("equal seconds, bfloat16", "bfloat16_10M", "seconds", KAN),
    ("equal tokens", "tokens", "tokens", KAN_BY_TOKENS),
    ("equal tokens", "bfloat16_tokens", "tokens", KAN_BY_TOKENS, TOKENS),
    ("equal tokens", "bfloat16_10M", "tokens", KAN_BY_TOKENS, TOKENS),
)
# Plan; cell; title
CURVES = (
    ("momentum", "stdlib_02M", "the library, 0.2M, equal seconds, float32"),
    ("momentum", "stdlib_08M", "the library, 0.8M, equal seconds, float32"),
    ("momentum", "stdlib_3M", "the library, 3M, equal seconds, float32"),
    ("decay", "stdlib_3M", "the library, 3M, equal seconds, surfaces"),
    ("as_large", "stdlib_08M", "the library, 0.8M, surfaces, as large"),
)


@dataclass
class Options:
    out: str = str(ablate.ROOT / "docs" / "results" / "leads.png")  # the picture to write
    results: str = str(ablate.ROOT / "docs" / "results")  # the folder that ablate.py wrote them to


@dataclass
class Lead:
    panel: str
    against: str
    corpus: str
    size: int  # the KAN's parameters beside the embeddings
    nats: float  # the KAN less the MLP
    error: float  # its standard error; nan with one seed
    verdict: str
    seeds: str  # how many of the KAN, of the MLP


def load(name, results):
    """(a plan of ours, {(cell, what is equal): rows}), as timed with one thread."""
    path = str(ablate.ROOT / "configs" / "ablations" / f"{name}.toml")
    plan = ablate.read_plan(path)
    runner = ablate.Runner(plan, ablate.Options(path, threads=1, out=results))
    for cell in plan.cells:
        runner.data(cell)  # what is not prepared is said at once
    return plan, ablate.comparisons(runner)


def size(row):
    """Parameters beside the embeddings."""
    return row.runs[0]["parameters"]["non_embedding"]


def leads(panel, plan, compared, equal, kan, large=LARGE):
    """The arm `kan` less the best baseline as large, within 5%, and less the best smaller one, where there are such, in
    every cell but those of longer runs, which are for another question."""
    found = []
    for (cell, measure), rows in compared.items():
        ours = next((row for row in rows if row.arm == kan), None)
        if measure != equal or ours is None or "max_steps" in plan.cells[cell]:
            continue
        where = CORPORA[ours.runs[0]["options"]["data"]], size(ours)
        for against, least, most in ((large, 0.95, 1.05), (SMALLER, 0, 0.95)):
            kind = [row for row in rows if row.mean < math.inf and least <= size(row) / size(ours) < most]
            if best := ablate.best_baseline(plan, kind):
                nats, error, verdict = ablate.difference(ours, best)
                seeds = f"{len(ours.runs)}, {len(best.runs)}"
                found.append(Lead(panel, against, *where, nats, math.nan if error is None else error, verdict, seeds))
    return sorted(found, key=lambda lead: (lead.against, lead.corpus, lead.size))


def draw_leads(axis, panel, found):
    for number, corpus in enumerate(CORPORA.values()):
        for against, style in STYLES.items():
            points = [lead for lead in found if (lead.panel, lead.corpus, lead.against) == (panel, corpus, against)]
            if points:
                sizes, nats, errors = zip(*((lead.size, lead.nats, lead.error) for lead in points))
                how = dict(fmt=style, color=f"C{number}", capsize=2, markersize=4)
                axis.errorbar(sizes, nats, errors, label=f"{corpus}, less {against}", **how)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set_xscale("log")
    axis.set_xticks([2e5, 8e5, 3e6, 1e7], ["0.2M", "0.8M", "3M", "10M"])
    axis.set_xticks([], minor=True)
    nats = [lead.nats for lead in found]
    axis.set(xlim=(1.5e5, 1.3e7), ylim=(min(nats) - 0.03, max(nats) + 0.01))  # with room for the legend
    axis.set(title=panel, xlabel="parameters beside the embeddings")
    axis.grid(True, linewidth=0.3)
    axis.legend(fontsize=6, loc="lower left")


def main(arguments):
    from matplotlib.figure import Figure

    options = cli.parse(Options, arguments)
    plans = {name: load(name, options.results) for name in dict.fromkeys(plan for _, plan, *_ in COMPARED)}
    found = [lead for panel, name, *how in COMPARED for lead in leads(panel, *plans[name], *how)]
    if not found:
        raise ValueError(
            f"{options.results} has none of our results; run ablate.py's plans with --out={options.results}"
        )
    lines = []
    for lead in found:
        nats = f"{lead.nats:+.4f} ± {lead.error:.4f}", lead.verdict
        lines.append([lead.panel, lead.corpus, f"{lead.size:,}", lead.against, *nats, lead.seeds])
    print(markdown(["", "corpus", "parameters", "the KAN less", "nats", "", "seeds of the two"], lines))
    picture = Figure(figsize=(23, 8.5), layout="constrained")
    top, bottom = picture.subplots(2, 5)
    for axis, panel in zip(top, dict.fromkeys(lead.panel for lead in found)):
        draw_leads(axis, panel, found)
    top[0].set_ylabel("validation loss, the KAN less an MLP, nats")
    for axis, (name, cell, title) in zip(bottom, CURVES, strict=True):
        plan, compared = plans[name]
        arms = {*plan.baselines, *(kan for _, compared_in, _, kan, *_ in COMPARED if compared_in == name)}
        rows = [row for row in compared.get((cell, "seconds"), []) if row.arm in arms]
        ablate.draw_curves(axis, plan, rows, "seconds")
        axis.set_title(title)
    print(save_figure(picture, options.out, dpi=110))


if __name__ == "__main__":
    cli.run(main)
