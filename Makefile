# The verbs of the README. Each can be repeated.
TORCH ?= torch==2.13.0
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-all coverage lint docs serve-docs notebook tables bench bench-reversible bench-cpu bench-memory \
	bench-pipelines bench-gradients bench-peers bench-noise bench-guides bench-scaling \
	plots pictures sanitize dist test-dist test-oldest compile-variants install-gpu test-gpu-first \
	test-gpu bench-gpu clean

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

# The site, into build/site; a warning is an error, and links are checked. Or as a server that shows
# changes while one writes. The variable silences a word of its theme about another project.
MKDOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs
docs: $(VENV)/.documented
	$(MKDOCS) build

serve-docs: $(VENV)/.documented
	$(MKDOCS) serve

# The first guide as a notebook, executed.
notebook: $(VENV)/.documented
	$(BIN)/python docs/site/notebook.py

tables: $(VENV)/.tested
	$(BIN)/python -m gradsampler.app.tables docs/solvers.md
	PYTHONPATH=tests $(BIN)/python -m support.tables docs/diffusers.md

bench: $(VENV)/.tested
	PYTHONPATH=benchmarks $(BIN)/python benchmarks/main_job.py
	PYTHONPATH=benchmarks $(BIN)/python benchmarks/calls.py

bench-reversible: $(VENV)/.tested
	PYTHONPATH=benchmarks $(BIN)/python benchmarks/reversible.py

bench-cpu: $(VENV)/.tested
	PYTHONPATH=benchmarks $(BIN)/python benchmarks/step_cpu.py

bench-pipelines: $(VENV)/.tested
	PYTHONPATH=benchmarks $(BIN)/python benchmarks/pipelines.py

bench-memory: $(VENV)/.tested
	PYTHONPATH=benchmarks $(BIN)/python benchmarks/memory.py

# Gradients beside those of k-diffusion and diffusers: the table and picture of the page about it.
bench-gradients: $(VENV)/.tested
	PYTHONPATH=benchmarks:tests $(BIN)/python benchmarks/gradients_compared.py \
		--page docs/gradients-compared.md --picture docs/pictures/gradients-compared.png
# Beside what is used without us, in an environment of its own. k-diffusion's sampling functions need none of
# torchvision, wandb and others that it asks for, so these are not installed. CORES is what the rows say.
PEERS := build/peers
CORES ?= quiet cores
bench-peers: $(PEERS)/.installed
	PYTHONPATH=benchmarks $(PEERS)/bin/python -m peers --cores "$(CORES)"

$(PEERS)/.installed: pyproject.toml benchmarks/peers/requirements.txt
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet "$(TORCH)"
	$(PEERS)/bin/python -m pip install --quiet ".[diffusers]" -r benchmarks/peers/requirements.txt
	$(PEERS)/bin/python -m pip install --quiet --no-deps "k-diffusion==0.1.1.post1"
	touch $@

bench-noise: $(VENV)/.tested
	PYTHONPATH=benchmarks $(BIN)/python benchmarks/which_noise.py --cores "$(CORES)"

bench-guides: $(VENV)/.tested
	PYTHONPATH=benchmarks $(BIN)/python benchmarks/purifier.py --cores "$(CORES)"
	PYTHONPATH=benchmarks $(BIN)/python benchmarks/inverse_problems.py --cores "$(CORES)"

bench-scaling: $(VENV)/.tested
	PYTHONPATH=benchmarks $(BIN)/python benchmarks/scaling.py --cores "$(CORES)"

# Pictures of docs/: of rows alone, and those that the guides' scripts draw.
plots: $(VENV)/.tested
	PYTHONPATH=benchmarks $(BIN)/python benchmarks/plots.py
	PYTHONPATH=benchmarks $(BIN)/python benchmarks/figures.py

pictures: plots
	$(BIN)/gradsampler optimize --starts 8 --out build/demo
	cp build/demo/digit.png docs/pictures/main-job.png
	for script in your_own_network fine_tuning which_solver; do \
		$(BIN)/python examples/$$script.py --out docs/pictures || exit 1; \
	done
	$(BIN)/python examples/wrong_gradients.py --out docs/pictures/wrong-gradients.png

# Without isolation: the extension is built against the torch of this environment.
dist: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet build ninja "setuptools>=77.0.1"
	rm -rf dist
	GRADSAMPLER_REQUIRE_EXT=1 $(BIN)/python -m build --no-isolation

# Both files in an empty environment of each Python that is here.
PYTHONS ?=
test-dist: dist
	$(PYTHON) tests/installed.py $(PYTHONS) --torch "$(TORCH)"

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

# The oldest versions that pyproject.toml promises, in an environment of their own: the extension built
# against that torch, with CUDA where nvcc is; the quick tests, and all of the kernels'; every variant of
# the kernels that these launch compiled by that Triton, for GPUs that need not be here. Appends rows to
# benchmarks/results/.
OLDEST := build/oldest
test-oldest: $(OLDEST)/.installed
	PYTHONPATH=benchmarks $(OLDEST)/bin/python benchmarks/oldest.py

$(OLDEST)/.installed: pyproject.toml tests/oldest_versions.py
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet $$($(PYTHON) tests/oldest_versions.py)
	touch $@

# The Triton part alone: what the last tests under GRADSAMPLER_VARIANTS=build/variants launched.
OLDEST_TRITON := build/triton-oldest
compile-variants: $(VENV)/.tested $(OLDEST_TRITON)/.installed
	PYTHONPATH=tests:$(OLDEST_TRITON) TRITON_CACHE_DIR=build/triton-cache \
		$(BIN)/python tests/compile_variants.py build/variants

$(OLDEST_TRITON)/.installed: pyproject.toml tests/oldest_versions.py
	rm -rf $(OLDEST_TRITON)
	$(BIN)/python -m pip install --quiet --no-deps --target $(OLDEST_TRITON) \
		$$($(PYTHON) tests/oldest_versions.py triton)
	touch $@

# What follows uses the python on the PATH, with its own torch and Triton, and no network. The extension
# has to build, for the card that is here alone. To begin with: test-gpu-first, in under four minutes.
CARD := import torch; print("%d.%d" % torch.cuda.get_device_capability())
PARALLEL := import importlib.util, os; \
	print("-n %d" % min(16, os.cpu_count()) if importlib.util.find_spec("xdist") else "")
# The packages of that python may warn as they please; our own warnings stay errors.
ON_GPU = $(PYTHON) -m pytest $$($(PYTHON) -c '$(PARALLEL)') \
	-W default::DeprecationWarning -W default::FutureWarning
KERNEL_TESTS := tests/test_kernel_step.py tests/test_kernel_ancestral.py \
	tests/test_kernel_flow_pair.py tests/test_kernel_leap.py

install-gpu:
	card=$$($(PYTHON) -c '$(CARD)') && GRADSAMPLER_REQUIRE_EXT=1 TORCH_CUDA_ARCH_LIST=$$card \
		$(PYTHON) -m pip install --quiet --no-build-isolation --no-deps --editable .

test-gpu-first: install-gpu
	$(PYTHON) -m gradsampler doctor
	$(ON_GPU) -m "not thorough and not slow" $(KERNEL_TESTS)

test-gpu: install-gpu
	$(ON_GPU) $(KERNEL_TESTS) tests/test_kernel_budget.py tests/test_native_step.py \
		tests/test_native_pairs.py tests/test_native_leap.py tests/test_native_half.py \
		tests/test_native_sample.py tests/test_torch_library.py tests/test_backends.py \
		tests/test_philox.py tests/test_strategies.py tests/test_composition.py tests/test_auto.py

OUT ?= benchmarks/results
SECTIONS ?=
bench-gpu: install-gpu
	PYTHONPATH=benchmarks $(PYTHON) benchmarks/gpu.py $(SECTIONS) --out $(OUT)

clean:
	rm -rf $(VENV) build demo *.egg-info

# torch comes first, so that no other package pulls a build of its own choice.
$(VENV)/.installed: pyproject.toml setup.py Makefile $(wildcard csrc/*.* csrc/*/*.*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.documented: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable ".[docs]"
	touch $@

# Of k-diffusion two modules alone are loaded, so that its dependencies are not needed.
$(VENV)/.tested: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	$(BIN)/python -m pip install --quiet --no-deps k-diffusion==0.1.1.post1
	touch $@
