"""train.py, with short convolutions over tokens in every block: what they do to docs/results.md's lead.

    python docs/short_convolutions.py --data=python_stdlib --mlp=swiglu ...     train.py's options

Behind the norms before attention and before the MLP or the KAN, channel by channel, with three taps w that start at 0:

    y[t] = x[t] + sum_k w[k] x[t - k]        k = 1, 2, 3; x[t] = 0 for t < 0

Canon layers A and C of Allen-Zhu (arXiv 2512.17351). They are in PyTorch's operators, many passes over x, and made for
a loss to be read: sample.py can't read the checkpoints.
"""

import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import cli
import train
from model import GPT

TAPS = 3


class ShortConvolution(nn.Module):
    """x (B, T, C) -> y (B, T, C), as above."""

    def __init__(self, size):
        super().__init__()
        # One vector a tap: a matrix would be trained by Muon.
        self.taps = nn.ParameterList(nn.Parameter(torch.zeros(size)) for _ in range(TAPS))

    def forward(self, x):
        y = x
        for k, w in zip(range(1, x.shape[1]), self.taps, strict=False):  # of a short x there is less behind
            y = y + F.pad(x[:, :-k] * w, (0, 0, k, 0))
        return y


class ConvolvedGPT(GPT):
    def __init__(self, config):
        super().__init__(config)
        for block in self.transformer.h:
            block.ln_1 = nn.Sequential(block.ln_1, ShortConvolution(config.n_embd))
            block.ln_2 = nn.Sequential(block.ln_2, ShortConvolution(config.n_embd))


def main(arguments):
    train.GPT = ConvolvedGPT
    return train.main(arguments)


if __name__ == "__main__":
    cli.run(main)
