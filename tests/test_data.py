"""Tokenizers, the prepare scripts, and what a training run reads."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, assert_one_line
from hypothesis import given, settings
from hypothesis import strategies as st

from data import bins, tokenizer
from data.bins import TokenData

# Tokenizers -----------------------------------------------------------------------------------------------------------

POEM = "Über allen Gipfeln ist Ruh' — 12 Vögel, 3 Wälder.\n" * 30


def every_tokenizer():
    yield tokenizer.Characters(POEM)
    yield tokenizer.Bytes()
    yield tokenizer.train_bpe([POEM], 300)
    yield tokenizer.gpt2()


@pytest.mark.parametrize("words", list(every_tokenizer()), ids=["characters", "bytes", "trained", "gpt2"])
def test_round_trip_and_spec(words):
    ids = words.encode(POEM)
    assert ids.dtype == np.uint32 and ids.max() < words.vocab_size
    assert words.decode(ids) == POEM
    again = tokenizer.from_spec(json.loads(json.dumps(words.spec)))
    assert (again.encode(POEM) == ids).all() and again.vocab_size == words.vocab_size
    assert b"".join(again.to_bytes([i]) for i in ids) == POEM.encode()


@settings(max_examples=50, deadline=None)
@given(st.text())
def test_bytes_and_bpe_know_every_text(text):
    for words in (tokenizer.Bytes(), TRAINED):
        assert words.decode(words.encode(text)) == text


TRAINED = tokenizer.train_bpe([POEM], 290)


def test_gpt2_is_gpt2():
    words = tokenizer.gpt2()
    assert words.encode("Hello world").tolist() == [15496, 995]
    assert words.vocab_size == 50257 and words.end == 50256
    # our pattern for words cuts as tiktoken's own does
    from tiktoken_ext.openai_public import r50k_pat_str

    theirs = tokenizer.BPE("theirs", r50k_pat_str, [words.to_bytes([i]) for i in range(50256)])
    sample = (ROOT / "model.py").read_text() + POEM + "don't  stop\t\n\n 12ab__ ++ é\u00a0x   "
    assert (theirs.encode(sample) == words.encode(sample)).all()


def test_gpt2_does_not_import_whisper():
    assert "whisper" not in sys.modules and importlib.util.find_spec("whisper") is not None


def test_without_whisper_and_network_it_says_how_to_get_the_ranks(monkeypatch):
    import tiktoken

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)

    def no_network(name):
        raise ConnectionError("no route")

    monkeypatch.setattr(tiktoken, "get_encoding", no_network)
    with pytest.raises(ValueError, match=r"openai-whisper.*TIKTOKEN_CACHE_DIR.*--tokenizer=train"):
        tokenizer.gpt2()


def test_gpt2_by_tiktoken_where_whisper_is_missing(monkeypatch):
    import tiktoken

    ours = tokenizer.gpt2()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: ours._encoding)
    assert tokenizer.gpt2().spec == ours.spec


def test_a_trained_vocabulary_has_the_size_asked_for():
    words = tokenizer.train_bpe([POEM, "more " * 50], 280)
    assert words.vocab_size == 280 and words.end == 279 and len(words.encode(POEM)) < len(POEM.encode())
    assert [list(a) for a in words.encode_batch(["ab", POEM])] == [list(words.encode(t)) for t in ("ab", POEM)]
    with pytest.raises(ValueError, match="at least 258"):
        tokenizer.train_bpe([POEM], 100)


def test_unknown_characters_are_named():
    with pytest.raises(ValueError, match=r"does not know '€' \(U\+20AC\), '𝄞' \(U\+1D11E\); it knows ' abc'"):
        tokenizer.Characters("abc abc").encode("a€b𝄞 \u20ac")


def test_unknown_spec():
    with pytest.raises(ValueError, match="unknown tokenizer 'wordpiece'"):
        tokenizer.from_spec({"kind": "wordpiece"})


# Preparing ------------------------------------------------------------------------------------------------------------


def load(folder, block_size=16):
    return TokenData(str(folder), block_size)


def tokens(folder, split):
    meta = json.loads((folder / "meta.json").read_text())
    return tokenizer.from_spec(meta["tokenizer"]), np.fromfile(folder / f"{split}.bin", dtype=meta["dtype"])


def test_python_stdlib(script, tmp_path):
    done = script("data/python_stdlib/prepare.py", f"--out={tmp_path / 'std'}")
    assert done.returncode == 0, done.stderr
    words, val = tokens(tmp_path / "std", "val")
    assert "import " in words.decode(val) and load(tmp_path / "std").tokens["train"] > 8_000_000
    before = (tmp_path / "std" / "train.bin").read_bytes()
    assert script("data/python_stdlib/prepare.py", "--out", tmp_path / "std").returncode == 0
    assert (tmp_path / "std" / "train.bin").read_bytes() == before


PAGE = """<?xml version="1.0"?><html><head><title>No</title></head><body><div id="banner"><p>No</p></div>
<ul class="docnav"><li><a href="x">No</a></li></ul><h1>11.7. Mail &amp; more</h1><p>A <em>page</em>,
broken<br/>in two.<img src="x"/></p>
<div class="toc"><dl><dt>No</dt></dl></div><pre># a   comment
  indented</pre><p>Page {number}.</p></body></html>"""
PROSE = "11.7. Mail & more\nA page, broken\nin two.\n# a   comment\n  indented\nPage {number}.\n\n"


@pytest.fixture
def handbook(tmp_path):
    """A folder with pages like the handbook's."""
    folder = tmp_path / "usr/share/doc/debian-handbook/html/en-US"
    folder.mkdir(parents=True)
    for number in range(40):
        (folder / f"sect.{number}.html").write_text(PAGE.format(number=number))
    return folder


def test_debian_handbook(script, handbook, tmp_path):
    done = script("data/debian_handbook/prepare.py", f"--input={handbook}", f"--out={tmp_path / 'd'}")
    assert done.returncode == 0, done.stderr
    data = TokenData(tmp_path / "d", 16)
    words = tokenizer.from_spec(data.tokenizer_spec)
    texts = [words.decode(data._read(split, 0, data.tokens[split])) for split in bins.SPLITS]
    pages = [PROSE.format(number=number) for number in range(40)]
    assert sorted("".join(texts).split("\n\n")) == sorted("".join(pages).split("\n\n"))
    assert texts[0].count("Mail") > texts[1].count("Mail") > 0


@pytest.mark.skipif(not shutil.which("dpkg-deb"), reason="no dpkg-deb on this system")
def test_debian_handbook_from_its_package(script, handbook, tmp_path):
    tree = tmp_path / "tree"
    shutil.copytree(tmp_path / "usr", tree / "usr")
    (tree / "DEBIAN").mkdir()
    (tree / "DEBIAN/control").write_text(
        "Package: debian-handbook\nVersion: 1\nArchitecture: all\nMaintainer: A <a@b.c>\nDescription: test\n"
    )
    subprocess.run(["dpkg-deb", "--build", tree, tmp_path / "book.deb"], check=True, capture_output=True)
    prepare = "data/debian_handbook/prepare.py"
    for source, out in ((handbook, "a"), (tmp_path / "book.deb", "b")):
        assert script(prepare, f"--input={source}", f"--out={tmp_path / out}").returncode == 0
    assert (tmp_path / "a" / "train.bin").read_bytes() == (tmp_path / "b" / "train.bin").read_bytes()
    (tmp_path / "bad.deb").write_text("no package")
    assert_one_line(script(prepare, f"--input={tmp_path / 'bad.deb'}"), "dpkg-deb -x failed", "--input=FOLDER")


def test_debian_handbook_says_what_it_needs(script, tmp_path):
    prepare = "data/debian_handbook/prepare.py"
    assert_one_line(script(prepare, "--input=none.deb"), "no none.deb", "--input names the .deb")
    assert_one_line(script(prepare, f"--input={tmp_path}"), "no .html pages", "--input")
    assert_one_line(script(prepare, env={"PATH": str(tmp_path)}), "no apt-get on this system", "--input=FILE")


@pytest.mark.parametrize("kind, size", [("char", None), ("train", 300)])
def test_python_stdlib_other_tokenizers(kind, size, script, tmp_path):
    options = [f"--tokenizer={kind}", f"--out={tmp_path / 'std'}"] + ([f"--vocab_size={size}"] if size else [])
    assert script("data/python_stdlib/prepare.py", *options).returncode == 0
    data = load(tmp_path / "std")
    assert data.vocab_size == (size or data.vocab_size) and data.tokenizer_spec["kind"][:4] == {"char": "char"}.get(
        kind, "bpe"
    )


@pytest.fixture
def play(tmp_path):
    path = tmp_path / "play.txt"
    path.write_text("ROMEO: what light through yonder window breaks?\n" * 200, encoding="utf-8")
    return path


def test_shakespeare_char(script, tmp_path, play):
    done = script("data/shakespeare_char/prepare.py", "--input", play, f"--out={tmp_path / 'd'}")
    assert done.returncode == 0, done.stderr
    words, train = tokens(tmp_path / "d", "train")
    assert words.decode(train) + words.decode(tokens(tmp_path / "d", "val")[1]) == play.read_text()
    assert len(train) == int(0.9 * len(play.read_text()))


@pytest.mark.parametrize("kind, vocabulary", [("gpt2", 50257), ("train", 290), ("byte", 256)])
def test_shakespeare_bpe(kind, vocabulary, script, tmp_path, play):
    options = ["--input", play, f"--tokenizer={kind}", "--vocab_size=290", f"--out={tmp_path / 'd'}"]
    done = script("data/shakespeare/prepare.py", *options)
    assert done.returncode == 0, done.stderr
    data = load(tmp_path / "d")
    assert data.vocab_size == vocabulary
    words, train = tokens(tmp_path / "d", "train")
    assert words.decode(train) == play.read_text()[: len(play.read_text()) * 9 // 10]


def test_shakespeare_mistakes(script, tmp_path):
    out = f"--out={tmp_path / 'd'}"
    assert_one_line(script("data/shakespeare_char/prepare.py", "--input=none.txt", out), "no file none.txt", "--input")
    (tmp_path / "short.txt").write_text("short")
    assert_one_line(script("data/shakespeare_char/prepare.py", "--input=short.txt", out), "5 characters")
    assert_one_line(script("data/shakespeare_char/prepare.py", "--inptu=a"), "unknown option --inptu", "mean input?")
    done = script("data/shakespeare/prepare.py", "--tokenizer=word", "--input", ROOT / "model.py", out)
    assert_one_line(done, "char, byte, gpt2 or train, got 'word'")


def test_a_download_is_checked(monkeypatch, tmp_path):
    import io
    import urllib.request

    from data import shakespeare

    monkeypatch.setattr(urllib.request, "urlopen", lambda *a, **k: io.BytesIO(b"an error page" * 1000))
    with pytest.raises(ValueError, match="checksum"):
        shakespeare.read("", tmp_path)

    def refuse(*a, **k):
        raise OSError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    with pytest.raises(ValueError, match="--input FILE"):
        shakespeare.read("", tmp_path)
    assert not list(tmp_path.iterdir())
    tmp_path = tmp_path / "new"
    text = "To be or not to be\n" * 100
    monkeypatch.setattr(shakespeare, "SHA256", __import__("hashlib").sha256(text.encode()).hexdigest())
    monkeypatch.setattr(urllib.request, "urlopen", lambda *a, **k: io.BytesIO(text.encode()))
    assert shakespeare.read("", tmp_path) == text
    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    assert shakespeare.read("", tmp_path) == text  # kept


@pytest.mark.parametrize(
    "name, format, kind",
    [("openwebtext", "jsonl", "gpt2"), ("fineweb_edu", "parquet", "train"), ("openwebtext", "parquet", "byte")],
)
def test_hugging_face_from_local_files(name, format, kind, script, tmp_path):
    texts = [f"Document {n} says that {n * n} is the square of {n}.\nÜbrigens." for n in range(1200)]
    rows = [*texts, None, ""]  # documents without a text are passed over
    path = tmp_path / f"docs.{format}"
    if format == "jsonl":
        path.write_text("".join(json.dumps({"text": t, "url": "x"}) + "\n" for t in rows), encoding="utf-8")
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"text": rows, "id": list(range(len(rows)))}), path)
    options = [f"--data-files={tmp_path}/d*.{format}", f"--tokenizer={kind}", "--vocab_size=300", "--val_fraction=0.1"]
    env = {"HF_HOME": str(tmp_path / "hf"), "HF_DATASETS_OFFLINE": "1"}
    done = script(f"data/{name}/prepare.py", *options, f"--out={tmp_path / 'd'}", env=env)
    assert done.returncode == 0, done.stderr
    words, train = tokens(tmp_path / "d", "train")
    _, val = tokens(tmp_path / "d", "val")
    if kind == "byte":
        assert len(train) + len(val) == sum(len(t.encode()) for t in texts)
    else:
        found = [words.decode(part[:-1]) for split in (train, val) for part in cut_after(split, words.end)]
        assert sorted(found) == sorted(texts)
    assert 0.05 < len(val) / (len(train) + len(val)) < 0.2
    limited = script(f"data/{name}/prepare.py", *options, "--max_tokens=3000", f"--out={tmp_path / 'e'}", env=env)
    assert limited.returncode == 0
    data = load(tmp_path / "e")
    assert 3000 <= sum(data.tokens.values()) < 3200


def cut_after(ids, end):
    return np.split(ids, np.flatnonzero(ids == end) + 1)[:-1]


def test_hugging_face_mistakes(script, tmp_path):
    out, prepare = f"--out={tmp_path / 'd'}", "data/openwebtext/prepare.py"
    env = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    assert_one_line(script(prepare, "--data-files=none.jsonl", out, env=env), "no file none.jsonl")
    assert_one_line(script(prepare, f"--data-files={tmp_path}/*.jsonl", out, env=env), "no file")
    (tmp_path / "a.csv").write_text("text\n1\n")
    assert_one_line(script(prepare, "--data-files=a.csv", out, env=env), "a.csv is neither .parquet nor")
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n')
    assert_one_line(script(prepare, "--data-files=a.jsonl", out, env=env), "no 'text'", "body")
    (tmp_path / "b.jsonl").write_text('{"text": ["x"]}\n')
    assert_one_line(script(prepare, "--data-files=b.jsonl", out, env=env), "text is list, not text")
    assert_one_line(script(prepare, "--tokenizer=char", out, env=env), "choose gpt2, train or byte")
    assert "--data-files takes local files" in script(prepare, "--tokenizer=byte", out, env=env).stderr
    assert not (tmp_path / "d" / "meta.json").exists()


# Writing and reading --------------------------------------------------------------------------------------------------


def test_an_interrupted_write_leaves_what_was_there(data_folder, tmp_path):
    folder = tmp_path / "d"
    shutil.copytree(data_folder, folder)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def pieces():
        yield "train", "abc", np.zeros(3, dtype=np.uint32)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bins.write(folder, tokenizer.Bytes(), pieces(), "x")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_large_vocabularies_take_four_bytes(tmp_path):
    many = tokenizer.Characters(map(chr, range(2**16, 2**16 + 70_000)))
    ids = np.arange(69_000, 70_000, dtype=np.uint32)
    bins.write(tmp_path / "d", many, [("train", "a", ids), ("val", "b", ids)], "x")
    data = load(tmp_path / "d")
    assert data.dtype.itemsize == 4 and (data.val_batch([0]) == ids[:17]).all()


def test_an_empty_split_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no text for val\.bin"):
        bins.write(tmp_path / "d", tokenizer.Bytes(), [("train", "abc", np.zeros(3, dtype=np.uint32))], "x")
    assert not list((tmp_path / "d").iterdir())


def test_batches_are_a_function_of_seed_and_number(data_folder):
    data, again = load(data_folder), load(data_folder)
    whole = data.train_batch(1, 0, 64)
    assert whole.shape == (64, 17) and whole.dtype == np.int64
    parts = [again.train_batch(1, first, 8) for first in (56, 48, 40, 32, 24, 16, 8, 0)][::-1]
    assert (np.concatenate(parts) == whole).all()
    assert (data.train_batch(2, 0, 64) != whole).any()


def test_an_epoch_covers_the_data_once(data_folder):
    data = load(data_folder)
    size = (data.tokens["train"] - 16) // 16
    for epoch in range(6):
        starts = [data._epoch(5, epoch)[n] for n in range(size)]
        assert len(set(starts)) == size and len({s % 16 for s in starts}) == 1  # no window twice, none overlaps another
        assert min(starts) < 16 and max(starts) + 17 <= data.tokens["train"]
    assert len({data._epoch(5, e)[0] % 16 for e in range(12)}) > 4  # every epoch cuts the text elsewhere
    assert data.train_batch(5, 10 * size - 3, 7).shape == (7, 17)  # across the end of an epoch


@pytest.mark.parametrize("length", [17, 18, 31, 32, 33, 40])
def test_the_shortest_data_sets_work(tmp_path, length):
    ids = np.arange(length, dtype=np.uint32)
    bins.write(tmp_path / "d", tokenizer.Bytes(), [("train", "", ids), ("val", "", ids)], "x")
    data = load(tmp_path / "d")
    for seed in range(5):
        assert data.train_batch(seed, 0, 9).shape == (9, 17)
    assert len(data.val_starts(0)) == (length - 1) // 16


def test_validation_windows_are_fixed_and_spread(data_folder):
    data = load(data_folder)
    every = data.val_starts(0)
    assert every == list(range(0, len(every) * 16, 16)) and len(every) == (data.tokens["val"] - 1) // 16
    some = data.val_starts(160)
    assert len(some) == 10 and set(some) <= set(every) and max(some) > 0.8 * max(every)
    assert data.val_starts(10**9) == every and len(data.val_starts(1)) == 1


def damage(data_folder, tmp_path, name, change):
    folder = tmp_path / "damaged"
    shutil.copytree(data_folder, folder)
    change(folder / name)
    return folder


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("train.bin", lambda p: os.truncate(p, 100), r"train\.bin has 100 bytes instead of .*; prepare it again"),
        ("val.bin", lambda p: p.unlink(), r"val\.bin is missing; prepare it again, with its --out"),
        ("meta.json", lambda p: p.unlink(), "no data in .*; prepare it again"),
        ("meta.json", lambda p: p.write_text("{"), r"meta\.json is damaged"),
        ("meta.json", lambda p: p.write_text("{}"), r"meta\.json is damaged"),
        ("meta.json", lambda p: p.write_text("[]"), r"meta\.json is damaged"),
        (
            "meta.json",
            lambda p: p.write_text(p.read_text().replace('"vocab_size": 3', '"vocab_size": 1')),
            r"meta\.json is damaged \(vocab_size 1\d, its tokenizer has 3\d\)",
        ),
        ("meta.json", lambda p: p.write_text(p.read_text().replace("uint16", "float16")), "damaged .dtype float16"),
        ("meta.json", lambda p: p.write_text(p.read_text().replace('"characters"', '"x"', 1)), "unknown tokenizer 'x'"),
        ("train.bin", lambda p: p.write_bytes(b"\xff" * p.stat().st_size), "another tokenizer"),
    ],
)
def test_damaged_data_is_named(data_folder, tmp_path, name, change, message):
    with pytest.raises(ValueError, match=message):
        load(damage(data_folder, tmp_path, name, change))


def test_data_prepared_again_is_for_the_next_run(data_folder, tmp_path):
    folder = tmp_path / "d"
    shutil.copytree(data_folder, folder)
    data = load(folder)
    before = data.train_batch(1, 0, 4)
    ids = np.ones(100, dtype=np.uint32)
    bins.write(folder, tokenizer.Bytes(), [("train", "a", ids), ("val", "b", ids)], "x")
    assert (data.train_batch(1, 0, 4) == before).all() and (load(folder).train_batch(1, 0, 4) == 1).all()


def test_missing_and_too_short_data(data_folder):
    with pytest.raises(
        ValueError, match=r"no data set 'nothing'.*there are debian_handbook, fineweb_edu, openwebtext, python_stdlib"
    ):
        TokenData("nothing", 16)
    made = [p.parent for p in (ROOT / "data").glob("*/prepare.py")]
    for folder in (folder for folder in made if not (folder / "meta.json").exists()):
        with pytest.raises(ValueError, match=rf"no data in .*; prepare it with: python data/{folder.name}/prepare\.py"):
            TokenData(folder.name, 16)
    with pytest.raises(ValueError, match=r"too few for block_size = 100000; lower block_size"):
        load(data_folder, 100_000)
