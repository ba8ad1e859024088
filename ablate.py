"""Ablations a sceptic would believe: arms against each other, tuned alike, with equal budgets and several seeds.

    python ablate.py configs/ablations/quick.toml               two arms, 3 minutes on 2 cores
    python ablate.py configs/ablations/evidence.toml --dry_run  what it would run, and for how long
    python ablate.py configs/ablations/evidence.toml --cells shakespeare_02M --jobs=2

One TOML says everything:

    reference = "swiglu"            what is equal is equal to this arm's
    baselines = ["gelu", "swiglu"]  the arms to beat: every other is held against the best of them
    equal = ["tokens", "seconds"]   what the runs may use up, one comparison each
    seeds = [1, 2, 3]
    [base]                          options of train.py, for all
    [cells.NAME]                    more of them: a corpus or a size, with tables of its own. A cell may have
    arms = ["swiglu", "kan"]        only some of the arms
    tries.NAME = [...]              its own for an arm, as below
    [arms.NAME]                     more of them: what is compared. Beside these an arm may have
    tries = [{learning_rate = 1e-3}, ...]   one run each with the first seed; the best goes on, a single one without a
                                            run. As many for every arm, and of nothing that makes a step longer
    equal = ["seconds"]             this arm's own comparisons; in these alone it may have its own batch_tokens
    equal_parameters = false        or else match_parameters makes it as large as the reference

Equal tokens: max_steps for all. Equal seconds: all arms of a cell (on a GPU each with the reference) take turns, some
steps at a time, alone on the machine, so that its moods hit them alike; then each gets the steps it can make while the
reference makes max_steps, and a schedule as long as that. What a run computes does not depend on how fast it ran, so
runs may share the machine (--jobs). How many threads a step has changes who is quick: timings and runs have as many
(--threads). Seconds are of training, without evaluations, checkpoints and compilation.

Written to --out: after every run NAME.json, with all runs, from which the same command goes on; after every cell
NAME.md; at the end NAME.png. A run that was interrupted goes on from its checkpoint.
"""

import concurrent.futures
import contextlib
import functools
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
import warnings
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import torch
import typeguard
import tyro

import cli
from bench import markdown
from data.bins import TokenData
from log import lock, read_log
from model import GPT, count
from plot import save_figure
from train import TrainConfig

ROOT = Path(__file__).resolve().parent
MEASURES = ("tokens", "seconds")
# What arms must share, for their losses to be comparable (in equal seconds alone each may have a batch of its own), and
# what tries may differ in, for a step to take as long.
SHARED = set("data block_size batch_tokens max_steps eval_tokens eval_interval".split())
RATES = set("learning_rate table_learning_rate weight_decay table_weight_decay beta1 beta2 warmup_steps min_lr".split())
WARM, TURNS, STEPS = 12, 12, 8  # of a timing: steps that don't count, turns of each arm, steps of a turn


@dataclass
class Options:
    plan: tyro.conf.Positional[str]  # a TOML file, as above
    dry_run: bool = False  # print the runs and the hours they would take
    cells: tuple[str, ...] = ()  # these only; empty: all
    jobs: int = 1  # runs at a time, which share the cores; timings are always alone
    threads: int = 0  # of a run, and of a step that is timed; 0: the cores divided by jobs
    launcher: str = ""  # what starts train.py in place of python: "torchrun --nproc_per_node=8"
    out: str = "out/ablations"  # folder of results, and of unfinished runs
    keep: bool = False  # the checkpoints of finished runs


# ----------------------------------------------------------------------------------------------------------------------
# The plan


# The types of what a plan, a cell and an arm may have, options of train.py left out.
PLAN = dict(base=dict, cells=dict[str, dict], arms=dict[str, dict], seeds=list[int], reference=str, baselines=list[str])
PLAN["equal"] = list[Literal[MEASURES]]
CELL = dict(arms=list[str], tries=dict[str, list[dict]])
ARM = dict(tries=list[dict], equal=PLAN["equal"], equal_parameters=bool)


@dataclass
class Arm:
    options: dict
    tries: list[dict]
    equal: tuple[str, ...]
    equal_parameters: bool


@dataclass
class Plan:
    name: str
    base: dict
    cells: dict[str, dict]
    arms: dict[str, Arm]
    seeds: list[int]
    equal: tuple[str, ...]
    reference: str
    baselines: list[str]

    def arms_of(self, cell):
        """{name: Arm}"""
        return {name: self.arms[name] for name in self.cells[cell].get("arms", self.arms)}

    def tries(self, cell, arm):
        return self.cells[cell].get("tries", {}).get(arm, self.arms[arm].tries)

    def options(self, cell, arm, extra):
        """What differs from train.py's defaults in a run of this arm, before it is made as large as the reference."""
        here = {name: value for name, value in self.cells[cell].items() if name not in ("arms", "tries")}
        return {**self.base, **here, **self.arms[arm].options, **extra}

    def reference_steps(self, cell):
        return make_config(self.options(cell, self.reference, {})).max_steps


def read_plan(path):
    """The plan in a TOML file, checked; ValueError says what is wrong with it."""
    content = cli.load_toml(path, "plan")
    cli.check_names(content, sorted({field.name for field in fields(Plan)} - {"name"}), path, "setting")
    check_types(content, PLAN, path)
    for name, settings in content.get("cells", {}).items():
        check_types(settings, CELL, f"{path}: cell {name}")
    for name, settings in content.get("arms", {}).items():
        check_types(settings, ARM, f"{path}: arm {name}")
    if not content.get("arms"):
        raise ValueError(f"{path} has no arms; name at least one: [arms.NAME]")
    equal = content.get("equal", ["tokens"])
    arms = {}
    for name, options in content["arms"].items():
        options = dict(options)
        special = dict(tries=options.pop("tries", [{}]), equal=tuple(options.pop("equal", equal)))
        arms[name] = Arm(options, equal_parameters=options.pop("equal_parameters", True), **special)
    plan = Plan(
        name=Path(path).stem,
        base=content.get("base", {}),
        cells=content.get("cells") or {"all": {}},
        arms=arms,
        seeds=content.get("seeds", [1, 2, 3]),
        equal=tuple(equal),
        reference=content.get("reference", next(iter(arms))),
        baselines=content.get("baselines", []),
    )
    for name in [plan.reference, *plan.baselines]:
        if name not in arms:
            raise ValueError(f"{path}: no arm {name!r}; the arms are {', '.join(arms)}")
    for cell, content in plan.cells.items():
        for name in content.get("arms", []):
            if name not in arms:
                raise ValueError(f"{path}: no arm {name!r} for cell {cell}; the arms are {', '.join(arms)}")
        for name in content.get("tries", []):
            if name not in plan.arms_of(cell):
                raise ValueError(
                    f"{path}: no arm {name!r} for cell {cell}; its arms are {', '.join(plan.arms_of(cell))}"
                )
        if plan.reference not in plan.arms_of(cell):
            raise ValueError(f"{path}: cell {cell} needs the reference, {plan.reference}, among its arms")
        tries = {name: len(plan.tries(cell, name)) for name in plan.arms_of(cell)}
        if len(set(tries.values())) > 1 or 0 in tries.values():
            raise ValueError(f"{path}: every arm must be tuned in the same number of tries, got {tries}")
    if not all((equal, *(arm.equal for arm in arms.values()))):
        raise ValueError(f"{path}: equal must name one of {', '.join(MEASURES)} or both, got []")
    if not plan.seeds or len(set(plan.seeds)) < len(plan.seeds):
        raise ValueError(f"{path}: seeds must be different numbers, at least one, got {plan.seeds}")
    own = {"out_dir", "resume", "seed", "match_parameters", "decay_steps"}  # is ours to set, or not to be set
    known = sorted({field.name for field in fields(TrainConfig)} - own)
    for cell in plan.cells:
        for name, arm in plan.arms_of(cell).items():
            where = f"{path}: cell {cell}, arm {name}"
            for extra in plan.tries(cell, name):
                options = plan.options(cell, name, extra)
                cli.check_names(options, known, where)
                own_batch = {"batch_tokens"} if arm.equal == ("seconds",) else set()
                if unequal := sorted((SHARED - own_batch) & {*arm.options, *extra}):
                    remedy = "set it in [base] or a cell"
                    if unequal[0] == "batch_tokens":
                        remedy += ', or compare this arm in equal = ["seconds"] alone'
                    raise ValueError(f"{where}: {unequal[0]} must be the same for all arms; {remedy}")
                if slow := sorted(set(extra) - RATES):
                    raise ValueError(f"{where}: tries may differ in {', '.join(sorted(RATES))}, got {slow[0]}")
                config = make_config(options)
                config.check()
                config.model_config(vocab_size=256)  # which checks itself
                if config.max_steps < 1:
                    raise ValueError(f"{where}: max_steps must be at least 1, got {config.max_steps}")
                if config.kan_refine_at and "seconds" in arm.equal:
                    raise ValueError(
                        f'{where}: its steps grow longer by kan_refine_at; compare it in equal = ["tokens"]'
                    )
    return plan


def check_types(settings, types, where):
    """ValueError for the first of the settings that is not of the type that the TOML should have there."""
    for name, kind in types.items():
        try:
            every = typeguard.CollectionCheckStrategy.ALL_ITEMS
            typeguard.check_type(settings.get(name, kind()), kind, collection_check_strategy=every)
        except typeguard.TypeCheckError as error:
            raise ValueError(f"{where}: {name}: {error}") from None


def signal_all(process, number):
    """Signal a process and its descendants: torchrun gives each of its own a session, where no group reaches."""
    children = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = stat.read_text(errors="replace").rpartition(")")[2].split()[1]
            children.setdefault(int(parent), []).append(int(stat.parent.name))
    family = [process.pid]
    for pid in family:
        family += children.get(pid, [])
    for pid in family:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def lines(path):
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def make_config(options):
    """A TrainConfig of options, their types checked as on the command line."""
    return cli.parse(TrainConfig, cli.as_arguments(options))


@dataclass
class Run:
    """One training run: what it is for, its options, and the fingerprint of its data."""

    cell: str
    arm: str
    seed: int
    options: dict
    data: str

    @property
    def key(self):
        """Names the run by what it computes, so that a result is found again, whatever the plan calls it."""
        return hashlib.sha256(json.dumps([self.options, self.data], sort_keys=True).encode()).hexdigest()[:12]


# ----------------------------------------------------------------------------------------------------------------------
# Running


class Runner:
    """Makes runs, each in a process of its own, and remembers their results."""

    def __init__(self, plan, options):
        self.plan, self.options = plan, options
        self.threads = options.threads or max(1, (os.cpu_count() or 1) // options.jobs)
        self.folder = Path(options.out)
        self.path = self.folder / f"{plan.name}.json"
        self.results = dict(runs={}, speeds={})
        if self.path.is_file():
            try:
                self.results = json.loads(self.path.read_text(encoding="utf-8"))
                self.results["runs"].keys(), self.results["speeds"].keys()
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ValueError(f"{self.path} is damaged; move it away, and its runs are made again") from None
        self.lock, self.processes, self.stopping = threading.Lock(), set(), False

    @functools.cache  # noqa: B019  there is one runner
    def data(self, cell):
        """(TokenData, parameters of the reference)"""
        config = make_config(self.plan.options(cell, self.plan.reference, {}))
        data = TokenData(config.data, config.block_size)
        return data, count(config.model_config(data.vocab_size))

    def run(self, cell, arm, seed, extra, steps=None):
        options = self.plan.options(cell, arm, extra)
        data, parameters = self.data(cell)
        if arm != self.plan.reference and self.plan.arms[arm].equal_parameters:
            options["match_parameters"] = parameters
        if steps:
            options["max_steps"] = steps
        options["seed"] = seed
        return Run(cell, arm, seed, options, data.fingerprint)

    def save(self):
        cli.write_text(self.path, json.dumps(self.results, indent=1))

    def start(self, options, folder):
        """Start train.py, in a session of its own: Ctrl-C is ours to pass on."""
        arguments = cli.as_arguments({**options, "out_dir": str(folder)})
        if any((folder / name).is_dir() for name in ("latest", "latest.old")):  # see checkpoint.py
            arguments.append("--resume")
        command = [*(shlex.split(self.options.launcher) or [sys.executable]), str(ROOT / "train.py"), *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads)}
        how = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)
        with self.lock:
            if self.stopping:
                raise KeyboardInterrupt
            process = subprocess.Popen(command, env=environment, **how)
            self.processes.add(process)
            return process

    def finish(self, process):
        """Wait for it; returns whether its loss stayed finite. ValueError with what it said, if it failed."""
        error = process.communicate()[1]
        self.processes.discard(process)
        if self.stopping:
            raise KeyboardInterrupt
        # torchrun ends with 1 whatever its processes ended with, and says much after what they said.
        diverged = process.returncode == cli.NOT_FINITE or re.search(rf"exitcode *: {cli.NOT_FINITE}\b", error)
        if process.returncode and not diverged:
            said = error.strip().splitlines() or [f"status {process.returncode}"]
            said = [line for line in said if line.startswith("train.py: ")] or said
            raise ValueError(f"{shlex.join(process.args[1:])} failed: {said[-1]}")
        return not diverged

    def timed(self, cell):
        """What is timed: every arm without evaluations, at rates that do no harm."""
        endless = dict(max_steps=10**9, eval_interval=10**9, eval_tokens=1)
        endless.update(learning_rate=1e-4, table_learning_rate=1e-4)
        return {name: self.run(cell, name, 0, endless) for name in self.plan.arms_of(cell)}

    def speed_key(self, run):
        return f"{run.key}-{self.threads}"

    def known_speeds(self, cell):
        """{arm: what was measured of its steps, with so many threads}, of the arms of which it is known."""
        keys = {arm: self.speed_key(run) for arm, run in self.timed(cell).items()}
        return {arm: self.results["speeds"][key] for arm, key in keys.items() if key in self.results["speeds"]}

    def speeds(self, cell):
        """{arm: milliseconds a step}, measured where it is not known yet."""
        known, runs, reference = self.known_speeds(cell), self.timed(cell), self.plan.reference
        missing = sorted((arm for arm in runs if arm not in known), key=lambda arm: arm != reference)
        # On a GPU one by one, since it may not hold them all; the reference first.
        on_cpu = runs[reference].options.get("device") == "cpu"
        for group in [missing] if on_cpu and missing else [[arm] for arm in missing]:
            turns, memory, header = self.take_turns({arm: runs[arm] for arm in dict.fromkeys([reference, *group])})
            # A reference that is known stays what it was, and so do the steps that were given out by it.
            base = known.get(reference, dict(ms=statistics.median(turns[reference])))["ms"]
            how = {name: header[name] for name in ("device", "cpu", "matmul_gflops", "torch")}
            how.update(reference_turns=turns[reference], threads=self.threads)
            for arm in group:
                # What is compared is taken from the same turn.
                ratio = statistics.median(a / b for a, b in zip(turns[arm], turns[reference], strict=True))
                measured = dict(ms=ratio * base, ratio=ratio, peak_memory=memory[arm], turns=turns[arm])
                known[arm] = dict(cell=cell, arm=arm, **measured, **how)
                self.results["speeds"][self.speed_key(runs[arm])] = known[arm]
            self.save()
        return {arm: known[arm]["ms"] for arm in runs}

    def take_turns(self, runs):
        """({arm: [milliseconds a step, the median of each turn]}, {arm: its peak memory in bytes}, a log's header).

        All of them are training, but at any time all but one are halted by a signal.
        """
        turns, memory, processes, logs = {arm: [] for arm in runs}, {}, {}, {}
        try:
            for arm, run in runs.items():
                folder = self.folder / "runs" / f"{run.key}-timing-{os.getpid()}"
                processes[arm], logs[arm] = self.start(run.options, folder), folder / "log.jsonl"
                self.wait_for(processes[arm], logs[arm], WARM)
                signal_all(processes[arm], signal.SIGSTOP)
            for _ in range(TURNS):
                for arm, process in processes.items():
                    seen = lines(logs[arm])
                    signal_all(process, signal.SIGCONT)
                    self.wait_for(process, logs[arm], seen + STEPS + 1)
                    signal_all(process, signal.SIGSTOP)
                    header, records = read_log(logs[arm].parent)
                    tokens = header["config"]["batch_tokens"]
                    # The first of them was halted on its way.
                    ms = [1e3 * tokens / record["tokens_per_second"] for record in records[seen:]]
                    turns[arm].append(statistics.median(ms))
                    memory[arm] = records[-1]["peak_memory"]
            return turns, memory, header
        finally:
            for process in processes.values():
                signal_all(process, signal.SIGKILL)
                process.wait()
                process.stderr.close()
                self.processes.discard(process)
            for log in logs.values():
                shutil.rmtree(log.parent, ignore_errors=True)

    def wait_for(self, process, log, number):
        """Until the log has so many lines."""
        while lines(log) < number:
            if process.poll() is not None:
                self.finish(process)
                raise ValueError(f"{shlex.join(process.args[1:])} has no finite loss while it is timed")
            time.sleep(0.005)

    def make(self, runs):
        """Make those that are not made yet, some at a time."""
        todo = list({run.key: run for run in runs if run.key not in self.results["runs"]}.values())
        with concurrent.futures.ThreadPoolExecutor(self.options.jobs) as pool:
            futures = [pool.submit(self.make_one, run) for run in todo]
            try:
                for future in concurrent.futures.as_completed(futures):
                    future.result()
            except BaseException:
                self.stop()
                raise

    def make_one(self, run):
        folder, started = self.folder / "runs" / run.key, time.time()
        finite = self.finish(self.start(run.options, folder))
        result = dict(vars(run), val_loss=None)
        if finite:
            header, records = read_log(folder)
            last = records[-1]
            result.update({name: header[name] for name in "parameters flops_per_token git torch cpu threads".split()})
            result.update(val_loss=last["val_loss"], steps=last["step"], seconds=round(last["seconds"], 1))
            result.update(peak_memory=last["peak_memory"], batch_tokens=header["config"]["batch_tokens"])
            result["curve"] = [[r["step"], round(r["val_loss"], 5)] for r in records if "val_loss" in r]
        with self.lock:
            self.results["runs"][run.key] = result
            self.save()
        if not self.options.keep:
            for name in ("latest", "best"):
                shutil.rmtree(folder / name, ignore_errors=True)
        loss = "not finite" if not finite else f"{result['val_loss']:.4f} after {result['steps']} steps"
        knobs = sorted({name for extra in self.plan.tries(run.cell, run.arm) for name in extra})
        knobs = "".join(f" {name}={run.options[name]}" for name in knobs if name in run.options)
        print(f"{run.cell}: {run.arm} seed {run.seed}{knobs}: {loss} ({time.time() - started:,.0f} s)", flush=True)

    def stop(self):
        with self.lock:
            self.stopping = True
        for process in list(self.processes):
            process.terminate()  # train.py saves, and exits

    # ------------------------------------------------------------------------------------------------------------------
    # Which runs

    def tries(self, cell, arm):
        """The runs to choose by: none where there is one try."""
        tries = self.plan.tries(cell, arm)
        return [self.run(cell, arm, self.plan.seeds[0], extra) for extra in tries] if len(tries) > 1 else []

    def chosen(self, cell, arm):
        """The try that did best with the first seed, or the first if none stayed finite; None if some are missing."""
        found = [self.results["runs"].get(run.key) for run in self.tries(cell, arm)]
        if None in found:
            return None
        losses = [math.inf if result["val_loss"] is None else result["val_loss"] for result in found]
        return self.plan.tries(cell, arm)[losses.index(min(losses)) if losses else 0]

    def compared(self, cell, arm, measure, extra, speeds):
        """The runs of one comparison, one a seed."""
        steps = None
        if measure == "seconds" and arm != self.plan.reference:
            steps = max(1, round(self.plan.reference_steps(cell) * speeds[self.plan.reference] / speeds[arm]))
        return [self.run(cell, arm, seed, extra, steps) for seed in self.plan.seeds]

    def make_cell(self, cell):
        speeds, arms = self.speeds(cell), self.plan.arms_of(cell)
        searched = [self.tries(cell, arm) for arm in arms]
        self.make([run for turn in zip(*searched, strict=True) for run in turn])
        runs = []
        for measure in MEASURES:
            for arm in arms:
                if measure in arms[arm].equal:
                    runs += self.compared(cell, arm, measure, self.chosen(cell, arm), speeds)
        self.make(sorted(runs, key=lambda run: self.plan.seeds.index(run.seed)))  # the arms take turns


# ----------------------------------------------------------------------------------------------------------------------
# The report


@dataclass
class Row:
    """One arm in one comparison: its runs, all seeds that are made."""

    arm: str
    runs: list[dict]
    extra: dict
    ms: float
    peak_memory: int | None

    @property
    def losses(self):
        return [math.inf if run["val_loss"] is None else run["val_loss"] for run in self.runs]

    @property
    def mean(self):
        return statistics.mean(self.losses)

    @property
    def error(self):
        """The mean's standard error; None with one seed, or if one diverged."""
        return standard_error(self.losses) if len(self.losses) > 1 and self.mean < math.inf else None


def standard_error(values):
    return statistics.stdev(values) / math.sqrt(len(values))


def difference(row, other):
    """(row - other, its standard error, "lower", "higher" or "tie"), of means; a tie is within two standard errors."""
    if row.error is None or other.error is None:
        return row.mean - other.mean, None, "-"
    d, error = row.mean - other.mean, math.hypot(row.error, other.error)
    return d, error, "tie" if abs(d) <= 2 * error else "lower" if d < 0 else "higher"


def rows_of(runner, cell, measure):
    """The comparison's rows, as far as runs are made."""
    plan, rows = runner.plan, []
    try:
        known = runner.known_speeds(cell)
    except ValueError as error:
        warnings.warn(f"{cell} is left out of the tables: {error}", stacklevel=2)
        return []
    if set(known) < set(plan.arms_of(cell)):
        return []
    speeds = {arm: speed["ms"] for arm, speed in known.items()}
    for name, arm in plan.arms_of(cell).items():
        extra = runner.chosen(cell, name)
        if measure in arm.equal and extra is not None:
            wanted = runner.compared(cell, name, measure, extra, speeds)
            made = [runner.results["runs"][run.key] for run in wanted if run.key in runner.results["runs"]]
            if made:
                rows.append(Row(name, made, extra, speeds[name], known[name].get("peak_memory")))
    return rows


def best_baseline(plan, rows):
    finite = (row for row in rows if row.arm in plan.baselines and row.mean < math.inf)
    return min(finite, key=lambda row: row.mean, default=None)


def comparisons(runner):
    """{(cell, measure): rows}, of those that have any."""
    every = {(cell, measure): rows_of(runner, cell, measure) for cell in runner.plan.cells for measure in MEASURES}
    return {where: rows for where, rows in every.items() if rows}


def against_text(plan, where, row, rows):
    """The row against the best of the baselines, which are among rows, the arms of the comparison where."""
    best = best_baseline(plan, rows)
    if best is None or (row.arm in plan.baselines and row is not best):
        return ""
    (cell, measure), made = where, {other.arm: len(other.runs) for other in rows}
    needed = [name for name, arm in plan.arms_of(cell).items() if name in plan.baselines and measure in arm.equal]
    missing = any(made.get(name) != len(plan.seeds) for name in [row.arm, *needed])
    if row is best:
        return "the best baseline" + (", but runs are missing" if missing else "")
    d, error, verdict = difference(row, best)
    if missing:
        verdict = "runs are missing"
    return f"{d:+.4f}" + (f" ± {error:.4f}, {verdict}" if error is not None else "")


def report(runner, compared):
    """The Markdown of all comparisons."""
    plan = runner.plan
    tries = sorted({len(plan.tries(cell, plan.reference)) for cell, _ in compared})
    tries = " or ".join("1 (so not at all)" if number == 1 else str(number) for number in tries)
    cells = dict.fromkeys(cell for cell, _ in compared)
    speeds = [speed for cell in cells for speed in runner.known_speeds(cell).values()]
    turns = " or ".join(map(str, sorted({len(speed["turns"]) for speed in speeds}))) or TURNS
    parts = [
        f"# Ablation `{plan.name}`",
        f"Made by `python ablate.py {runner.options.plan}`. Validation loss in nats per token: the mean over seeds ± "
        f"its standard error; a difference within two is a tie. Every arm of a cell was tuned in as many runs, "
        f"{tries}, with the first seed, which is one of those counted, and the reference's "
        f"steps. Errors are of unpaired means: of equal arms, two standard errors call one in eight different where "
        f"there are three seeds. ms: a training step with --threads={runner.threads}, alone on the machine: the "
        f"reference's median over {turns} turns, the others' by the median of their ratios to it turn by turn. "
        f"Peak MB: of the process that was timed. Seconds are steps times ms." + timed_on(speeds),
    ]
    summary = []
    for cell in plan.cells:
        line = [cell]
        for measure in MEASURES:
            rows = {row.arm: row for row in compared.get((cell, measure), [])}
            for arm in free_arms(plan, measure):
                line.append(against_text(plan, (cell, measure), rows[arm], rows.values()) if arm in rows else "")
        if any(line[1:]):
            summary.append(line)
    if summary and plan.baselines:
        head = ["cell", *(f"{arm}, equal {m}" for m in MEASURES for arm in free_arms(plan, m))]
        parts.append("## Against the best baseline\n\n" + markdown(head, summary))
    parts += fits(plan, compared)
    head = "arm, parameters, tried best, steps, ms, tokens/s, Mflop/token, peak MB, seconds, loss, against".split(", ")
    for (cell, measure), rows in compared.items():
        lines = [line_of(plan, (cell, measure), row, rows) for row in rows]
        parts.append(f"## {cell}, equal {measure}\n\n" + markdown(head, lines))
    return "\n\n".join(parts) + "\n"


def timed_on(speeds):
    """The CPUs that steps were timed on, and what matrix products made of them: an MLP is as fast as these."""
    rates = {}
    for speed in speeds:
        if speed.get("matmul_gflops"):  # not a GPU's, nor one that was timed before it was measured
            rates.setdefault(speed["cpu"], []).append(speed["matmul_gflops"])
    lines = (f" {cpu}: float32 matrix products at {min(r):.0f} to {max(r):.0f} GFLOP/s." for cpu, r in rates.items())
    return "".join(lines)


def line_of(plan, where, row, rows):
    """A row of a comparison's table."""
    run, knobs = row.runs[0], ", ".join(f"{k}={v}" for k, v in row.extra.items())
    if row.mean == math.inf:
        return [row.arm, "", knobs, "", f"{row.ms:.1f}", "", "", "", "", "not finite", ""]
    loss = f"{row.mean:.4f}" + (f" ± {row.error:.4f}" if row.error is not None else " (one seed)")
    return [
        row.arm,
        f"{run['parameters']['total']:,}",
        knobs,
        f"{run['steps']:,}",
        f"{row.ms:.1f}",
        f"{run['batch_tokens'] / row.ms * 1e3:,.0f}",
        f"{total_flops(run['flops_per_token']) / 1e6:.2f}",
        f"{row.peak_memory / 2**20:,.0f}" if row.peak_memory else "",
        f"{run['steps'] * row.ms / 1e3:.0f}",
        loss + ("" if len(row.runs) in (1, len(plan.seeds)) else f", {len(row.runs)} seeds so far"),
        against_text(plan, where, row, rows),
    ]


def free_arms(plan, measure):
    return [name for name, arm in plan.arms.items() if name not in plan.baselines and measure in arm.equal]


def fits(plan, compared):
    """Where cells of one corpus, with as many steps of the reference, have three sizes or more: loss = a *
    parameters^-b, a * seconds^-b by least squares."""
    groups, lines = {}, []
    for (cell, measure), rows in compared.items():
        budget = f"{plan.reference_steps(cell):,}"
        for row in (row for row in rows if row.mean < math.inf):
            run = row.runs[0]
            point = run["parameters"]["non_embedding"], run["steps"] * row.ms / 1e3, row.mean
            corpus = run["options"].get("data", TrainConfig.data)
            groups.setdefault((corpus, measure, budget, row.arm), []).append(point)
    for group, points in groups.items():
        sizes, seconds, losses = zip(*points)
        if len(set(sizes)) >= 3:
            (a, b), (c, d) = power_law(sizes, losses), power_law(seconds, losses)
            lines.append([*group, f"{a:.3f} P^-{b:.4f}", f"{c:.3f} s^-{d:.4f}", f"{b * math.log(2):.4f}"])
    if not lines:
        return []
    head = ["corpus", "equal", "the reference's steps", "arm", "loss by parameters P", "loss by seconds s"]
    head.append("a doubling of P lowers log loss by")
    return ["## Fits over sizes\n\nP: parameters that are not embeddings.\n\n" + markdown(head, lines)]


def power_law(x, y):
    """(a, b) of y = a * x^-b, least squares in logarithms."""
    slope, intercept = statistics.linear_regression([math.log(v) for v in x], [math.log(v) for v in y])
    return math.exp(intercept), -slope


def draw_curves(axis, plan, rows, measure):
    """Validation loss of a comparison's rows against tokens or seconds, the mean over seeds and its error as a band."""
    for number, arm in enumerate(plan.arms):
        for row in (row for row in rows if row.arm == arm and row.mean < math.inf):
            curves = [[loss for step, loss in run["curve"] if step] for run in row.runs]
            steps = [step for step, _ in row.runs[0]["curve"] if step]
            per_step = row.runs[0]["batch_tokens"] if measure == "tokens" else row.ms / 1e3
            mean = [statistics.mean(values) for values in zip(*curves)]
            error = [standard_error(values) if len(values) > 1 else 0 for values in zip(*curves)]
            where = [step * per_step for step in steps]
            style = ("-", "--", ":")[number // 10 % 3]  # there are ten colours
            axis.plot(where, mean, style, color=f"C{number}", label=f"{arm} ({row.mean:.3f})", linewidth=1)
            low, high = ([m + sign * e for m, e in zip(mean, error)] for sign in (-1, 1))
            axis.fill_between(where, low, high, color=f"C{number}", alpha=0.2, linewidth=0)
    finals = [row.mean for row in rows if row.mean < math.inf]
    if finals:
        axis.set_ylim(min(finals) - 0.05, max(finals) + 0.5)
    axis.set_xlabel("tokens" if measure == "tokens" else "seconds of training")
    axis.set_ylabel("validation loss, nats")
    axis.grid(True, linewidth=0.3)
    axis.legend(fontsize=7)


def figure(plan, compared, path):
    """Validation loss against tokens and against seconds, a row of axes per cell, mean and standard error as a band."""
    from matplotlib.figure import Figure

    cells = [cell for cell in plan.cells if any((cell, measure) in compared for measure in MEASURES)]
    if not cells:
        return None
    drawing = Figure(figsize=(11, 3.6 * len(cells)), layout="constrained")
    axes = drawing.subplots(len(cells), 2, squeeze=False)
    for cell, pair in zip(cells, axes, strict=True):
        for axis, measure in zip(pair, MEASURES, strict=True):
            equal = measure if (cell, measure) in compared else next(m for m in MEASURES if (cell, m) in compared)
            draw_curves(axis, plan, compared[cell, equal], measure)
            axis.set_title(f"{cell}, equal {equal}", fontsize=9)
    return save_figure(drawing, path, dpi=90)  # many cells make it large


# ----------------------------------------------------------------------------------------------------------------------


def flops_per_token(config):
    with torch.device("meta"):
        return total_flops(GPT(config).flops_per_token())


def total_flops(flops):
    """One number of what flops_per_token counts, the spline layers' work being their look-ups."""
    return sum(number for name, number in flops.items() if name != "kan_hat_gemm")


def dry_run(runner, cells):
    """Print the runs that are left and their hours. Where a step is not timed yet, its time is estimated from its flops
    and from some steps of the first cell's reference, which flatters small models."""
    plan, rate, total = runner.plan, None, 0.0
    lines = []
    for cell in cells:
        ms, known = {}, runner.known_speeds(cell)
        for arm, run in runner.timed(cell).items():
            config = make_config(run.options)
            work = flops_per_token(config.model_config(runner.data(cell)[0].vocab_size)) * config.batch_tokens
            if arm in known:
                ms[arm] = known[arm]["ms"]
            else:
                if rate is None:
                    rate = flops_per_ms(runner, cells[0])
                ms[arm] = work / rate
        for name, arm in plan.arms_of(cell).items():
            searched = runner.tries(cell, name)
            extra = runner.chosen(cell, name) or plan.tries(cell, name)[0]
            wanted = searched + [run for m in arm.equal for run in runner.compared(cell, name, m, extra, ms)]
            left = {run.key: run for run in wanted if run.key not in runner.results["runs"]}.values()
            steps = [make_config(run.options).max_steps for run in left]
            hours = sum(steps) * ms[name] / 3.6e6
            total += hours
            span = f"{min(steps):,} to {max(steps):,}" if steps else ""
            lines.append([cell, name, len(steps), span, f"{ms[name]:.1f}", f"{hours:.2f}"])
    print(markdown(["cell", "arm", "runs left", "steps", "ms a step", "hours"], lines))
    print(f"about {total:.1f} hours of training, evaluations not counted; nothing was trained")


def flops_per_ms(runner, cell):
    """What the reference achieves, in a few steps."""
    reference = runner.plan.reference
    turns, _, header = runner.take_turns({reference: runner.timed(cell)[reference]})
    return (
        total_flops(header["flops_per_token"]) * header["config"]["batch_tokens"] / statistics.median(turns[reference])
    )


def interrupt(number, frame):
    raise KeyboardInterrupt


def main(arguments):
    options = cli.parse(Options, arguments)
    plan = read_plan(options.plan)
    for cell in options.cells:
        if cell not in plan.cells:
            raise ValueError(f"no cell {cell!r} in {options.plan}; {cli.nearest(cell, list(plan.cells))}")
    if options.jobs < 1 or options.threads < 0:
        raise ValueError(f"jobs must be at least 1, threads at least 0, got {options.jobs} and {options.threads}")
    held = None if options.dry_run else lock(options.out)  # before the results are read
    cells, runner = options.cells or tuple(plan.cells), Runner(plan, options)
    # A shell's background jobs ignore Ctrl-C, so it is set here too; no process may be left behind.
    previous = {number: signal.signal(number, interrupt) for number in cli.stop_signals()}
    try:
        if options.dry_run:
            return dry_run(runner, cells)
        for cell in cells:
            runner.data(cell)  # before the first run: what is missing is said at once
        for cell in cells:
            runner.make_cell(cell)
            compared = comparisons(runner)
            text = report(runner, compared)
            cli.write_text(runner.path.with_suffix(".md"), text)
    except KeyboardInterrupt:
        runner.stop()
        print(f"stopped; the same command goes on. What is finished is in {runner.path}", file=sys.stderr)
        return 130
    finally:
        if held:
            held.close()
        for number, handler in previous.items():
            signal.signal(number, handler)
    picture = figure(plan, compared, runner.path.with_suffix(".png"))
    print(text)
    print(f"{runner.path}, {runner.path.with_suffix('.md')}, {picture}")


if __name__ == "__main__":
    cli.run(main)
