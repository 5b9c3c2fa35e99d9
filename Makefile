# make demo · make lab · make test · make bench; each sets up .venv by itself, once.
# make test-lowest tests the lowest versions that pyproject.toml declares, in .venv-lowest; it is not part of make test.
# make offline builds a folder that installs without a network: PLATFORMS="linux-x86_64 windows-amd64" PYTHONS="3.11 3.12"
PYTHON ?= python3
BIN := .venv/bin
CPU_WHEELS := https://download.pytorch.org/whl/cpu
BOX ?= build/offline
PINS = constraints.txt
TORCH = $(shell sed -n 's/^torch==//p' $(PINS))

check_python = $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "lorabook needs Python 3.11 or newer: make PYTHON=python3.12 …"; exit 1; }

.PHONY: demo lab test test-lowest bench offline clean

demo: .venv/ready
	$(BIN)/python -m lorabook demo

lab: .venv/ready
	$(BIN)/jupyter lab notebooks/00_start_here.ipynb

test: .venv/ready
	$(BIN)/ruff check .
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 3 --dist worksteal -m "not browser" tests
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m browser -rs tests/browser
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --nbval-lax --nbval-current-env --nbval-cell-timeout=900 notebooks

test-lowest: .venv-lowest/ready
	OMP_NUM_THREADS=1 .venv-lowest/bin/pytest -n 2 --dist worksteal tests --ignore tests/browser --ignore tests/notebooks \
		--ignore tests/test_stock_images.py --ignore tests/test_offline.py

bench: .venv/ready
	for script in benchmarks/*.py; do $(BIN)/python $$script || exit 1; done

offline:
	@$(check_python)
	@$(PYTHON) .ci/offline/box.py "$(BOX)" --platforms "$(PLATFORMS)" --pythons "$(PYTHONS)" --cpu-wheels $(CPU_WHEELS)

clean:
	rm -rf .venv .venv-lowest .venv-widgets7

.venv/ready: constraints.txt
.venv-lowest/ready: PINS = constraints-lowest.txt
.venv-lowest/ready: constraints-lowest.txt
.venv/ready .venv-lowest/ready: pyproject.toml
	@$(check_python)
	$(PYTHON) -m venv $(@D)
	@if command -v nvidia-smi > /dev/null && nvidia-smi > /dev/null 2>&1; then \
		echo "NVIDIA GPU found: installing torch for CUDA"; \
		$(@D)/bin/pip install -q -c $(PINS) torch; \
	else \
		echo "no NVIDIA GPU: installing a CPU build of torch, if one is within reach"; \
		$(@D)/bin/pip install -q --no-deps --retries 1 --timeout 15 --extra-index-url $(CPU_WHEELS) "torch==$(TORCH)+cpu" \
		|| { echo "no CPU build within reach: installing the default build of torch"; $(@D)/bin/pip install -q "torch==$(TORCH)"; }; \
	fi
	$(@D)/bin/pip install -q -c $(PINS) -e ".[notebooks,trackers,dev]"
	@$(@D)/bin/python -c 'import torch; print("torch", torch.__version__)'
	touch $@
