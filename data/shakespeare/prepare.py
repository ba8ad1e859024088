"""Tiny Shakespeare by GPT-2's BPE: 301,966 tokens to train on, 36,059 to validate, a vocabulary of 50,257.

python data/shakespeare/prepare.py                       downloads the text and, once, tiktoken's GPT-2 ranks
python data/shakespeare/prepare.py --input FILE          uses this text
python data/shakespeare/prepare.py --tokenizer=train     a BPE of the text's own; needs no ranks
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import cli
from data import bins, shakespeare


@dataclass
class Options:
    input: str = ""  # a text file; empty: download tiny Shakespeare
    tokenizer: str = "gpt2"  # gpt2, train (a BPE of this text), byte, char
    vocab_size: int = 1024  # of a trained BPE
    out: str = str(Path(__file__).parent)  # folder for train.bin, val.bin and meta.json


def main(arguments):
    options = cli.parse(Options, arguments)
    texts = shakespeare.split(shakespeare.read(options.input, options.out))
    bins.prepare(options, texts, options.input or "tiny Shakespeare")


if __name__ == "__main__":
    cli.run(main)
