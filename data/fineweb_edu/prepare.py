"""FineWeb-Edu (https://huggingface.co/datasets/HuggingFaceFW/fineweb-edu), its sample of 10 billion tokens, by GPT-2's
BPE: 20 GB. It streams; --max_tokens takes less.

    python data/fineweb_edu/prepare.py --max_tokens=1000000000
    python data/fineweb_edu/prepare.py --data-files='docs/*.parquet'
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import cli
from data import huggingface


def main(arguments):
    options = cli.parse(huggingface.Options, arguments)
    huggingface.prepare(options, "HuggingFaceFW/fineweb-edu", "sample-10BT", "text", Path(__file__).parent)


if __name__ == "__main__":
    cli.run(main)
