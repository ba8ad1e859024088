"""Tiny Shakespeare, for the two data sets made of it: found or downloaded, checked, cut at 90% as nanoGPT does."""

import hashlib
import http.client
import os
import urllib.request
from pathlib import Path

import cli

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def read(path, folder):
    """The text of `path`; with no path, of folder/input.txt, which is downloaded (1.1 MB) and checked if missing."""
    if path:
        if not Path(path).is_file():
            raise ValueError(f"no file {path}; --input names the text to prepare")
        text = cli.read_text(path)
        if len(text) < 1000:
            raise ValueError(f"{path} has {len(text)} characters, too few to learn from")
        return text
    cached = Path(folder) / "input.txt"
    if not cached.is_file():
        try:
            content = urllib.request.urlopen(URL, timeout=30).read()
        except (OSError, http.client.HTTPException) as error:
            raise ValueError(
                f"could not download {URL} ({error}); get it by other means and pass --input FILE"
            ) from None
        if hashlib.sha256(content).hexdigest() != SHA256:
            raise ValueError(f"what came from {URL} has another checksum than expected; pass --input FILE instead")
        cached.parent.mkdir(parents=True, exist_ok=True)
        temporary = cached.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_bytes(content)
        os.replace(temporary, cached)
    return cached.read_text(encoding="utf-8")


def split(text):
    cut = int(len(text) * 0.9)
    return [("train", text[:cut]), ("val", text[cut:])]
