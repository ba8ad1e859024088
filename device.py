"""Where a run runs: processes, device, number format, compiler. Each choice that "auto" makes comes with its reason."""

import contextlib
import ctypes
import math
import os
import platform
import sys
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

import log


class World:
    """The processes that train together: torchrun's, or this one alone."""

    def __init__(self):
        self.distributed = "RANK" in os.environ
        given = os.environ if self.distributed else {}  # a WORLD_SIZE alone is someone else's
        self.rank, self.size = int(given.get("RANK", 0)), int(given.get("WORLD_SIZE", 1))
        self.local_rank = int(given.get("LOCAL_RANK", 0))

    def print(self, message):
        if self.rank == 0:
            log.say(message)

    def sum(self, numbers, device):
        """The element-wise sum over all processes of a list of numbers."""
        if not self.distributed:
            return numbers
        kind = torch.float32 if device.type == "mps" else torch.float64
        total = torch.tensor(numbers, dtype=kind, device=device)
        dist.all_reduce(total)
        return total.tolist()


def choose_device(name, world):
    """torch.device of a name or "auto", made ready; ValueError if it can't be used here."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{world.local_rank}"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("cpu, cuda and mps are known")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason, there = str(error).splitlines()[0], torch.cuda.device_count()
        remedy = f"start at most {there} processes" if 0 < there <= world.local_rank else "try --device=auto"
        raise ValueError(f"device {name} can't be used here ({reason}); {remedy}") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32
    if device.type == "cpu":
        keep_freed_memory()
    return device


def multiplies_bfloat16():
    """Whether this CPU does, so that a matrix product takes half as long as in float32 and not many times as long."""
    return torch.cpu._is_avx512_bf16_supported()


def choose_dtype(name, device):
    """(torch dtype, reason) of a name or "auto". Weights stay float32; this is what autocast computes in."""
    reason = "as asked"
    if name == "auto" and device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            name, reason = "bfloat16", "this GPU has units for it"
        else:
            name, reason = "float16", "this GPU has no bfloat16; gradients are scaled"
    elif name == "auto":
        name, reason = "float32", f"nothing shorter was tried on {device.type}"
        if device.type == "cpu":
            # A CPU with AVX512-BF16 takes 0.55 to 0.85 of the time a step of a swiglu GPT in bfloat16, 0.7 to 0.85 of a
            # KAN's (64 to 256 wide, Zen 4, one thread); one without takes far longer.
            reason = "the same on every CPU"
            reason += "; this one is quicker in bfloat16" if multiplies_bfloat16() else ""
    if name == "float16" and device.type == "cpu":
        raise ValueError("dtype float16 has no gradient scaling on a CPU; use float32 or bfloat16")
    if name == "float32" and device.type == "cuda":
        reason += ", its matrix products in TF32"
    return getattr(torch, name), reason


def choose_compile(name, device):
    """(whether to use torch.compile, reason), from "auto", "true" or "false"; tried out before it is promised."""
    wanted, reason = name == "true", "as asked"
    if name == "auto":
        wanted = device.type == "cuda"
        reason = "faster on a GPU" if wanted else "eager starts at once; --compile=true for long runs"
    if wanted:
        try:  # a compiler or Triton may be missing
            torch.compile(lambda x: x * 2 + 1)(torch.ones(8, device=device))
        except Exception as error:
            problem = f"torch.compile does not work here: {str(error).splitlines()[0]}"
            if name == "true":
                raise ValueError(problem) from None
            warnings.warn(f"{problem}; going on without", stacklevel=1)
            wanted, reason = False, "it does not work here"
    return wanted, reason


def field(file, name):
    """What a file of "name: value" lines says, the first time it does; None where there is no such file or line."""
    with contextlib.suppress(OSError):
        for line in Path(file).read_text(errors="replace").splitlines():  # a process may be called anything
            key, _, value = line.partition(":")
            if key.strip() == name:
                return value.strip()
    return None


def cpu_name():
    """Of a CPU its name, its family (a virtual machine hides the name), and the instruction set PyTorch uses."""
    name, family = field("/proc/cpuinfo", "model name") or platform.machine(), field("/proc/cpuinfo", "cpu family")
    return f"{name}{f' family {family}' if family else ''}, {torch.backends.cpu.get_cpu_capability()}"


def matmul_gflops():
    """The rate of PyTorch's float32 matrix products on this CPU, with as many threads as it uses: an MLP is as fast."""
    a, seconds = torch.ones(1024, 1024), math.inf
    for _ in range(5):
        start = time.perf_counter()
        a @ a
        seconds = min(seconds, time.perf_counter() - start)
    return 2 * 1024**3 / seconds / 1e9


def keep_freed_memory():
    """Let glibc keep what this process frees for what it allocates next, instead of giving it back to the system.

    A step frees what the next one wants again, and memory from the system comes as a fault for every 4 KB. Kept, a CPU
    step of 4 layers is 1.2 times as fast with a vocabulary of 1,024 (2,000 faults less) and 2.4 times with GPT-2's,
    where peak memory grows by 0.3 (a Zen 5). Does nothing without glibc; what the environment says of the two settings
    (mallopt(3)) holds.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    for name, option, value in (("MALLOC_TRIM_THRESHOLD_", -1, 2**31 - 1), ("MALLOC_MMAP_MAX_", -4, 0)):
        if name not in os.environ:
            mallopt(option, value)


def memory(name):
    """A field of /proc/self/status in bytes; nan where there is none."""
    value = field("/proc/self/status", name)
    return int(value.split()[0]) * 1024 if value else math.nan


def peak_memory(device):
    """Bytes: on CUDA of tensors, elsewhere of the process (0 where the system does not say)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = memory("VmHWM")
    if not math.isnan(peak):  # Linux, whose ru_maxrss begins with what the process had that started this one
        return peak
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
