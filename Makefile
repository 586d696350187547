# The verbs of the README. Each can be repeated.
TORCH ?= torch==2.13.0
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-all coverage lint bench bench-reversible bench-cpu bench-memory sanitize dist test-gpu bench-gpu clean

demo: $(VENV)/.installed
	$(BIN)/gradsampler optimize --out demo

# Every behaviour in three minutes on two cores. Which tests cost too much for that was measured; the
# marker `thorough` says so.
test: $(VENV)/.tested
	$(BIN)/python -m pytest -n 2 -m "not thorough and not slow"

test-all: test
	$(BIN)/python -m pytest -n 2 -m "thorough and not slow"

# Line coverage of `make test` and of `make test-all`, and their times; appends rows to
# benchmarks/results/.
coverage: $(VENV)/.tested
	PYTHONPATH=benchmarks $(BIN)/python benchmarks/tiers.py

lint: $(VENV)/.tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.tested
	PYTHONPATH=benchmarks $(BIN)/python benchmarks/main_job.py

bench-reversible: $(VENV)/.tested
	PYTHONPATH=benchmarks $(BIN)/python benchmarks/reversible.py

bench-cpu: $(VENV)/.tested
	PYTHONPATH=benchmarks $(BIN)/python benchmarks/step_cpu.py

bench-memory: $(VENV)/.tested
	PYTHONPATH=benchmarks $(BIN)/python benchmarks/memory.py

# Without isolation: the extension is built against the torch of this environment.
dist: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet build ninja "setuptools>=77.0.1"
	GRADSAMPLER_REQUIRE_EXT=1 $(BIN)/python -m build --no-isolation

# The extension's tests under AddressSanitizer and UBSan, in a copy of the tree: the build here stays.
# ThreadSanitizer sees only what it compiled: torch's threads would all look like races to it. So the
# loops run on threads of csrc/tests/threads.cpp, and torch's own pool, the GIL and the bindings stay
# unseen; of stores around the cache, which are intrinsics, it sees none, but their results are compared.
SANITIZED := build/sanitized
sanitize: $(VENV)/.tested
	rm -rf $(SANITIZED)
	mkdir -p $(SANITIZED)
	tar -c --exclude='*.so' --exclude=__pycache__ setup.py pyproject.toml README.md LICENSE csrc \
		gradsampler kernels tests | tar -x -C $(SANITIZED)
	cd $(SANITIZED) && GRADSAMPLER_REQUIRE_EXT=1 GRADSAMPLER_CXXFLAGS="-fsanitize=address,undefined \
		-fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1" \
		$(CURDIR)/$(BIN)/python setup.py -q build_ext --inplace --force
	cd $(SANITIZED) && LD_PRELOAD="$(foreach n,asan ubsan stdc++,$(shell g++ -print-file-name=lib$n.so))" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=. \
		$(CURDIR)/$(BIN)/python -m pytest tests/test_native_step.py tests/test_native_pairs.py \
		tests/test_native_leap.py tests/test_native_half.py tests/test_native_runtime.py
	cd $(SANITIZED) && g++ -std=c++20 -O1 -g1 -Wall -fsanitize=thread $$($(CURDIR)/$(BIN)/python -c \
		"from torch.utils.cpp_extension import include_paths as i; print(*('-I' + p for p in i()))") \
		csrc/tests/threads.cpp csrc/cpu/*.cpp -o threads && ./threads

# These two use the python on the PATH, with its own torch and Triton, and no network.
test-gpu:
	$(PYTHON) -m pip install --quiet --no-build-isolation --no-deps --editable .
	$(PYTHON) -m pytest tests/test_kernel_step.py tests/test_kernel_ancestral.py \
		tests/test_kernel_flow_pair.py tests/test_kernel_leap.py tests/test_torch_library.py \
		tests/test_backends.py tests/test_philox.py tests/test_strategies.py \
		tests/test_composition.py tests/test_auto.py

bench-gpu:
	$(PYTHON) -m pip install --quiet --no-build-isolation --no-deps --editable .
	PYTHONPATH=benchmarks $(PYTHON) benchmarks/gpu.py

clean:
	rm -rf $(VENV) build demo *.egg-info

# torch comes first, so that no other package pulls a build of its own choice.
$(VENV)/.installed: pyproject.toml setup.py Makefile $(wildcard csrc/*.* csrc/*/*.*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.tested: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	touch $@
