"""Token files: how they are written and how a training run reads them.

A data set is a folder with

    train.bin, val.bin    token ids one after the other, little-endian uint16, or uint32 for vocabularies over 65,536
    meta.json             {"tokenizer", "vocab_size", "dtype", "train_tokens", "val_tokens", "source", "source_sha256"}

The order in which a run sees them is a pure function of (seed, step), so resuming needs no saved position, and the
same whatever the number of processes. An epoch shuffles windows of block_size tokens that cover the data once, from an
offset of its own. Validation windows are spread evenly and are the same at every evaluation and for every model.
"""

import contextlib
import functools
import hashlib
import json
import os
import weakref
from pathlib import Path

import numpy as np

import cli
from data import tokenizer

ROOT = Path(__file__).resolve().parent
SPLITS = ("train", "val")


def write(folder, words, pieces, source):
    """Write a data set from an iterable of (split, text, ids), document by document, words being their tokenizer.

    Nothing appears in the folder before all of it is written. Prints what was written and returns the metadata.
    Raises ValueError when a split would be empty.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    dtype = np.dtype("<u2" if words.vocab_size <= 2**16 else "<u4")
    digest, counts = hashlib.sha256(), dict.fromkeys(SPLITS, 0)
    partial = {split: folder / f"{split}.bin.{os.getpid()}.tmp" for split in SPLITS}
    try:
        with contextlib.ExitStack() as stack:
            files = {split: stack.enter_context(open(partial[split], "wb")) for split in SPLITS}
            for split, text, ids in pieces:
                digest.update(text.encode())
                files[split].write(ids.astype(dtype).tobytes())
                counts[split] += len(ids)
        for split in SPLITS:
            if not counts[split]:
                raise ValueError(
                    f"no text for {split}.bin: the source is too small, or --val_fraction leaves it nothing"
                )
        meta = {
            "tokenizer": words.spec,
            "vocab_size": words.vocab_size,
            "dtype": dtype.name,
            **{f"{split}_tokens": counts[split] for split in SPLITS},
            "source": source,
            "source_sha256": digest.hexdigest(),
        }
        (folder / "meta.json").unlink(missing_ok=True)  # the folder is no data set while its files are being exchanged
        for split in SPLITS:
            os.replace(partial[split], folder / f"{split}.bin")
        cli.write_text(folder / "meta.json", json.dumps(meta, ensure_ascii=False, indent=1))
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)
    print(
        f"{folder}: {counts['train']:,} tokens to train on, {counts['val']:,} to validate, "
        f"vocabulary {words.vocab_size:,} ({words.spec['kind']})"
    )
    return meta


def prepare(options, texts, source):
    """Write the data set of a list of (split, text) with the tokenizer that the options ask for, in options.out.

    A trained tokenizer learns from the training texts alone; characters have to know both splits.
    """
    known = [text for split, text in texts if split == "train" or options.tokenizer == "char"]
    words = tokenizer.choose(options.tokenizer, known, options.vocab_size)
    return write(options.out, words, ((split, text, words.encode(text)) for split, text in texts), source)


class TokenData:
    """One data set, checked: meta, and windows of its two splits as int64 arrays of (sequences, block_size + 1).

    Raises ValueError for a folder that is missing, files that are missing or do not have the length that meta.json
    states, ids outside the vocabulary, and splits shorter than one window; each says how to mend it.
    """

    def __init__(self, name, block_size):
        self.folder, self.block_size = ROOT / name, block_size
        known = (self.folder / "prepare.py").is_file()
        again = f"prepare it with: python data/{name}/prepare.py" if known else "prepare it again, with its --out"
        if not self.folder.is_dir():
            there = ", ".join(sorted(p.parent.name for p in ROOT.glob("*/prepare.py")))
            raise ValueError(f"no data set {name!r} in {ROOT}; there are {there}")
        try:
            self.meta = json.loads((self.folder / "meta.json").read_text(encoding="utf-8"))
            self.dtype = np.dtype(self.meta["dtype"]).newbyteorder("<")
            if self.dtype.kind != "u":
                raise ValueError(f"dtype {self.meta['dtype']}")
            self.vocab_size, self.tokenizer_spec = int(self.meta["vocab_size"]), self.meta["tokenizer"]
            words = tokenizer.from_spec(self.tokenizer_spec)
            if words.vocab_size != self.vocab_size:
                raise ValueError(f"vocab_size {self.vocab_size}, its tokenizer has {words.vocab_size}")
            self.tokens = {split: int(self.meta[f"{split}_tokens"]) for split in SPLITS}
        except FileNotFoundError:
            raise ValueError(f"no data in {self.folder}; {again}") from None
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.folder / 'meta.json'} is damaged ({error}); {again}") from None
        self._files = {}
        for split in SPLITS:
            path = self.folder / f"{split}.bin"
            if not path.is_file():
                raise ValueError(f"{path} is missing; {again}")
            expected = self.tokens[split] * self.dtype.itemsize
            if path.stat().st_size != expected:
                raise ValueError(f"{path} has {path.stat().st_size:,} bytes instead of {expected:,}; {again}")
            if self.tokens[split] <= block_size:
                raise ValueError(
                    f"{path} has {self.tokens[split]:,} tokens, too few for block_size = {block_size}; "
                    "lower block_size or prepare more data"
                )
            # It is kept open: should the folder be prepared anew, this run goes on with what it began with. Read, not
            # mapped: every page that a map touches for the first time costs more than reading a window.
            self._files[split] = open(path, "rb", buffering=0)  # noqa: SIM115
            weakref.finalize(self, self._files[split].close)
            self._check(self._read(split, 0, 2**20), path)

    def _read(self, split, start, count):
        """The tokens from start on, count of them or as many as there are."""
        self._files[split].seek(start * self.dtype.itemsize)
        return np.frombuffer(self._files[split].read(count * self.dtype.itemsize), dtype=self.dtype)

    def _check(self, ids, path):
        if ids.max() >= self.vocab_size:
            raise ValueError(
                f"{path} holds token {ids.max()}, outside the vocabulary of {self.vocab_size}; "
                "it belongs to another tokenizer: prepare it again"
            )

    def _windows(self, split, starts):
        windows = np.stack([self._read(split, start, self.block_size + 1) for start in starts]).astype(np.int64)
        self._check(windows, self.folder / f"{split}.bin")
        return windows

    @functools.lru_cache(maxsize=2)  # noqa: B019  one per run, and it must forget old epochs
    def _epoch(self, seed, epoch):
        rng = np.random.default_rng([seed, epoch])
        offset = int(rng.integers(min(self.block_size, self.tokens["train"] - self.block_size)))
        count = (self.tokens["train"] - 1 - offset) // self.block_size
        return offset + rng.permutation(count) * self.block_size

    def train_batch(self, seed, first, count):
        """The training sequences number first to first + count - 1 of the endless stream that `seed` defines."""
        # Epochs hold one window fewer when their offset is large; counting with the smallest makes the stream's index
        # plain arithmetic, at the cost of leaving out at most one window an epoch, another one each time.
        size = max(1, (self.tokens["train"] - self.block_size) // self.block_size)
        numbers = range(first, first + count)
        return self._windows("train", [self._epoch(seed, n // size)[n % size] for n in numbers])

    def val_starts(self, tokens):
        """Where the fixed validation windows start: about `tokens` tokens spread evenly, all that there are for 0."""
        available = (self.tokens["val"] - 1) // self.block_size
        count = available if tokens == 0 else min(available, max(1, tokens // self.block_size))
        return [i * available // count * self.block_size for i in range(count)]

    def val_batch(self, starts):
        return self._windows("val", starts)

    @property
    def fingerprint(self):
        """What two runs must share to be one: the text, the tokenizer and the counts."""
        content = {name: value for name, value in self.meta.items() if name != "source"}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
