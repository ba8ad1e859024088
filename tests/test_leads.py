"""docs/leads.py: what it says of runs whose differences are known, and that the documents say what it says of ours."""

import functools
import json
import re
from types import SimpleNamespace

import pytest
from conftest import ROOT, load_script

import ablate
from data import bins
from model import count

leads = load_script("docs/leads.py")

SIZES = {"0.2M": 2e5, "0.8M": 8e5, "3M": 3.1e6, "10M": 9.6e6}
SIZES_OF_SURFACES = {"0.2M": 5.47e5, "0.8M": 1.23e6, "3M": 1.675e6}  # in the seconds of those sizes


@pytest.fixture(scope="module")
def plans():
    """{name: what leads.load gives} of docs/results. No corpus is prepared here; the runs say what they were of."""
    corpora = {}
    for path in (ROOT / "docs" / "results").glob("*.json"):
        for run in json.loads(path.read_text())["runs"].values():
            if "parameters" in run:  # it did not diverge
                vocab_size = run["parameters"]["embedding"] // run["options"]["n_embd"]
                corpora[run["options"]["data"]] = run["data"], vocab_size

    @functools.cache  # as what it stands for
    def data(runner, cell):
        config = ablate.make_config(runner.plan.options(cell, runner.plan.reference, {}))
        fingerprint, vocab_size = corpora[config.data]
        return SimpleNamespace(fingerprint=fingerprint), count(config.model_config(vocab_size))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ablate.Runner, "data", data)
        names = [name for _, name, *_ in leads.COMPARED]
        names += ["pairs", "narrow", "pairs_tokens"]
        return {name: leads.load(name, str(ROOT / "docs" / "results")) for name in names}


@pytest.fixture(scope="module")
def ours(plans):
    return [lead for panel, name, *how in leads.COMPARED for lead in leads.leads(panel, *plans[name], *how)]


def of(found, panel, against, size, corpus=None):
    near = (lead for lead in found if abs(lead.size / SIZES.get(size, size) - 1) < 0.05)
    near = (lead for lead in near if corpus in (None, lead.corpus))
    return [lead for lead in near if (lead.panel, lead.against) == (panel, against)]


def assert_says(text, found, panel, kinds, size, corpus):
    """Of a table's row: its differences, in this order, are those of the runs."""
    said = re.findall(r"([+-]0\.\d+) ± (0\.\d+)(, tie)?", text)
    for kind, (nats, error, tie) in zip(kinds, said[: len(kinds)], strict=True):
        (lead,) = of(found, panel, kind, size, corpus)
        assert (lead.nats, lead.error) == pytest.approx((float(nats), float(error)), abs=6e-4), (text, kind)
        assert (lead.verdict == "tie") == bool(tie), (text, kind)


def sections():
    text = "".join((ROOT / "docs" / name).read_text() for name in ("results.md", "curves.md"))
    return {part.partition("\n")[0]: part for part in re.split(r"^##+ ", text, flags=re.M)}


@pytest.mark.parametrize(
    "section, panel, kinds",
    [
        ("Curves, in equal seconds", "equal seconds, float32", (leads.LARGE, leads.SMALLER)),
        ("In bfloat16", "equal seconds, bfloat16", (leads.LARGE, leads.SMALLER)),
        ("Equal tokens", "equal tokens", (leads.LARGE,)),
    ],
)
def test_the_tables_of_the_results_are_those_of_the_runs(ours, section, panel, kinds):
    rows = re.findall(r"^\| ([\w ]+), ([\d.]+M) \|(.*)$", sections()[section], flags=re.M)[:9]
    assert len({(corpus, size) for corpus, size, _ in rows}) == 9
    for corpus, size, text in rows:
        assert_says(text, ours, panel, kinds, size, corpus)


@pytest.mark.parametrize(
    "section, plan, equal, arms, kinds, sizes",
    [
        ("Equal seconds", "decay", "seconds", leads.KANS_OF_PAIRS, [leads.SMALLER], SIZES_OF_SURFACES),
        ("As large, too", "as_large", "seconds", leads.KANS_AS_LARGE, [leads.LARGE, leads.SMALLER], SIZES),
        ("Of pairs, in equal tokens", "pairs_tokens", "tokens", ["kan_pairs"], [leads.SMALLER], {"0.2M": 7.45e5}),
        ("As large, in equal tokens", "pairs_tokens", "tokens", ["kan_pairs_84_wide"], [leads.LARGE], {"0.2M": 1.98e5}),
    ],
)
def test_so_are_those_of_pairs(plans, section, plan, equal, arms, kinds, sizes):
    found = [lead for arm in arms for lead in leads.leads(plan, *plans[plan], equal, arm)]
    rows = re.findall(r"^\| ([\w ]+), ([\d.]+M) \|(.*)$", sections()[section], flags=re.M)
    assert len(rows) * len(kinds) == len(found)
    for corpus, size, row in rows:
        assert_says(row, found, plan, kinds, sizes[size], corpus)


@pytest.mark.parametrize(
    "begins, plan, arms",
    [
        ("curves", "pairs", {"02M": "kan_muon_3_layers"}),
        ("surfaces of 7 x 7", "pairs", {"02M": "kan_pairs", "08M": "kan_pairs"}),
        ("9 x 9", "narrow", {"08M": "kan_pairs_96_wide"}),
        ("weight decay", "decay", {"02M": "kan_pairs_64_wide", "08M": "kan_pairs_96_wide"}),
        ("no gate", "decay", {"02M": "kan_pairs_64_no_gate", "08M": "kan_pairs_96_no_gate"}),
    ],
)
def test_what_surfaces_owe_is_what_the_runs_say(plans, begins, plan, arms):
    (row,) = re.findall(rf"^\| {begins}[^|]*\|(.*)$", sections()["What surfaces owe to what"], flags=re.M)
    said = {cell: re.findall(r"-0\.\d+", column) for cell, column in zip(("02M", "08M"), row.split("|"))}
    assert {cell for cell in said if said[cell]} == set(arms)
    content, compared = plans[plan]
    for cell, arm in arms.items():
        compared_there = {key: rows for key, rows in compared.items() if key[0].endswith(cell)}
        found = leads.leads(plan, content, compared_there, "seconds", arm)
        nats = [lead.nats for lead in found if lead.against == leads.SMALLER]
        assert len(nats) == 3
        assert (min(nats), max(nats)) == pytest.approx(tuple(map(float, said[cell])), abs=6e-4), (begins, cell)


def test_so_are_those_of_ten_million_parameters(ours):
    text = sections()["At ten million parameters"]
    (row,) = re.findall(r"^\| KAN, three layers \|.*$", text, flags=re.M)
    assert_says(row, ours, "equal seconds, bfloat16", (leads.LARGE, leads.SMALLER), "10M", "the library")
    rows = re.findall(r"^\| ([\d.]+M) \|(.*)$", text, flags=re.M)
    assert [size for size, _ in rows] == list(SIZES)
    for size, row in rows:
        assert_says(row, ours, "equal tokens", (leads.TOKENS,), size, "the library")


def test_the_ranges_of_the_readme_are_those_of_the_runs(ours):
    """Those of bfloat16 are in curves.md."""
    texts = (ROOT / "README.md").read_text(), sections()["In bfloat16"]
    readme, rounded = (re.findall(r"^\| (0\.2M|0\.8M|3M) \|(.*)$", text, flags=re.M) for text in texts)
    assert [size for size, _ in readme] == [size for size, _ in rounded] == ["0.2M", "0.8M", "3M"]
    surfaces, panels = "equal seconds, float32, surfaces", ("equal seconds, float32", "equal seconds, bfloat16")
    columns = [(surfaces, leads.SMALLER, SIZES_OF_SURFACES), (f"{surfaces}, as large", leads.LARGE, SIZES)]
    columns += [(panel, kind, SIZES) for panel in panels for kind in (leads.LARGE, leads.SMALLER)]
    for (size, text), (_, more) in zip(readme, rounded, strict=True):
        said = [tuple(map(float, found)) for found in re.findall(r"([+-][\d.]+) to ([+-][\d.]+)", text + more)]
        known = [[lead.nats for lead in of(ours, panel, kind, sizes[size])] for panel, kind, sizes in columns]
        assert [len(nats) for nats in known] == [3] * 6
        for nats, ends in zip(known, said, strict=True):
            assert (min(nats), max(nats)) == pytest.approx(ends, abs=6e-4), (size, ends)


def row(arm, *losses, size=1000):
    run = dict(options=dict(data="python_stdlib"), parameters=dict(non_embedding=size))
    return ablate.Row(arm, [dict(run, val_loss=loss) for loss in losses], {}, 1.0, None)


def test_the_best_of_each_kind_is_held_against():
    baselines = ["large", "large_too", "larger", "small", "diverged"]
    plan = SimpleNamespace(baselines=baselines, cells=dict(one={}, longer=dict(max_steps=8000)))
    rows = [row("large", 2.0, 2.0), row("large_too", 1.5, 1.7, size=990), row("larger", 1.0, 1.0, size=1100)]
    rows += [row("small", 1.4, 1.4, size=900), row("diverged", None, 1.3), row("kan", 1.3, 1.5, size=1000)]
    compared = {("one", "seconds"): rows, ("one", "tokens"): rows[:-1], ("longer", "seconds"): rows}
    smaller, large = sorted(leads.leads("panel", plan, compared, "seconds", "kan"), key=lambda lead: -lead.nats)
    assert (large.against, smaller.against) == (leads.LARGE, leads.SMALLER)
    assert (large.nats, large.error) == pytest.approx((-0.2, 0.02**0.5)) and large.verdict == "tie"
    assert (smaller.nats, smaller.error) == pytest.approx((0, 0.1), abs=1e-12)
    assert (large.corpus, large.size) == ("the library", 1000)


def test_the_picture_and_the_numbers(plans, ours, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(leads, "load", lambda name, results: plans[name])
    leads.main([f"--out={tmp_path / 'leads.png'}"])
    assert (tmp_path / "leads.png").stat().st_size > 10_000
    assert capsys.readouterr().out.count(" | the library | ") == sum(lead.corpus == "the library" for lead in ours)


def test_without_data_it_says_what_to_prepare(tmp_path, monkeypatch):
    monkeypatch.setattr(bins, "ROOT", tmp_path)
    with pytest.raises(ValueError, match="no data set"):
        leads.load("momentum", str(tmp_path))


def test_without_results_it_says_what_to_run(tmp_path, monkeypatch):
    monkeypatch.setattr(leads, "load", lambda name, results: (SimpleNamespace(cells={}), {}))
    with pytest.raises(ValueError, match="run ablate"):
        leads.main([f"--out={tmp_path / 'leads.png'}"])
    assert not list(tmp_path.iterdir())
