PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
INSTALLED := $(VENV)/.installed
NATIVE := src/bnlab/kernels/native/libbnlab_native.so

.PHONY: run test test-browser test-native lint bench docs pictures wheel clean

run: $(NATIVE)  ## train a small network with a classic mishap and diagnose its checkpoint
	$(BIN)/bnlab demo

test: lint $(NATIVE)  ## everything CI runs
	$(BIN)/pytest

test-browser: $(NATIVE)  ## the pages, in headless Chromium
	command -v chromium && command -v chromedriver || (apt-get update -qq && apt-get install -y -qq chromium chromium-driver)
	$(PIP) install --constraint constraints.txt --editable '.[browser]'
	$(BIN)/pytest tests/browser

test-native: $(INSTALLED)  ## the C entry points on odd shapes, with the address sanitizer
	$(BIN)/python tests/native/run.py

lint: $(INSTALLED)
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(NATIVE)  ## every benchmark: checkpoints, accuracy, small tensors
	$(BIN)/bnlab bench check
	$(BIN)/bnlab bench accuracy
	OMP_PROC_BIND=true $(BIN)/bnlab bench small
	$(BIN)/bnlab bench ops
	$(BIN)/bnlab bench training

wheel: $(NATIVE)  ## one wheel for every Python, with the compiled kernels
	$(PIP) wheel --no-deps --wheel-dir dist .

docs: $(INSTALLED)  ## rewrite the generated pages
	$(BIN)/python tools/build_docs.py

pictures: $(NATIVE)  ## draw docs/images again; the page needs chromium, check.svg a checkpoint of $$BNLAB_DATA
	$(BIN)/python tools/screenshot_page.py docs/images/report.png
	$(BIN)/python tools/screenshot_diagnosis.py docs/images/diagnosis.svg
	test -z "$$BNLAB_DATA" || $(BIN)/python tools/screenshot.py "$$BNLAB_DATA/nets/burn_mnist/mnist.pt" docs/images/check.svg
	$(BIN)/bnlab lab run huge-gap train-eval --figure svg
	cp lab-records/huge-gap-quick.svg docs/images/huge-gap.svg
	cp lab-records/train-eval-quick.svg docs/images/train-eval.svg

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

# torch goes first and pinned: a package that pulls it unpinned would fetch the CUDA build.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --constraint constraints.txt torch
	$(PIP) install --constraint constraints.txt --editable '.[dev]'
	touch $@

# Without a compiler bnlab runs on torch's kernels: it says so, and goes on.
$(NATIVE): $(INSTALLED) $(wildcard src/bnlab/kernels/native/src/*) src/bnlab/kernels/native/build.py
	$(BIN)/python -m bnlab.kernels.native.build && touch $@ || true
