"""The record of a run: log.jsonl, the terminal and, when asked, wandb.

log.jsonl begins with how the run was made: configuration, git hash, versions, device, seed. Then comes a line a step:

    step                number of updates made
    train_loss          nats per token, mean over the whole batch of the last update, before it was made
    val_loss            where an evaluation fell on this step
    lr, grad_norm, table_grad_norm    of the last update; norms before clipping, grad_norm of all parameters
    tokens_per_second   of the last update
    seconds             spent training so far, evaluations and checkpoints left out
    peak_memory         bytes: of tensors on CUDA, of the process elsewhere
"""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import cli


class Log:
    """log.jsonl, the terminal (a progress bar, or plain lines where there is none) and wandb.

    step: where the run begins, 0 or a checkpoint's. What an old log has after it is forgotten. Its record of that step,
    self.pending, may still get a val_loss: it stays in the file until write() replaces it.
    """

    def __init__(self, config, header, step):
        self.config, self.header, self.pending = config, header, None
        self.progress = self.wandb = None
        if config.wandb:
            import wandb

            name, folder = Path(config.out_dir).name, config.out_dir
            try:
                self.wandb = wandb.init(project=config.wandb_project, name=name, config=header["config"], dir=folder)
            except wandb.Error as error:
                raise ValueError(f"wandb: {error}; log in, set WANDB_MODE=offline, or leave out --wandb") from None
        path = Path(config.out_dir) / "log.jsonl"
        kept = [r for r in read_lines(path) if r.get("step", -1) <= step] if step and path.is_file() else []
        if kept and kept[-1].get("step") == step:
            self.pending = kept[-1]
        lines = [json.dumps(record) + "\n" for record in kept]
        cli.write_text(path, "".join(lines))
        self.file = open(path, "r+", encoding="utf-8")  # noqa: SIM115  closed by close()
        self.end = len("".join(lines[:-1] if self.pending else lines).encode())  # where the next record goes
        if sys.stdout.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
            self.progress = Progress(*columns)
            self.task = self.progress.add_task("", total=config.max_steps, completed=step)
            self.progress.start()

    def write(self, record):
        if self.header:
            self.file.seek(self.end)
            self.file.truncate()
            self.file.write(json.dumps(self.header) + "\n")
            self.header = None
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        text = f"step {record['step']}"
        if "train_loss" in record:
            text += f" | train {record['train_loss']:.4f} | lr {record['lr']:.2e} | norm {record['grad_norm']:.2f}"
            text += f" | {record['tokens_per_second']:,.0f} tok/s"
        if "val_loss" in record:
            text += f" | val {record['val_loss']:.4f}"
        shown = "val_loss" in record or record["step"] % self.config.log_interval == 0
        if self.progress:
            self.progress.update(self.task, completed=record["step"], description=text)
            if "val_loss" in record:
                say(text, show=self.progress.console.print)
        elif shown:
            say(text)
        if self.wandb and shown:
            self.wandb.log({k: v for k, v in record.items() if k != "step"}, step=record["step"])

    def close(self):
        if self.progress:
            with contextlib.suppress(OSError):  # the terminal may be gone
                self.progress.stop()
        if self.wandb:
            self.wandb.finish()
        self.file.close()


def say(text, show=print):
    """Print, or show; a run does not die of having no one left to tell (train.py | head), nor of a full disk."""
    try:
        show(text)
        sys.stdout.flush()
    except OSError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  until the process ends


def lock(out_dir):
    """Hold out_dir for this process until the file returned is closed; ValueError if another run holds it."""
    Path(out_dir).mkdir(parents=True, exist_ok=True)
    file = open(Path(out_dir) / ".lock", "w")  # noqa: SIM115
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # Windows goes without
        pass
    except OSError:
        raise ValueError(f"another run is writing to {out_dir}; wait for it, or choose another folder") from None
    return file


def git_hash():
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def move_aside(out_dir):
    """An earlier run in out_dir becomes out_dir.1, out_dir.2, ...: nothing is overwritten. Says so."""
    out = Path(out_dir)
    if any((out / name).exists() for name in ("log.jsonl", "latest", "best")):
        own = ("latest", "best", "wandb")
        if others := sorted(p.name for p in out.iterdir() if p.is_dir() and not p.name.startswith(own)):
            raise ValueError(
                f"{out} holds an earlier run and other folders ({', '.join(others)}); choose another out_dir"
            )
        if out.resolve() == Path.cwd():
            raise ValueError(f"an earlier run is in {out.resolve()}, where you are; choose another out_dir")
        lock(out).close()  # not while it runs
        number = next(n for n in range(1, 10**6) if not Path(f"{out}.{n}").exists())
        os.rename(out, f"{out}.{number}")
        say(f"the earlier run in {out} is now {out}.{number}")


def read_lines(path):
    """The records of a log.jsonl. ValueError names a damaged line; a last one cut short by a crash is left out."""
    records, lines = [], Path(path).read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            if line or number < len(lines):
                records.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            if number < len(lines):
                raise ValueError(f"{path} is damaged in line {number}; mend or remove that line") from None
    return records


def read_log(run):
    """(header, records of the steps) of a run's log.jsonl; the header is the newest where the run was resumed."""
    path = Path(run) / "log.jsonl"
    if not path.is_file():
        raise ValueError(f"no {path}; name folders that train.py wrote")
    lines = read_lines(path)
    headers, records = [r for r in lines if "config" in r], [r for r in lines if "step" in r]
    if not headers or not records:
        raise ValueError(f"{path} holds no steps yet")
    return headers[-1], records
