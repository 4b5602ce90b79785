PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PYTEST := $(BIN)/pytest -n 2 --dist worksteal
TO_RUN := $(VENV)/.installed-to-run
TO_DEVELOP := $(VENV)/.installed-to-develop
TRAINS := -m 'trains and not slow'
OTHER_KERNELS := BNLAB_CPU=torch ATEN_CPU_CAPABILITY=default BNLAB_TEST_FLUSH_DENORMAL=1
OLD_PROCESSOR := BNLAB_ISA=baseline BNLAB_TEST_THREADS=2
INTEGRATION := .venv-integration
TO_INTEGRATE := $(INTEGRATION)/.installed
KERNELS := src/bnlab/kernels/native/libbnlab_native.so
KERNEL_SOURCES := $(wildcard src/bnlab/kernels/native/src/*) src/bnlab/kernels/native/build.py
EVERY_SET := $(VENV)/.every-set-compiled

# pip compiles nothing here, and every stage imports torch in many processes: what they compile is kept.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: run test test-slow test-machines test-each-machine test-browser test-integration test-native fuzz lint kernels every-set bench docs pictures wheel clean

run: $(TO_RUN)  ## train a small network with a classic mishap, diagnose its checkpoint and repair it
	$(BIN)/bnlab demo
	@test -e $(KERNELS) || echo "bnlab ran on torch's kernels. make kernels compiles its own, in half a minute."

test: lint $(KERNELS)  ## lint, types, layering and tests
	$(PYTEST)

test-slow: $(TO_DEVELOP) $(KERNELS)  ## more cases of what make test checks
	$(PYTEST) -m slow

# env rather than a shell: a shell that gets Ctrl-C does not wait for pytest. Threads do not share cores with a worker.
test-machines: $(EVERY_SET)  ## the tests that train, as other machines would round, in two runs
	env $(OTHER_KERNELS) $(PYTEST) $(TRAINS)
	env $(OLD_PROCESSOR) $(BIN)/pytest -n 1 $(TRAINS)

test-each-machine: $(EVERY_SET)  ## every test that trains, with one difference at a time: see which it was
	for difference in $(OTHER_KERNELS) BNLAB_ISA=baseline; do env $$difference $(PYTEST) -m trains || exit 1; done
	env BNLAB_TEST_THREADS=2 $(BIN)/pytest -n 1 -m trains

test-browser: $(TO_DEVELOP)  ## the pages, in headless Chromium
	command -v chromium && command -v chromedriver || (apt-get update -qq && apt-get install -y -qq chromium chromium-driver)
	$(PIP) install --quiet --constraint constraints.txt --editable '.[browser]'
	$(BIN)/pytest tests/browser

test-integration: $(KERNELS)  ## real models of ten libraries; writes docs/integrations.md
	@rm -f build/integrations.json
	@$(MAKE) --no-print-directory $(TO_INTEGRATE) || echo "Skipped: a library does not install here."
	test ! -e $(TO_INTEGRATE) || $(INTEGRATION)/bin/python -m pytest -n 2 --dist loadgroup tests/integration
	test ! -e build/integrations.json || $(BIN)/python tools/build_integrations.py build/integrations.json

test-native: $(TO_DEVELOP)  ## the C entry points on odd shapes, with the address sanitizer
	$(BIN)/python tests/native/run.py

fuzz: $(TO_DEVELOP)  ## every hostile file, an error at every call of forward, and 100,000 damaged files of every format
	BNLAB_EVERY_FILE=1 $(PYTEST) -m "" tests/hostile/test_budgets.py
	BNLAB_EVERY_CALL=1 $(PYTEST) -m "" tests/contracts/test_interrupted.py
	$(BIN)/python -m tests.hostile.fuzz --cases $(or $(CASES),100000)

lint: $(TO_DEVELOP)
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports

kernels: $(KERNELS)  ## compile the CPU kernels for this machine

every-set: $(EVERY_SET)  ## compile the CPU kernels for every set of instructions

bench: $(TO_DEVELOP) $(KERNELS)  ## every benchmark: checkpoints, accuracy, small tensors
	$(BIN)/bnlab bench check
	$(BIN)/bnlab bench hostile
	$(BIN)/bnlab bench accuracy
	OMP_PROC_BIND=true $(BIN)/bnlab bench small
	$(BIN)/bnlab bench ops
	$(BIN)/bnlab bench training

wheel: $(TO_RUN)  ## one wheel for every Python, with the kernels for every set of instructions
	BNLAB_SETS=all $(PIP) wheel --verbose --no-deps --wheel-dir dist .

docs: $(TO_DEVELOP)  ## rewrite the generated pages
	$(BIN)/python tools/build_docs.py

pictures: $(TO_DEVELOP) $(KERNELS)  ## draw docs/images again; the page needs chromium, check.svg a checkpoint of $$BNLAB_DATA
	$(BIN)/python tools/screenshot_page.py docs/images/report.png
	$(BIN)/python tools/screenshot_diagnosis.py docs/images/diagnosis.svg
	$(BIN)/python tools/screenshot_run.py docs/images/watch.png
	test -z "$$BNLAB_DATA" || $(BIN)/python tools/screenshot.py "$$BNLAB_DATA/nets/burn_mnist/mnist.pt" docs/images/check.svg
	$(BIN)/bnlab lab run huge-gap train-eval --figure svg
	cp lab-records/huge-gap-quick.svg docs/images/huge-gap.svg
	cp lab-records/train-eval-quick.svg docs/images/train-eval.svg

clean:
	rm -rf $(VENV) $(INTEGRATION) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

# torch goes first and pinned: a package that pulls it unpinned would fetch the CUDA build. Files are compiled to bytecode
# when they are first imported: most of torch never is.
$(TO_RUN): pyproject.toml constraints.txt
	@echo "Creating $(VENV), with torch and what the demo needs"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --no-compile --constraint constraints.txt torch
	$(PIP) install --no-compile --constraint constraints.txt --editable '.[lab]'
	@touch $@

# timm needs nothing else to import, and its dependencies would bring what only its downloads need.
$(TO_DEVELOP): $(TO_RUN)
	@echo "Installing what the tests need"
	$(PIP) install --quiet --no-compile --constraint constraints.txt --editable '.[dev]'
	$(PIP) install --quiet --no-compile --constraint constraints.txt --no-deps timm torchvision \
		|| echo "timm does not install here: the tests of its layers are skipped."
	$(PIP) install --quiet --no-compile --constraint constraints.txt --editable '.[triton]' \
		|| echo "triton does not install here: the tests of the GPU kernels are skipped."
	@touch $@

# The libraries lie in an environment of their own that sees .venv: torch is there once, and .venv stays as it is.
$(TO_INTEGRATE): $(TO_DEVELOP) tests/integration/requirements.txt
	@echo "Creating $(INTEGRATION), with the libraries of tests/integration"
	@test -x $(INTEGRATION)/bin/python || $(BIN)/python -m venv $(INTEGRATION)
	@purelib='import sysconfig; print(sysconfig.get_path("purelib"))'; \
		echo "import site; site.addsitedir('$$($(BIN)/python -c "$$purelib")')" \
		> "$$($(INTEGRATION)/bin/python -c "$$purelib")/base.pth"
	$(INTEGRATION)/bin/python -m pip --disable-pip-version-check install --quiet --no-compile --no-deps --requirement tests/integration/requirements.txt
	@touch $@

# Without a compiler bnlab runs on torch's kernels: it says so, and goes on.
$(KERNELS): $(TO_RUN) $(KERNEL_SOURCES)
	@rm -f $(EVERY_SET)
	$(BIN)/python -m bnlab.kernels.native.build && touch $@ || true

$(EVERY_SET): $(TO_DEVELOP) $(KERNEL_SOURCES)
	$(BIN)/python -m bnlab.kernels.native.build --all && touch $(KERNELS) $@
