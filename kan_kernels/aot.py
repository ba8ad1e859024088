"""The GPU kernels' code, on a machine without a GPU: compile every tile that may be chosen, and look at what came out.

    python -m kan_kernels.aot              sm_80 (A100), sm_90 (H100, H200), sm_100 (B200): a minute on 2 cores
    python -m kan_kernels.aot --sm 90      one of them
    python -m kan_kernels.aot --points 7   for N = 7, of which a tile of 8 knots leaves one unused; default 8

It exits with 1 if a kernel spills registers or touches local memory, does not fit a device's shared memory, came out as
a trap, multiplies in its innermost loop without tensor cores (those of full float32 are meant to), or waits for every
product where Triton did not ask for it. Columns:

    regs, shared   registers a thread and KiB of shared memory a block; warps: of how many a multiprocessor holds
    tensor         tensor-core instructions in loops: mma.sync, wgmma or tcgen05.mma
    KiB, Mflop     what one step of a block's inner loop reads and multiplies; flop/B: the ratio
    mma, issue     cycles that the step takes the tensor cores, and the schedulers to issue its instructions

The last two are where hats show: a step in which issue is the larger can't keep the tensor cores busy. At the end, the
time that no kernel of its kind can beat on an H100 and an H200, by their data sheets.
"""

import argparse
import concurrent.futures
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kan_kernels import gpu
from kan_kernels.gpu import FULL, HALF, TF32

SHARED = {80: 163, 90: 227, 100: 227}  # KiB a block may have; the system takes 1 more from what the multiprocessor has
TENSOR_CORES = {80: r"\bmma\.sync", 90: r"wgmma\.mma_async", 100: r"tcgen05\.mma"}
FLOPS = {80: 2048, 90: 4096, 100: 8192}  # a cycle and multiprocessor, half precision on tensor cores
SCHEDULERS = 4  # of a multiprocessor, an instruction of a warp each cycle
SIMPLE = dict(  # kernels without a choice
    look_up_kernel=gpu.look_up_tile(768),
    add_kernel=dict(PARTS=64, BN=gpu.ADD),
    add_tiles_kernel=dict(BM=128, BN=256, R=8),
    slopes_kernel=dict(BN=gpu.SLOPES),
)
BYTES = {HALF: 2, TF32: 4, FULL: 4}
DEVICES = {"H100": (989, 3.35), "H200": (989, 4.8)}  # dense bfloat16 Tflop/s, TB/s


@dataclass
class Built:
    """One kernel as compiled for one device, and what is wrong with it."""

    kernel: str
    kind: str
    sm: int
    tile: str
    registers: int
    shared: float
    warps: int
    tensor: int
    kilobytes: float
    megaflops: float
    issue: float
    wrong: list[str]


def everything(sms, N):
    """(kernel's name, kind, sm, number among the choices, with TMA (the look-up: early) or not, N), of all that may
    run."""
    for sm in sms:
        for kernel, kind in gpu.CHOICES:
            for number in range(len(gpu.choices(kernel, kind, sm // 10))):
                ways = (True, False) if kind == HALF and sm >= 90 else (False,)
                yield from ((kernel.fn.__name__, kind, sm, number, tma, N) for tma in ways)
        for name in SIMPLE:
            ways = (True, False) if name == "look_up_kernel" and sm >= 90 else (False,)
            yield from ((name, HALF, sm, 0, early, N) for early in ways)


def build(name, kind, sm, number, tma, N):
    kernel = getattr(gpu, name)
    if name in SIMPLE:
        tile = dict(SIMPLE[name], EARLY=True) if tma else dict(SIMPLE[name])
        options = dict(num_warps=tile.pop("num_warps", 4))
    else:
        chosen = gpu.choices(kernel, kind, sm // 10)[number]
        tile = chosen.kwargs
        options = dict(num_warps=chosen.num_warps, num_stages=chosen.num_stages)
    counted = N - 1 if name == "input_gradient_kernel" else N  # intervals, or knots
    sizes = dict(N=N, KN=gpu.knots_at_once(counted), SCALE=1.75, PARTS=5)
    constants = {**sizes, **tile, "TMA": tma, "TF32": kind == TF32}
    constants = {k: v for k, v in constants.items() if k in kernel.arg_names}
    product = "bf16" if kind == HALF else "fp32"
    boxes = {k: list(box(constants)) for k, box in gpu.BOXES[kernel].items()} if tma and name not in SIMPLE else {}
    signature = {}
    for argument in kernel.arg_names:
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument in boxes:
            signature[argument] = f"tensordesc<{'fp32' if argument == 'x' else product}{boxes[argument]}>"
        elif argument in ("x", "out", "sums", "constants"):
            signature[argument] = "*fp32"
        elif argument in ("table", "y", "g", "slopes"):
            signature[argument] = f"*{product}"
        else:
            signature[argument] = "fp32" if argument == "scale" else "i32"
    # As at run time: addresses, and sizes that are multiples of 16, are known to be aligned.
    sizes = "F", "O", "per_part"
    aligned = [k for k, t in enumerate(signature.values()) if t[0] == "*" or kernel.arg_names[k] in sizes]
    attributes = {(k,): [["tt.divisibility", 16]] for k in aligned}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    return inspect(name, kind, sm, tile, tma, N, options["num_warps"], compiled)


def inspect(name, kind, sm, tile, tma, N, warps, compiled):
    resources, code = disassemble(compiled.asm["cubin"])
    tensor = in_loops(compiled.asm["ptx"], TENSOR_CORES[sm])
    shared, wrong = compiled.metadata.shared / 1024, []
    if resources["STACK"] or resources["LOCAL"] or re.search(r"\b(LDL|STL)\b", code):
        wrong.append("spills")
    if shared > SHARED[sm]:
        wrong.append(f"{shared:.0f} KiB shared")
    if resources["REG"] < 16:
        wrong.append("nothing but a trap")
    if name not in SIMPLE and kind != FULL and not tensor:
        wrong.append("no tensor cores")
    left_running = re.search(r"wgmma\.wait_group\S* [1-9]", compiled.asm["ptx"])
    if left_running and not re.search(r"DEPBAR\.LE gsb0, 0x[1-9]", code):
        wrong.append("ptxas waits for every product")
    blocks = min(65536 // (max(resources["REG"], 1) * 32 * warps), int((SHARED[sm] + 1) // (shared + 1)), 64 // warps)
    kilobytes, megaflops = step(name, kind, tile, N)
    text = " ".join(f"{k}={v}" for k, v in tile.items()) + (" TMA" if tma and name not in SIMPLE else "")
    kernel = name.removesuffix("_kernel")
    issue = instructions(code) * warps / SCHEDULERS
    numbers = resources["REG"], shared, blocks * warps, tensor, kilobytes, megaflops, issue
    return Built(kernel, kind, sm, text, *numbers, wrong)


def disassemble(cubin):
    """({REG, STACK, LOCAL, ...: number}, SASS)"""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        texts = [
            subprocess.run([tool, what, file.name], capture_output=True, text=True, check=True).stdout
            for what in ("-res-usage", "-sass")
        ]
    return {key: int(value) for key, value in re.findall(r"\b([A-Z]+):(\d+)", texts[0])}, texts[1]


def in_loops(ptx, pattern):
    """How many instructions like this stand between a label and a branch back to it."""
    lines, labels, inside = ptx.splitlines(), {}, set()
    for number, line in enumerate(lines):
        if label := re.match(r"(\$\w+):", line):
            labels[label[1]] = number
        elif (branch := re.search(r"\bbra(?:\.uni)?\s+(\$\w+)", line)) and branch[1] in labels:
            inside.update(range(labels[branch[1]], number))
    return sum(bool(re.search(pattern, lines[number])) for number in inside)


def instructions(code):
    """How many machine instructions the smallest loop has that multiplies: there may be another over end pieces."""
    lines = [(int(at, 16), what) for at, what in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", code)]
    found = []
    for at, what in lines:
        branch = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", what)
        if branch and int(branch[1], 16) < at:
            body = [text for where, text in lines if int(branch[1], 16) <= where <= at]
            if any(re.search(r"MMA|FFMA", text) for text in body):
                found.append(len(body))
    return min(found, default=0)


def step(name, kind, tile, N):
    """(KiB read, Mflop) of one turn of a block's loop."""
    size, KN = BYTES[kind], gpu.knots_at_once(N)
    if name in SIMPLE:
        if name == "look_up_kernel":
            pairs = tile["BF"] * tile["BN"] * tile["STEPS"]
            read, flops = 2 * pairs * size, 4 * pairs
        elif name == "slopes_kernel":
            read, flops = 2 * 4 * tile["BN"], tile["BN"]
        else:
            rows = tile.get("R", 1) * tile.get("PARTS", 1)
            read, flops = 4 * rows * tile["BN"], rows * tile["BN"]
    else:
        BM, BN, BK = tile["BM"], tile["BN"], tile["BK"]
        positions = BM * BK // KN * 4  # of which hats are made
        left = BM * BK * size if name == "input_gradient_kernel" else positions
        read, flops = left + BK * BN * size, 2 * BM * BN * BK
    return read / 1024, flops / 1e6


def bounds(B, C, N):
    """{kernel: (flops, bytes)} that a layer from C to C can't do without, in bfloat16."""
    x, y, table = 4 * B * C, 2 * B * C, 2 * C * N * C
    return {
        "forward": (2 * B * N * C * C, x + y + table),
        "table_gradient": (2 * B * N * C * C, x + y + 2 * table),
        "input_gradient": (2 * B * (N - 1) * C * C, 2 * x + y + table),
        "look_up": (4 * B * C * C, B * (4 * C * C + x / B + y / B)),
    }


def main():
    parser = argparse.ArgumentParser(
        prog="python -m kan_kernels.aot", description="Compile the GPU kernels, look at them"
    )
    parser.add_argument("--sm", type=int, nargs="*", choices=list(SHARED), default=list(SHARED))
    parser.add_argument("--points", type=int, default=8, metavar="N")
    arguments = parser.parse_args()
    N, todo = arguments.points, list(everything(arguments.sm, arguments.points))
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(build, *zip(*todo, strict=True)))
    print(f"Triton {triton.__version__}, N = {N}")
    head = "kernel products sm tile regs shared warps tensor KiB Mflop flop/B mma issue".split()
    form = "{:14} {:8} {:>3}  {:30} {:>4} {:>6} {:>5} {:>6} {:>3} {:>5} {:>6} {:>5} {:>5}  {}"
    print(form.format(*head, ""))
    for r in results:
        ratio = r.megaflops * 1e6 / (r.kilobytes * 1024)
        numbers = r.registers, f"{r.shared:.0f}", r.warps, r.tensor, f"{r.kilobytes:.0f}", f"{r.megaflops:.2f}"
        mma = f"{r.megaflops * 1e6 / FLOPS[r.sm]:.0f}" if r.kind == HALF and r.tensor else "-"
        cycles = f"{ratio:.0f}", mma, f"{r.issue:.0f}"
        print(form.format(r.kernel, r.kind, r.sm, r.tile, *numbers, *cycles, ", ".join(r.wrong)))
    print(f"\nmicroseconds that can't be beaten, bfloat16, N = {N} (flops or memory, whichever takes longer)")
    for B, C in ((16384, 768), (16384, 2048), (1, 768), (1, 2048)):
        for name, (flops, bytes_) in bounds(B, C, N).items():
            if (B == 1) == (name == "look_up"):
                times = [f"{d} {max(flops / (t * 1e6), bytes_ / (b * 1e6)):8.2f}" for d, (t, b) in DEVICES.items()]
                print(f"{B:6} tokens, {C:4} to {C:4}, {name:15} {'   '.join(times)}")
    wrong = [r for r in results if r.wrong]
    print(f"\n{len(results)} kernels, {len(wrong)} with something wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
