"""Natural English prose, from a package: The Debian Administrator's Handbook, 1.1 million characters.

Debian and what is made from it have the package debian-handbook; on another system pass --input, its .deb or a folder
with the pages. Nothing is installed, and nothing of the book is in this repository (its licence is GPL-2+ or CC-BY-SA
3.0). One page in ten, chosen by the hash of its name, is for validation.

    python data/debian_handbook/prepare.py                          characters, those that occur
    python data/debian_handbook/prepare.py --tokenizer=train        BPE of its own, 4,096 ids
    python data/debian_handbook/prepare.py --input=debian-handbook_11.20220922_all.deb
"""

import html.parser
import re
import subprocess
import sys
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import cli
from data import bins

PACKAGE = "debian-handbook"
PAGES = "usr/share/doc/debian-handbook/html/en-US"
BLOCKS = set("p div pre li dt dd tr h1 h2 h3 h4 h5 h6 table ul ol dl br".split())
EMPTY = set("br hr img link meta input col".split())  # elements without an end
NOT_PROSE = {"docnav", "docnav top", "toc"}  # classes of what leads from page to page


@dataclass
class Options:
    input: str = ""  # the .deb, or a folder of .html pages; empty: downloaded by apt-get
    tokenizer: str = "char"  # char, byte, train (a BPE of this corpus), gpt2
    vocab_size: int = 4096  # of a trained BPE
    out: str = str(Path(__file__).parent)  # folder for train.bin, val.bin and meta.json


class Prose(html.parser.HTMLParser):
    """The text of a page, a line per paragraph, preformatted lines as they are."""

    def __init__(self):
        super().__init__()
        self.parts, self.skip, self.pre = [], 0, 0

    def handle_starttag(self, tag, attributes):
        if tag in BLOCKS and not self.skip:
            self.parts.append("\n")
        if tag in EMPTY:
            return
        attributes = dict(attributes)
        outside = tag in ("head", "script", "style") or attributes.get("class") in NOT_PROSE
        if self.skip or outside or attributes.get("id") in ("banner", "title"):
            self.skip += 1
        self.pre += tag == "pre"

    def handle_startendtag(self, tag, attributes):
        if tag in BLOCKS and not self.skip:
            self.parts.append("\n")

    def handle_endtag(self, tag):
        if tag in EMPTY:
            return
        self.skip -= self.skip > 0
        self.pre -= tag == "pre"
        if tag in BLOCKS and not self.skip:
            self.parts.append("\n")

    def handle_data(self, data):
        if not self.skip and not self.pre:
            data = re.sub(r"\s+", " ", data)
            data = data.lstrip() if not self.parts or self.parts[-1].endswith("\n") else data
        if not self.skip:
            self.parts.append(data)


def prose(page):
    parser = Prose()
    parser.feed(page)
    text = "".join(parser.parts).replace("\xa0", " ")
    lines = [line.rstrip() for line in text.split("\n")]
    return "\n".join(line for line in lines if line) + "\n\n"


def read_pages(folder):
    """(name, text) of every page in a folder, sorted by name; ValueError if there is none."""
    pages = [(path.name, prose(cli.read_text(path))) for path in sorted(Path(folder).glob("*.html"))]
    if not pages:
        raise ValueError(f"no .html pages in {folder}; --input names a folder with them, or the .deb")
    return pages


def run(command, folder, remedy):
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    except FileNotFoundError:
        raise ValueError(f"no {command[0]} on this system; {remedy}") from None
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it does not say why"])[-1]
        raise ValueError(f"{' '.join(command[:2])} failed ({reason}); {remedy}")


def read(source):
    """All pages, from the .deb or folder given, or downloaded by apt-get for as long as this takes."""
    if source and Path(source).is_dir():
        return read_pages(source)
    if source and not Path(source).is_file():
        raise ValueError(f"no {source}; --input names the .deb of {PACKAGE}, or a folder with its pages")
    with tempfile.TemporaryDirectory() as scratch:
        package = Path(source).resolve() if source else None
        if package is None:
            remedy = f"get the .deb from https://packages.debian.org/{PACKAGE} and pass --input=FILE"
            run(["apt-get", "download", PACKAGE], scratch, remedy)
            package = next(Path(scratch).glob("*.deb"))
        run(["dpkg-deb", "-x", str(package), scratch], scratch, "unpack it by other means and pass --input=FOLDER")
        return read_pages(Path(scratch) / PAGES)


def main(arguments):
    options = cli.parse(Options, arguments)
    texts = [("val" if zlib.crc32(name.encode()) % 10 == 0 else "train", text) for name, text in read(options.input)]
    bins.prepare(options, texts, PACKAGE)


if __name__ == "__main__":
    cli.run(main)
