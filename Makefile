# Everything from nothing but Python >= 3.10, a C++ compiler and pip. PYTHON picks the interpreter.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
# What is imported is compiled then, and once: all of torch and transformers would take half a minute. Images of containers
# often say that nothing is to be kept, and each of the processes that tests start would compile torch anew.
unexport PYTHONDONTWRITEBYTECODE
PIP_INSTALL := $(PY) -m pip install -q --no-compile
JOBS ?= $(shell nproc)
# Without an NVIDIA GPU a plain `torch` would bring gigabytes of CUDA packages.
TORCH ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && echo torch || echo torch==2.13.0)
# Compiles kernels/*.cu for every card, without one, and has cuda.h; 76 MB. A torch for CUDA has all but cuda-core.
NVRTC := 'cuda-core>=1.0' 'cuda-bindings>=12.9' 'nvidia-cuda-nvrtc>=12.9' 'nvidia-cuda-runtime>=13'
SOURCES := pyproject.toml CMakeLists.txt $(shell find csrc kernels python -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu' -o -name '*.py' -o -name '*.pyi')

.PHONY: demo test compat ecosystem lint sanitize test-aarch64 test-card soak bench install gpu-build gpu-test gpu-sanitize \
        gpu-acceptance clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(VENV)/bin/offload train --check

# Two processes, a core each: threads of torch's own would wait for each other. What a test counts or holds is its own
# process's.
TEST_WORKERS ?= 2
test: $(VENV)/.installed
	OFFLOAD_POISON=1 OMP_NUM_THREADS=1 $(PY) -m pytest -n $(TEST_WORKERS) --dist worksteal tests

# Beside DeepSpeed itself, which brings packages of its own: in an environment of its own.
COMPAT_VENV ?= .venv-compat
DEEPSPEED ?= deepspeed==0.19.8

compat: $(COMPAT_VENV)/.installed
	$(COMPAT_VENV)/bin/python -m pytest tests/compat

$(COMPAT_VENV)/.tools:
	$(PYTHON) -m venv $(COMPAT_VENV)
	$(COMPAT_VENV)/bin/python -m pip install -q --upgrade pip
	$(COMPAT_VENV)/bin/python -m pip install -q $(TORCH) numpy
	$(COMPAT_VENV)/bin/python -m pip install -q '$(DEEPSPEED)' 'scikit-build-core>=0.10' 'pybind11>=2.13' ninja \
	  'cmake>=3.22' 'pytest>=8' 'pytest-timeout>=2.3'
	touch $@

$(COMPAT_VENV)/.installed: $(COMPAT_VENV)/.tools $(SOURCES)
	$(COMPAT_VENV)/bin/python -m pip install -q --no-build-isolation --no-deps .
	touch $@

# In the hands of frameworks that `make test` does without, in an environment of its own: about 700 MB.
ECOSYSTEM_VENV ?= .venv-ecosystem

ecosystem: $(ECOSYSTEM_VENV)/.installed
	OFFLOAD_POISON=1 OMP_WAIT_POLICY=PASSIVE GOMP_SPINCOUNT=0 $(ECOSYSTEM_VENV)/bin/python -m pytest -n $(TEST_WORKERS) \
	  --dist worksteal tests/ecosystem

# The versions of the last run. timm and sentence-transformers ask for the newest torch through packages that no test
# needs, so those they do need are named.
$(ECOSYSTEM_VENV)/.tools: tests/ecosystem/requirements.txt
	$(PYTHON) -m venv $(ECOSYSTEM_VENV)
	$(ECOSYSTEM_VENV)/bin/python -m pip install -q --upgrade pip
	$(ECOSYSTEM_VENV)/bin/python -m pip install -q $(TORCH) numpy
	$(ECOSYSTEM_VENV)/bin/python -m pip install -q $(TORCH) -r tests/ecosystem/requirements.txt
	$(ECOSYSTEM_VENV)/bin/python -m pip install -q --no-deps timm==1.0.31 sentence-transformers==6.2.0
	touch $@

$(ECOSYSTEM_VENV)/.installed: $(ECOSYSTEM_VENV)/.tools $(SOURCES)
	$(ECOSYSTEM_VENV)/bin/python -m pip install -q --no-build-isolation --no-deps .
	touch $@

lint: $(VENV)/.tools
	$(VENV)/bin/ruff check python tests examples benches
	$(VENV)/bin/ruff format --check python tests examples benches
	$(VENV)/bin/mypy
	find csrc kernels tests/csrc tests/driver_double tests/host_kernels tests/torch_double -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu' | xargs $(VENV)/bin/clang-format --dry-run --Werror
	$(PY) -m pytest -q -p no:cacheprovider tests/layout

# The native tests under AddressSanitizer + UndefinedBehaviorSanitizer, then under ThreadSanitizer.
sanitize: $(VENV)/.tools
	for kind in address,undefined thread; do \
	  build=build/sanitize-$${kind%,*}; \
	  cmake -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(VENV))/bin/ninja -S . -B $$build -DCMAKE_BUILD_TYPE=RelWithDebInfo \
	    -DOFFLOAD_BUILD_PYTHON=OFF -DOFFLOAD_BUILD_TESTS=ON -DOFFLOAD_SANITIZE=$$kind && \
	  cmake --build $$build -j $(JOBS) && \
	  TSAN_OPTIONS=suppressions=$(abspath tests/csrc/tsan.supp) ctest --test-dir $$build --output-on-failure || exit 1; \
	done

# The tests of a card where there is none, on a device of torch in host memory: its extension takes a minute to compile,
# all of them eight on two cores. CARD_TESTS= takes files and folders.
CARD_TESTS ?= tests/python tests/torch_double/watching.py tests/torch_double/benches.py
test-card: $(VENV)/.installed
	OFFLOAD_POISON=1 OMP_NUM_THREADS=1 $(PY) tests/torch_double -q -n $(TEST_WORKERS) --dist worksteal $(CARD_TESTS)

# What has a body or an instruction of its own on aarch64, cross-compiled and run by qemu, as a CPU without SVE and with
# SVE of each width that has a body.
AARCH64 := aarch64-linux-gnu

test-aarch64: $(VENV)/.tools
	@command -v $(AARCH64)-g++ && command -v qemu-aarch64 || \
	  { echo "needs Debian's packages g++-aarch64-linux-gnu and qemu-user, or their like: apt-get install both"; exit 1; }
	cmake -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(VENV))/bin/ninja -S . -B build/aarch64 -DCMAKE_BUILD_TYPE=Release \
	  -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=$(AARCH64)-g++ \
	  -DCMAKE_CROSSCOMPILING_EMULATOR='qemu-aarch64;-L;/usr/$(AARCH64)' \
	  -DOFFLOAD_BUILD_PYTHON=OFF -DOFFLOAD_BUILD_TESTS=ON
	cmake --build build/aarch64 -j $(JOBS)
	run() { QEMU_CPU=max,$$1 EXPECTED_ISAS="$$2" \
	  ctest --test-dir build/aarch64 --output-on-failure -R '^(update|update_digest|block_file)_test$$'; }; \
	run sve=off 'scalar neon' && run sve128=on 'scalar sve128 neon' && run sve256=on 'scalar neon sve256' && \
	run sve512=on 'scalar neon sve512'
	AARCH64_OBJECTS=build/aarch64/CMakeFiles/offload_core.dir/csrc/optimizer \
	  $(PY) -m pytest -q -p no:cacheprovider -k 'cross_compiled or sve_registers' tests/python/test_isa_objects.py

# Memory, threads, files and objects must not grow over so many steps; about 4 ms a step.
STEPS ?= 10000
soak: $(VENV)/.installed
	OFFLOAD_POISON=1 $(PY) tests/soak.py $(STEPS)

bench: $(VENV)/.installed
	$(VENV)/bin/offload bench all

install: $(VENV)/.installed

# For a machine with an NVIDIA card, without a network: PYTHON has torch, pytest, scikit-build-core, pybind11, cmake and
# ninja already. Tests that need hypothesis, transformers and the like are skipped by that name where those are missing;
# without cuda-core those of the kernels fail. REQUIRE_GPU=0 runs the same on the CPU.
REQUIRE_GPU ?= 1
# Processes that share the card: one after the other the tests of both devices would not end within 8 minutes. Each takes
# whole files, whose fixtures may be dear.
GPU_TEST_WORKERS ?= $(shell n=$$(($(JOBS) / 2)); echo $$((n > 8 ? 8 : n < 1 ? 1 : n)))
GPU_SITE := $(abspath build/gpu-site)
# Packages that somebody has brought along stay where they are.
GPU_PATH := $(GPU_SITE)$(if $(PYTHONPATH),:$(PYTHONPATH))
GPU_TESTS ?= tests
on_gpu = PYTHONPATH=$(GPU_PATH) OFFLOAD_POISON=1 OMP_WAIT_POLICY=PASSIVE GOMP_SPINCOUNT=0 \
  $(if $(filter 0,$(REQUIRE_GPU)),,OFFLOAD_REQUIRE_GPU=1)

gpu-build:
	$(if $(filter 0,$(REQUIRE_GPU)),,$(PYTHON) benches/require_gpu.py)
	$(PYTHON) -m pip install -q --no-index --no-build-isolation --no-deps --upgrade --target $(GPU_SITE) .

# Stopped, as by Ctrl-C, when it takes 8 minutes; what runs on the card comes first. GPU_TESTS= takes files and folders. In
# parts of which none is repeated: make gpu-acceptance FLAGS="--sections tests".
gpu-test: gpu-build
	@$(PYTHON) -c 'import xdist' 2>/dev/null || echo 'pytest-xdist is missing: in one process 8 minutes will not do for all'
	$(on_gpu) timeout --foreground --signal=INT --kill-after=15 480 $(PYTHON) -m pytest --skip-missing \
	  $$($(PYTHON) -c 'import xdist; print("-n", $(GPU_TEST_WORKERS), "--dist loadfile")' 2>/dev/null) $(GPU_TESTS)

# The kernels' tests under NVIDIA's memory checker and race checker, every tensor in an allocation of its own. Calls that
# torch makes to see what a driver can do, and that fail, are no errors.
KERNEL_TESTS := $(addprefix tests/python/test_,kernels.py kernels_small_states.py activation_format.py)

gpu-sanitize: gpu-build
	@checker=$$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null) || \
	  { echo "needs NVIDIA's compute-sanitizer, of the CUDA toolkit, on PATH"; exit 1; }; \
	for tool in memcheck racecheck; do \
	  echo "compute-sanitizer $$tool"; \
	  $(on_gpu) PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout --foreground --signal=INT --kill-after=15 280 \
	    $$checker --tool $$tool --report-api-errors no --error-exitcode 1 \
	    $(PYTHON) -m pytest -q -p no:cacheprovider -k cuda --skip-missing $(KERNEL_TESTS) || exit 1; \
	done

# The tests and every bench into one JSON; FLAGS="--quick --sections train,peers". Call again until it says that all is done.
gpu-acceptance: gpu-build
	PYTHONPATH=$(GPU_PATH) $(PYTHON) benches/gpu_acceptance.py --device $(if $(filter 0,$(REQUIRE_GPU)),cpu,cuda) $(FLAGS)

$(VENV)/.base:
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) --upgrade pip
	$(PIP_INSTALL) $(TORCH) numpy
	touch $@

$(VENV)/.tools: $(VENV)/.base pyproject.toml
	$(PIP_INSTALL) 'scikit-build-core>=0.10' 'pybind11>=2.13' ninja 'cmake>=3.22' 'pytest>=8' 'pytest-timeout>=2.3' \
	  'pytest-xdist>=3.5' 'hypothesis>=6.100' 'transformers>=4.57' 'accelerate>=1.10' 'peft>=0.17' 'hjson>=3.1' 'ruff>=0.15' 'mypy>=1.11' 'clang-format>=18' $(NVRTC)
	touch $@

$(VENV)/.installed: $(VENV)/.tools $(SOURCES)
	$(PIP_INSTALL) --no-build-isolation --no-deps .
	touch $@

clean:
	rm -rf $(VENV) $(COMPAT_VENV) $(ECOSYSTEM_VENV) build dist
