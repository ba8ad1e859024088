"""Training: configuration, exact resuming, several processes, what it writes, and what it says to mistakes."""

import contextlib
import fcntl
import functools
import gc
import hashlib
import itertools
import json
import os
import platform
import pty
import shutil
import signal
import subprocess
import sys
import termios
import tomllib
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, as_options, assert_one_line, torchrun
from torch.nn.parallel import DistributedDataParallel

import checkpoint
import cli
import device
import log
import muon
import train
from model import GPT, GPTConfig, count

CONFIGS = sorted((ROOT / "configs").glob("*.toml"))


def sha256(out_dir, name="latest"):
    return hashlib.sha256((Path(out_dir) / name / "weights.safetensors").read_bytes()).hexdigest()


def steps(out_dir):
    return log.read_log(out_dir)[1]


# Configuration --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_makes_a_model(path):
    config = cli.parse(train.TrainConfig, [str(path)], toml=True)
    config.check()
    given = tomllib.loads(path.read_text())
    assert all(getattr(config, key) == value for key, value in given.items())
    with torch.device("meta"):
        model = GPT(config.model_config(50257 if "gpt2" in path.stem else 256))
    assert model.count_parameters()["total"] > 1000
    world = train.World()
    world.size = 8 if "gpt2" in path.stem else 1
    sequences, micro_batch = train.divide_batch(config, world)
    assert sequences * config.block_size * world.size == config.batch_tokens and sequences % micro_batch == 0
    assert (ROOT / "data" / config.data / "prepare.py").is_file()
    assert config.out_dir == f"out/{path.stem}"


@pytest.mark.parametrize("stem", ["shakespeare_char_cpu", "shakespeare_char_gpu", "gpt2_124m"])
def test_pairs_differ_in_the_mlp_alone(stem):
    kan, mlp = (cli.parse(train.TrainConfig, [f"{ROOT}/configs/{stem}_{k}.toml"], toml=True) for k in ("kan", "mlp"))
    differ = {name for name, value in asdict(kan).items() if asdict(mlp)[name] != value}
    assert differ <= {"out_dir", "mlp", "table_learning_rate"} and mlp.mlp == "gelu"
    assert count(kan.model_config(65)) == count(mlp.model_config(65))


def test_the_best_of_each_kind_are_as_large():
    paths = (f"{ROOT}/configs/shakespeare_char_cpu_best_{kind}.toml" for kind in ("kan", "mlp"))
    kan, mlp = (cli.parse(train.TrainConfig, [path], toml=True) for path in paths)
    differ = {name for name, value in asdict(kan).items() if asdict(mlp)[name] != value}
    assert "mlp" in differ and not differ & {"data", "max_steps", "batch_tokens", "block_size", "seed", "eval_tokens"}
    sizes = [count(config.model_config(65)) for config in (kan, mlp)]
    assert abs(sizes[0] - sizes[1]) < 1e-3 * sizes[1]


def test_the_knobs_have_the_names_people_know():
    names = (
        "out_dir data resume seed device dtype compile mlp n_layer n_head n_embd block_size dropout kan_control_points "
        "kan_width kan_hidden batch_tokens max_steps eval_interval eval_tokens learning_rate table_learning_rate "
        "weight_decay wandb"
    ).split()
    assert set(names) <= {field.name for field in fields(train.TrainConfig)}
    assert {f.name for f in fields(GPTConfig)} - {"vocab_size"} <= {f.name for f in fields(train.TrainConfig)}


def parse(*arguments):
    return cli.parse(train.TrainConfig, arguments, toml=True)


def test_command_line_forms(tmp_path):
    assert (
        parse("--max_steps=300").max_steps
        == parse("--max-steps", "300").max_steps
        == parse("--max_steps", "300").max_steps
        == 300
    )
    assert parse("--resume").resume and parse("--resume=True").resume and parse("--resume=true").resume
    assert not parse("--resume", "--no-resume").resume and not parse("--resume=False").resume
    assert parse("--learning_rate=1").learning_rate == 1.0 and parse("--learning-rate", "1e-4").learning_rate == 1e-4
    path = tmp_path / "a.toml"
    path.write_text('mlp = "gelu"\nlearning_rate = 1\nwandb = true\nmax_steps = 7\n')
    config = parse(str(path), "--max_steps=9")
    assert (config.mlp, config.learning_rate, config.wandb, config.max_steps) == ("gelu", 1.0, True, 9)
    path.write_text("compile = false\nresume = false")
    assert (
        parse(str(path)).compile == parse("--compile=False").compile == parse("--compile", "False").compile == "false"
    )
    assert parse("--resume", "True", "--max_steps=3").resume and parse(str(path), "--resume").resume
    assert parse("--out_dir", "--odd").out_dir == "--odd"
    path.write_text('kan_refine_at = []\nmlp = "gelu"')  # the list ends where it ends
    assert parse(str(path), "--out_dir=x") == train.TrainConfig(mlp="gelu", out_dir="x")
    assert parse("--kan_refine_at", "5", "8", "--seed=3") == train.TrainConfig(kan_refine_at=(5, 8), seed=3)


@pytest.mark.parametrize(
    "toml, arguments, message",
    [
        ("", ["--max_stps=3"], "unknown option --max_stps; did you mean max_steps?"),
        ("", ["--leraning-rate", "3"], "unknown option --leraning_rate; did you mean learning_rate?"),
        ("n_layers = 3", [], "unknown option n_layers; did you mean n_layer?"),
        ("n_layer = ", [], "is not valid TOML"),
        ("", ["--batch_size=12"], "did you mean batch_tokens"),
        ("", ["--init_from=resume"], "did you mean resume?"),
        ("", ["--resume=maybe"], "--resume is True or False, got 'maybe'"),
    ],
)
def test_wrong_names_meet_the_nearest_right_one(tmp_path, toml, arguments, message):
    path = tmp_path / "a.toml"
    path.write_text(toml)
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        parse(str(path), *arguments)


def test_mistakes_end_in_one_line(script, tiny, tmp_path):
    good = as_options(tiny())
    assert_one_line(script("train.py", "configs/nope.toml"), "no configuration configs/nope.toml")
    assert_one_line(script("train.py", ROOT / "configs/nope.toml"), "quickstart.toml")
    assert_one_line(script("train.py", "--max_stps=3"), "did you mean max_steps?")
    assert_one_line(script("train.py", *good, "--n_head=3"), "multiple of n_head = 3")
    assert_one_line(
        script("train.py", *good, "--batch_tokens=100"), "batch_tokens = 100 must be a multiple", "96 or 112"
    )
    assert_one_line(script("train.py", *good, "--batch_tokens=10"), "block_size * processes = 16; try 16")
    assert_one_line(script("train.py", *good, "--min_lr=1.5"), "min_lr must be from 0 to 1, got 1.5")
    assert_one_line(script("train.py", *good, "--data=none"), "no data set 'none'")
    assert_one_line(script("train.py", *good, "--device=tpu9"), "device tpu9 can't be used here")
    assert_one_line(script("train.py", *good, "--dtype=float16"), "float16 has no gradient scaling on a CPU")
    assert_one_line(script("train.py", *good, "--resume"), "no checkpoint in")
    assert_one_line(script("train.py", *good, "--block_size=0"), "block_size must be above 0")
    assert_one_line(script("train.py", *good, "--n_embd=4000000"), "no memory for a model of")
    assert_one_line(script("train.py", *good, "--device=meta"), "cpu, cuda and mps are known")
    assert_one_line(script("train.py", *good, "--mlp_hidden=9"), "mlp_hidden is for the MLPs, got 9")
    assert_one_line(script("train.py", *good, "--match_parameters=9"), "match_parameters = 9 can't be met")
    assert_one_line(script("train.py", *good, f"--seed={2**64}"), "seed must be below")
    wandb = script(
        "train.py", *good, "--wandb", env={"WANDB_API_KEY": "", "WANDB_MODE": "online", "HOME": str(tmp_path)}
    )
    assert wandb.returncode == 1 and "Traceback" not in wandb.stderr and "train.py: wandb: " in wandb.stderr
    assert not (tmp_path / "run" / "log.jsonl").exists()
    shutil.rmtree(tmp_path / "run")
    assert_one_line(script("train.py", *good, "--learning_rate=-1"), "learning_rate must be above 0, got -1.0")
    assert_one_line(script("train.py", *good, "--learning_rate=nan"), "learning_rate must be above 0, got nan")
    assert_one_line(script("train.py", *good, "--weight_decay=inf"), "weight_decay must be finite, got inf")
    assert_one_line(script("train.py", *good, "--out_dir="), "out_dir must name a folder")
    with pytest.raises(ValueError, match="out_dir must be a name in UTF-8"):
        replace(tiny(), out_dir=os.fsdecode(b"run\xff")).check()
    typed = script("train.py", *good, "--max_steps=many")
    assert typed.returncode == 2 and "--max-steps" in typed.stderr and "Traceback" not in typed.stderr
    assert not (tmp_path / "run").exists()
    help = script("train.py", "--help")
    assert help.returncode == 0 and "--table-learning-rate" in help.stdout and "control points" in help.stdout


# A run ----------------------------------------------------------------------------------------------------------------


def test_a_run_writes_what_it_should(tiny, capsys):
    config = tiny(mlp="kan")
    result = train.train(config)
    out = Path(config.out_dir)
    header, records = log.read_log(out)
    assert [r["step"] for r in records] == list(range(13))
    assert [r["step"] for r in records if "val_loss" in r] == [0, 5, 10, 12]  # the end is always evaluated
    keys = {"step", "train_loss", "val_loss", "lr", "grad_norm", "tokens_per_second", "seconds", "peak_memory"}
    assert keys <= set(records[-1]) and keys - {"val_loss"} <= set(records[1])
    assert records[-1]["val_loss"] < records[0]["val_loss"] and result["val_loss"] == records[-1]["val_loss"]
    assert all(a["seconds"] < b["seconds"] for a, b in itertools.pairwise(records[1:]))
    assert header["seed"] == 1337 and header["config"]["n_embd"] == 16 and header["torch"] == torch.__version__
    for name in ("latest", "best"):
        assert {p.name for p in (out / name).iterdir()} == {"weights.safetensors", "config.json", "optimizer.pt"}
    assert json.loads((out / "latest" / "config.json").read_text())["step"] == 12
    assert (out / "loss.png").stat().st_size > 5000
    assert not list(out.glob("*.tmp")) and not list(out.glob("*.old"))
    printed = capsys.readouterr().out
    for words in (
        "device: cpu",
        "dtype: float32 (as asked)",
        "compile: False (eager",
        "parameters:",
        "flops per token:",
    ):
        assert words in printed


def test_there_is_a_best_even_if_nothing_gets_better(tiny):
    for steps_ in (0, 5):
        config = tiny(f"short{steps_}", max_steps=steps_, learning_rate=1.0, table_learning_rate=1.0, warmup_steps=0)
        train.train(config)
        assert json.loads((Path(config.out_dir) / "best" / "config.json").read_text())["step"] == steps_


def test_a_run_outlives_its_reader(tiny):
    config = tiny("piped", max_steps=200, eval_interval=100, log_interval=1)
    process = start(config)
    process.stdout.readline()
    process.stdout.close()  # as `| head` does
    assert process.wait(timeout=60) == 0 and len(steps(config.out_dir)) == 201


def test_the_same_seed_is_the_same_run(tiny):
    runs = [train.train(tiny(out, seed=seed, dropout=0.1)) for out, seed in (("a", 1), ("b", 1), ("c", 2))]
    a, b, c = (sha256(tiny(out).out_dir) for out in "abc")
    assert a == b != c and runs[0]["val_loss"] == runs[1]["val_loss"] != runs[2]["val_loss"]


def test_evaluating_more_often_changes_nothing(tiny):
    train.train(tiny("a", dropout=0.1))
    train.train(tiny("b", dropout=0.1, eval_interval=2, eval_tokens=0, log_interval=3))
    assert sha256(tiny("a").out_dir) == sha256(tiny("b").out_dir)


def test_micro_steps_add_up(tiny):
    whole = train.train(tiny("a"))
    parts = train.train(tiny("b", micro_batch=3))  # 8 sequences: 4 micro-steps of 2
    assert abs(whole["train_loss"] - parts["train_loss"]) < 1e-5 and abs(whole["grad_norm"] - parts["grad_norm"]) < 1e-4


def test_best_is_the_best(tiny, monkeypatch):
    losses = {0: 9.0, 5: 2.5, 10: 2.0, 15: 2.25}
    found = iter(losses.values())
    monkeypatch.setattr(train, "evaluate", lambda *_: (next(found), False))
    config = tiny(max_steps=15)
    result = train.train(config)
    assert (result["val_loss"], result["best_val_loss"]) == (2.25, 2.0)
    infos = {name: json.loads((Path(config.out_dir) / name / "config.json").read_text()) for name in ("best", "latest")}
    assert (infos["best"]["step"], infos["best"]["best_val_loss"]) == (10, 2.0)
    assert (infos["latest"]["step"], infos["latest"]["best_val_loss"]) == (15, 2.0)
    assert sha256(config.out_dir, "best") != sha256(config.out_dir, "latest")


def test_an_earlier_run_is_moved_aside(tiny, capsys):
    config = tiny()
    train.train(config)
    first = sha256(config.out_dir)
    train.train(replace(config, seed=1))
    train.train(replace(config, seed=2))
    assert sha256(config.out_dir + ".1") == first and Path(config.out_dir + ".2").is_dir()
    assert "is now" in capsys.readouterr().out


def test_what_is_not_the_runs_own_is_not_moved(tiny, tmp_path, monkeypatch):
    config = tiny(max_steps=0)
    train.train(config)
    monkeypatch.chdir(config.out_dir)
    with pytest.raises(ValueError, match=r"an earlier run is in .*, where you are; choose another out_dir"):
        train.train(replace(config, out_dir="."))
    Path("mine").mkdir()
    with pytest.raises(ValueError, match=r"holds an earlier run and other folders \(mine\); choose another out_dir"):
        train.train(config)
    assert Path("log.jsonl").is_file() and Path("mine").is_dir()


@pytest.mark.parametrize(
    "options",
    [
        dict(mlp="swiglu"),
        dict(kan_gate=True),
        dict(kan_hidden=8, position="learned", qk_norm=True, qk_gain=1.0, norm="rmsnorm"),
    ],
)
@pytest.mark.parametrize(
    "optimizer, table_optimizer", [("adamw", "adamw"), ("muon", "adamw"), ("muon", "muon"), ("normuon", "normuon")]
)
def test_other_models_and_optimizers_learn(tiny, options, optimizer, table_optimizer):
    how = dict(optimizer=optimizer, table_optimizer=table_optimizer, schedule="wsd", max_steps=40, learning_rate=1e-2)
    result = train.train(tiny(**how, **options))
    assert result["val_loss"] < 2.9


def test_table_and_matrix_rates_are_apart(tiny):
    optimizers = train.make_optimizers(GPT(tiny().model_config(30)), tiny(), torch.device("cpu"))
    (adamw,) = optimizers
    rates = {tuple(group["params"][0].shape)[1:]: (group["lr"], group["weight_decay"]) for group in adamw.param_groups}
    assert rates[(8, 16)] == (3e-4, 0.0)  # tables
    assert rates[(16,)] == (3e-3, 0.1) and rates[()] == (3e-3, 0.0)  # a matrix, a norm


@pytest.mark.parametrize("matrices", ["adamw", "muon", "normuon"])
@pytest.mark.parametrize("tables", ["adamw", "muon", "normuon"])
def test_each_optimizer_has_what_it_is_told(tiny, matrices, tables):
    config = tiny(optimizer=matrices, table_optimizer=tables, muon_momentum=0.8)
    optimizers = train.make_optimizers(GPT(config.model_config(30)), config, torch.device("cpu"))
    has = {type(o): {p.dim() for group in o.param_groups for p in group["params"]} for o in optimizers}
    by_muon = {dim: kind for dim, kind in ((2, matrices), (3, tables)) if kind != "adamw"}
    assert has.get(muon.Muon, set()) == set(by_muon)
    assert has[torch.optim.AdamW] == {1, 2} | ({3} - set(by_muon))  # embeddings and norms always
    for group in optimizers[0].param_groups if by_muon else ():
        normed = by_muon[group["params"][0].dim()] == "normuon"
        assert group["momentum"] == 0.8 and group["row_beta"] == (0.95 if normed else 0)


def test_schedules():
    config = train.TrainConfig(max_steps=100, warmup_steps=10, min_lr=0.1)
    cosine = [train.schedule(config, s) for s in range(101)]
    assert cosine[0] == 0.1 and cosine[9] == cosine[10] == 1.0 and abs(cosine[55] - 0.55) < 0.01 and cosine[100] == 0.1
    wsd = [train.schedule(replace(config, schedule="wsd"), s) for s in range(101)]
    assert wsd[9] == wsd[80] == 1.0 and abs(wsd[91] - 0.55) < 0.01 and abs(wsd[100] - 0.1) < 1e-12
    assert train.schedule(replace(config, decay_steps=50), 90) == 0.1


def test_the_spline_tables_have_a_clip_of_their_own(tiny):
    unclipped = train.train(tiny("a", grad_clip=0, table_grad_clip=0, max_steps=1))
    tables = train.train(tiny("b", grad_clip=0, table_grad_clip=1e-9, max_steps=1))
    assert unclipped["grad_norm"] == tables["grad_norm"]  # logged before clipping
    a, b = (checkpoint.load_model(tiny(o).out_dir)[0] for o in "ab")
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q) != name.endswith("kan_weight"), name


def test_a_loss_that_is_not_finite_stops_before_the_update(script, tiny, tmp_path):
    config = tiny(max_steps=60, eval_interval=20)
    assert script("train.py", *as_options(replace(config, max_steps=20, decay_steps=60))).returncode == 0
    kept = sha256(config.out_dir)
    latest = Path(config.out_dir) / "latest"
    saved = checkpoint.load_optimizer_state(latest)
    for group in saved["optimizers"][0]["param_groups"]:
        group["peak_lr"] = 1e25
    torch.save(saved, latest / "optimizer.pt")
    failed = script("train.py", *as_options(config), "--resume")
    assert_one_line(failed, "loss nan", "stopped before the update", "Lower learning_rate", "step ")
    assert failed.returncode == cli.NOT_FINITE and sha256(config.out_dir) == kept
    model, _, info = checkpoint.load_model(latest)
    assert info["step"] == 20 and all(p.isfinite().all() for p in model.parameters())


def test_a_validation_loss_that_is_not_finite_is_not_saved(tiny, monkeypatch):
    losses = {0: 9.0, 5: 2.5, 10: float("nan")}
    found = iter(losses.values())
    monkeypatch.setattr(train, "evaluate", lambda *_: (next(found), False))
    config = tiny(max_steps=15)
    with pytest.raises(FloatingPointError, match=r"step 10: validation loss nan.*untouched"):
        train.train(config)
    for name in ("best", "latest"):
        assert json.loads((Path(config.out_dir) / name / "config.json").read_text())["step"] == 5


@pytest.mark.parametrize("overflows", ["attn.c_attn.weight", "wte.weight"])
def test_an_overflow_in_float16_is_a_step_of_no_optimizer(tiny, monkeypatch, overflows):
    """Muon's matrices and AdamW's embeddings: where one has infinite gradients, neither moves, and the scale falls."""
    made = []

    def make(config):
        made.append(GPT(config))
        for name, p in made[-1].named_parameters():
            if name.endswith(overflows):
                p.register_hook(lambda g: g.fill_(float("inf")))
        made.append({name: p.detach().clone() for name, p in made[-1].named_parameters()})
        return made[-2]

    monkeypatch.setattr(train, "GPT", make)
    monkeypatch.setattr(train, "choose_dtype", lambda *_: (torch.float16, "for this test"))
    config = tiny(max_steps=1, optimizer="muon", mlp="swiglu")
    train.train(config)
    model, before = made
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert checkpoint.load_optimizer_state(Path(config.out_dir) / "latest")["scaler"]["scale"] == 2.0**15


def test_muon_in_float32_is_torchs_without_rounding(monkeypatch):
    """Three steps: torch.optim.Muon's, if its bfloat16 is made float32; and its states are each other's."""
    start = [torch.randn(20, 50), torch.randn(50, 20), torch.randn(1, 7)]
    made = []
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)
    for kind in (functools.partial(torch.optim.Muon, adjust_lr_fn="match_rms_adamw"), muon.Muon):
        matrices = [torch.nn.Parameter(p.clone()) for p in start]
        optimizer = kind(matrices, lr=0.02, weight_decay=0.1, momentum=0.9)
        for seed in range(3):
            generator = torch.Generator().manual_seed(seed)
            for p in matrices:
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()
        made.append((matrices, optimizer))
    (want, theirs), (got, ours) = made
    assert all(torch.allclose(a, b, atol=1e-6) and not torch.equal(a, c) for a, b, c in zip(want, got, start))
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(theirs.state[want[0]]["momentum_buffer"], ours.state[got[0]]["momentum_buffer"])


def test_muon_takes_a_table_as_one_matrix():
    start, grads = torch.randn(6, 5, 4), torch.randn(2, 6, 5, 4)
    found = []
    for shape in ((6, 5, 4), (30, 4)):
        p = torch.nn.Parameter(start.reshape(shape).clone())
        optimizer = muon.Muon([p], lr=0.1, weight_decay=0.5)
        for grad in grads:
            p.grad = grad.reshape(shape)
            optimizer.step()
        found.append(p.detach().reshape(start.shape))
    assert torch.equal(*found) and not torch.equal(found[0], start)


def test_normuon_makes_rows_equally_long():
    """Word for word, a table whose rows' gradients differ by six decades; and one without gradients stays finite."""
    start, grads = torch.randn(6, 5, 4).double(), torch.randn(3, 6, 5, 4).double()
    grads *= torch.logspace(0, -6, 30, dtype=torch.float64).view(6, 5, 1)
    table, silent = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    optimizer = muon.Muon([table, silent], lr=0.1, weight_decay=0.5, momentum=0.9, row_beta=0.8)
    want, buffer, average = start.clone(), torch.zeros_like(start), None
    for grad in grads:
        table.grad, silent.grad = grad.clone(), torch.zeros_like(grad)
        optimizer.step()
        buffer = 0.9 * buffer + 0.1 * grad
        x = muon.orthogonal((0.1 * grad + 0.9 * buffer).reshape(30, 4))
        squares = (x**2).mean(dim=1)
        average = squares if average is None else 0.8 * average + 0.2 * squares
        rows = x / (average.sqrt() + 1e-8)[:, None]
        rows *= x.norm() / rows.norm()
        want = (1 - 0.1 * 0.5) * want - 0.1 * 0.2 * 30**0.5 * rows.view(6, 5, 4)
    assert (table - want).abs().max() < 1e-6
    assert torch.allclose(silent, start * 0.95**3)
    lengths = rows.norm(dim=1)
    assert lengths.max() < 10 * lengths.min()
    assert x.norm(dim=1).max() > 1000 * x.norm(dim=1).min()


def test_normuon_goes_on_where_products_are_in_bfloat16(monkeypatch):
    monkeypatch.setattr(muon, "multiplies_bfloat16", lambda: True)
    p = torch.nn.Parameter(torch.randn(129, 150))
    make = functools.partial(muon.Muon, [p], row_beta=0.95)
    optimizer = make()
    for _ in range(2):
        p.grad = torch.randn(p.shape)
        optimizer.step()
        assert optimizer.state[p]["row_squares"].dtype == torch.float32
        again = make()
        again.load_state_dict(optimizer.state_dict())
        optimizer = again
    assert p.isfinite().all()


@pytest.mark.parametrize("shape", [(20, 50), (50, 20), (20, 20), (1, 7)])
@pytest.mark.parametrize("decades", [0, 6])  # of singular values
def test_muon_iterates_as_published(shape, decades):
    """Against Newton-Schulz word for word in float64, also where gradients are all but singular."""
    rank = min(shape)
    left, right = (torch.linalg.qr(torch.randn(size, rank, dtype=torch.float64))[0] for size in shape)
    matrix = left * torch.logspace(0, -decades, rank, dtype=torch.float64) @ right.T
    published = torch.optim.Muon([torch.nn.Parameter(matrix)]).param_groups[0]
    want = matrix / matrix.norm()
    for _ in range(published["ns_steps"]):
        gram = want @ want.T
        a, b, c = published["ns_coefficients"]
        want = (a * torch.eye(len(gram), dtype=torch.float64) + b * gram + c * gram @ gram) @ want
    assert (muon.orthogonal(matrix) - want).abs().max() < 1e-12
    assert (muon.orthogonal(matrix.float()) - want).abs().max() < 1e-3  # bfloat16 is 1e-2 off
    for half in (matrix.bfloat16(), (1e4 * matrix).half()):  # of such parameters' gradients, by no less exact a way
        assert torch.equal(muon.orthogonal(half), muon.orthogonal(half.float()))


@pytest.mark.parametrize("has", [True, False])
@pytest.mark.parametrize("shape", [(129, 300), (300, 129), (129, 150), (128, 300)])
def test_muon_multiplies_what_the_machine_can(monkeypatch, has, shape):
    """bfloat16 above 128 rows, where the CPU has it; singular values stay what that type lets them be."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has)
    matrix = torch.randn(shape) * torch.logspace(0, -6, shape[1])  # all but singular, as gradients are
    got, want = muon.orthogonal(matrix), muon.orthogonal(matrix.double())
    rounded = has and min(shape) > 128
    assert got.dtype == (torch.bfloat16 if rounded else torch.float32) and want.dtype == torch.float64
    assert (got - want).norm() < (0.3 if rounded else 3e-3) * want.norm()
    assert torch.linalg.matrix_norm(got.double(), 2) < 1.25
    if rounded:
        found = []
        for kind in (muon.Muon, functools.partial(torch.optim.Muon, adjust_lr_fn="match_rms_adamw")):
            p = torch.nn.Parameter(torch.ones(shape))
            p.grad = matrix.clone()
            kind([p]).step()
            found.append(p.detach())
        assert torch.allclose(*found, rtol=1e-6) and not torch.equal(found[0], torch.ones(shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_muon_multiplies_bfloat16_on_a_gpu(dtype):
    """As torch.optim.Muon; "meta" stands for any device that is no CPU."""
    found = muon.orthogonal(torch.empty(8, 20, device="meta", dtype=dtype))
    assert found.dtype == (torch.bfloat16 if dtype == torch.float32 else dtype)


def test_compiled_training_is_the_same(tiny, capsys):
    eager, compiled = train.train(tiny("a")), train.train(tiny("b", compile="true"))
    assert (
        abs(eager["val_loss"] - compiled["val_loss"]) < 1e-4 and "compile: True (as asked)" in capsys.readouterr().out
    )


def test_bfloat16_training(tiny):
    assert 0 < abs(train.train(tiny("a", dtype="bfloat16"))["val_loss"] - train.train(tiny("b"))["val_loss"]) < 0.05


def test_options_that_do_nothing_are_named(tiny, capsys):
    options = dict(max_steps=1, kan_control_points=7, table_optimizer="muon", muon_momentum=0.9)
    train.train(tiny("mlp", mlp="swiglu", **options))
    said = "ignored, since mlp = swiglu and optimizer = adamw: kan_control_points, table_optimizer, muon_momentum\n"
    assert said in capsys.readouterr().out
    train.train(tiny("adamw", max_steps=1, muon_momentum=0.9))
    assert "ignored, since mlp = kan and optimizer = adamw: muon_momentum\n" in capsys.readouterr().out
    for run in (tiny("kan", **options), tiny("plain", mlp="swiglu", max_steps=1)):
        train.train(run)
        assert "ignored" not in capsys.readouterr().out


def test_wandb_offline(script, tiny, tmp_path):
    done = script("train.py", *as_options(tiny()), "--wandb", env={"WANDB_MODE": "offline", "WANDB_SILENT": "true"})
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    assert next(folder.glob("run-*.wandb")).stat().st_size > 1000


# Stopping and resuming ------------------------------------------------------------------------------------------------


def start(config, *more):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, str(ROOT / "train.py"), *as_options(config), *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.mark.parametrize(
    "number, options",
    [(signal.SIGTERM, dict()), (signal.SIGINT, dict(optimizer="muon", schedule="wsd", mlp="swiglu"))],
)
def test_stopped_and_resumed_is_bitwise_the_same(tiny, number, options):
    config = tiny("killed", max_steps=300, eval_interval=80, dropout=0.1, micro_batch=4, log_interval=1, **options)
    process = start(config)
    for line in process.stdout:
        if line.startswith("step ") and int(line.split()[1]) >= 30:
            break
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number and not err, err
    stopped = json.loads((Path(config.out_dir) / "latest" / "config.json").read_text())["step"]
    assert 30 <= stopped < 300 and f"stopped at step {stopped}" in out and "--resume" in out

    resumed = start(config, "--resume")
    out, err = resumed.communicate(timeout=120)
    assert resumed.returncode == 0 and f"at step {stopped}" in out, err
    whole = start(replace(config, out_dir=config.out_dir + "whole"))
    assert whole.wait(timeout=120) == 0
    assert sha256(config.out_dir) == sha256(config.out_dir + "whole")
    a, b = steps(config.out_dir), steps(config.out_dir + "whole")
    assert [r["step"] for r in a] == list(range(301))
    for key in ("train_loss", "val_loss", "grad_norm", "lr"):
        assert [r.get(key) for r in a] == [r.get(key) for r in b]


@pytest.mark.parametrize("ignored", [False, True], ids=["hangup", "nohup"])
def test_a_terminal_that_closes(tiny, ignored):
    config = tiny("closed", max_steps=700, eval_interval=150)
    terminal, inside = pty.openpty()

    def attach():
        fcntl.ioctl(inside, termios.TIOCSCTTY, 0)  # so that closing it hangs up
        signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)

    how = dict(stdout=inside, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=attach)
    command = [sys.executable, str(ROOT / "train.py"), *as_options(config)]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, **how)
    os.close(inside)
    saved = Path(config.out_dir) / "latest" / "config.json"
    while not saved.is_file():
        os.read(terminal, 4096)  # OSError if it ends before
    os.close(terminal)
    error, status = process.communicate(timeout=60)[1], process.returncode
    step = json.loads(saved.read_text())["step"]
    assert (status, step) == (0, 700) if ignored else (status == 128 + signal.SIGHUP and 150 <= step < 700)
    assert not error


def test_killed_without_warning_goes_on_from_the_last_checkpoint(tiny):
    config = tiny("killed", max_steps=500, eval_interval=40, log_interval=1)
    process = start(config)
    for line in process.stdout:
        if line.startswith("step ") and int(line.split()[1]) >= 100:
            break
    process.kill()
    process.communicate()
    # Processes of their own, like the first: another number of threads adds up in another order.
    for run in (start(config, "--resume"), start(replace(config, out_dir=config.out_dir + "whole"))):
        assert run.wait(timeout=120) == 0
    assert sha256(config.out_dir) == sha256(config.out_dir + "whole")
    assert [r["step"] for r in steps(config.out_dir)] == list(range(501))


def test_resuming_a_finished_run_changes_nothing(tiny):
    config = tiny()
    first = train.train(config)
    before, lines = sha256(config.out_dir), steps(config.out_dir)
    again = train.train(replace(config, resume=True))
    assert (
        sha256(config.out_dir) == before and steps(config.out_dir) == lines and again["val_loss"] == first["val_loss"]
    )


def test_extending_needs_a_schedule_that_allows_it(tiny):
    config = tiny(decay_steps=20)
    train.train(config)
    train.train(replace(config, resume=True, max_steps=20))
    train.train(replace(config, out_dir=config.out_dir + "whole", max_steps=20))
    assert sha256(config.out_dir) == sha256(config.out_dir + "whole")
    with pytest.raises(ValueError, match=r"schedule .* was 20 and is 30.*add --decay_steps=20"):
        train.train(replace(config, resume=True, decay_steps=0, max_steps=30))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(learning_rate=1e-2), "learning_rate was 0.003 and is 0.01"),
        (dict(n_layer=3), "n_layer was 2 and is 3"),
        (dict(seed=1), "seed was 1337 and is 1"),
        (dict(max_steps=13), "schedule .* was 12 and is 13"),
        (dict(dtype="bfloat16"), "dtype was 'torch.float32' and is 'torch.bfloat16'"),
    ],
)
def test_a_different_run_is_not_resumed(tiny, change, message):
    config = tiny()
    train.train(config)
    before = sha256(config.out_dir)
    with pytest.raises(ValueError, match=message):
        train.train(replace(config, resume=True, **change))
    assert sha256(config.out_dir) == before
    train.train(replace(config, resume=True, eval_interval=6, micro_batch=2, log_interval=1))


def test_an_option_newer_than_the_run_was_at_its_default(tiny):
    config = tiny()
    train.train(config)
    path = Path(config.out_dir) / "latest" / "config.json"
    saved = json.loads(path.read_text())
    assert not saved["train"].pop("kan_swiglu") and not saved["model"].pop("kan_swiglu")
    path.write_text(json.dumps(saved))
    with pytest.raises(ValueError, match="kan_swiglu was False and is True"):
        train.train(replace(config, resume=True, kan_swiglu=True))
    train.train(replace(config, resume=True))


def test_dropout_depends_on_how_the_batch_is_divided(tiny):
    config = tiny(dropout=0.1)
    train.train(config)
    with pytest.raises(ValueError, match=r"what dropout depends on .* was '1 x 8' and is '1 x 2'"):
        train.train(replace(config, resume=True, micro_batch=2))
    train.train(replace(config, resume=True, micro_batch=8))


def test_auto_and_what_it_chose_are_the_same_dtype(tiny):
    config = tiny(dtype="auto")
    train.train(config)
    train.train(replace(config, resume=True, dtype="float32"))


def test_max_steps_before_the_checkpoint_is_refused(tiny):
    config = tiny(decay_steps=12)
    train.train(config)
    with pytest.raises(ValueError, match="at step 12, past max_steps = 3"):
        train.train(replace(config, resume=True, max_steps=3))


def test_two_runs_do_not_share_a_folder(script, tiny):
    config = tiny(max_steps=50_000, eval_interval=10_000, log_interval=1)
    process = start(config)
    for line in process.stdout:
        if line.startswith("step 20 "):
            break
    assert_one_line(script("train.py", *as_options(config)), "another run is writing to")
    process.kill()
    process.communicate()


def test_a_single_gpu_gets_a_number(monkeypatch):
    # No GPU here: what can be checked is that CUDA is asked for a numbered device, which set_device insists on.
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", lambda *a, **k: None)
    monkeypatch.setattr(torch._C, "_cuda_setDevice", asked.append, raising=False)
    for name in ("auto", "cuda", "cuda:0"):
        assert device.choose_device(name, device.World()) == torch.device("cuda:0")
    assert asked == [0, 0, 0]


def test_a_world_size_without_a_rank_is_not_ours(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert (device.World().size, device.World().distributed) == (1, False)
    monkeypatch.setenv("RANK", "1")
    assert (device.World().size, device.World().rank) == (2, 1)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc only")
def test_freed_memory_is_kept_unless_the_environment_says_otherwise():
    script = (
        "import resource, device\n"
        "device.choose_device('cpu', device.World())\n"
        "for _ in range(11):\n"
        "    block = bytearray(2**26)\n"
        "    block[:: 4096] = b'x' * 2**14\n"
        "    del block\n"
        "    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)"
    )

    def faults(**environment):  # of the last ten times, the system's pages being of 4 KB or of 2 MB
        run = dict(capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment})
        seen = [int(line) for line in subprocess.run([sys.executable, "-c", script], **run).stdout.split()]
        return seen[-1] - seen[0]

    assert faults() < 100
    assert faults(MALLOC_TRIM_THRESHOLD_="131072", MALLOC_MMAP_MAX_="65536") > 200


def test_peak_memory_is_not_the_parents():
    own = "import device, torch; print(device.peak_memory(torch.device('cpu')))"
    ballast = "import subprocess, sys; x = bytearray(2**30); subprocess.run([sys.executable, '-c', sys.argv[1]])"
    run = dict(capture_output=True, text=True, cwd=ROOT)
    peak = int(subprocess.run([sys.executable, "-c", ballast, own], **run).stdout)
    assert 2**26 < peak < 2**30


def test_more_processes_than_gpus_are_told_how_many(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    world = device.World()
    world.local_rank = 1
    with pytest.raises(ValueError, match=r"device cuda:1 can't be used here .*; start at most 1 processes"):
        device.choose_device("cuda", world)


def test_how_the_layer_is_evaluated_may_change(tiny):
    config = tiny(kan_impl="dense", max_steps=5)
    train.train(config)
    path = Path(config.out_dir) / "latest" / "config.json"
    path.write_text(path.read_text().replace('"kan_impl": "dense"', '"kan_impl": "triton"'))  # as if made on a GPU
    assert checkpoint.load_model(config.out_dir + "/latest")[0].config.kan_impl == "auto"
    train.train(replace(config, resume=True, kan_impl="embedding_bag", max_steps=8, decay_steps=5))


def test_changed_data_is_not_resumed(tiny, data_folder, tmp_path):
    shutil.copytree(data_folder, tmp_path / "d")
    config = tiny(data=str(tmp_path / "d"))
    train.train(config)
    meta = json.loads((tmp_path / "d" / "meta.json").read_text())
    (tmp_path / "d" / "meta.json").write_text(json.dumps({**meta, "source_sha256": "0"}))
    with pytest.raises(ValueError, match="the hash of the data was"):
        train.train(replace(config, resume=True))


@pytest.mark.parametrize(
    "name, change, message",
    [
        (
            "weights.safetensors",
            lambda p: os.truncate(p, 1000),
            r"weights\.safetensors is damaged .*; .*best may be whole",
        ),
        ("weights.safetensors", lambda p: p.unlink(), r"weights\.safetensors is missing; .*best may be whole"),
        ("optimizer.pt", lambda p: os.truncate(p, 1000), r"optimizer\.pt is damaged .*; .*best may be whole"),
        ("optimizer.pt", lambda p: p.write_bytes(b""), r"optimizer\.pt is damaged"),
        ("optimizer.pt", lambda p: p.write_bytes(b"\x80\x02h\x07."), r"optimizer\.pt is damaged"),  # a KeyError
        ("config.json", lambda p: os.truncate(p, 100), r"config\.json is damaged"),
        ("config.json", lambda p: p.write_text("{}"), r"config\.json is damaged: it lacks"),
        ("config.json", lambda p: p.write_text(p.read_text().replace('"step": 12', '"step": "12"')), "step is '12'"),
    ],
)
def test_damaged_checkpoints_are_named(tiny, name, change, message):
    config = tiny()
    train.train(config)
    latest = Path(config.out_dir) / "latest"
    target = latest / name
    copy = target.read_bytes()
    target.unlink()  # not in place: best shares the file
    target.write_bytes(copy)
    change(target)
    with pytest.raises(ValueError, match=message):
        train.train(replace(config, resume=True))
    checkpoint.load_model(Path(config.out_dir) / "best")


def test_a_checkpoint_survives_a_crash_between_its_renames(tiny):
    config = tiny()
    train.train(config)
    out = Path(config.out_dir)
    os.rename(out / "latest", out / "latest.old")
    assert checkpoint.find_in_run(out, ("latest",)) == out / "latest.old"
    assert "best may be whole" in checkpoint._remedy(out / "latest.old")
    train.train(replace(config, resume=True))


def test_a_failed_save_leaves_the_last_checkpoint(tiny, monkeypatch):
    config = tiny()
    train.train(config)
    before = sha256(config.out_dir)

    def full(*a, **k):
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoint.torch, "save", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(config.out_dir, GPT(config.model_config(30)), {}, {})
    assert sha256(config.out_dir) == before and not list(Path(config.out_dir).glob("*.tmp"))


def test_a_log_is_never_behind_its_checkpoint(tiny, monkeypatch):
    config = tiny()
    monkeypatch.setattr(checkpoint, "save", lambda *a: pytest.fail("killed before it was saved"))
    with pytest.raises(pytest.fail.Exception):
        train.train(config)
    assert steps(config.out_dir)[-1].keys() >= {"step", "train_loss", "seconds", "val_loss"}


# Several processes ----------------------------------------------------------------------------------------------------


def test_two_processes_are_the_same_run_as_one(script, tiny):
    finer = dict(kan_control_points=3, kan_refine_at=(5,), kan_smoothness=1e-2, decay_steps=20, micro_batch=2)
    one, two = tiny("one", max_steps=20, **finer), tiny("two", max_steps=15, **finer)
    train.train(one)
    done = torchrun(script, 2, two, "--kan_refine_at", "5")
    assert done.returncode == 0, done.stderr
    assert "2 processes x 2 micro-steps x 2 sequences" in done.stdout
    a, b = steps(one.out_dir), steps(two.out_dir)
    assert [r["step"] for r in b] == list(range(16))
    for x, y in zip(a[1:16], b[1:], strict=True):
        assert abs(x["train_loss"] - y["train_loss"]) < 1e-5, (x, y)
        assert abs(x["grad_norm"] - y["grad_norm"]) < 1e-4
        assert abs(x.get("val_loss", 0) - y.get("val_loss", 0)) < 1e-5
    # and goes on as one
    resumed = train.train(replace(two, resume=True, max_steps=20))
    assert abs(resumed["val_loss"] - a[-1]["val_loss"]) < 1e-5


def test_a_run_outlives_a_full_disk_behind_its_output(tiny):
    command = [sys.executable, str(ROOT / "train.py"), *as_options(tiny(max_steps=2))]
    with open("/dev/full", "w") as full:
        assert subprocess.run(command, stdout=full).returncode == 0


def test_two_processes_stop_together(tiny):
    config = tiny("two", max_steps=5000, eval_interval=1000, log_interval=1)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(ROOT / "train.py"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [*command, *as_options(config)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    )
    for line in process.stdout:
        if line.startswith("step ") and int(line.split()[1]) >= 20:
            break
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode != 0 and "stopped at step" in out
    stopped = json.loads((Path(config.out_dir) / "latest" / "config.json").read_text())["step"]
    assert 20 <= stopped < 5000 and f"stopped at step {stopped}" in out


@pytest.mark.parametrize("learning_rate", [1e-3, 1e30])
def test_the_model_goes_before_the_group(tiny, monkeypatch, learning_rate):
    """Else its Reducer, as the last to hold the group, may wait forever for gloo's thread, which waits for the GIL."""
    for name, value in dict(RANK=0, WORLD_SIZE=1, LOCAL_RANK=0, MASTER_ADDR="127.0.0.1", MASTER_PORT=0).items():
        monkeypatch.setenv(name, str(value))
    alive, destroy = [], dist.destroy_process_group

    def look_and_destroy():
        alive.append(sum(type(o) is DistributedDataParallel for o in gc.get_objects()))
        destroy()

    monkeypatch.setattr(dist, "destroy_process_group", look_and_destroy)
    with pytest.raises(FloatingPointError) if learning_rate > 1 else contextlib.nullcontext():
        train.train(tiny(learning_rate=learning_rate))
    assert alive == [0]


def test_a_batch_that_does_not_divide_is_refused(script, tiny):
    done = torchrun(script, 3, tiny())
    assert done.returncode != 0 and "must be a multiple of block_size * processes = 48; try 96 or 144" in done.stderr
