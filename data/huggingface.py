"""Large corpora from Hugging Face, streamed: documents come one after the other and are never all on disk.

Both data sets made this way, openwebtext and fineweb_edu, are this function with their own names. --data-files takes
local parquet or jsonl files in the hub's place, through the same code.
"""

import glob
import itertools
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data import bins, tokenizer

BATCH = 512  # documents tokenized together, on all cores


@dataclass
class Options:
    tokenizer: str = "gpt2"  # gpt2, train (a BPE of the first documents), byte
    vocab_size: int = 32768  # of a trained BPE
    train_documents: int = 20000  # documents a trained BPE learns from
    max_tokens: int = 0  # stop after so many tokens; 0: take everything
    val_fraction: float = 0.0005  # share of the documents for validation, chosen by their hash
    data_files: str = ""  # local .parquet, .jsonl or .json files (a glob pattern) instead of the hub
    out: str = ""  # folder for train.bin, val.bin and meta.json; empty: the data set's own


def documents(options, path, name, field):
    """An iterator over the texts of the corpus; documents without a text are passed over."""
    import datasets

    if options.data_files:
        files = sorted(glob.glob(options.data_files, recursive=True))
        if not files:
            raise ValueError(f"no file {options.data_files}; --data-files names local .parquet, .jsonl or .json files")
        kind = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}.get(Path(files[0]).suffix)
        if kind is None:
            raise ValueError(f"{files[0]} is neither .parquet nor .jsonl nor .json")
        path, arguments = kind, dict(data_files=files)
    else:
        arguments = dict(name=name)
    try:
        stream = datasets.load_dataset(path, split="train", streaming=True, **arguments)
        rows = iter(stream)
        while (row := next(rows, None)) is not None:
            if field not in row:
                raise KeyError(f"the documents have no {field!r}; their fields are {', '.join(row)}")
            if not isinstance(row[field], str | None):
                raise TypeError(f"{field} is {type(row[field]).__name__}, not text")
            if row[field]:
                yield row[field]
    except Exception as error:  # from five libraries; none is ours to handle but to report
        reason = str(error).splitlines()[0][:200] if str(error) else ""
        remedy = "look at the files" if options.data_files else "is there a network? --data-files takes local files"
        raise ValueError(
            f"could not read {options.data_files or path} ({type(error).__name__}: {reason}); {remedy}"
        ) from None


def pieces(texts, words, options):
    """(split, text, ids) of document after document, each closed by the end token, until max_tokens."""
    total, threshold = 0, options.val_fraction * 2**32
    texts = iter(texts)
    while batch := list(itertools.islice(texts, BATCH)):
        encoded = words.encode_batch(batch) if isinstance(words, tokenizer.BPE) else map(words.encode, batch)
        for text, ids in zip(batch, encoded, strict=True):
            if words.end is not None:
                ids = np.append(ids, np.uint32(words.end))
            yield ("val" if zlib.crc32(text.encode()) < threshold else "train"), text, ids
            total += len(ids)
            if options.max_tokens and total >= options.max_tokens:
                return
        if sys.stdout.isatty():
            print(f"\r{total:,} tokens", end="", flush=True)


def prepare(options, path, name, field, folder):
    """Stream, tokenize and write the data set to folder (or options.out)."""
    if options.tokenizer == "char":
        raise ValueError("characters need the whole corpus before the first token; choose gpt2, train or byte")
    if not 0 < options.val_fraction < 1:
        raise ValueError(f"val_fraction must be between 0 and 1, got {options.val_fraction}")
    sample = []
    if options.tokenizer == "train":
        sample = list(itertools.islice(documents(options, path, name, field), options.train_documents))
    words = tokenizer.choose(options.tokenizer, sample, options.vocab_size)
    source = options.data_files or f"{path} {name or ''}".strip()
    bins.write(options.out or folder, words, pieces(documents(options, path, name, field), words, options), source)
