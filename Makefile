# make quickstart    train a small spline GPT on the standard library's source, and sample from it (4 minutes, no GPU)
# make test          run the tests
# make lint          check style
# Each makes a virtual environment in .venv first, where it is missing or out of date; only that needs a network.

PYTHON ?= python3
PY := .venv/bin/python
PIP := $(PY) -m pip install -q --disable-pip-version-check -c constraints.txt
ARGS ?=

.PHONY: quickstart test lint
quickstart: .venv/train.done
	$(PY) data/python_stdlib/prepare.py
	$(PY) train.py configs/quickstart.toml $(ARGS)
	$(PY) sample.py out/quickstart --prompt="def " --max_new_tokens=400
	@echo
	@echo "The loss curve is in out/quickstart/loss.png. Write more: $(PY) sample.py out/quickstart --prompt='class '"

test: .venv/test.done
	OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --dist=loadfile $(ARGS)

lint: .venv/test.done
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .

.venv/train.done: pyproject.toml constraints.txt
	$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	$(PIP) -e ".[train]"
	touch $@

# openai-whisper ships GPT-2's vocabulary, which tiktoken would download; without its dependencies it is half a megabyte.
.venv/test.done: .venv/train.done
	$(PIP) -e ".[test]"
	$(PIP) --no-deps openai-whisper
	touch $@
