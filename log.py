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

import json
import os
import subprocess
import sys
from pathlib import Path


class Log:
    """log.jsonl, the terminal (a progress bar, or plain lines where there is none) and wandb."""

    def __init__(self, config, header, step):
        self.config, self.pending = config, None
        path = Path(config.out_dir) / "log.jsonl"
        if step and path.is_file():  # what came after the checkpoint is forgotten; its own record may be completed
            kept = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
            self.pending = next((r for r in kept if r.get("step") == step), None)
            lines = [json.dumps(r) + "\n" for r in kept if r.get("step", -1) < step]
            temporary = path.with_suffix(".tmp")
            temporary.write_text("".join(lines), encoding="utf-8")
            os.replace(temporary, path)
        self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115  closed by close()
        self.file.write(json.dumps(header) + "\n")
        self.progress = self.wandb = None
        if sys.stdout.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
            self.progress = Progress(*columns)
            self.task = self.progress.add_task("", total=config.max_steps, completed=step)
            self.progress.start()
        if config.wandb:
            import wandb

            self.wandb = wandb.init(
                project=config.wandb_project,
                name=Path(config.out_dir).name,
                config=header["config"],
                dir=config.out_dir,
            )

    def write(self, record):
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        text = f"step {record['step']}"
        if "train_loss" in record:
            text += f" | train {record['train_loss']:.4f} | lr {record['lr']:.2e} | norm {record['grad_norm']:.2f}"
            text += f" | {record['tokens_per_second']:,.0f} tok/s"
        if "val_loss" in record:
            text += f" | val {record['val_loss']:.4f}"
        if self.progress:
            self.progress.update(self.task, completed=record["step"], description=text)
            if "val_loss" in record:
                self.progress.console.print(text)
        elif "val_loss" in record or record["step"] % self.config.log_interval == 0:
            print(text, flush=True)
        if self.wandb and ("val_loss" in record or record["step"] % self.config.log_interval == 0):
            self.wandb.log({k: v for k, v in record.items() if k != "step"}, step=record["step"])

    def close(self):
        if self.progress:
            self.progress.stop()
        if self.wandb:
            self.wandb.finish()
        self.file.close()


def git_hash():
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def move_aside(out_dir, world):
    """An earlier run in out_dir becomes out_dir.1, out_dir.2, ...: nothing is overwritten."""
    out = Path(out_dir)
    if world.rank == 0 and any((out / name).exists() for name in ("log.jsonl", "latest")):
        number = next(n for n in range(1, 10**6) if not Path(f"{out}.{n}").exists())
        os.rename(out, f"{out}.{number}")
        world.print(f"the earlier run in {out} is now {out}.{number}")
    if world.rank == 0:
        out.mkdir(parents=True, exist_ok=True)


def read_log(run):
    """(header, records of the steps) of a run's log.jsonl; the header is the newest where the run was resumed."""
    path = Path(run) / "log.jsonl"
    if not path.is_file():
        raise ValueError(f"no {path}; name folders that train.py wrote")
    header, records = None, []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
        except ValueError:
            raise ValueError(f"{path} is damaged in line {number}") from None
        if "config" in record:
            header = record
        else:
            records.append(record)
    if header is None or not records:
        raise ValueError(f"{path} holds no steps yet")
    return header, records
