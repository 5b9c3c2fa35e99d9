# make demo · make lab · make test · make bench; each sets up .venv by itself, once.
# make offline builds a folder that installs without a network: PLATFORMS="linux-x86_64 windows-amd64" PYTHONS="3.11 3.12"
PYTHON ?= python3
BIN := .venv/bin
CPU_WHEELS := https://download.pytorch.org/whl/cpu
BOX ?= build/offline
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)

check_python = $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "lorabook needs Python 3.11 or newer: make PYTHON=python3.12 …"; exit 1; }

.PHONY: demo lab test bench offline clean

demo: .venv/ready
	$(BIN)/python -m lorabook demo

lab: .venv/ready
	$(BIN)/jupyter lab notebooks/00_start_here.ipynb

test: .venv/ready
	$(BIN)/ruff check .
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 3 --dist worksteal -m "not browser" tests
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m browser -rs tests/browser
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --nbval-lax --nbval-current-env --nbval-cell-timeout=900 notebooks

bench: .venv/ready
	for script in benchmarks/*.py; do $(BIN)/python $$script || exit 1; done

offline:
	@$(check_python)
	@$(PYTHON) .ci/offline/box.py "$(BOX)" --platforms "$(PLATFORMS)" --pythons "$(PYTHONS)" --cpu-wheels $(CPU_WHEELS)

clean:
	rm -rf .venv .venv-widgets7

.venv/ready: pyproject.toml constraints.txt
	@$(check_python)
	$(PYTHON) -m venv .venv
	@if command -v nvidia-smi > /dev/null && nvidia-smi > /dev/null 2>&1; then \
		echo "NVIDIA GPU found: installing torch for CUDA"; \
		$(BIN)/pip install -q -c constraints.txt torch; \
	else \
		echo "no NVIDIA GPU: installing a CPU build of torch, if one is within reach"; \
		$(BIN)/pip install -q --no-deps --retries 1 --timeout 15 --extra-index-url $(CPU_WHEELS) "torch==$(TORCH)+cpu" \
		|| { echo "no CPU build within reach: installing the default build of torch"; $(BIN)/pip install -q "torch==$(TORCH)"; }; \
	fi
	$(BIN)/pip install -q -c constraints.txt -e ".[notebooks,trackers,dev]"
	@$(BIN)/python -c 'import torch; print("torch", torch.__version__)'
	touch $@
