"""bench.py runs and says what it measured; how fast anything is, no test asserts."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


def bench(*arguments):
    return subprocess.run([sys.executable, "bench.py", *arguments], cwd=ROOT, capture_output=True, text=True)


def test_layers_are_measured_and_written(tmp_path):
    out = tmp_path / "bench.json"
    shapes = ("--features", "16", "--points", "8", "--tokens", "1", "40", "--only", "kanditioned embedding_bag", "nn")
    done = bench(*shapes, "--seconds", "0.01", "--out", str(out))
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    names = {record["name"] for record in report["layers"]}
    assert names == {"splinegpt", "kanditioned embedding_bag", "nn.Linear"}
    assert all(0 < record["fwd"] < record["fwd_bwd"] for record in report["layers"])
    assert [row["tokens"] for row in report["summary"]] == [1, 40]
    assert done.stdout.count("| splinegpt |") == 2 and report["threads"] >= 1
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]


def test_evaluations_are_measured_and_written(tmp_path):
    out = tmp_path / "bench.json"
    shapes = ("--features", "6", "--points", "4", "5", "--tokens", "40", "--only", "coo", "dense, scatter")
    done = bench("--evaluations", *shapes, "--seconds", "0.01", "--out", str(out))
    assert done.returncode == 0, done.stderr
    records = json.loads(out.read_text())["evaluations"]
    measured = {(r["name"], r["compiled"]) for r in records if r["N"] == 5 and r["name"] != "cpp"}
    assert measured == {("coo", False), ("dense, scatter", False), ("dense, scatter", True)}
    assert all(r["fwd"] > 0 and r["fwd_bwd"] > 0 and r["tokens"] == 40 and r["C"] == 6 for r in records)
    assert done.stdout.count("40 tokens, 6 to 6, N = ") == 2 and "Not compiled: csc, coo, bsr: " in done.stdout
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith(("| coo", "| dense", "| cpp"))]
    for shape in (rows[: len(rows) // 2], rows[len(rows) // 2 :]):  # one or more are best in every column
        assert all(any("**" in cell for cell in column) for column in list(zip(*shape))[1:])
    assert all(row[4:] == ["-", "-", "- |"] for row in rows if row[0] == "| coo")


without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--points", "8", "1"], "points must be at least 2, got 8, 1"),
        (["--tokens"], "tokens must be at least 1, got none"),
        (["--token", "8"], "unknown option --token; did you mean tokens?"),
        (["--model", "--nanogpt", "nowhere"], "no nanoGPT in nowhere"),
        (["--device", "cuda"], "device is cpu, or with --evaluations cuda where there is a GPU, got 'cuda'"),
        pytest.param(["--blocks"], "--blocks needs a GPU", marks=without_gpu),
        pytest.param(["--cuda"], "--cuda needs a GPU", marks=without_gpu),
    ],
)
def test_mistakes_in_one_line(script, arguments, message):
    done = script("bench.py", *arguments)
    assert done.returncode == 1 and message in done.stderr.splitlines()[-1]
