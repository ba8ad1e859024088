"""Write text with a trained model. A checkpoint is all it needs.

    python sample.py out/quickstart --prompt="def main"
    python sample.py out/quickstart/latest --file=prompt.txt --num_samples=3 --temperature=0.7 --seed=1
    echo "import" | python sample.py out/quickstart --prompt=-

Text appears as it is made. With several samples, sample k uses seed + k.
"""

import codecs
import sys
from dataclasses import dataclass

import torch
import tyro

import checkpoint
import cli
from device import World, choose_device
from model import check_sampling


@dataclass
class Options:
    run: tyro.conf.Positional[str]  # a folder that train.py wrote (best/ is taken, else latest/) or one of these two
    prompt: str = ""  # how the text begins, a new line if nothing is said; - reads standard input
    file: str = ""  # a file that holds the prompt
    num_samples: int = 1
    max_new_tokens: int = 500
    temperature: float = 0.8  # 0: always the most likely token
    top_k: int = 200  # sample among so many of the most likely tokens; 0: all
    top_p: float = 1.0  # among the fewest whose probability adds up to this
    seed: int = 1337
    device: str = "cpu"  # fine for small models; else auto, cuda, mps
    cache: bool = True  # keep keys and values; without, the same text, slower


def read_prompt(options):
    if options.file and options.prompt:
        raise ValueError("give --prompt or --file, not both")
    if options.file:
        return cli.read_text(options.file)
    return sys.stdin.read() if options.prompt == "-" else options.prompt or "\n"


def main(arguments):
    options = cli.parse(Options, arguments)
    for name in ("num_samples", "max_new_tokens"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(options, name)}")
    device = choose_device(options.device, World())
    folder = checkpoint.find(options.run)
    model, words, info = checkpoint.load_model(folder, device)
    prompt = read_prompt(options)
    ids = words.encode(prompt).astype("int64")
    if len(ids) == 0:
        raise ValueError("the prompt is empty; it needs at least one character")
    sampling = dict(
        temperature=options.temperature,
        top_k=options.top_k or None,
        top_p=options.top_p if options.top_p != 1 else None,
    )
    context = torch.from_numpy(ids).to(device).view(1, -1)
    check_sampling(context, **sampling)
    print(f"{folder}, step {info['step']}", file=sys.stderr)
    for sample in range(options.num_samples):
        if sample:
            print("\n" + "-" * 80)
        # A token may end in the middle of a character: the decoder keeps the bytes until the rest comes. What is still
        # incomplete after the last token is left out.
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        print(prompt, end="", flush=True)
        stream = model.stream(
            context,
            options.max_new_tokens,
            **sampling,
            seed=options.seed + sample,
            use_cache=options.cache,
        )
        for token in stream:
            print(decoder.decode(words.to_bytes([token.item()])), end="", flush=True)
        print(flush=True)


if __name__ == "__main__":
    cli.run(main)
