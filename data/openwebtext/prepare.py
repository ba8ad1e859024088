"""OpenWebText (https://huggingface.co/datasets/Skylion007/openwebtext) by GPT-2's BPE: about 8 million documents, 9
billion tokens to train on and 4 million to validate, 18 GB. It streams; --max_tokens takes less.

    python data/openwebtext/prepare.py
    python data/openwebtext/prepare.py --data-files='docs/*.jsonl' --tokenizer=train
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import cli
from data import huggingface


def main(arguments):
    options = cli.parse(huggingface.Options, arguments)
    huggingface.prepare(options, "Skylion007/openwebtext", None, "text", Path(__file__).parent)


if __name__ == "__main__":
    cli.run(main)
