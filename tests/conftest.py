"""Small data and small runs that several test files share. Run all tests with `make test`."""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():  # Triton's kernels are interpreted then; it wants to know before it is imported
    os.environ["TRITON_INTERPRET"] = "1"

import train
from data import bins, tokenizer
from kan_layer import IMPLS

ROOT = Path(__file__).resolve().parents[1]
CPU_IMPLS = {name: f for name, f in IMPLS.items() if name != "triton"}  # that one is in test_gpu.py
TINY = dict(
    n_layer=2,
    n_head=2,
    n_embd=16,
    block_size=16,
    batch_tokens=128,
    max_steps=12,
    warmup_steps=2,
    eval_interval=5,
    eval_tokens=256,
    device="cpu",
    dtype="float32",
)


@pytest.fixture(autouse=True)
def fresh_torch():
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def text():
    """15 kB that have something to learn: a repeated phrase with numbers in it."""
    return "".join(f"{n} green bottles hanging on the wall, and {n * n % 97} of them fall.\n" for n in range(230))


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("data") / "bottles"
    words = tokenizer.Characters(text)
    cut = len(text) * 9 // 10
    pieces = [(s, t, words.encode(t)) for s, t in (("train", text[:cut]), ("val", text[cut:]))]
    bins.write(folder, words, pieces, "bottles")
    return folder


@pytest.fixture
def tiny(data_folder, tmp_path):
    """Makes configurations of a run that takes half a second: tiny(out_dir="a", mlp="gelu")."""

    def make(out_dir="run", **options):
        return train.TrainConfig(**{**TINY, "data": str(data_folder), "out_dir": str(tmp_path / out_dir), **options})

    return make


@pytest.fixture(scope="session")
def forks():
    """forked.py, which runs scripts without importing torch for each."""
    command = [sys.executable, str(ROOT / "tests" / "forked.py")]
    how = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    with subprocess.Popen(command, **how) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def script(tmp_path, forks):
    """Runs one of the scripts as a person would; returns the finished process."""

    def run(*arguments, input=None, env=None, module=None, cwd=tmp_path):
        name, *rest = map(str, arguments)
        command = [str(ROOT / name), *rest]
        if env or module:
            command = [sys.executable, *(module or []), *command]
            how = dict(env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}, cwd=cwd, timeout=300)
            return subprocess.run(command, input=input, capture_output=True, text=True, **how)
        with tempfile.TemporaryDirectory() as folder:
            files = [Path(folder, name) for name in ("in", "out", "err")]
            files[0].write_text(input or "")
            json.dump([command[0], rest, str(cwd), *map(str, files)], forks.stdin)
            print(file=forks.stdin, flush=True)
            status = int(forks.stdout.readline())
            return subprocess.CompletedProcess(command, status, *(file.read_text() for file in files[1:]))

    return run


def load_script(name):
    """A script that is in no package, as a module."""
    spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def torchrun(script, processes, config, *more, env=None):
    module = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return script("train.py", *as_options(config), *more, module=module, env=env)


def as_options(config):
    """A configuration as command-line options."""
    return [f"--{name}={value}" for name, value in vars(config).items() if value != ()]


def assert_one_line(process, *words):
    """A person's mistake: a non-zero exit and a single line that says what and how to mend it."""
    assert process.returncode not in (0, None)
    assert "Traceback" not in process.stderr, process.stderr
    lines = [line for line in process.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, process.stderr
    for word in words:
        assert word in lines[0], lines[0]
