"""Text to token ids and back: characters, bytes, or byte-pair encoding run by tiktoken.

A tokenizer is saved as a small dictionary, its `spec`, in a data set's meta.json and in every checkpoint, and made from
it alone: sampling never looks for the data or the network. All three have

    encode(text) -> uint32 array      ValueError names what can't be encoded
    to_bytes(ids) -> bytes            so that tokens can be decoded as they come, also in mid-character
    decode(ids) -> text
    vocab_size, spec, end             end: the id that separates documents, or None
"""

import base64
import hashlib
import importlib.util
import os
from pathlib import Path

import numpy as np

END = "<|endoftext|>"
# Where GPT-2 cuts text into words: contractions, letters, digits, other signs, each with the space before; white space.
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
GPT2_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"  # as tiktoken's r50k_base states it


class Characters:
    """One id per character that occurs in the corpus, in the order of their code points."""

    end = None

    def __init__(self, characters):
        self.characters = "".join(sorted(set(characters)))
        self.vocab_size = len(self.characters)
        self.spec = {"kind": "characters", "characters": self.characters}
        self._codes = np.array([ord(c) for c in self.characters], dtype=np.uint32)

    def encode(self, text):
        codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
        ids = np.searchsorted(self._codes, codes).astype(np.uint32)
        known = self._codes[np.minimum(ids, self.vocab_size - 1)] == codes
        if not known.all():
            strange = sorted({chr(c) for c in codes[~known]})
            names = ", ".join(f"{c!r} (U+{ord(c):04X})" for c in strange[:8])
            raise ValueError(
                f"the tokenizer does not know {names}{' and others' if len(strange) > 8 else ''}; "
                f"it knows {self.characters!r}"
            )
        return ids

    def to_bytes(self, ids):
        return "".join(self.characters[i] for i in ids).encode()

    def decode(self, ids):
        return self.to_bytes(ids).decode()


class Bytes:
    """The 256 bytes of UTF-8: nothing is unknown, nothing is learned."""

    vocab_size, end = 256, None

    def __init__(self):
        self.spec = {"kind": "bytes"}

    def encode(self, text):
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint32)

    def to_bytes(self, ids):
        return bytes(int(i) for i in ids)

    def decode(self, ids):
        return self.to_bytes(ids).decode(errors="replace")


class BPE:
    """Byte-pair encoding run by tiktoken (https://github.com/openai/tiktoken), from its ranks: GPT-2's or our own.

    ranks: the tokens' bytes in the order of their ids. One more id, the last, ends a document.
    """

    def __init__(self, name, pattern, ranks):
        import tiktoken

        self.end, self.vocab_size = len(ranks), len(ranks) + 1
        self.spec = {
            "kind": "bpe",
            "name": name,
            "pattern": pattern,
            "ranks": " ".join(base64.b64encode(token).decode() for token in ranks),
        }
        self._encoding = tiktoken.Encoding(
            name, pat_str=pattern, mergeable_ranks={t: i for i, t in enumerate(ranks)}, special_tokens={END: self.end}
        )

    def encode(self, text):
        return np.array(self._encoding.encode_ordinary(text), dtype=np.uint32)

    def encode_batch(self, texts):
        """A list of arrays; the texts are shared among the machine's cores."""
        ids = self._encoding.encode_ordinary_batch(texts, num_threads=os.cpu_count() or 1)
        return [np.array(i, dtype=np.uint32) for i in ids]

    def to_bytes(self, ids):
        return self._encoding.decode_bytes([int(i) for i in ids])

    def decode(self, ids):
        return self.to_bytes(ids).decode(errors="replace")


def from_spec(spec):
    """The tokenizer a spec describes. Raises ValueError for a spec of no known kind."""
    kind = spec.get("kind") if isinstance(spec, dict) else None
    try:
        if kind == "characters":
            return Characters(spec["characters"])
        if kind == "bytes":
            return Bytes()
        if kind == "bpe":
            return BPE(spec["name"], spec["pattern"], [base64.b64decode(token) for token in spec["ranks"].split()])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the tokenizer in the metadata is damaged ({error!r}); prepare the data again") from None
    raise ValueError(f"unknown tokenizer {kind!r} in the metadata; prepare the data again")


def gpt2():
    """GPT-2's tokenizer, 50,257 ids: from the ranks that openai-whisper ships, where that is installed, else by
    tiktoken, which downloads them once and caches them. ValueError says how to get them where neither works."""
    spec = importlib.util.find_spec("whisper")  # finds the package's folder, does not import it
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / "assets" / "gpt2.tiktoken"
        if path.is_file():
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest() != GPT2_SHA256:
                raise ValueError(f"{path} is not GPT-2's vocabulary (its checksum differs); reinstall openai-whisper")
            pairs = sorted(
                (int(rank), token) for token, rank in (line.split() for line in content.splitlines() if line)
            )
            return BPE("gpt2", GPT2_PATTERN, [base64.b64decode(token) for _, token in pairs])
    import tiktoken

    try:
        encoding = tiktoken.get_encoding("gpt2")
    except OSError as error:  # what requests raises where there is no network
        raise ValueError(
            "tiktoken could not download GPT-2's vocabulary. Either `pip install --no-deps openai-whisper`, which has "
            "it, or set TIKTOKEN_CACHE_DIR to a folder where it was cached, or pass --tokenizer=train for a vocabulary "
            f"of this corpus' own ({type(error).__name__})"
        ) from None
    return BPE("gpt2", GPT2_PATTERN, [encoding.decode_single_token_bytes(i) for i in range(encoding.n_vocab - 1)])


def train_bpe(texts, vocab_size):
    """A BPE learned from an iterable of texts by rustbpe (https://github.com/karpathy/rustbpe), with vocab_size ids."""
    import rustbpe

    if vocab_size < 258:
        raise ValueError(f"a trained vocabulary has the 256 bytes, a merge and an end: at least 258, got {vocab_size}")
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(texts), vocab_size - 1, pattern=GPT2_PATTERN)
    ranks = sorted(((rank, bytes(token)) for token, rank in trainer.get_mergeable_ranks()))
    if len(ranks) + 1 < vocab_size:
        print(f"the text has pairs for {len(ranks) + 1:,} ids only, fewer than the {vocab_size:,} asked for")
    return BPE("trained", GPT2_PATTERN, [token for _, token in ranks])


def choose(kind, texts, vocab_size):
    """The tokenizer a prepare script was asked for: char, byte, gpt2 or train; texts: the training texts."""
    if kind == "char":
        return Characters("".join(texts))
    if kind == "byte":
        return Bytes()
    if kind == "gpt2":
        return gpt2()
    if kind == "train":
        return train_bpe(texts, vocab_size)
    raise ValueError(f"tokenizer must be char, byte, gpt2 or train, got {kind!r}")
