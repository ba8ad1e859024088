"""Tiny Shakespeare by characters: 1,003,854 to train on, 111,540 to validate, a vocabulary of 65.

python data/shakespeare_char/prepare.py                  downloads the text
python data/shakespeare_char/prepare.py --input FILE     uses this text, any text
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import cli
from data import bins, shakespeare, tokenizer


@dataclass
class Options:
    input: str = ""  # a text file; empty: download tiny Shakespeare
    out: str = str(Path(__file__).parent)  # folder for train.bin, val.bin and meta.json


def main(arguments):
    options = cli.parse(Options, arguments)
    text = shakespeare.read(options.input, options.out)
    characters = tokenizer.Characters(text)
    pieces = ((split, part, characters.encode(part)) for split, part in shakespeare.split(text))
    bins.write(options.out, characters, pieces, options.input or "tiny Shakespeare")


if __name__ == "__main__":
    cli.run(main)
