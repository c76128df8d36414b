# Every target sets itself up first. PYTHON is the interpreter that .venv is made from (3.10 or newer):
#     make setup PYTHON=python3.12             it counts only while there is no .venv yet
#     make test  PYTHON=python3.12 VENV=.venv-3.12
PYTHON ?= python3
VENV ?= .venv

# Where torch comes from. On Linux the usual index has it with CUDA, which takes gigabytes, so where there is no GPU it is
# taken from PyTorch's index of CPU wheels, and from the usual one if that cannot be reached.
#     make setup TORCH_INDEX=          the usual index: for a GPU that this machine does not have itself
ifeq ($(origin TORCH_INDEX),undefined)
TORCH_INDEX := $(shell [ "$$(uname -s)" != Linux ] || [ -e /dev/nvidiactl ] || nvidia-smi >/dev/null 2>&1 \
	|| echo https://download.pytorch.org/whl/cpu)
endif

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
LOG := $(VENV)/setup.log
PIP := $(BIN)/python -m pip install --disable-pip-version-check
LOGGED = >>$(LOG) 2>&1 || { tail -n 20 $(LOG) >&2; echo "That failed; these are the last lines of $(LOG)." >&2; exit 1; }

.PHONY: help setup demo test bench gpu lint clean

help:
	@echo "make setup   create $(VENV) with everything that is needed"
	@echo "make demo    refine the shipped digits GAN with the shipped teacher, show before and after"
	@echo "make test    run the tests"
	@echo "make bench   images per second of one iteration, and where its time goes"
	@echo "make gpu     measure all of it on a GPU, in ten minutes: gpu.md"
	@echo "make lint    ruff, mypy and vulture"
	@echo "make clean   remove $(VENV) and caches"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed, $(PYTHON) is " + sys.version.split()[0] + "; try make PYTHON=python3.12" if sys.version_info < (3, 10) else 0)'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 \
		|| { echo "an environment of $(PYTHON): $(VENV)"; $(PYTHON) -m venv --clear $(VENV); }
	@: >$(LOG)
	@[ -z "$(TORCH_INDEX)" ] || { \
		echo "torch without CUDA, as there is no GPU here (make setup TORCH_INDEX= takes it with CUDA)"; \
		$(PIP) --retries=0 --timeout=15 --no-deps -c constraints.txt --index-url=$(TORCH_INDEX) torch >>$(LOG) 2>&1 \
		|| echo "torch is not to be had from $(TORCH_INDEX): from the usual index, as it is there"; }
	@echo "the project and what it needs, which takes minutes (all that pip says: $(LOG))"
	@$(PIP) -c constraints.txt -e '.[dev,recipes]' $(LOGGED)
	@touch $@
	@echo "done: $(BIN)/gan-refine --help"

demo: setup
	$(BIN)/python -m refine.cli.demo

test: setup
	$(BIN)/python -m pytest -q -n auto --maxprocesses=8 --dist=worksteal

bench: setup
	$(BIN)/python benchmarks/iteration.py

gpu: setup
	$(BIN)/python benchmarks/gpu.py --out=gpu.md

# mypy finds refine.dnnlib and refine.torch_utils where a wheel has them: in one tree, made of links.
lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@rm -rf build/lint && mkdir -p build/lint/refine && ln -s $(CURDIR)/refine/* $(CURDIR)/dnnlib $(CURDIR)/torch_utils build/lint/refine/
	cd build/lint && $(abspath $(BIN))/mypy --config-file=$(CURDIR)/pyproject.toml refine
	$(BIN)/vulture

clean:
	rm -rf $(VENV) build .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
