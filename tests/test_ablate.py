"""ablate.py: arms get what they are said to get, results outlive interruptions, and the statistics are right."""

import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, assert_one_line

import ablate
import device
from log import lock

PLAN = """
reference = "relu2"
baselines = ["relu2", "gelu"]
equal = ["tokens", "seconds"]
seeds = [1, 2]

[base]
data = "{data}"
n_layer = 1
n_head = 2
n_embd = 16
block_size = 16
batch_tokens = 128
max_steps = 12
warmup_steps = 2
eval_interval = 6
eval_tokens = 256
device = "cpu"
dtype = "float32"

[arms.relu2]
mlp = "relu2"
tries = [{{learning_rate = 1e-3}}, {{learning_rate = 1e-2}}]

[arms.gelu]
mlp = "gelu"
equal = ["tokens"]
tries = [{{learning_rate = 1e-3}}, {{learning_rate = 1e30}}]

[arms.kan]
mlp = "kan"
tries = [{{table_learning_rate = 1e-3}}, {{table_learning_rate = 1e-2}}]
"""

HEADER = dict(device="cpu", cpu="", torch="", matmul_gflops=1.0)  # of what a timing says of the machine


@pytest.fixture
def plan(data_folder, tmp_path):
    """Writes the plan above, with changes, and returns its path."""

    def write(*changes, name="plan"):
        text = PLAN.format(data=data_folder)
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        path = tmp_path / f"{name}.toml"
        path.write_text(text)
        return str(path)

    return write


@pytest.fixture(scope="module")
def finished(data_folder, tmp_path_factory):
    """(the plan's path, its folder of results, what was printed) after it ran to its end."""
    folder = tmp_path_factory.mktemp("ablation")
    path = folder / "plan.toml"
    path.write_text(PLAN.format(data=data_folder))
    process = ablate_process(path, folder)
    assert process.returncode == 0, process.stderr
    return str(path), folder, process.stdout


def ablate_process(path, out, *options, **how):
    command = [sys.executable, str(ROOT / "ablate.py"), str(path), f"--out={out}", "--jobs=2", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **how)


def results(folder):
    return json.loads((Path(folder) / "plan.json").read_text())


def test_every_plan_of_ours_is_valid():
    paths = sorted((ROOT / "configs" / "ablations").glob("*.toml"))
    assert paths
    for path in paths:
        plan = ablate.read_plan(path)
        assert plan.baselines and plan.reference in plan.baselines


def test_budgets_are_equal(finished):
    _, folder, _ = finished
    content = results(folder)
    speeds = {speed["arm"]: speed["ms"] for speed in content["speeds"].values()}
    runs = content["runs"].values()
    totals = {run["parameters"]["total"] for run in runs if run["val_loss"] is not None}
    assert max(totals) - min(totals) <= 16 * 16  # a control point of all edges, or less
    steps = {arm: {run["steps"] for run in runs if run["arm"] == arm and "steps" in run} for arm in speeds}
    assert steps["relu2"] == steps["gelu"] == {12}
    assert steps["kan"] == {12, max(1, round(12 * speeds["relu2"] / speeds["kan"]))}
    for speed in content["speeds"].values():
        turns = [a / b for a, b in zip(speed["turns"], speed["reference_turns"], strict=True)]
        assert speed["ms"] == pytest.approx(statistics.median(turns) * speeds["relu2"]) and len(turns) == ablate.TURNS


def test_the_best_try_goes_on_and_all_seeds_are_made(finished):
    path, folder, _ = finished
    runner = ablate.Runner(ablate.read_plan(path), ablate.Options(path, out=str(folder), jobs=2))
    for arm in runner.plan.arms:
        found = {
            json.dumps(t): runner.results["runs"][r.key]
            for t, r in zip(runner.plan.arms[arm].tries, runner.tries("all", arm))
        }
        finite = {name: run["val_loss"] for name, run in found.items() if run["val_loss"] is not None}
        assert json.dumps(runner.chosen("all", arm)) == min(finite, key=finite.get)
        assert len(finite) == (1 if arm == "gelu" else 2)
    rows = {row.arm: row for row in ablate.rows_of(runner, "all", "tokens")}
    assert {arm: [run["seed"] for run in row.runs] for arm, row in rows.items()} == {
        a: [1, 2] for a in runner.plan.arms
    }
    assert [row.arm for row in ablate.rows_of(runner, "all", "seconds")] == ["relu2", "kan"]


def test_the_tables_say_what_the_results_say(finished):
    path, folder, printed = finished
    text = (folder / "plan.md").read_text()
    assert text.strip() in printed and (folder / "plan.png").stat().st_size > 10_000
    runner = ablate.Runner(ablate.read_plan(path), ablate.Options(path, out=str(folder), jobs=2))
    for measure in ablate.MEASURES:
        section = text.split(f"## all, equal {measure}")[1].split("\n## ")[0]
        for row in ablate.rows_of(runner, "all", measure):
            losses = [run["val_loss"] for run in row.runs]
            line = next(line for line in section.splitlines() if line.startswith(f"| {row.arm} |"))
            assert f"{statistics.mean(losses):.4f} ± {abs(losses[0] - losses[1]) / 2:.4f}" in line
            assert f" {row.runs[0]['steps']} " in line and f"{row.runs[0]['parameters']['total']:,}" in line


def test_nothing_is_made_twice(finished, monkeypatch, capsys):
    path, folder, _ = finished
    before = results(folder)
    monkeypatch.setattr(ablate.Runner, "start", lambda *_: pytest.fail("it was made already"))
    ablate.main([path, f"--out={folder}", "--jobs=2"])
    ablate.main([path, f"--out={folder}", "--jobs=2", "--dry_run"])
    assert "about 0.0 hours" in capsys.readouterr().out
    assert results(folder) == before


def test_steps_are_timed_with_the_threads_that_runs_have(finished):
    path, folder, _ = finished
    content, threads = results(folder), max(1, (os.cpu_count() or 1) // 2)
    assert {run["threads"] for run in content["runs"].values() if "threads" in run} == {threads}
    assert {speed["threads"] for speed in content["speeds"].values()} == {threads}
    assert all(speed["peak_memory"] > 2**26 for speed in content["speeds"].values())
    known = {
        n: ablate.Runner(ablate.read_plan(path), ablate.Options(path, out=str(folder), threads=n)).known_speeds("all")
        for n in (threads, threads + 1)
    }
    assert set(known[threads]) == {"relu2", "gelu", "kan"} and not known[threads + 1]


def test_the_report_says_how_fast_matrix_products_were(finished):
    _, folder, _ = finished
    speeds = results(folder)["speeds"].values()
    rates = [speed["matmul_gflops"] for speed in speeds]
    cpu = next(iter(speeds))["cpu"]
    assert min(rates) > 1 and device.cpu_name() == cpu
    line = f"{cpu}: float32 matrix products at {min(rates):.0f} to {max(rates):.0f} GFLOP/s."
    assert line in (folder / "plan.md").read_text()


def test_no_verdict_while_runs_are_missing(finished):
    path, folder, _ = finished
    runner = ablate.Runner(ablate.read_plan(path), ablate.Options(path, out=str(folder), jobs=2))

    def said_of_all():
        rows = ablate.rows_of(runner, "all", "tokens")
        return {row.arm: ablate.against_text(runner.plan, ("all", "tokens"), row, rows) for row in rows}

    def said():
        return said_of_all()["kan"]

    assert said().endswith((", tie", ", lower", ", higher")) and "the best baseline" in said_of_all().values()
    made = dict(runner.results["runs"])
    for arm in ("kan", "gelu", "relu2"):  # itself, and every baseline, whether it is the best or not
        gone = next(key for key, run in made.items() if run["arm"] == arm and run["seed"] == 2)
        runner.results["runs"] = {key: run for key, run in made.items() if key != gone}
        assert said().endswith(", runs are missing") or "±" not in said()
        if arm != "kan":
            assert "the best baseline, but runs are missing" in said_of_all().values()
        if arm == "gelu":
            tried = [run.key for run in runner.tries("all", "gelu")]
            runner.results["runs"] = {key: run for key, run in made.items() if key not in tried}
            assert said().endswith(", runs are missing")


def test_one_at_a_time_in_a_folder(plan, script, tmp_path):
    held = lock(tmp_path)
    assert_one_line(script("ablate.py", plan(), f"--out={tmp_path}"), "another run is writing to")
    held.close()


def test_a_dry_run_trains_nothing(plan, tmp_path, capsys):
    cells = '[cells.here]\n[cells.elsewhere]\ndata = "nowhere"\n\n[arms.relu2]'  # what is left out needs no data
    ablate.main([plan(("[arms.relu2]", cells)), f"--out={tmp_path}", "--cells=here", "--dry_run"])
    lines = capsys.readouterr().out.splitlines()
    left = {line.split(" | ")[1]: int(line.split(" | ")[2]) for line in lines[2:-1]}
    assert left == {"relu2": 3, "gelu": 3, "kan": 5} and "nothing was trained" in lines[-1]
    assert not (tmp_path / "plan.json").exists()


def test_a_cell_may_have_some_of_the_arms_and_tries_of_its_own(plan, tmp_path):
    cell = '[cells.few]\narms = ["relu2", "kan"]\ntries.kan = [{learning_rate = 5e-4}, {}]\n[cells.all]\n\n[arms.relu2]'
    path = plan(("[arms.relu2]", cell))
    runner = ablate.Runner(ablate.read_plan(path), ablate.Options(path, out=str(tmp_path)))
    assert list(runner.timed("few")) == ["relu2", "kan"] and list(runner.timed("all")) == ["relu2", "gelu", "kan"]
    tried = {arm: [run.options.get("learning_rate") for run in runner.tries("few", arm)] for arm in ("relu2", "kan")}
    assert tried == {"relu2": [1e-3, 1e-2], "kan": [5e-4, None]}
    assert [run.options["table_learning_rate"] for run in runner.tries("all", "kan")] == [1e-3, 1e-2]


def test_a_single_try_needs_no_run_of_its_own(plan, tmp_path):
    cell = (
        '[cells.few]\narms = ["relu2", "kan"]\ntries.relu2 = [{learning_rate = 2e-3}]\ntries.kan = [{}]\n\n[arms.relu2]'
    )
    path = plan(("[arms.relu2]", cell))
    runner = ablate.Runner(ablate.read_plan(path), ablate.Options(path, out=str(tmp_path)))
    assert runner.tries("few", "relu2") == [] and runner.chosen("few", "relu2") == {"learning_rate": 2e-3}
    runs = runner.compared("few", "relu2", "tokens", runner.chosen("few", "relu2"), None)
    assert [(run.seed, run.options["learning_rate"]) for run in runs] == [(1, 2e-3), (2, 2e-3)]


def test_in_equal_seconds_alone_an_arm_may_have_its_own_batch(plan, tmp_path):
    path = plan(("[arms.kan]", '[arms.kan]\nequal = ["seconds"]\nbatch_tokens = 256'))
    runner = ablate.Runner(ablate.read_plan(path), ablate.Options(path, out=str(tmp_path)))
    runs = runner.compared("all", "kan", "seconds", {}, dict(relu2=2.0, kan=3.0))
    assert [(run.options["batch_tokens"], run.options["max_steps"]) for run in runs] == [(256, 8)] * 2


@pytest.mark.parametrize(
    "device, together",
    [("cpu", [["relu2", "gelu", "kan"]]), ("auto", [["relu2"], ["relu2", "gelu"], ["relu2", "kan"]])],
)
def test_arms_take_turns_all_at_once_on_a_cpu(plan, tmp_path, monkeypatch, device, together):
    path, asked = plan(('device = "cpu"', f'device = "{device}"')), []
    turns = dict(relu2=[4.0, 2.0, 2.0], gelu=[2.0, 2.0, 1.0], kan=[1.0, 1.0, 1.0])

    def take_turns(runner, runs):
        asked.append(list(runs))
        return turns, dict.fromkeys(runs, 2**20), HEADER

    monkeypatch.setattr(ablate.Runner, "take_turns", take_turns)
    runner = ablate.Runner(ablate.read_plan(path), ablate.Options(path, out=str(tmp_path)))
    assert runner.speeds("all") == dict(relu2=2.0, gelu=1.0, kan=1.0) and asked == together
    # One that is added later is held against the reference as it was.
    del runner.results["speeds"][runner.speed_key(runner.timed("all")["kan"])]
    turns.update(relu2=[8.0, 8.0, 8.0], kan=[2.0, 2.0, 2.0])
    assert runner.speeds("all") == dict(relu2=2.0, gelu=1.0, kan=0.5) and asked[len(together) :] == [["relu2", "kan"]]


@pytest.fixture
def made_up(monkeypatch):
    """Steps take a millisecond, losses are the learning rate's, steps and parameters n_embd's; nothing is trained."""

    def make(runner, runs):
        for run in runs:
            loss, size = run.options["learning_rate"] + run.seed, run.options["n_embd"]
            result = dict(vars(run), val_loss=loss if loss < 1e9 else None, steps=size, batch_tokens=128)
            result.update(parameters=dict(total=9, non_embedding=size), flops_per_token=dict(other=9))
            result.update(curve=[[1, loss]])
            runner.results["runs"][run.key] = result
        runner.save()

    one = lambda self, runs: ({arm: [1.0] * 3 for arm in runs}, dict.fromkeys(runs, 2**20), HEADER)
    monkeypatch.setattr(ablate.Runner, "take_turns", one)
    monkeypatch.setattr(ablate.Runner, "make", make)


def test_every_cell_that_was_made_is_in_the_tables(plan, tmp_path, made_up, recwarn):
    # Two that differ in the number of steps alone share their timings; one may be called something else later; and one
    # whose data are gone must not take the others with it.
    cells = "[cells.short]\nmax_steps = 10\n[cells.long]\nmax_steps = 50\n\n[arms.relu2]"
    kan = "tries = [{table_learning_rate = 1e-3}, {table_learning_rate = 1e-2}]", "tries = [{learning_rate = 1.0}, {}]"
    changes = ("[arms.relu2]", cells), (kan[0], kan[1].replace("{}", "{learning_rate = 2.0}"))
    ablate.main([plan(*changes), f"--out={tmp_path}"])
    text = (tmp_path / "plan.md").read_text()
    assert all(f"## {cell}, equal {m}" in text for cell in ("short", "long") for m in ablate.MEASURES)
    renamed = ("[cells.long]", '[cells.far]\n[cells.gone]\ndata = "nowhere"\n[cells.far_away]')
    ablate.main([plan(*changes, renamed), f"--out={tmp_path}", "--cells=short"])
    assert "## far_away, equal seconds" in (text := (tmp_path / "plan.md").read_text()) and "## gone" not in text
    assert "gone is left out of the tables: no data set 'nowhere'" in "".join(str(w.message) for w in recwarn)


def test_a_fit_is_of_cells_with_as_many_steps(plan, tmp_path, made_up):
    sizes = "".join(f"[cells.wide_{C}]\nn_embd = {C}\n" for C in (16, 32, 64))
    longer = "".join(f"[cells.longer_{C}]\nn_embd = {C}\nmax_steps = 50\n" for C in (16, 128))
    changes = ("[base]", "[base]\nlearning_rate = 1e-3"), ("[arms.relu2]", f"{sizes}{longer}[arms.relu2]")
    ablate.main([plan(*changes), f"--out={tmp_path}"])
    fitted = (tmp_path / "plan.md").read_text().partition("## Fits over sizes")[2].partition("##")[0]
    assert all(f" | {measure} | 12 | kan | " in fitted for measure in ablate.MEASURES) and " | 50 | " not in fitted


def test_an_arm_that_always_diverges_is_a_row_and_no_baseline(plan, tmp_path, made_up):
    gelu = "tries = [{learning_rate = 1e-3}, {learning_rate = 1e30}]"
    kan = "tries = [{table_learning_rate = 1e-3}, {table_learning_rate = 1e-2}]"
    changes = (gelu, gelu.replace("1e-3", "1e20")), (kan, gelu)
    ablate.main([plan(*changes), f"--out={tmp_path}"])
    text = (tmp_path / "plan.md").read_text()
    assert "| not finite |" in text and "missing" not in text and "| all | +0.0000 ± " in text


def test_signals_reach_processes_in_sessions_of_their_own():
    child = "import os, time; os.setsid(); print(os.getpid(), flush=True); time.sleep(60)"
    parent = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    process = subprocess.Popen([sys.executable, "-c", parent, child], stdout=subprocess.PIPE, text=True)
    pid = int(process.stdout.readline())
    ablate.signal_all(process, signal.SIGKILL)
    assert process.wait(timeout=20) == -signal.SIGKILL
    for _ in range(400):
        stat = Path(f"/proc/{pid}/stat")
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("it is still there")


def test_several_processes_and_a_try_that_diverges(plan, tmp_path):
    two = f"--launcher={sys.executable} -m torch.distributed.run --standalone --nproc_per_node=2"
    tries = "tries = [{learning_rate = 1e-3}, {learning_rate = 1e-2}]"
    once = ("seeds = [1, 2]", "seeds = [1]"), ('equal = ["tokens", "seconds"]', 'equal = ["tokens"]')
    text = Path(plan((tries, tries.replace("1e-2", "1e30")), *once)).read_text()
    path = tmp_path / "plan.toml"
    path.write_text(text.split("[arms.gelu]")[0].replace('"relu2", "gelu"', '"relu2"'))
    done = subprocess.run(
        [sys.executable, str(ROOT / "ablate.py"), str(path), f"--out={tmp_path}", two], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    losses = {run["options"]["learning_rate"]: run["val_loss"] for run in results(tmp_path)["runs"].values()}
    assert losses[1e30] is None and 0 < losses[1e-3] < 10


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_stopped_it_goes_on_where_it_was(plan, tmp_path, number):
    # The runs that a signal stops save, and end as if they had not been stopped. Under nohup a hangup is none.
    longer = ("max_steps = 12", "max_steps = 400"), ('equal = ["tokens", "seconds"]', 'equal = ["tokens"]')
    path = plan(*longer, ("eval_interval = 6", "eval_interval = 50"))
    command = [sys.executable, str(ROOT / "ablate.py"), path, f"--out={tmp_path}", "--jobs=2"]
    hangup = lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL if number == signal.SIGHUP else signal.SIG_IGN)
    how = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=hangup)
    process = subprocess.Popen(command, **how)
    deadline = time.time() + 200
    while time.time() < deadline and not list(tmp_path.glob("runs/*/latest")):
        time.sleep(0.05)
    if number != signal.SIGHUP:
        process.send_signal(signal.SIGHUP)
        time.sleep(0.5)
        assert process.poll() is None
    process.send_signal(number)
    _, error = process.communicate(timeout=100)
    assert process.returncode == 130 and "the same command goes on" in error, error
    folders = [p.parent for p in tmp_path.glob("runs/*/latest")]
    assert folders
    for folder in folders:
        assert 0 < json.loads((folder / "latest" / "config.json").read_text())["step"] < 400
    if number == signal.SIGHUP:  # what it saved is as good after either signal
        return
    os.rename(folders[0] / "latest", folders[0] / "latest.old")  # as a crash between two renames leaves it
    losses = []
    for out in (tmp_path, tmp_path / "fresh"):
        runner = ablate.Runner(ablate.read_plan(path), ablate.Options(path, out=str(out), jobs=2))
        (run,) = (r for arm in runner.plan.arms for r in runner.tries("all", arm) if r.key == folders[0].name)
        runner.make([run])
        losses.append(runner.results["runs"][run.key]["val_loss"])
    assert losses[0] == losses[1] and not Path(f"{folders[0]}.1").exists()  # nothing was moved aside


@pytest.mark.parametrize(
    "change, words",
    [
        (('reference = "relu2"', 'reference = "relu"'), ["no arm 'relu'", "relu2, gelu, kan"]),
        (("seeds = [1, 2]", "seeds = [1, 1]"), ["seeds", "[1, 1]"]),
        (("seeds = [1, 2]", "sedes = [1, 2]"), ["unknown setting sedes", "did you mean seeds?"]),
        (("seeds = [1, 2]", "seeds = 3"), ["seeds: int is not a list"]),
        (("seeds = [1, 2]", 'seeds = ["a"]'), ["seeds: item 0 of list is not an instance of int"]),
        (
            ("[arms.relu2]", "[arms.relu2]\nbatch_tokens = 256"),
            ["batch_tokens must be the same for all arms", 'in equal = ["seconds"] alone'],
        ),
        (
            ("[arms.relu2]", '[arms.relu2]\nequal_parameters = "no"'),
            ["equal_parameters: str is not"],
        ),
        (("{table_learning_rate = 1e-2}", "{kan_control_points = 9}"), ["tries may differ in", "kan_control_points"]),
        (("{table_learning_rate = 1e-2}", "3"), ["arm kan: tries: item 1 of list is not a dict"]),
        (("[base]", "[base]\ntries = [{}]"), ["unknown option tries"]),
        (("[arms.relu2]", "[cells.a]\ntries.ka = [{}]\n[arms.relu2]"), ["no arm 'ka' for cell a"]),
        (
            ("[arms.relu2]", '[cells.a]\narms = ["relu2", "kan"]\ntries.gelu = [{}]\n[arms.relu2]'),
            ["no arm 'gelu' for cell a; its arms are relu2, kan"],
        ),
        (("[arms.relu2]", "[cells.a]\ntries = [{}]\n[arms.relu2]"), ["cell a: tries: list is not a dict"]),
        (
            ("[arms.relu2]", "[cells.a]\ntries.kan = 3\n[arms.relu2]"),
            ["a: tries: value of key 'kan'"],
        ),
        (("[arms.kan]", "[arms.kan]\nkan_refine_at = [5]"), ["kan_refine_at", 'equal = ["tokens"]']),
        (("max_steps = 12", "max_steps = 0"), ["max_steps must be at least 1"]),
        (("n_head = 2", "n_head = 3"), ["n_head = 3"]),
        (("n_head = 2", "n_head = 2\ndecay_steps = 9"), ["unknown option decay_steps"]),
        (("n_embd = 16", "n_embed = 16"), ["unknown option n_embed", "did you mean n_embd?"]),
        (("n_embd = 16", "seed = 16"), ["unknown option seed"]),
        (("n_embd = 16", "learning_rate = -1"), ["learning_rate must be above 0"]),
        (("tries = [{table_learning_rate = 1e-3}, ", "tries = ["), ["same number of tries", "'kan': 1"]),
        (('equal = ["tokens"]', 'equal = ["steps"]'), ["equal: item 0 of list is not any of ('tokens', 'seconds')"]),
        (('equal = ["tokens"]', "equal = []"), ["equal must name one of tokens, seconds or both"]),
        (("[base]", "[base"), ["not valid TOML"]),
        (("data = ", "data = 'nowhere' # "), ["no data set 'nowhere'"]),
        (
            ("[arms.relu2]", '[cells.a]\narms = ["kann"]\n[arms.relu2]'),
            ["no arm 'kann' for cell a", "relu2, gelu, kan"],
        ),
        (("[arms.relu2]", '[cells.a]\narms = ["kan"]\n[arms.relu2]'), ["cell a needs the reference, relu2"]),
    ],
)
def test_mistakes_end_in_one_line(script, plan, tmp_path, change, words):
    assert_one_line(script("ablate.py", plan(change), f"--out={tmp_path}"), *words)


def test_other_mistakes_end_in_one_line(script, plan, tmp_path):
    assert_one_line(script("ablate.py", str(tmp_path / "none.toml")), "no plan", "plan")
    assert_one_line(script("ablate.py", plan(), "--cells=al"), "no cell 'al'", "did you mean all?")
    assert_one_line(script("ablate.py", plan(), "--jobs=0"), "jobs must be at least 1")
    (tmp_path / "plan.json").write_text("{}")
    assert_one_line(script("ablate.py", plan(), f"--out={tmp_path}"), "plan.json is damaged")


def row(*losses, arm="kan"):
    return ablate.Row(arm, [dict(val_loss=loss) for loss in losses], {}, 1.0, None)


def test_a_tie_is_within_two_standard_errors():
    other = row(2.0, 2.1, 2.2)
    assert other.mean == pytest.approx(2.1) and other.error == pytest.approx(0.1 / math.sqrt(3))
    error = math.hypot(other.error, other.error)
    for shift, verdict in ((1.9 * error, "tie"), (2.1 * error, "higher"), (-2.1 * error, "lower")):
        d, e, said = ablate.difference(row(*(loss + shift for loss in (2.0, 2.1, 2.2))), other)
        assert (d, e, said) == (pytest.approx(shift), pytest.approx(error), verdict)
    assert ablate.difference(row(1.0), other)[1:] == (None, "-")  # one seed: no claim
    assert row(1.0, None).mean == math.inf  # a seed that diverged is not left out of the mean


def test_a_power_law_is_found():
    sizes = [2e5, 8e5, 3e6]
    a, b = ablate.power_law(sizes, [3.0 * p**-0.07 for p in sizes])
    assert (a, b) == (pytest.approx(3.0), pytest.approx(0.07))


def test_a_failed_run_says_why(plan, tmp_path, script):
    failed = script("ablate.py", plan(("batch_tokens = 128", "batch_tokens = 100")), f"--out={tmp_path}")
    assert_one_line(failed, "batch_tokens = 100 must be a multiple")
