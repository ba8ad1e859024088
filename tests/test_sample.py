"""Sampling from a checkpoint, plotting, and what the README promises."""

import json
import re
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_one_line

import log
import plot
import train
from data import bins, tokenizer
from kan_layer import KANLayer
from kan_pairs import KANPairLayer


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data_folder):
    """Two runs of the same tiny data, a KAN and an MLP."""
    from conftest import TINY

    folder = tmp_path_factory.mktemp("runs")
    for mlp in ("kan", "gelu"):
        options = {**TINY, "max_steps": 60, "eval_interval": 30, "learning_rate": 1e-2, "table_learning_rate": 1e-2}
        train.train(train.TrainConfig(**options, data=str(data_folder), out_dir=str(folder / mlp), mlp=mlp))
    return folder


def test_a_checkpoint_is_all_it_needs(script, trained, tmp_path):
    shutil.copytree(trained / "kan" / "best", tmp_path / "alone")  # neither log nor data beside it
    a = script("sample.py", tmp_path / "alone", "--prompt=7 green", "--max_new_tokens=60", "--seed=3")
    assert a.returncode == 0 and a.stdout.startswith("7 green") and len(a.stdout) == len("7 green") + 60 + 1, a.stderr
    b = script("sample.py", trained / "kan", "--prompt=7 green", "--max_new_tokens=60", "--seed=3", "--no-cache")
    assert b.stdout == a.stdout and "best" in b.stderr
    c = script("sample.py", trained / "kan", "--prompt=7 green", "--max_new_tokens=60", "--seed=4")
    assert c.stdout != a.stdout


def test_prompts_from_a_file_and_from_standard_input(script, trained, tmp_path):
    (tmp_path / "p.txt").write_text("12 green")
    for options, input in ((["--file=p.txt"], None), (["--prompt=-"], "12 green")):
        done = script("sample.py", trained / "kan", *options, "--max_new_tokens=20", "--num_samples=3", input=input)
        samples = done.stdout.split("\n" + "-" * 80 + "\n")
        assert len(samples) == 3 and all(s.startswith("12 green") for s in samples) and len(set(samples)) == 3


def test_sampling_mistakes_end_in_one_line(script, trained, tmp_path):
    run = trained / "kan"
    assert_one_line(script("sample.py", run, "--prompt=Ärger"), "does not know 'Ä' (U+00C4)")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes(b"\xe4")
    assert_one_line(script("sample.py", run, "--file=empty.txt"), "the prompt is empty")
    assert_one_line(script("sample.py", run, "--file=latin.txt"), "latin.txt is not UTF-8 text")
    assert_one_line(script("sample.py", run, "--file=empty.txt", "--prompt=7"), "not both")
    cold = script("sample.py", run, "--prompt=7", "--temperature=1e-45", "--max_new_tokens=5")
    assert cold.returncode == 0 and cold.stdout.startswith("7")
    assert_one_line(script("sample.py", tmp_path / "none"), "no checkpoint in", "train.py")
    assert_one_line(script("sample.py", run, "--file=none.txt"), "none.txt")
    assert_one_line(script("sample.py", run, "--prompt=7", "--temperature=-1"), "temperature must be")
    assert_one_line(script("sample.py", run, "--tempreature=1"), "did you mean temperature?")
    assert_one_line(script("sample.py", run, "--num_samples=0"), "num_samples must be at least 1, got 0")
    assert_one_line(script("sample.py", run, "--device=cuda:7"), "device cuda:7 can't be used here")
    shutil.copytree(run, tmp_path / "broken")
    (tmp_path / "broken" / "best" / "weights.safetensors").write_bytes(b"oops")
    assert_one_line(script("sample.py", tmp_path / "broken", "--prompt=7"), "is damaged", "latest may be whole")
    config = tmp_path / "broken" / "latest" / "config.json"
    info = json.loads(config.read_text())
    config.write_text(json.dumps({**info, "tokenizer": {"kind": "characters", "characters": "7"}}))
    assert_one_line(script("sample.py", config.parent, "--prompt=7"), "config.json is damaged", "its tokenizer 1")


def test_characters_cut_by_tokens_arrive_whole(script, tmp_path, text):
    words = tokenizer.Bytes()
    poem = "äöü ÄÖÜ ß — " * 400
    bins.write(tmp_path / "d", words, [("train", poem, words.encode(poem)), ("val", poem, words.encode(poem))], "x")
    from conftest import TINY

    options = {**TINY, "max_steps": 80, "eval_interval": 80, "learning_rate": 1e-2, "table_learning_rate": 1e-2}
    train.train(train.TrainConfig(**options, data=str(tmp_path / "d"), out_dir=str(tmp_path / "run")))
    done = script("sample.py", tmp_path / "run", "--prompt=ä", "--max_new_tokens=60", "--temperature=0", "--top_k=0")
    assert (
        done.returncode == 0
        and "\ufffd" not in done.stdout
        and set(done.stdout) <= set(poem + "\n")
        and len(done.stdout) > 20
    )


# Pictures -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("against", ["steps", "tokens", "seconds"])
def test_loss_curves_of_several_runs(script, trained, tmp_path, against):
    done = script("plot.py", trained / "kan", trained / "gelu", f"--against={against}", "--out=a/b.png")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a" / "b.png").stat().st_size > 10_000


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name, steps", [("lr$1_$b", 2), ("_x", 2), ("begun", 1)])
def test_loss_curves_of_any_name(tmp_path, name, steps):
    """Of which matplotlib would make a formula or no entry of the legend, and of a run that has no entry to make."""
    records = [dict(config=dict(batch_tokens=8)), dict(step=0), dict(step=1, train_loss=2.0, val_loss=2.0, seconds=1.0)]
    (tmp_path / name).mkdir()
    lines = "".join(json.dumps(record) + "\n" for record in records[: 1 + steps])
    (tmp_path / name / "log.jsonl").write_text(lines)
    assert plot.loss_figure([str(tmp_path / name)], tmp_path / "a.png").stat().st_size > 5_000


def test_curves_that_were_learned(script, trained, tmp_path):
    assert script("plot.py", trained / "kan", "--curves", "--out=c.png").returncode == 0
    assert (tmp_path / "c.png").stat().st_size > 10_000
    assert_one_line(script("plot.py", trained / "gelu", "--curves"), "has no curves: its mlp is gelu")
    assert_one_line(script("plot.py", trained / "kan", "--curves", "--per_layer=0"), "per_layer must be at least 1")
    many = script("plot.py", trained / "kan", "--curves", "--per_layer=9", "--out=many.png")
    assert many.returncode == 0 and not many.stderr
    assert_one_line(script("plot.py", tmp_path / "none"), "log.jsonl")
    assert_one_line(script("plot.py"), "name at least one folder")
    assert_one_line(script("plot.py", trained / "kan", "--out=c.xyz"), "can't write a picture to c.xyz")
    assert script("plot.py", trained / "kan", "--out=plain").returncode == 0 and (tmp_path / "plain.png").is_file()


def test_a_network_without_its_data_is_drawn_with_a_warning(trained, tmp_path):
    for name, change in dict(gone=dict(train={"data": "gone"}), other=dict(data_fingerprint="other")).items():
        shutil.copytree(trained / "kan" / "best", tmp_path / name)
        info = {**json.loads((tmp_path / name / "config.json").read_text()), **change}
        (tmp_path / name / "config.json").write_text(json.dumps(info))
        with pytest.warns(UserWarning, match="no data set 'gone'" if name == "gone" else "other data than the run"):
            picture = plot.curves_figure(tmp_path / name, tmp_path / f"{name}.png", per_layer=3)
        assert picture.stat().st_size > 10_000
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot.curves_figure(trained / "kan", tmp_path / "whole.png", per_layer=3)
    assert (tmp_path / "whole.png").read_bytes() != (tmp_path / "gone.png").read_bytes()


def test_what_enters_the_layers_is_counted():
    layer = KANLayer(2, 3, num_control_points=5, spline_width=4.0)
    batches = [torch.tensor([[[-2.1, 0.0], [2.0, 7.0]]]), torch.tensor([[[0.5, -2.0]]])]  # 2 of 6 are outside [-2, 2]
    share, values = plot.watch_inputs(torch.nn.Sequential(layer), {layer: [1, 1, 0]}, batches)[layer]
    assert share == pytest.approx(2 / 6)
    assert values.tolist() == [[0.0, 0.0, pytest.approx(-2.1)], [7.0, 7.0, 2.0], [-2.0, -2.0, 0.5]]
    layer(torch.full((1, 2), 9.0))  # no hook was left behind
    assert len(values) == 3 and not layer._forward_pre_hooks


def test_curvature_of_curves_that_are_known():
    assert plot.curvature(KANLayer(8, 8, init="zero")) == 0
    assert plot.curvature(KANLayer(8, 8, num_control_points=2)) == 0
    assert plot.curvature(KANLayer(8, 8, num_control_points=9)) < 1e-4  # random_normal: straight lines
    layer = KANLayer(64, 64, num_control_points=9)
    torch.nn.init.normal_(layer.kan_weight, mean=5.0)
    assert plot.curvature(layer) == pytest.approx(6**0.5, rel=0.02)
    with torch.no_grad():
        layer.kan_weight.copy_(torch.tensor([0.0, 1.0] * 4 + [0.0]).view(1, 9, 1).expand_as(layer.kan_weight))
    assert plot.curvature(layer) == pytest.approx(2 / torch.tensor([0.0, 1.0] * 4 + [0.0]).std().item())


def test_curvature_of_surfaces_that_are_known():
    assert plot.curvature(KANPairLayer(8, 8, init="zero")) == 0
    assert plot.curvature(KANPairLayer(8, 8, num_control_points=2)) == 0
    assert plot.curvature(KANPairLayer(8, 8, num_control_points=9)) < 1e-4  # random_normal: planes
    layer = KANPairLayer(64, 64, num_control_points=9)
    torch.nn.init.normal_(layer.kan_weight, mean=5.0)
    assert plot.curvature(layer) == pytest.approx(6**0.5, rel=0.02)
    tooth = torch.tensor([0.0, 1.0] * 4 + [0.0])  # along one axis, nothing along the other
    layer.set_control_points(tooth.view(1, 1, 9, 1).expand_as(layer.kan_weight))
    assert plot.curvature(layer) == pytest.approx(2 / tooth.std().item())


def test_surfaces_that_were_learned(script, tiny, tmp_path):
    config = tiny(kan_pairs=True, kan_parameterization="whitened", max_steps=20)
    train.train(config)
    pictures = []
    for number, options in enumerate([[], ["--per_layer=9"], ["--per_layer=9"]]):
        if number == 2:  # without the data that it was trained on there are no dots
            info = Path(config.out_dir) / "best" / "config.json"
            info.write_text(json.dumps({**json.loads(info.read_text()), "data_fingerprint": "other"}))
        done = script("plot.py", config.out_dir, "--curves", f"--out={number}.png", *options)
        assert done.returncode == 0 and ("other data than the run" in done.stderr) == (number == 2), done.stderr
        pictures.append((tmp_path / f"{number}.png").read_bytes())
    assert min(map(len, pictures)) > 10_000 and len(set(pictures)) == 3


def test_the_first_input_of_a_surface_is_drawn_across():
    from matplotlib.figure import Figure

    knots, points = np.linspace(-2, 2, 5), np.zeros((5, 5))
    points[4, 2] = 1.0  # first input 2, second 0
    axis = Figure().subplots()
    plot.draw_surface(axis, knots, points, 1.0, np.array([[2.0, 0.0], [2.5, 0.0]]))
    (image,) = axis.images
    values = np.asarray(image.get_array())
    up, across = np.unravel_index(values.argmax(), values.shape)
    low, high = image.get_extent()[:2]
    assert (low, high) == (-2, 2) and (across, up) == (96, 48) and values.max() == 1
    inside, outside = (part.get_offsets().tolist() for part in axis.collections)
    assert (inside, outside) == ([[2.0, 0.0]], [[2.5, 0.0]])


def test_damaged_logs(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"config": {}}\n{"step": 1}\n{"step": 2, "train_')  # cut short by a crash
    assert log.read_log(tmp_path)[1] == [{"step": 1}]
    for line in ('{"step": 1', "5", "[]x"):
        (tmp_path / "log.jsonl").write_text(f'{{"config": {{}}}}\n{line}\n{{"step": 2}}\n')
        with pytest.raises(ValueError, match="damaged in line 2"):
            log.read_log(tmp_path)


# The README -----------------------------------------------------------------------------------------------------------

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readme_names_what_exists():
    assert "QQ" not in README
    for path in [*re.findall(r"`([\w/]+\.(?:py|toml|md))`", README), *re.findall(r"!\[[^]]*\]\((.*?)\)", README)]:
        assert (ROOT / path).exists(), path
    for command in re.findall(r"^(?:\S*python|torchrun[^\n]*?) ((?:data/\w+/)?\w+\.py)[ \n]", README, re.M):
        assert (ROOT / command).is_file(), command
    targets = re.findall(r"^make (\w+)", README, re.M)
    assert {"quickstart", "test"} <= set(targets)
    makefile = (ROOT / "Makefile").read_text()
    assert all(f"\n{target}:" in makefile for target in targets)


def test_the_readmes_options_exist():
    import cli

    texts = [README, *((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("curves.md", "results.md"))]
    for line in re.findall(r"^(?:\S*python|torchrun .*?) train\.py (.*)$", "\n".join(texts), re.M):
        if "--help" in line:
            continue
        config = cli.parse(train.TrainConfig, line.split("#")[0].split(), toml=True)
        config.check()


def test_the_readmes_python_runs(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert blocks
    names = {}  # a block may go on from the one before
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
