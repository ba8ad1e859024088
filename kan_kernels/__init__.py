"""The project's own kernels: for CPUs those here, and for CUDA gpu.py, in Triton.

spline.cpp and pairs.cpp, the layers, attention.cpp and loss.cpp are built where they run, on first use (half a minute,
once) or ahead of it with `python -m kan_kernels`, and kept in $SPLINEGPT_CACHE, by default ~/.cache/splinegpt, under
a name that goes by the sources, the compiler, the CPU and PyTorch. Nothing but a C++ compiler is needed, g++ or clang++
or what $CXX names. $SPLINEGPT_MARCH is the compiler's -march, if it should be another than native (x86-64-v3: any CPU
with AVX2).

    spline(x, table, spline_width, rounded=False) -> y

of x (B, F), table (F, N, O) and y (B, O); it has gradients, compiles and exports. x and table are both float32 or both
float64; a bfloat16 table may come with a float32 x. All sums are in x's type. rounded allows, with a bfloat16 table,
that positions t are rounded to bfloat16 too, which makes a few tokens 1.4 times as fast on a CPU with AVX512-BF16.

    spline_bfloat16(x, table, spline_width) -> y

of x and table in float32, and y in bfloat16: rows of the table, weights and the gradient of y are rounded to bfloat16,
sums are in float32. With AVX512-BF16 it takes 0.6 to 0.8 of the time, on other CPUs it is spline.

    pairs(x, table, spline_width) -> y

of x (B, 2 P), table (P, N, N, O) and y (B, O), all float32 or all float64: surfaces over pairs of inputs.

    attention(qkv, heads, cos=None, sin=None, qk_norm=False, gain=None, past=None) -> y

of qkv (B, T, 3 C), one after the other what the heads of q, k and v have, and y (B, T, C) of its type, causal: what
model.py says in PyTorch's operators, rotary positions by cos and sin (T, C / heads), QK-norm and gains of q, (heads,),
included, in float32 whatever comes in; gradients are of qkv and gain. With past, a cache's (keys, values, start), of
(B, heads, S, C / heads) both and in float32 as qkv, qkv's tokens follow the start that it holds, and are added to it;
there is no gradient.

    cross_entropy(logits, targets) -> loss

the mean over logits (M, V) and targets (M,) in nats, as torch.nn.functional has it, for less memory.
"""

import concurrent.futures
import contextlib
import functools
import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F

FOLDER = Path(__file__).parent
NAMES = ("spline", "bfloat16", "pairs", "autograd", "attention", "loss")  # the slowest first
SOURCES = [FOLDER / f"{name}.cpp" for name in NAMES]
HEADERS = [FOLDER / f"{name}.h" for name in ("vectors", "look_up")]
# Products and sums may be fused, errno and floating-point traps are nobody's concern; NaN and infinities are kept.
FLAGS = ["-std=c++20", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-fopenmp"]
FLAGS += ["-Wno-psabi", f"-march={os.environ.get('SPLINEGPT_MARCH') or 'native'}"]


def compiler():
    """The compiler's command as a list, or None."""
    for name in filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")):
        command = shlex.split(name)
        if command and shutil.which(command[0]):
            return command
    return None


def cache_folder():
    return Path(os.environ.get("SPLINEGPT_CACHE") or Path.home() / ".cache" / "splinegpt")


def cpu():
    """What -march=native depends on."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return line
    return platform.processor()


def library(command):
    """Where the library built by this compiler for this machine belongs."""
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False).stdout
    sources = [path.read_text() for path in (*SOURCES, *HEADERS)]
    parts = (sources, FLAGS, command, version, platform.machine(), cpu(), torch.__version__)
    return cache_folder() / f"spline-{hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}.so"


@contextlib.contextmanager
def one_at_a_time(path):
    """Eight processes of one node start together and should compile once. The lock goes with its process."""
    with open(path, "w") as file:
        with contextlib.suppress(ImportError):  # not on Windows
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def build():
    """Compile if need be and return the library's path. Raises RuntimeError saying what is missing or went wrong."""
    command = compiler()
    if command is None:
        raise RuntimeError("no C++ compiler found: install g++ or clang++, or name one in $CXX")
    try:
        target = library(command)
        if target.exists():  # perhaps where we may not write
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        with one_at_a_time(target.parent / "lock"):
            if not target.exists():
                compile_to(target, command)
        return target
    except OSError as error:
        raise RuntimeError(
            f"can't write to {cache_folder()}: {error}; name another folder in $SPLINEGPT_CACHE"
        ) from error


def compile_to(target, command):
    start = time.perf_counter()
    print("compiling the CPU kernels, once, half a minute ...", file=sys.stderr, flush=True)
    root = Path(torch.__file__).parent
    includes = [f"-I{root / 'include'}", f"-I{root / 'include' / 'torch' / 'csrc' / 'api' / 'include'}"]
    # PyTorch's own OpenMP library, where it brings one: with two of them, two sets of threads would fight for cores.
    openmp = [str(path) for path in sorted((root / "lib").glob("libgomp*.so*"))] or ["-fopenmp"]
    libraries = [f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10", *openmp]
    unfinished = target.with_name(f"{target.name}.{os.getpid()}")
    objects = [Path(f"{unfinished}.{source.stem}.o") for source in SOURCES]

    def run(arguments):
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()[-1:]
            raise RuntimeError(f"{command[0]} failed: {' | '.join(line.strip() for line in lines[:2])[:400]}")

    try:
        with concurrent.futures.ThreadPoolExecutor() as pool:
            steps = ([*FLAGS, *includes, "-c", str(a), "-o", str(b)] for a, b in zip(SOURCES, objects, strict=True))
            list(pool.map(run, steps))
        run(["-shared", *map(str, objects), "-o", str(unfinished), *libraries])
        os.replace(unfinished, target)
    finally:
        for leftover in (unfinished, *objects):
            leftover.unlink(missing_ok=True)
    print(f"compiled in {time.perf_counter() - start:.0f} s: {target}", file=sys.stderr, flush=True)


@functools.cache
def load():
    """Build and load the kernels; returns None, or the reason why there are none as a string. Never raises."""
    try:
        torch.ops.load_library(build())
    except Exception as error:  # whatever it is, there are none: a $CXX that is no command, a library that is cut off
        return str(error)

    @torch.library.register_fake("splinegpt_cpu::spline")
    def _(x, table, spline_width, rounded=False):
        return x.new_empty(x.shape[0], table.shape[2])

    @torch.library.register_fake("splinegpt_cpu::spline_backward")
    def _(g, x, table, spline_width):
        return x.new_empty(x.shape), x.new_empty(table.shape)

    @torch.library.register_fake("splinegpt_cpu::spline_bfloat16")
    def _(x, table, spline_width):
        return x.new_empty(x.shape[0], table.shape[2], dtype=torch.bfloat16)

    @torch.library.register_fake("splinegpt_cpu::spline_bfloat16_backward")
    def _(g, x, table, spline_width):
        return x.new_empty(x.shape), x.new_empty(table.shape)

    @torch.library.register_fake("splinegpt_cpu::pairs")
    def _(x, table, spline_width):
        return x.new_empty(x.shape[0], table.shape[3])

    @torch.library.register_fake("splinegpt_cpu::pairs_backward")
    def _(g, x, table, spline_width):
        return x.new_empty(x.shape), x.new_empty(table.shape)

    @torch.library.register_fake("splinegpt_cpu::change_basis")
    def _(matrix, p):
        return p.new_empty(p.shape)

    @torch.library.register_fake("splinegpt_cpu::attention_cached")
    @torch.library.register_fake("splinegpt_cpu::attention")
    def _(qkv, heads, cos, sin, qk_norm, gain, keys=None, values=None, start=0):
        return qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3)

    @torch.library.register_fake("splinegpt_cpu::attention_backward")
    def _(g, qkv, heads, cos, sin, qk_norm, gain):
        return qkv.new_empty(qkv.shape), qkv.new_empty(0 if gain is None else heads)

    @torch.library.register_fake("splinegpt_cpu::cross_entropy")
    def _(logits, targets):
        return tuple(logits.new_empty(shape, dtype=torch.float32) for shape in ((), targets.shape))

    @torch.library.register_fake("splinegpt_cpu::cross_entropy_backward")
    def _(g, logits, targets, lse):
        return logits.new_empty(logits.shape)

    def twice(ctx, *_):
        raise RuntimeError(
            "the C++ kernels have no second derivatives; the layer with impl='dense' has, attention and loss in float64"
        )

    for name in ("spline", "spline_bfloat16", "pairs", "attention", "cross_entropy"):
        torch.library.register_autograd(f"splinegpt_cpu::{name}_backward", twice)
    return None


@functools.cache
def warn_once(reason, where="CPU"):
    warnings.warn(f"the fast {where} kernels are not used, PyTorch's operators are: {reason}", stacklevel=2)


def constant(function):
    """A question whose answer torch.compile may take once for all.

    That is torch.compiler.assume_constant_result, without importing Dynamo for it, 2 s of processor time each time this
    is imported.
    """
    function._dynamo_marked_constant = True
    return function


@constant
def available():
    """Whether the kernels can be used here; if not, says why, once."""
    reason = load()
    if reason is not None:
        warn_once(reason)
    return reason is None


@functools.cache
def load_gpu():
    """Load the Triton kernels; returns None, or the reason why there are none as a string. Never raises."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; pip install triton"
    try:
        gpu = importlib.import_module("kan_kernels.gpu")
    except Exception as error:
        return f"kan_kernels/gpu.py can't be imported with this Triton: {error}"
    if gpu.INTERPRETED.value:
        return None
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if torch.cuda.get_device_capability() < (8, 0):
        return f"{torch.cuda.get_device_name()} is older than compute capability 8.0"
    return None


@constant
def gpu_available():
    """Whether the Triton kernels can be used here; if not, says why, once."""
    reason = load_gpu()
    if reason is not None:
        warn_once(reason, "GPU")
    return reason is None


def spline(x, table, spline_width, rounded=False):
    return torch.ops.splinegpt_cpu.spline(x, table, spline_width, rounded)


def spline_bfloat16(x, table, spline_width):
    return torch.ops.splinegpt_cpu.spline_bfloat16(x, table, spline_width)


def pairs(x, table, spline_width):
    return torch.ops.splinegpt_cpu.pairs(x, table, spline_width)


@constant  # torch 2.11's Dynamo takes the question itself for true, exporting or not
def exporting():
    return torch.compiler.is_exporting()


def in_place_of_pytorch(x):
    """Whether a kernel may stand for PyTorch's operators: on a CPU, outside torch.func, and not to be exported."""
    if x.device.type != "cpu" or torch._C._are_functorch_transforms_active() or exporting():
        return False
    return available()


def change_basis(matrix, p):
    """matrix @ p, of (N, N) and (F, N, O), both float32 or both float64; with gradients of p. Of a p (F, N, N, O) along
    both axes.

    Beyond 16 control points PyTorch's is as fast, where sizes are those of a small GPT (Zen 3).
    """
    if len(matrix) <= 16 and in_place_of_pytorch(p):
        return torch.ops.splinegpt_cpu.change_basis(matrix, p)
    p = matrix @ p
    return p if p.dim() == 3 else (matrix @ p.flatten(2)).view_as(p)


def has_attention(qkv, past=None):
    """Whether attention() is the one to use: not of float64, and up to 2,048 tokens, beyond which PyTorch's is faster
    (Zen 3). With past only of float32, under no_grad or inference_mode, and not compiled."""
    if qkv.dtype == torch.float64 or qkv.shape[1] > 2048:
        return False
    if past is not None and (torch.is_grad_enabled() or torch.compiler.is_compiling()):
        return False
    if past is not None and not past[0].dtype == qkv.dtype == torch.float32:
        return False
    return in_place_of_pytorch(qkv)


def attention(qkv, heads, cos=None, sin=None, qk_norm=False, gain=None, past=None):
    if past is not None:
        return torch.ops.splinegpt_cpu.attention_cached(qkv, heads, cos, sin, qk_norm, gain, *past)
    gain = gain if gain is None else gain.float()
    return torch.ops.splinegpt_cpu.attention(qkv.float(), heads, cos, sin, qk_norm, gain).to(qkv.dtype)


def cross_entropy(logits, targets):
    """torch.nn.functional.cross_entropy of logits (M, V), in float32 whatever they are in, and targets (M,).

    When compiling it is PyTorch's own, which the compiler fuses, and of float64, where it has second derivatives.
    """
    if logits.dtype != torch.float64 and not torch.compiler.is_compiling() and in_place_of_pytorch(logits):
        logits = logits if logits.dtype == torch.bfloat16 else logits.float()
        return torch.ops.splinegpt_cpu.cross_entropy(logits, targets)[0]
    return F.cross_entropy(logits.float(), targets)
