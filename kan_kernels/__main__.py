"""python -m kan_kernels: build the kernels ahead of their first use, and say what for."""

import sys

import torch

import kan_kernels

reason = kan_kernels.load()
if reason is not None:
    sys.exit(f"error: {reason}")
ops = torch.ops.splinegpt_cpu
print(f"{kan_kernels.build()}: {ops.instruction_set()}, {ops.threads()} threads")
