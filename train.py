"""Train a GPT, with splines or MLPs in its blocks. From one process on a laptop to several nodes:

    python train.py configs/quickstart.toml
    python train.py configs/quickstart.toml --n_layer=6 --mlp=swiglu --out_dir=out/mine
    python train.py configs/quickstart.toml --resume
    torchrun --nproc_per_node=8 train.py configs/gpt2_124m_kan.toml
    torchrun --nproc_per_node=8 --nnodes=2 --node_rank=0 --master_addr=IP train.py configs/gpt2_124m_kan.toml

The batch is stated globally, in tokens, and divided among processes and micro-steps, so another machine changes the
speed and not the run. Which tokens a step sees depends on (seed, step) alone, its dropout on (seed, step, process): a
run that was stopped and resumed ends with bitwise the weights of one that was not, on a CPU with as many threads.
out_dir gets

    latest/, best/      checkpoints (see checkpoint.py)
    log.jsonl           one record of the run, then one a step (see log.py)
    loss.png            the loss curves, at the end
"""

import contextlib
import json
import math
import platform
import signal
import time
import traceback
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import checkpoint
import cli
import kan_parameterizations
import muon
from data.bins import TokenData
from device import World, choose_compile, choose_device, choose_dtype, cpu_name, matmul_gflops, peak_memory
from kan_layer import IMPLS, INITS
from log import Log, git_hash, lock, move_aside
from model import GPT, GPTConfig, count, match_parameters


@dataclass
class TrainConfig:
    # The run
    out_dir: str = "out/run"  # an earlier run found there is moved aside, unless resumed
    data: str = "python_stdlib"  # a folder under data/, prepared by its prepare.py
    resume: bool = False  # go on from out_dir/latest
    seed: int = 1337  # of weights, data order and dropout
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the arithmetic; weights are float32
    compile: Literal["auto", "true", "false"] = "auto"  # torch.compile
    # The model (see model.py)
    mlp: Literal["kan", "gelu", "relu2", "swiglu"] = "kan"  # what follows the attention in a block
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128
    block_size: int = 128  # context length, tokens
    dropout: float = 0.0
    mlp_hidden: int = 0  # 0: 4 * n_embd, for swiglu 8/3
    kan_control_points: int = 8  # of every curve; 8 makes one KANLayer as large as the MLP
    kan_pairs: bool = False  # surfaces over pairs of channels, so many points along each axis; 4 make the MLP's size
    kan_gate: bool = False  # times 1 + W x, a matrix beside the layer; with it 7 points make the MLP's size
    kan_swiglu: bool = False  # plus a SwiGLU, half as wide as the MLP would be; with it and the gate 3 points do
    kan_width: float = 4.0  # domain of the curves
    kan_hidden: int = 0  # 0: one KANLayer; else two, with so many channels between
    kan_init: Literal[INITS] = "zero"
    kan_impl: Literal["auto", *IMPLS] = "auto"
    kan_parameterization: Literal[kan_parameterizations.PARAMETERIZATIONS] = "bspline"  # what of a curve is learned
    kan_mu: float | None = None  # of dct_scaled and whitened: the penalty's weight they are made for; None: by N
    kan_smoothness: float = 0.0  # weight in the loss of the sum of all curves' squared second differences
    kan_smoothness_end: float = 1.0  # what fraction of it is left at the end; it falls geometrically
    kan_refine_at: tuple[int, ...] = ()  # steps after which N control points become 2 N - 1, the curves unchanged
    match_parameters: int = 0  # choose mlp_hidden, kan_hidden or kan_control_points for so many parameters in all
    position: Literal["rope", "learned"] = "rope"  # learned: nanoGPT's, worse for both arms (see DIARY.md)
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    qk_norm: bool = False
    qk_gain: float = 0.0  # with qk_norm: where each head's learned gain of q begins; 0: there is none
    zero_init: bool = False  # output projections start at zero
    logit_softcap: float = 0.0  # 0: off
    tie_head: bool = True
    # The batch and the steps
    batch_tokens: int = 1536  # tokens a step, over all processes
    micro_batch: int = 0  # most sequences in one forward; 0: as many as make 32,768 tokens
    max_steps: int = 2000
    # The optimizer
    optimizer: Literal["adamw", "muon", "normuon"] = "adamw"  # muon and normuon: of the 2-D matrices inside the blocks
    table_optimizer: Literal["adamw", "muon", "normuon"] = "adamw"  # of the splines; the others with a higher rate
    muon_momentum: float = 0.95  # runs of a thousand steps like 0.8 to 0.9 better (docs/results.md)
    learning_rate: float = 3e-3
    table_learning_rate: float = 3e-4  # of the splines' control points
    weight_decay: float = 0.1  # of matrices and embeddings
    table_weight_decay: float = 0.0  # pulls to zero, not to straight lines; surfaces (kan_pairs) are better with 0.5
    beta1: float = 0.9
    beta2: float = 0.99
    grad_clip: float = 1.0  # 0: off
    table_grad_clip: float = 1.0  # the tables have a norm of their own; 0: off
    schedule: Literal["cosine", "wsd"] = "cosine"  # wsd: constant, then linear over the last fifth
    warmup_steps: int = 100
    decay_steps: int = 0  # where the schedule ends; 0: max_steps. Set it in a run that is to be extended
    min_lr: float = 0.1  # at the end, as a fraction of the learning rate
    # Evaluation and log
    eval_interval: int = 250  # steps between evaluations, each followed by a checkpoint
    eval_tokens: int = 100_000  # of the fixed validation windows; 0: all of them
    log_interval: int = 10  # steps between printed lines; log.jsonl has every step
    wandb: bool = False
    wandb_project: str = "splinegpt"

    def check(self):
        above = "block_size batch_tokens eval_interval log_interval learning_rate table_learning_rate".split()
        at_least = "max_steps micro_batch warmup_steps decay_steps eval_tokens match_parameters seed".split()
        at_least += "weight_decay table_weight_decay grad_clip table_grad_clip kan_smoothness".split()
        for name, value in vars(self).items():
            if value == math.inf:
                raise ValueError(f"{name} must be finite, got {value}")
            if (name in above and not value > 0) or (name in at_least and not value >= 0):
                raise ValueError(f"{name} must be {'above' if name in above else 'at least'} 0, got {value}")
            if name in ("beta1", "beta2", "muon_momentum") and not 0 <= value < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, got {value}")
        if not 0 <= self.min_lr <= 1:
            raise ValueError(f"min_lr must be from 0 to 1, got {self.min_lr}")
        if not 0 < self.kan_smoothness_end <= 1:
            raise ValueError(f"kan_smoothness_end must be above 0 and at most 1, got {self.kan_smoothness_end}")
        if list(self.kan_refine_at) != sorted(set(self.kan_refine_at)) or min(self.kan_refine_at, default=1) < 1:
            raise ValueError(f"kan_refine_at must be increasing steps from 1 on, got {self.kan_refine_at}")
        if self.mlp != "kan" and (self.kan_refine_at or self.kan_smoothness):
            raise ValueError(
                f"kan_refine_at and kan_smoothness are for mlp = kan, got mlp = {self.mlp}; leave them out"
            )
        if self.kan_pairs and (self.kan_refine_at or self.kan_smoothness):
            raise ValueError("kan_refine_at and kan_smoothness are for curves, not with kan_pairs; leave them out")
        if self.mlp == "kan" and self.mlp_hidden:
            raise ValueError(f"mlp_hidden is for the MLPs, got {self.mlp_hidden} with mlp = kan; leave it out")
        if not self.out_dir:
            raise ValueError("out_dir must name a folder, got ''")
        for name in ("out_dir", "data"):
            value = getattr(self, name)
            if value.encode(errors="ignore").decode() != value:  # a checkpoint could not say it
                raise ValueError(f"{name} must be a name in UTF-8, got {value!r}")
        if self.seed >= 2**63:
            raise ValueError(f"seed must be below 2**63, got {self.seed}")

    @property
    def schedule_end(self):
        return self.decay_steps or self.max_steps

    def model_config(self, vocab_size, step=0):
        """The model's configuration, with the control points it has when `step` updates are done."""
        shared = {field.name for field in fields(GPTConfig)} & {field.name for field in fields(self)}
        config = GPTConfig(vocab_size=vocab_size, **{name: getattr(self, name) for name in shared})
        if self.match_parameters:
            config = match_parameters(config, self.match_parameters)
        refined = sum(at < step for at in self.kan_refine_at)
        return replace(config, kan_control_points=(config.kan_control_points - 1) * 2**refined + 1)


# What may differ when a run is resumed: where and how fast it runs, not what it computes. Of the second line only what
# follows from it matters, and that is in LABELS.
FREE_TO_CHANGE = "out_dir resume device compile kan_impl eval_interval log_interval wandb wandb_project".split()
FREE_TO_CHANGE += "dtype micro_batch max_steps decay_steps".split()
LABELS = dict(
    schedule_end="the end of the schedule (decay_steps, or else max_steps)",
    arithmetic="dtype",
    dropout_streams="what dropout depends on (processes x sequences in one forward)",
    data_fingerprint="the hash of the data",
)

# ----------------------------------------------------------------------------------------------------------------------
# Pieces of the loop


def divide_batch(config, world):
    """(sequences a process takes a step, sequences in one forward)."""
    unit = config.block_size * world.size
    if config.batch_tokens % unit:
        lower = config.batch_tokens // unit * unit
        raise ValueError(
            f"batch_tokens = {config.batch_tokens} must be a multiple of block_size * processes = {unit}; "
            f"try {f'{lower} or ' if lower else ''}{lower + unit}"
        )
    sequences = config.batch_tokens // unit
    most = min(sequences, config.micro_batch or max(1, 32768 // config.block_size))
    return sequences, next(size for size in range(most, 0, -1) if sequences % size == 0)


def make_optimizers(model, config, device):
    """AdamW for everything, or Muon or NorMuon (see muon.py) for the matrices inside the blocks, the tables, or both.

    Every parameter group carries its peak learning rate; the loop scales all by one schedule. Muon is the first.
    """
    parameters = model.parameter_groups()
    lr, decay = config.learning_rate, config.weight_decay
    tables = dict(params=parameters["tables"], lr=config.table_learning_rate, weight_decay=config.table_weight_decay)
    matrices = dict(params=parameters["matrices"], lr=lr, weight_decay=decay)
    embeddings = dict(params=parameters["embeddings"], lr=lr, weight_decay=decay)
    vectors = dict(params=parameters["vectors"], lr=lr, weight_decay=0.0)
    groups = dict(muon=[], normuon=[], adamw=[])
    groups[config.table_optimizer].append(tables)
    groups["adamw"] += [embeddings, vectors]
    groups[config.optimizer].append(matrices)
    muons, normuons, by_adamw = ([group for group in groups[kind] if group["params"]] for kind in groups)
    by_muon = muons + [dict(group, row_beta=0.95) for group in normuons]
    optimizers = [muon.Muon(by_muon, momentum=config.muon_momentum)] if by_muon else []
    fused = device.type in ("cuda", "cpu")
    optimizers.append(torch.optim.AdamW(by_adamw, betas=(config.beta1, config.beta2), fused=fused))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    trained = sum(len(group["params"]) for optimizer in optimizers for group in optimizer.param_groups)
    assert trained == len(list(model.parameters()))
    return optimizers


def schedule(config, step):
    """The learning rate of update number `step`, counted from 0, as a fraction of its peak."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    done = min(1.0, (step - config.warmup_steps) / max(1, config.schedule_end - config.warmup_steps))
    if config.schedule == "cosine":
        return config.min_lr + (1 - config.min_lr) * 0.5 * (1 + math.cos(math.pi * done))
    return config.min_lr + (1 - config.min_lr) * min(1.0, (1 - done) / 0.2)


@torch.no_grad()
def evaluate(model, data, starts, batch, context, device, world, stop=()):
    """(mean loss in nats over the fixed windows, each process taking its share; whether a signal cut it short).

    stop: a list that becomes true when this process gets a signal.
    """
    model.eval()
    mine, total = starts[world.rank :: world.size], 0.0
    for first in range(0, len(mine), batch):
        if stop:
            break
        windows = torch.from_numpy(data.val_batch(mine[first : first + batch])).to(device)
        with context():
            total += model(windows[:, :-1], windows[:, 1:])[1].item() * len(windows)
    model.train()
    total, signals = world.sum([total, float(len(stop))], device)
    return total / len(starts), signals > 0


def smoothness(config, step):
    """The weight of the second-difference penalty at update number `step`: lmKAN (arXiv 2509.07103) has it fall too."""
    return config.kan_smoothness * config.kan_smoothness_end ** min(1.0, step / max(1, config.schedule_end))


def clip(parameters, limit):
    """Scale the gradients to a norm of at most `limit` (0: leave them) and return the norm they had."""
    return torch.nn.utils.clip_grad_norm_(parameters, limit or math.inf).item() if parameters else 0.0


def diverged(config, step, what):
    return FloatingPointError(
        f"step {step}: {what}. Lower learning_rate or table_learning_rate, or lengthen warmup_steps; what checkpoints "
        f"there are in {config.out_dir} are untouched"
    )


# ----------------------------------------------------------------------------------------------------------------------


def check_same_run(config, derived, info, folder):
    """Refuse to resume what would not be the same run, naming what differs; derived has the keys of LABELS."""
    # An option that there was not then was, in effect, at its default.
    then, now = {**asdict(TrainConfig()), **info["train"], **info}, {**asdict(config), **derived}
    then, now = (json.loads(json.dumps(settings)) for settings in (then, now))  # as they were read
    changes = [
        f"{LABELS.get(name, name)} was {then.get(name)!r} and is {value!r}"
        for name, value in now.items()
        if name not in FREE_TO_CHANGE and then.get(name) != value
    ]
    if config.max_steps < info["step"]:
        changes.append(f"it is at step {info['step']}, past max_steps = {config.max_steps}")
    if changes:
        remedy = "Use its settings, or another --out_dir"
        if then.get("schedule_end") != now["schedule_end"]:
            remedy += f"; to go on past its end, at its last rate, add --decay_steps={then.get('schedule_end')}"
        raise ValueError(f"{folder} is another run: {'; '.join(changes)}. {remedy}")


# ----------------------------------------------------------------------------------------------------------------------


def train(config):
    """Train as configured; returns the last record of the log with "best_val_loss", or "stopped_by", a signal's number.

    Raises ValueError for a setting or a file that can't be used and FloatingPointError when the loss or a gradient is
    not finite; then no update has been made with it and the last checkpoints are untouched.
    """
    config.check()
    world = World()
    device = choose_device(config.device, world)
    if world.distributed:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        return _train(config, world, device)
    except BaseException as error:
        # The model must go before the group. Were it the last to hold the group, gloo's thread would be waited for with
        # Python's lock held, which that thread wants for its last gradients: PyTorch 2.13 hung so, once.
        if world.distributed:
            traceback.clear_frames(error.__traceback__)
        raise
    finally:
        if world.distributed:
            dist.destroy_process_group()


def _train(config, world, device):
    dtype, reason = choose_dtype(config.dtype, device)
    found = {"cpu": "no GPU found", "mps": "no CUDA found"}.get(device.type, "found")
    name = f" {torch.cuda.get_device_name(device)}" if device.type == "cuda" else ""
    world.print(f"device: {device}{name} ({found if config.device == 'auto' else 'as asked'})")
    world.print(f"dtype: {str(dtype).removeprefix('torch.')} ({reason})")
    given = [f.name for f in fields(config) if getattr(config, f.name) != f.default]
    kan = config.mlp == "kan"
    by_muon = config.optimizer != "adamw" or (kan and config.table_optimizer != "adamw")
    unused = (() if kan else ("kan_", "table_")) + (() if by_muon else ("muon_",))
    ignored = [name for name in given if name.startswith(unused)]
    if ignored:
        world.print(f"ignored, since mlp = {config.mlp} and optimizer = {config.optimizer}: {', '.join(ignored)}")
    sequences, micro_batch = divide_batch(config, world)
    data = TokenData(config.data, config.block_size)
    starts = data.val_starts(config.eval_tokens)

    derived = dict(
        schedule_end=config.schedule_end,
        arithmetic=str(dtype),
        dropout_streams=f"{world.size} x {micro_batch}" if config.dropout else None,
        data_fingerprint=data.fingerprint,
    )

    torch.manual_seed(config.seed)
    step, best, seconds = 0, math.inf, 0.0
    if config.resume:
        folder = checkpoint.find_in_run(config.out_dir, ("latest",))
        info = checkpoint.read_info(folder)
        check_same_run(config, derived, info, folder)
        step, best, seconds = info["step"], info["best_val_loss"], info["seconds"]
        best = math.inf if best is None else best
    model_config = config.model_config(data.vocab_size, step)
    try:
        model = GPT(model_config)
    except RuntimeError as error:  # what PyTorch raises when the machine has no memory for it
        raise ValueError(f"no memory for a model of {count(model_config):,} parameters; make it smaller") from error
    counts, flops = model.count_parameters(), model.flops_per_token()
    world.print(f"parameters: {', '.join(f'{k} {v:,}' for k, v in counts.items() if v)}")
    world.print(f"flops per token: {', '.join(f'{k} {v:,}' for k, v in flops.items() if v)}")

    if config.resume:
        checkpoint.load_weights(folder, model)
        world.print(f"resuming {folder} at step {step}")
    model.to(device)
    optimizers = make_optimizers(model, config, device)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    if config.resume:
        state = checkpoint.load_optimizer_state(folder)
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        scaler.load_state_dict(state["scaler"])

    use_compile, reason = choose_compile(config.compile, device)
    world.print(f"compile: {use_compile} ({reason})")

    def prepare():
        """(the model compiled, the same as it trains, its tables, its other parameters): anew when tables change."""
        fast = model
        if use_compile:
            torch._dynamo.reset()  # each refinement's graphs would count towards a limit
            # Else a last, smaller batch of validation would make the batch a variable, in training too.
            fast = torch.compile(model, dynamic=False)
        ids = [device.index] if device.type == "cuda" else None
        training = DistributedDataParallel(fast, device_ids=ids) if world.distributed else fast
        groups = model.parameter_groups()
        return fast, training, groups.pop("tables"), sum(groups.values(), [])

    fast_model, training_model, tables, others = prepare()
    context = contextlib.nullcontext
    if dtype != torch.float32:
        context = lambda: torch.autocast(device.type, dtype=dtype)
    micro_steps = sequences // micro_batch
    world.print(
        f"batch: {config.batch_tokens:,} tokens = {world.size} processes x {micro_steps} micro-steps x {micro_batch} "
        f"sequences x {config.block_size}; validation on {len(starts) * config.block_size:,} tokens"
    )

    def save(is_best):
        info = dict(
            step=step,
            best_val_loss=best if best < math.inf else None,
            seconds=seconds,
            train=asdict(config),
            model=asdict(model_config),
            tokenizer=data.tokenizer_spec,
            **derived,
        )
        state = dict(optimizers=[o.state_dict() for o in optimizers], scaler=scaler.state_dict())
        checkpoint.save(config.out_dir, model, state, info, is_best)

    log = None
    if world.rank == 0:
        if not config.resume:
            move_aside(config.out_dir)
        held = lock(config.out_dir)
        checkpoint.remove_unfinished(config.out_dir)
        first = model
        if step and config.kan_refine_at:  # it may have been refined since it began
            with torch.device("meta"):
                first = GPT(config.model_config(data.vocab_size))
        header = dict(config=asdict(config), model=asdict(first.config), parameters=first.count_parameters())
        header.update(flops_per_token=first.flops_per_token())
        header.update(git=git_hash(), python=platform.python_version(), torch=torch.__version__, started=time.time())
        header.update(device=str(device), dtype=str(dtype), processes=world.size, seed=config.seed, resumed_at=step)
        header.update(cpu=cpu_name(), threads=torch.get_num_threads())
        header.update(matmul_gflops=matmul_gflops() if device.type == "cpu" else None)
        log = Log(config, header, step)
    record = log.pending if log and log.pending else dict(step=step, seconds=seconds)
    evaluated = world.sum([float("val_loss" in record)], device)[0] > 0  # where a resumed run had been before

    # From here on a signal lets the step finish, saves and stops; a second Ctrl-C stops at once.
    stop = []

    def on_signal(number, frame):
        if stop and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.append(number)

    old_handlers = {number: signal.signal(number, on_signal) for number in cli.stop_signals()}
    stopped = False
    try:
        while True:
            # Evaluate first, so that the end is always evaluated and max_steps is exact.
            is_best = due = False
            if not stopped and not evaluated and (step % config.eval_interval == 0 or step == config.max_steps):
                val_loss, stopped = evaluate(fast_model, data, starts, micro_batch, context, device, world, stop)
                if not stopped:
                    if not math.isfinite(val_loss):
                        raise diverged(config, step, f"validation loss {val_loss}; stopped before it was saved")
                    record["val_loss"] = val_loss
                    due = step > 0 or config.max_steps == 0
                    is_best, best = (val_loss < best, min(val_loss, best)) if due else (False, best)
            evaluated = False
            if log:
                log.write(record)  # first: resuming forgets what a log has after a checkpoint, but can't make it up
                if due or (stopped and step > 0):
                    save(is_best)
            if stopped or step >= config.max_steps:
                break
            if step in config.kan_refine_at:
                losses = [evaluate(fast_model, data, starts, micro_batch, context, device, world)[0]]
                tables_by = optimizers[-1 if config.table_optimizer == "adamw" else 0]
                for layer in model.kan_layers():
                    layer.refine(optimizer=tables_by)
                model_config = config.model_config(data.vocab_size, step + 1)
                fast_model, training_model, tables, others = prepare()
                losses.append(evaluate(fast_model, data, starts, micro_batch, context, device, world)[0])
                world.print(
                    f"step {step}: {model_config.kan_control_points} control points from here on; validation loss "
                    "{:.6f} before, {:.6f} after".format(*losses)
                )

            started = time.perf_counter()
            scale = schedule(config, step)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["peak_lr"] * scale
            torch.manual_seed(hash((config.seed, step, world.rank)) % 2**63)  # dropout, a function of these alone
            loss_sum = torch.zeros((), device=device)
            for micro_step in range(micro_steps):
                first = (step * world.size + world.rank) * sequences + micro_step * micro_batch
                windows = torch.from_numpy(data.train_batch(config.seed, first, micro_batch)).to(device)
                last = micro_step == micro_steps - 1
                sync = contextlib.nullcontext() if last or not world.distributed else training_model.no_sync()
                with sync:
                    with context():
                        loss = training_model(windows[:, :-1], windows[:, 1:])[1] / micro_steps
                    loss_sum += loss.detach()
                    if last and config.kan_smoothness:  # once a step; not part of the loss that is reported
                        loss = loss + smoothness(config, step) * sum(
                            layer.second_difference_penalty() for layer in model.kan_layers()
                        )
                    scaler.scale(loss).backward()
            for optimizer in optimizers:
                scaler.unscale_(optimizer)
            norms = clip(others, config.grad_clip), clip(tables, config.table_grad_clip)
            grad_norm = math.hypot(*norms)
            train_loss, signals = world.sum([loss_sum.item() / world.size, float(len(stop))], device)
            finite = math.isfinite(grad_norm)
            if not math.isfinite(train_loss) or not (finite or scaler.is_enabled()):
                what = f"loss {train_loss}, gradient norm {grad_norm}; stopped before the update"
                raise diverged(config, step, what)
            for optimizer in optimizers:
                if finite:  # the scaler would leave out the one whose gradients overflowed, and make the other's step
                    scaler.step(optimizer)
                optimizer.zero_grad(set_to_none=True)
            scaler.update()
            if scaler.is_enabled() and scaler.get_scale() < 1:
                raise FloatingPointError(
                    f"step {step}: float16 gradients overflow at any scale; use bfloat16 or float32"
                )

            step += 1
            stopped = signals > 0
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            elapsed = time.perf_counter() - started
            seconds += elapsed
            record = dict(
                step=step,
                train_loss=train_loss,
                lr=config.learning_rate * scale,
                grad_norm=grad_norm,
                table_grad_norm=norms[1],
                tokens_per_second=config.batch_tokens / elapsed,
                seconds=seconds,
                peak_memory=peak_memory(device),
            )
    finally:
        if log:
            log.close()
            held.close()
        for number, handler in old_handlers.items():
            signal.signal(number, handler)

    if stopped:
        saved = (
            f"saved in {config.out_dir}/latest; --resume with the same command goes on" if step else "nothing to save"
        )
        world.print(f"stopped at step {step}, {saved}")
        return {**record, "stopped_by": stop[0] if stop else signal.SIGTERM}
    if log:
        import plot

        speed, memory = step * config.batch_tokens / max(seconds, 1e-9), peak_memory(device) / 2**20
        world.print(f"final validation loss {record['val_loss']:.4f}, best {best:.4f}")
        world.print(f"{seconds:.1f} s of training, {speed:,.0f} tokens/s, peak memory {memory:,.0f} MB")
        picture = plot.loss_figure([config.out_dir], Path(config.out_dir) / "loss.png")
        world.print(f"checkpoints in {config.out_dir}/latest and best, loss curves in {picture}")
    return {**record, "best_val_loss": best}


def main(arguments):
    try:
        result = train(cli.parse(TrainConfig, arguments, toml=True))
    except torch.OutOfMemoryError as error:
        remedy = "lower --micro_batch, which leaves the batch as it is"
        raise ValueError(f"{str(error).splitlines()[0]}; {remedy}") from None
    return 128 + result["stopped_by"] if "stopped_by" in result else 0


if __name__ == "__main__":
    cli.run(main)
