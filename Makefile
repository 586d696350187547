# The verbs of the README. Each can be repeated.
TORCH ?= torch==2.13.0
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# The folder kernels/ must not hide an installed package of that name.
export PYTHONSAFEPATH := 1

.PHONY: demo test lint bench test-gpu bench-gpu clean

demo: $(VENV)/.installed
	$(BIN)/gradsampler optimize --out demo

test: $(VENV)/.tested
	$(BIN)/python -m pytest -n 2

lint: $(VENV)/.tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.tested
	PYTHONPATH=benchmarks $(BIN)/python benchmarks/main_job.py

# These two use the python on the PATH, with its own torch and Triton, and no network.
test-gpu:
	$(PYTHON) -m pip install --quiet --no-build-isolation --no-deps --editable .
	$(PYTHON) -m pytest tests/test_kernel_step.py tests/test_kernel_ancestral.py \
		tests/test_kernel_flow_pair.py tests/test_torch_library.py

bench-gpu:
	$(PYTHON) -m pip install --quiet --no-build-isolation --no-deps --editable .
	PYTHONPATH=benchmarks $(PYTHON) benchmarks/gpu.py

clean:
	rm -rf $(VENV) build demo *.egg-info

# torch comes first, so that no other package pulls a build of its own choice.
$(VENV)/.installed: pyproject.toml setup.py Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.tested: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	touch $@
