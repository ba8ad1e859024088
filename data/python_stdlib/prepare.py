"""The embedded corpus: the source of the standard library of the Python that runs this, about 12 MB, no network needed.

Tests are left out (distributions differ in whether they ship them). One file in twenty, chosen by the hash of its name,
is for validation. Another Python version is another corpus, so compare losses within one; meta.json says which.

    python data/python_stdlib/prepare.py                       bytes
    python data/python_stdlib/prepare.py --tokenizer=train     BPE of its own, 4,096 ids
"""

import platform
import sys
import sysconfig
import zlib
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import cli
from data import bins

SKIP = {"site-packages", "dist-packages", "test", "tests", "idle_test"}


@dataclass
class Options:
    tokenizer: str = "byte"  # byte, char, train (a BPE of this corpus), gpt2
    vocab_size: int = 4096  # of a trained BPE
    out: str = str(Path(__file__).parent)  # folder for train.bin, val.bin and meta.json


def sources(root):
    """(relative name, text) of every library module under root, sorted by name."""
    for path in sorted(Path(root).rglob("*.py")):
        name = path.relative_to(root)
        if SKIP.isdisjoint(name.parts):
            try:
                yield name.as_posix(), path.read_text(encoding="utf-8")
            except (UnicodeDecodeError, OSError):
                continue  # a handful in older encodings; links that lead nowhere


def main(arguments):
    options = cli.parse(Options, arguments)
    root = sysconfig.get_paths()["stdlib"]
    texts = [("val" if zlib.crc32(name.encode()) % 20 == 0 else "train", text + "\n\n") for name, text in sources(root)]
    if not texts:
        raise ValueError(f"no sources under {root}; this Python ships its library without them")
    bins.prepare(options, texts, f"standard library of Python {platform.python_version()}")


if __name__ == "__main__":
    cli.run(main)
