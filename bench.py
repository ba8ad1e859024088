"""How fast is the spline layer, and against what? Every number is the best of several, all contenders taking turns.

    python bench.py                       the layer against other spline layers and the MLP of equal parameters
    python bench.py --tokens 768 --features 384 --points 8 32 128        some of the shapes
    python bench.py --against_n           its own cost from N = 8 to 256
    python bench.py --model               training steps and sampling of the small GPT, spline against MLP
    python bench.py --kan_benchmarking    that project's setting: batch 100, 1000 -> 1000 -> 1, 10 million parameters
    python bench.py --evaluations         every entry of kan_evaluations.py, eager and compiled, at N of --points and at
                                          768 tokens, 384 to 384, or else the first of --tokens and --features; 8
                                          minutes; --device=cuda for a GPU
    python bench.py --blocks              a GPU, bfloat16: LayerNorm and layer, 16,384 tokens, C of --features
    python bench.py --decoding            a GPU, bfloat16: 1, 4 and 16 tokens
    python bench.py --steps               a GPU: training steps of gpt2_124m
    python bench.py --cuda                these three

Prints Markdown tables and writes the same to --out as JSON. Times are milliseconds; only ratios of one run mean
anything elsewhere: the machine's speed drifts, so a matrix product is timed in the same rounds and shares refer to it.

fwd: forward without gradients. fwd+bwd: forward and backward, gradients of input and parameters. MB: what a forward and
backward adds to the process's memory at its peak. Inputs are unit-normal; with few tokens every call gets other ones,
or else they would find their rows of the table in the cache.

splinegpt is a KANLayer, surfaces a KANPairLayer of as many parameters. Other libraries are used where they are
installed: kanditioned, inkan and flashkan from PyPI; efficient-kan, fast-kan and pykan for whoever has them. Theirs are
cubic or Gaussian; the grid is chosen to give as many parameters as ours.
"""

import contextlib
import ctypes
import gc
import importlib.util
import itertools
import json
import math
import platform
import sys
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

import cli
import kan_kernels
from device import keep_freed_memory, memory, multiplies_bfloat16
from kan_evaluations import EVALUATIONS
from kan_layer import KANLayer
from kan_pairs import KANPairLayer

MOST_MEMORY = 2e9  # bytes a contender may need by arithmetic; else it is skipped with a line


@dataclass
class Options:
    features: tuple[int, ...] = (128, 384, 768)  # C of layers C to C
    points: tuple[int, ...] = (8, 32, 128)  # control points N
    tokens: tuple[int, ...] = (1, 8, 768, 4096)
    only: tuple[str, ...] = ()  # contenders whose name begins so; ours and the matrix product always run
    seconds: float = 1.0  # of calls for each contender and shape
    against_n: bool = False
    model: bool = False
    nanogpt: str = ""  # a clone of nanoGPT, to sample from its model in --model
    kan_benchmarking: bool = False
    evaluations: bool = False
    device: str = "cpu"  # of --evaluations, or "cuda"
    cuda: bool = False
    blocks: bool = False
    decoding: bool = False
    steps: bool = False
    out: str = "out/bench.json"


# ----------------------------------------------------------------------------------------------------------------------
# Contenders


class MLP(nn.Module):
    """The MLP that has as many parameters as a C to C layer of N control points."""

    def __init__(self, inputs, hidden, outputs):
        super().__init__()
        self.fc, self.proj = nn.Linear(inputs, hidden, bias=False), nn.Linear(hidden, outputs, bias=False)

    def forward(self, x):
        return self.proj(F.gelu(self.fc(x)))


def surfaces(inputs, outputs, N):
    """Of as many parameters as curves of N points, or about: 4 x 4 for 8, 8 x 8 for 32, 16 x 16 for 128."""
    return KANPairLayer(inputs, outputs, num_control_points=max(2, round(math.sqrt(2 * N))))


def kanditioned(impl):
    def make(inputs, outputs, N):
        from KANditioned import KANLayer as Theirs

        layer = Theirs(inputs, outputs, init="random_normal", num_control_points=N, impl=impl)
        if impl == "sparse_matmul_csr":  # as released it raises: its table has three dimensions
            layer.kan_weight = nn.Parameter(layer.kan_weight.detach().flatten(0, 1))
        return layer

    return make


def inkan(inputs, outputs, N):
    from inkan import KANLayer as Theirs

    return Theirs(inputs, outputs, grid_size=N - 4)  # cubic: N - 1 coefficients and one base weight an edge


def flashkan(inputs, outputs, N):
    from flashkan import KANLayer as Theirs

    return Theirs(inputs, outputs, grid_size=N - 4)


def efficient_kan(inputs, outputs, N):
    from efficient_kan import KANLinear

    return KANLinear(inputs, outputs, grid_size=N - 5, spline_order=3)


def fast_kan(inputs, outputs, N):
    from fastkan import FastKANLayer

    return FastKANLayer(inputs, outputs, num_grids=N - 1)


def pykan(inputs, outputs, N):
    from kan import KANLayer as Theirs

    layer = Theirs(inputs, outputs, num=N - 5, k=3)
    forward = layer.forward
    layer.forward = lambda x: forward(x)[0]
    return layer


def compiled(module):
    torch._dynamo.reset()  # a graph of its own for every shape
    return torch.compile(module)


class InBFloat16(nn.Module):
    """A module under autocast."""

    def __init__(self, module, device="cpu"):
        super().__init__()
        self.module, self.device = module, device

    def forward(self, x):
        with torch.autocast(self.device, torch.bfloat16):
            return self.module(x)


# name: (package, how to make it of inputs, outputs and N, floats it holds at once for B tokens by its own source)
CONTENDERS = {
    "splinegpt": (None, lambda i, o, N: KANLayer(i, o, num_control_points=N), None),
    "surfaces": (None, surfaces, None),
    "kanditioned embedding_bag": ("KANditioned", kanditioned("embedding_bag"), None),
    "kanditioned embedding": ("KANditioned", kanditioned("embedding"), lambda B, i, o, N: 4 * B * i * o),
    "kanditioned csr, mended": ("KANditioned", kanditioned("sparse_matmul_csr"), None),
    "inkan": ("inkan", inkan, lambda B, i, o, N: 8 * B * i * N),
    "flashkan": ("flashkan", flashkan, lambda B, i, o, N: 12 * B * i * N),
    "efficient-kan": ("efficient_kan", efficient_kan, lambda B, i, o, N: 12 * B * i * N),
    "fast-kan": ("fastkan", fast_kan, lambda B, i, o, N: 6 * B * i * N),
    "pykan": ("kan", pykan, lambda B, i, o, N: 8 * B * i * o),
    "MLP": (None, lambda i, o, N: MLP(i, i * o * N // (i + o), o), None),
    "MLP compiled": (None, lambda i, o, N: compiled(MLP(i, i * o * N // (i + o), o)), None),
    "nn.Linear": (None, lambda i, o, N: nn.Linear(i, o, bias=False), None),
}
if multiplies_bfloat16():
    rounded = lambda make: lambda i, o, N: InBFloat16(make(i, o, N))
    CONTENDERS |= {f"in bfloat16: {name}": (None, rounded(CONTENDERS[name][1]), None) for name in ("splinegpt", "MLP")}
missing = set()


def installed(name):
    package = CONTENDERS[name][0]
    if package is None or importlib.util.find_spec(package):
        return True
    if name not in missing:
        missing.add(name)
        print(f"{name}: not installed, left out", flush=True)
    return False


# ----------------------------------------------------------------------------------------------------------------------
# Measuring


def added_memory(call, device="cpu"):
    """Bytes that the process grows by during a call, at the peak, with nothing kept from earlier calls."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    if kan_kernels.load() is None:
        torch.ops.splinegpt_cpu.release_memory()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = memory("VmRSS")
    call()
    return memory("VmHWM") - before


def now(device="cpu"):
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class Timer:
    """One contender at one shape: its forward and its forward with backward, whenever its turn comes."""

    def __init__(self, module, inputs, tokens, input_gradient=True, device="cpu"):
        count = max(1, min(64, 4096 // tokens // 8))
        self.xs = [torch.randn(tokens, inputs, device=device) for _ in range(count)]
        self.module, self.input_gradient, self.device = module, input_gradient, device
        self.in_a_row = 3 if device == "cuda" else 1  # so that Python runs ahead, as in training
        with torch.no_grad():
            self.g = torch.randn_like(module(self.xs[0]))
        self.fwd = self.both = self.bwd = math.inf
        self.spent, self.turns = 0.0, 0
        self.forward(), self.forward_backward()  # compiles, allocates
        self.fwd = self.both = self.bwd = math.inf
        for p in (*module.parameters(), *self.xs):
            p.grad = None
        self.bytes = added_memory(self.forward_backward, device)
        self.forward()
        if self.both > 3:  # so slow that this is enough
            self.spent = math.inf
            return
        self.forward_backward()

    def forward(self):
        with torch.no_grad():
            xs, start = self.xs * self.in_a_row, now(self.device)
            for x in xs:
                self.module(x)
            self.fwd = min(self.fwd, (now(self.device) - start) / len(xs))

    def forward_backward(self):
        both = bwd = 0.0
        xs, began = self.xs[:8] * self.in_a_row, now(self.device)
        for x in xs:
            x.grad = None
            x.requires_grad_(self.input_gradient)
            for p in self.module.parameters():
                p.grad = None
            start = time.perf_counter()
            y = self.module(x)
            middle = time.perf_counter()
            y.backward(self.g)
            end = time.perf_counter()
            both, bwd = both + end - start, bwd + end - middle
            x.requires_grad_(False)
        if self.device == "cuda":
            both = now(self.device) - began
            bwd = both - self.fwd * len(xs)
        self.both, self.bwd = min(self.both, both / len(xs)), min(self.bwd, bwd / len(xs))

    def turn(self, seconds):
        """Measure once more, unless the time is used up; returns whether it did."""
        if self.spent > seconds:
            return False
        start = time.perf_counter()
        # The first of a turn finds the caches full of the others' data. Whoever takes seconds does not notice.
        for _ in range(3 if self.both < seconds else 1):
            self.forward()
            self.forward_backward()
        self.spent, self.turns = self.spent + time.perf_counter() - start, self.turns + 1
        return self.turns < 100


class Gemm:
    """The machine's rate for a matrix product, in the same turns."""

    def __init__(self, device="cpu", dtype=torch.float32, size=1024):
        self.a, self.b, self.out = torch.randn(3, size, size, device=device, dtype=dtype)
        self.fwd, self.device, self.size = math.inf, device, size

    def turn(self, seconds):
        start = now(self.device)
        torch.mm(self.a, self.b, out=self.out)
        self.fwd = min(self.fwd, now(self.device) - start)
        return False

    @property
    def flops(self):
        return 2 * self.size**3 / self.fwd


def take_turns(timers, seconds):
    while sum(timer.turn(seconds) for timer in timers):
        pass


def chosen(tokens, inputs, outputs, N, options):
    """(name, make) of the contenders that are wanted, installed and fit into memory; ours always."""
    for name, (_, make, floats) in CONTENDERS.items():
        wanted = not options.only or name == "splinegpt" or name.startswith(options.only)
        if not wanted or not installed(name) or (name == "inkan" and N < 5):
            continue
        needed = 4 * (floats(tokens, inputs, outputs, N) if floats else 0)
        if needed > MOST_MEMORY:
            print(f"{name}: left out at {tokens} x {inputs} -> {outputs}, N = {N}: it holds {needed / 1e9:.0f} GB")
            continue
        torch.manual_seed(0)
        yield name, make


def measure(tokens, inputs, outputs, N, options):
    """{name: Timer} and the matrix product's Gemm for one shape."""
    timers = {}
    for name, make in chosen(tokens, inputs, outputs, N, options):
        if name == "MLP compiled" and tokens < 768:  # one call of the compiled code costs as much as the product
            continue
        timers[name] = Timer(make(inputs, outputs, N), inputs, tokens)
    gemm = Gemm()
    take_turns([*timers.values(), gemm], options.seconds)
    return timers, gemm


def number(x):
    return "-" if not math.isfinite(x) else f"{x:.3f}" if x < 1 else f"{x:.2f}" if x < 100 else f"{x:.0f}"


def markdown(header, rows):
    """A table in Markdown; floats are rounded by number()."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(number(x) if isinstance(x, float) else str(x) for x in row) + " |" for row in rows]
    return "\n".join(lines)


def table(header, rows):
    print("\n" + markdown(header, rows) + "\n", flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# What is measured


def layers(options):
    records, summary = [], []
    for C in options.features:
        for N in options.points:
            for tokens in options.tokens:
                timers, gemm = measure(tokens, C, C, N, options)
                ours = timers["splinegpt"]
                rows = []
                for name, t in timers.items():
                    rows.append((name, t.fwd * 1e3, t.both * 1e3, t.both / ours.both, t.bytes / 1e6))
                    records.append(
                        dict(name=name, tokens=tokens, C=C, N=N, fwd=t.fwd, fwd_bwd=t.both, bwd=t.bwd, bytes=t.bytes)
                    )
                print(f"{tokens} tokens, {C} to {C}, N = {N}; matrix product {gemm.flops / 1e9:.0f} GFLOP/s")
                table(("", "fwd", "fwd+bwd", "times ours", "MB"), rows)
                best = {
                    kind: min((t.both for n, t in timers.items() if n.startswith(kind)), default=math.nan)
                    for kind in ("kanditioned", "MLP")
                }
                mlp_fwd = min((t.fwd for n, t in timers.items() if n.startswith("MLP")), default=math.nan)
                work = 2 * tokens * C * C / gemm.flops
                ratios = best["kanditioned"] / ours.both, best["MLP"] / ours.both, mlp_fwd / ours.fwd
                summary.append((tokens, C, N, *ratios, 2 * work / ours.fwd, 3 * work / ours.bwd))
    print(
        "Times faster than the best of each, and share of the matrix product's rate (4*F*O flops a token, 6 backward)"
    )
    header = ("tokens", "C", "N", "kanditioned fwd+bwd", "MLP fwd+bwd", "MLP fwd", "share fwd", "share bwd")
    table(header, summary)
    return records, dict(summary=[dict(zip(header, row, strict=True)) for row in summary])


def against_n(options):
    """fwd+bwd from N = 8 to 256, 384 to 384, beside the larger of its compute and of its traffic."""
    source, target = torch.randn(25_000_000), torch.empty(25_000_000)
    rows = []
    alone = replace(options, only=("splinegpt",))
    for tokens in (768, 4096):
        first = None
        for N in (8, 16, 32, 64, 128, 256):
            timers, gemm = measure(tokens, 384, 384, N, alone)
            copy = min(timed(lambda: target.copy_(source)) for _ in range(5))
            both = timers["splinegpt"].both
            first = first or both
            compute = 10 * 384 * 384 * tokens / gemm.flops
            traffic = 3 * 4 * N * 384 * 384 / (2 * 4 * source.numel() / copy)  # read twice, its gradient written
            rows.append(
                (tokens, N, both * 1e3, both / first, compute * 1e3, traffic * 1e3, both / max(compute, traffic))
            )
    header = ("tokens", "N", "fwd+bwd", "times N = 8", "compute", "traffic", "times the larger")
    table(header, rows)
    return [dict(zip(header, row, strict=True)) for row in rows], {}


def timed(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class Step:
    """A whole training step of a configuration: forward, backward, clipping, optimizer."""

    def __init__(self, config_file, vocab_size=65, device="cpu", model=None, **changes):
        import train
        from model import GPT

        known = train.TrainConfig.__dataclass_fields__
        arguments = cli.read_toml(Path(__file__).parent / "configs" / config_file, known)
        arguments += [f"--{key}={value}" for key, value in changes.items()]
        self.config = cli.parse(train.TrainConfig, arguments)
        torch.manual_seed(0)
        ours = GPT(self.config.model_config(vocab_size))
        self.flops = sum(flops for part, flops in ours.flops_per_token().items() if part != "kan_lookup")
        self.device, self.model = device, (model or ours).to(device)
        rounded = device != "cpu" or self.config.dtype == "bfloat16"
        self.dtype = torch.bfloat16 if rounded else torch.float32
        self.fast = self.model if device == "cpu" else torch.compile(self.model)
        if model is None:
            self.optimizers = train.make_optimizers(ours, self.config, torch.device(device))
            groups = ours.parameter_groups()
        else:
            self.optimizers = [torch.optim.AdamW(model.parameters(), lr=self.config.learning_rate, fused=True)]
            groups = dict(tables=[], others=list(model.parameters()))
        self.tables, self.clip = groups.pop("tables"), train.clip
        self.others = sum(groups.values(), [])
        T = self.config.block_size
        windows = torch.randint(vocab_size, (self.config.batch_tokens // T, T + 1), device=device)
        self.inputs, self.targets = windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
        self.parts = dict.fromkeys(("step", "forward", "backward", "optimizer"), math.inf)
        self.bytes = math.nan
        self.run()
        self.bytes = added_memory(self.run, device)

    def run(self):
        marks = [now(self.device)]
        with torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32):
            loss = self.fast(self.inputs, self.targets)[1]
        marks.append(now(self.device))
        loss.backward()
        marks.append(now(self.device))
        self.clip(self.others, self.config.grad_clip), self.clip(self.tables, self.config.table_grad_clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        marks.append(now(self.device))
        spans = [marks[-1] - marks[0], *(b - a for a, b in itertools.pairwise(marks))]
        self.parts = {name: min(old, new) for (name, old), new in zip(self.parts.items(), spans, strict=True)}


def saved_bytes(block, C, device="cpu", dtype=torch.float32):
    """Bytes of activations that a block's normalisation and MLP or KAN keep for the backward, for one token."""
    x, kept = torch.randn(64, C, requires_grad=True, device=device), {}
    weights = {p.data_ptr() for p in block.parameters()}
    copies = {p.numel() for p in block.parameters() if p.dim() > 1}  # autocast's, in half precision

    def pack(t):
        if t.data_ptr() not in weights and t.numel() not in copies:
            kept[t.data_ptr()] = t.untyped_storage().nbytes()
        return t

    autocast = torch.autocast(device, dtype, enabled=dtype != torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), autocast:
        block.mlp(block.ln_2(x), (x, block.ln_2))
    return sum(kept.values()) / 64


def models(options):
    recipe = dict(kan_control_points=7, kan_gate=True, kan_parameterization="whitened")
    of_pairs = dict(kan_pairs=True, kan_control_points=9, kan_width=5.0, kan_parameterization="whitened")
    kan, mlp = "shakespeare_char_cpu_kan.toml", "shakespeare_char_cpu_mlp.toml"
    arms = {
        "KAN, N = 7, gate, whitened": (kan, recipe),
        "KAN of surfaces, 9 x 9, whitened": (kan, of_pairs),
        "KAN, N = 8": (kan, {}),
        "KAN, N = 32": (kan, dict(kan_control_points=32)),
        "gelu MLP": (mlp, {}),
        "swiglu MLP": (mlp, dict(mlp="swiglu")),
    }
    steps = {name: Step(file, **changes) for name, (file, changes) in arms.items()}
    if multiplies_bfloat16():
        for name, (file, changes) in arms.items():
            steps[f"{name}, bfloat16"] = Step(file, **changes, dtype="bfloat16")
    start = time.perf_counter()
    while time.perf_counter() - start < 30 * options.seconds:
        for step in steps.values():
            step.run()
    rows, mlp = [], steps["gelu MLP"]
    for name, step in steps.items():
        saved = saved_bytes(step.model.transformer.h[0], step.config.n_embd, dtype=step.dtype)
        milliseconds = [part * 1e3 for part in step.parts.values()]
        rows.append((name, *milliseconds, mlp.parts["step"] / step.parts["step"], step.bytes / 1e6, f"{saved:.0f}"))
    print("A training step of the CPU Shakespeare pair: 768 tokens, 4 layers, 128 wide")
    header = ("", "step", "forward", "backward", "clip + AdamW", "gelu / it", "MB", "saved bytes a token, one block")
    table(header, rows)
    records = [dict(zip(("name", *header[1:]), row, strict=True)) for row in rows]
    return records, dict(sampling=sampling(options))


def sampling(options):
    """Tokens a second, one sequence of 500 tokens, at the sizes of nanoGPT's two character models."""
    from model import GPT, GPTConfig

    rows = []
    for n_layer, n_head, n_embd, block_size in ((4, 4, 128, 64), (6, 6, 384, 256)):
        size = dict(n_layer=n_layer, n_head=n_head, n_embd=n_embd, block_size=block_size, vocab_size=65)
        runs = {}
        for name, changes in (
            ("KAN, N = 8", dict(mlp="kan", kan_control_points=8)),
            ("KAN, N = 32", dict(mlp="kan", kan_control_points=32)),
            ("gelu MLP", dict(mlp="gelu")),
        ):
            model = GPT(GPTConfig(**size, **changes))
            for cache in (True, False):
                runs[name + ("" if cache else ", no cache")] = lambda model=model, cache=cache: model.generate(
                    torch.zeros(1, 1, dtype=torch.long), 500, temperature=0.8, top_k=200, seed=0, use_cache=cache
                )
        if options.nanogpt:
            theirs = nanogpt(options.nanogpt, size)

            def run(theirs=theirs):
                with torch.no_grad():
                    theirs.generate(torch.zeros(1, 1, dtype=torch.long), 500, temperature=0.8, top_k=200)

            runs["nanoGPT"] = run
        best = dict.fromkeys(runs, math.inf)
        for _ in range(3):
            for name, run in runs.items():
                best[name] = min(best[name], timed(run))
        base = best.get("nanoGPT", best["gelu MLP, no cache"])
        rows += [(f"{n_layer} x {n_embd}, block {block_size}", n, 500 / s, base / s) for n, s in best.items()]
    if not options.nanogpt:
        print("nanoGPT: left out; name a clone of it with --nanogpt=FOLDER (gelu without cache stands for it)")
    print("Sampling 500 tokens, one sequence")
    header = ("size", "", "tokens/s", "times nanoGPT" if options.nanogpt else "times gelu without cache")
    table(header, rows)
    return [dict(zip(("size", "name", *header[2:]), row, strict=True)) for row in rows]


def nanogpt(folder, size):
    """The model of a clone of nanoGPT, as its sample.py has it."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", Path(folder) / "model.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt_model"] = module
    spec.loader.exec_module(module)
    with contextlib.redirect_stdout(None):
        return module.GPT(module.GPTConfig(**size, dropout=0.0, bias=False)).eval()


def kan_benchmarking(options):
    """https://github.com/Jerry-Master/KAN-benchmarking: two layers, the input without gradient, forward and backward
    timed apart."""
    timers, total = {}, {}
    for name, make in chosen(100, 1000, 1000, 10, options):
        if name in ("nn.Linear", "pykan"):
            continue
        net = MLP(1000, 10_000, 1) if "MLP" in name else nn.Sequential(make(1000, 1000, 10), make(1000, 1, 10))
        net = compiled(net) if name == "MLP compiled" else net
        total[name] = sum(p.numel() for p in net.parameters() if p.requires_grad)
        timers[name] = Timer(net, 1000, 100, input_gradient=False)
    gemm = Gemm()
    take_turns([*timers.values(), gemm], 5 * options.seconds)
    print(f"KAN-benchmarking: batch 100, 1000 -> 1000 -> 1; matrix product {gemm.flops / 1e9:.0f} GFLOP/s")
    header = ("", "parameters", "forward", "backward", "both", "times ours", "MB")
    ours = timers["splinegpt"]
    rows = [
        (n, f"{total[n]:,}", t.fwd * 1e3, t.bwd * 1e3, t.both * 1e3, t.both / ours.both, t.bytes / 1e6)
        for n, t in timers.items()
    ]
    table(header, rows)
    return [dict(zip(("name", *header[1:]), row, strict=True)) for row in rows], {}


# What kan_evaluations.py copies out of the table, and what it makes of hats, in floats; and what torch.compile can't
# take.
GATHERS = (
    "embedding + lerp",
    "index_select + lerp",
    "index_add",
    "batch-major",
    "feature-major",
    "as_strided",
    "unfold",
)
HATS = ("csc", "coo", "bsr", "dense, formula")
NOT_COMPILED = {
    "feature-major": "a loop over features, which it would unroll",
    **dict.fromkeys(("sort", "counting sort"), "runs of tokens have lengths known only at run time"),
    **dict.fromkeys(("csc", "coo", "bsr"), "it makes no sparse tensors"),
}


class Evaluation(nn.Module):
    def __init__(self, f, table):
        super().__init__()
        self.f, self.table = f, table

    def forward(self, x):
        return self.f(x, self.table, 4.0)


def evaluations(options):
    """The catalogue, all entries with one table, eager and compiled. Nobody has run it with device="cuda" yet."""
    B = 768 if 768 in options.tokens else options.tokens[0]
    C = 384 if 384 in options.features else options.features[0]
    records = []
    for N in options.points:
        torch._dynamo.reset()
        weight = nn.Parameter(torch.randn(C, N, C, device=options.device))
        timers = {}
        for name, f in EVALUATIONS.items():
            if options.only and not name.startswith(("cpp", *options.only)):
                continue
            needed = 4 * B * C * (3 * C if name in GATHERS else 5 * N if name in HATS else 0)
            if needed > MOST_MEMORY:
                print(f"{name}: left out at {B} tokens, {C} to {C}, N = {N}: it holds {needed / 1e9:.0f} GB")
                continue
            for compiled in (False, True)[: 1 if name in NOT_COMPILED else 2]:
                call = torch.compile(f, fullgraph=True, dynamic=False) if compiled else f
                try:
                    timers[name, compiled] = Timer(Evaluation(call, weight), C, B, device=options.device)
                except Exception as error:  # another device or PyTorch may lack an operator: the others go on
                    print(f"{name}{', compiled' * compiled}: left out, {str(error).splitlines()[0][:100]}")
        gemm = Gemm(options.device)
        take_turns([*timers.values(), gemm], options.seconds)
        numbers = {key: (t.fwd * 1e3, t.both * 1e3, t.bytes / 1e6) for key, t in timers.items()}
        rows = {name: [*numbers[name, False], *numbers.get((name, True), [math.nan] * 3)] for name, _ in timers}
        best = [min(column) for column in zip(*([x if x == x else math.inf for x in r] for r in rows.values()))]
        for name, row in rows.items():
            rows[name] = [f"**{number(x)}**" if x == b else number(x) for x, b in zip(row, best)]
        print(f"{B} tokens, {C} to {C}, N = {N}; matrix product {gemm.flops / 1e9:.0f} GFLOP/s")
        header = ("", "fwd", "fwd+bwd", "MB", "compiled fwd", "compiled fwd+bwd", "compiled MB")
        table(header, [(name, *row) for name, row in rows.items()])
        for (name, compiled), t in timers.items():
            shape = dict(name=name, compiled=compiled, tokens=B, C=C, N=N, device=options.device)
            records.append(dict(**shape, fwd=t.fwd, fwd_bwd=t.both, bwd=t.bwd, bytes=t.bytes))
    for reason in dict.fromkeys(NOT_COMPILED.values()):
        print(f"Not compiled: {', '.join(name for name in NOT_COMPILED if NOT_COMPILED[name] == reason)}: {reason}")
    return records, {}


# ----------------------------------------------------------------------------------------------------------------------
# A GPU

PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12}  # flop/s in dense bfloat16, by data sheet


def bag(inputs, outputs, N):
    return KANLayer(inputs, outputs, num_control_points=N, impl="embedding_bag")


BLOCKS = {name: CONTENDERS[name.removesuffix(" compiled")][1] for name in ("splinegpt", "splinegpt compiled", "MLP")}
BLOCKS |= {"MLP compiled": BLOCKS["MLP"], "embedding_bag": bag}
BLOCKS |= {name: CONTENDERS[name][1] for name in CONTENDERS if name.startswith("kanditioned")}
BLOCKS |= {f"{name} compiled": make for name, make in BLOCKS.items() if name.startswith("kanditioned")}


def replayed(graph, times):
    """Seconds that a CUDA graph takes, of so many replays in a row."""
    start = now("cuda")
    for _ in range(times):
        graph.replay()
    return (now("cuda") - start) / times


class Replays:
    """As Timer, from CUDA graphs: the kernels without Python, which in a whole model runs ahead of them."""

    def __init__(self, module, inputs, tokens, device):
        x = torch.randn(tokens, inputs, device=device, requires_grad=True)
        g = torch.randn(tokens, inputs, device=device, dtype=torch.bfloat16)
        self.kept = module, x, g  # the graphs have their addresses alone

        def forward():
            with torch.no_grad():
                module(x)

        def both():
            torch.autograd.grad(module(x), (x, *module.parameters()), g)

        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            forward(), both()  # compiles and tunes
        torch.cuda.current_stream().wait_stream(aside)
        self.bytes = added_memory(both, "cuda")
        self.graphs = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        for graph, run in zip(self.graphs, (forward, both), strict=True):
            with torch.cuda.graph(graph):
                run()
        self.fwd = self.both = math.inf
        self.turns = 0

    def turn(self, seconds):
        fwd, both = (replayed(graph, 10) for graph in self.graphs)
        self.fwd, self.both, self.turns = min(self.fwd, fwd), min(self.both, both), self.turns + 1
        return self.turns < 5


def blocks_on_cuda(options):
    """LayerNorm and layer, 16,384 tokens, forward and backward under autocast, as in training."""
    records, gemm = [], Gemm("cuda", torch.bfloat16, 8192)
    quick = [name for name in BLOCKS if name.startswith(("splinegpt", "MLP"))]
    slow = [name for name in BLOCKS if name not in quick]  # theirs take seconds a step, or more memory than there is
    shapes, mlp = [(N, C) for N in options.points for C in options.features], {}
    for names, (N, C) in [(quick, s) for s in shapes] + [(slow, s) for s in shapes if s == (8, 768)]:
        torch._dynamo.reset()
        timers = {}
        for name in names:
            if options.only and not name.startswith(options.only):
                continue
            try:
                with torch.device("cuda"):
                    module = InBFloat16(nn.Sequential(nn.LayerNorm(C), BLOCKS[name](C, C, N)), "cuda")
                module = torch.compile(module) if name.endswith("compiled") else module
                timers[name] = t = (Replays if name in quick else Timer)(module, C, 16384, device="cuda")
                if name not in quick:  # which may be cut short
                    print(
                        f"{name}, at first: {t.fwd * 1e3:.1f} and {t.both * 1e3:.1f} ms, {t.bytes / 1e6:.0f} MB",
                        flush=True,
                    )
            except Exception as error:
                print(f"{name}: left out, {str(error).splitlines()[0][:100]}")
                torch.cuda.empty_cache()
        if not timers:
            continue
        take_turns([*timers.values(), gemm], options.seconds / 4)
        mlp[N, C] = min((t.both for name, t in timers.items() if "MLP" in name), default=mlp.get((N, C), math.nan))
        work, rows = 6 * 16384 * N * C * C / gemm.flops, []
        for name, t in timers.items():
            rows.append((name, t.fwd * 1e3, t.both * 1e3, t.both / mlp[N, C], work / t.both, t.bytes / 1e6))
            records.append(dict(name=name, C=C, N=N, fwd=t.fwd, fwd_bwd=t.both, bytes=t.bytes))
        print(f"16,384 tokens, {C} to {C}, N = {N}; matrix product {gemm.flops / 1e12:.0f} TFLOP/s")
        table(("", "fwd", "fwd+bwd", "times the MLP", "share of its rate", "MB"), rows)
        sys.stdout.flush()
    return records, {}


def decoding_on_cuda(options):
    """A few tokens through 16 layers in bfloat16, as one CUDA graph: the kernels, without Python and launches."""
    records, rows = [], []
    for C in options.features:
        for N in (8, 32):
            for tokens in (1, 4, 16):
                times = {}
                for name in ("splinegpt", "MLP"):
                    with torch.inference_mode(), torch.device("cuda"):
                        stack = nn.Sequential(*(BLOCKS[name](C, C, N) for _ in range(16))).bfloat16()
                        xs = torch.randn(8, tokens, C, dtype=torch.bfloat16)
                        stack(xs[0]), stack(xs[1])
                        torch.cuda.synchronize()
                        graph = torch.cuda.CUDAGraph()
                        with torch.cuda.graph(graph):
                            for x in xs:  # the same rows every time would stay in the cache
                                stack(x)
                        best = min(replayed(graph, 4) for _ in range(20)) / (16 * len(xs))
                    times[name] = best
                    records.append(dict(name=name, C=C, N=N, tokens=tokens, seconds=best))
                rows.append((C, N, tokens, *(t * 1e6 for t in times.values()), times["MLP"] / times["splinegpt"]))
    print("Decoding, microseconds a layer")
    table(("C", "N", "tokens", "splinegpt", "MLP", "times faster"), rows)
    return records, {}


def steps_on_cuda(options):
    """Training steps of gpt2_124m: 16 sequences of 1,024 tokens."""
    name = torch.cuda.get_device_name()
    peak = next((flops for key, flops in PEAK.items() if key in name), math.nan)
    common = dict(vocab_size=50257, device="cuda", batch_tokens=16384)
    steps = {
        "KAN, N = 8": lambda: Step("gpt2_124m_kan.toml", **common),
        "KAN, whitened, gate, N = 7": lambda: Step(
            "gpt2_124m_kan.toml", kan_control_points=7, kan_gate=True, kan_parameterization="whitened", **common
        ),
        "gelu MLP": lambda: Step("gpt2_124m_mlp.toml", **common),
    }
    if options.nanogpt:
        size = dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, vocab_size=50304)
        steps["nanoGPT"] = lambda: Step("gpt2_124m_mlp.toml", model=nanogpt(options.nanogpt, size).train(), **common)
    steps = {name: step() for name, step in steps.items() if not options.only or name.startswith(options.only)}
    for _ in range(20):
        for step in steps.values():
            step.run()
    base = next(name for name in ("nanoGPT", "gelu MLP", *steps) if name in steps)
    rows, records = [], []
    for label, step in steps.items():
        seconds, parts = step.parts["step"], [part * 1e3 for part in step.parts.values()]
        use = 16384 * step.flops / seconds / peak
        block = step.model.transformer.h[0]
        saved = math.nan if label == "nanoGPT" else saved_bytes(block, 768, "cuda", torch.bfloat16)
        faster = steps[base].parts["step"] / seconds
        rows.append((label, *parts, 16384 / seconds, faster, use, step.bytes / 1e6, saved))
        records.append(dict(name=label, **step.parts, bytes=step.bytes, saved=saved, flops_per_token=step.flops))
    print(f"A training step of gpt2_124m, 16,384 tokens, {name}")
    header = ("", "step", "forward", "backward", "clip + AdamW", "tokens/s", f"times {base}", "MFU", "MB")
    table((*header, "saved bytes a token, one block"), rows)
    return records, {}


def main(arguments):
    options = cli.parse(Options, arguments)
    for name, least in dict(features=1, tokens=1, points=2).items():
        if min(getattr(options, name), default=0) < least:
            got = ", ".join(map(str, getattr(options, name))) or "none"
            raise ValueError(f"{name} must be at least {least}, got {got}")
    if options.nanogpt and not (Path(options.nanogpt) / "model.py").exists():
        raise ValueError(f"no nanoGPT in {options.nanogpt}: it has no model.py; clone github.com/karpathy/nanoGPT")
    if options.device != "cpu" and not (options.device == "cuda" and options.evaluations and torch.cuda.is_available()):
        raise ValueError(f"device is cpu, or with --evaluations cuda where there is a GPU, got {options.device!r}")
    on_gpu = [name for name in ("blocks", "decoding", "steps") if options.cuda or getattr(options, name)]
    if on_gpu and not torch.cuda.is_available():
        raise ValueError(
            f"--{'cuda' if options.cuda else on_gpu[0]} needs a GPU, and PyTorch finds none here; leave it out"
        )
    keep_freed_memory()  # as train.py does
    warnings.filterwarnings("ignore")  # what other libraries have to say about themselves
    kernels = torch.cuda.get_device_name() if on_gpu else "no kernels"
    if not on_gpu and kan_kernels.available():
        kernels = torch.ops.splinegpt_cpu.instruction_set()
    machine = dict(
        kernels=kernels, threads=torch.get_num_threads(), torch=torch.__version__, python=platform.python_version()
    )
    print(f"{kernels}, {machine['threads']} threads, torch {machine['torch']}, Python {machine['python']}", flush=True)
    modes = dict(
        against_n=against_n, model=models, kan_benchmarking=kan_benchmarking, evaluations=evaluations,
        blocks=blocks_on_cuda, decoding=decoding_on_cuda, steps=steps_on_cuda,
    )  # fmt: skip
    what = [name for name in modes if name in on_gpu or getattr(options, name)]
    if on_gpu:
        torch.set_float32_matmul_precision("high")
        torch._dynamo.config.recompile_limit = 64  # all blocks go through one forward, with and without gradients
    report = dict(machine, started=time.strftime("%Y-%m-%d %H:%M"), arguments=arguments)
    for name in what or ["layers"]:
        report[name], more = modes.get(name, layers)(options)
        report.update(more)
        cli.write_text(options.out, json.dumps(report, indent=1))  # what follows may fail
    print(f"written to {options.out}")


if __name__ == "__main__":
    cli.run(main)
