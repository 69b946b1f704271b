# `make demo` and `make test` do all the set-up by themselves. PYTHON chooses the interpreter the environment is made from.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/ready
OUT ?= build/gpu
CSRC := $(wildcard csrc/*.* csrc/*/*.* csrc/*/*/*.* csrc/*/*/*/*.*)
SOURCES := setup.py pyproject.toml requirements.txt $(filter-out csrc/testing/%,$(CSRC))
# CUDA kernels are compiled for this machine's GPU only, or where there is none for one; `make wheel` takes the default.
GPU = $(firstword $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | \
	sed -n 's/^9\.0$$/90a/p; t; s/^\([89]\|1[0-9]\)\.\([0-9]\)$$/\1\2/p') 80)

PAGE := build/bench/page.json
BLOCKS := criss_cross_attention criss_cross linear_attention linear_attention,kind=channel efficient_attention \
	channelized_axial squeeze_and_attention interlaced_sparse salient_positions non_local non_local,mode=gaussian \
	non_local,mode=dot_product
# What is imported is compiled once, not by every process that a test starts.
export PYTHONDONTWRITEBYTECODE :=
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined -g1 -O1

.PHONY: demo large-map volume segment sparsify test test-avx2 test-all kernels cuda-kernels sanitize bench bench-page bench-check gpu wheel sdist hub docs lint format clean

demo: $(READY)  ## denoise a photograph; ARGS="--size 256 my.jpg" passes options
	$(RUN) examples/denoise.py $(ARGS)

large-map: $(READY)  ## denoise a photograph whose maps are split over 2 processes; ARGS="photo.jpg --out large.png" passes options
	$(RUN) -m torch.distributed.run --standalone --nproc-per-node 2 examples/large_map.py $(ARGS)

volume: $(READY)  ## denoise a volume, at once and slice by slice; ARGS="brain.nii.gz --size 24 64 64" passes options
	$(RUN) examples/denoise_volume.py $(ARGS)

segment: $(READY)  ## train a segmentation network on made pictures; ARGS="--block criss_cross --steps 200" passes options
	$(RUN) -m examples.segmentation.train --overwrite $(ARGS)

sparsify: $(READY)  ## train a vision transformer with dense attention, fine-tune it to sparse; ARGS="--steps 500" passes options
	$(RUN) examples/sparsify.py $(ARGS)

test: $(READY)  ## everything that must pass, in minutes
	$(RUN) -m pytest -n auto --maxprocesses 8 --dist loadgroup -m "not slow" $(ARGS)

test-avx2: $(READY)  ## a slice of it as on a machine without AVX-512: scores and their comparison, under a minute
	OPENBLAS_CORETYPE=Haswell ATEN_CPU_CAPABILITY=avx2 ASA_OPS_CPU_ISA=avx2 $(RUN) -m pytest -n auto --maxprocesses 8 -m "not slow" \
		-k "(equals_reference or equals_the_reference or large_scores or any_blocks) and (triton or float32)" \
		tests/asa/test_triton.py tests/asa/test_implementations.py tests/criss_cross tests/blocks $(ARGS)

test-all: $(READY)  ## also what is slow
	$(RUN) -m pytest -n auto --maxprocesses 8 --dist loadgroup $(ARGS)

kernels:  ## compile every Triton kernel without a GPU and hold it to its budget, with PYTHON's triton (default: .venv's)
	@$(if $(filter file,$(origin PYTHON)),$(MAKE) --no-print-directory $(READY))
	$(if $(filter file,$(origin PYTHON)),$(RUN),$(PYTHON)) -m bench.triton.budget $(ARGS)

cuda-kernels: $(READY)  ## the same for the CUDA kernels with nvcc, in minutes; ARGS="--archs 90a --sources hopper/sums"
	$(RUN) -m bench.cuda.budget $(ARGS)

sanitize: $(READY)  ## the tests of the C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer
	rm -rf build/sanitize
	ASA_OPS_NO_CUDA=1 CXXFLAGS="$(SANITIZE)" CFLAGS="$(SANITIZE)" LDFLAGS="$(SANITIZE)" $(RUN) -m pip install --quiet --disable-pip-version-check \
		--no-build-isolation --no-deps --target build/sanitize .
	cd build/sanitize && PYTHONPATH=. LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0 ../../$(RUN) -m pytest --capture=sys -p no:cacheprovider -o pythonpath=tests \
		-m "not slow" -k "cpu and not thread and not repeats" ../../tests/asa/test_cpu.py \
		../../tests/asa/test_implementations.py ../../tests/criss_cross

bench: $(READY)  ## what ASA costs beside dense attention and other peers, a page in build/bench, minutes; ARGS="--size 97x97"
	@mkdir -p build/bench
	$(RUN) -m bench.run --out build/bench/results.json $(ARGS)
	$(RUN) -m bench.run --add --out build/bench/results.json --sweep calls --peers "sdpa flash" --rounds 25
	$(RUN) -m bench.report build/bench/results.json --folder build/bench

bench-page: $(READY)  ## the page of this machine in bench/results, scaling and the other blocks included, most of an hour
	@mkdir -p build/bench
	rm -f $(PAGE)
	$(RUN) -m bench.run --add --out $(PAGE) --sweep tokens survivors dim
	$(RUN) -m bench.run --add --out $(PAGE) --sweep calls --peers "sdpa flash" --rounds 25
	$(RUN) -m bench.run --add --out $(PAGE) --dim 64 256
	$(RUN) -m bench.run --add --out $(PAGE) --dim 64 256 --inputs dense --mode fwd fwd+bwd --peers "sdpa flash"
	$(RUN) -m bench.run --add --out $(PAGE) --size 97x97 --dim 64 256 --inputs photo labels near-dense \
		--peers "sdpa flash" eager --rounds 5
	$(RUN) -m bench.run --add --out $(PAGE) --op $(BLOCKS) --dim 512 --rounds 5
	$(RUN) -m bench.report $(PAGE)

bench-check: $(READY)  ## a minute: has a ratio to dense attention moved by more than its spread since the page was made?
	$(RUN) -m bench.check $(ARGS)

gpu:  ## on a CUDA machine, with its own Python: tests, timings, profiles, 5 minutes a call, which goes on; OUT=folder, KEEP=1
	$(PYTHON) -m bench.gpu --out $(OUT) $(if $(KEEP),--keep) $(ARGS)

wheel: $(READY)  ## one manylinux wheel for CPU and GPU, every Python and torch that pyproject.toml allows, in dist, and its audit
	rm -rf dist build/lib* build/wheel build/linux
	LDFLAGS="$$($(RUN) release/manylinux.py build/manylinux)" ASA_OPS_REQUIRE_EXT=1 $(RUN) -m pip wheel --quiet \
		--disable-pip-version-check --no-build-isolation --no-deps --wheel-dir build/linux .
	PATH="$(VENV)/bin:$$PATH" $(RUN) -m auditwheel repair --only-plat --plat manylinux_2_28_$$(uname -m) \
		--exclude "libtorch*" --exclude "libc10*" --wheel-dir dist build/linux/*.whl
	$(RUN) -m abi3audit --strict --summary dist/*.whl
	@$(RUN) -m zipfile -e dist/*.whl build/wheel
	@du -h dist/*.whl build/wheel/asa_ops/_C.abi3.so
	@$(RUN) -c 'import torch; torch.ops.load_library("build/wheel/asa_ops/_C.abi3.so"); print("CUDA architectures:", torch.ops.asa_ops.cuda_architectures() or "none")'

sdist: $(READY)  ## a source archive in dist
	$(RUN) -c 'from setuptools import build_meta; print(build_meta.build_sdist("dist"))'

hub: $(READY)  ## the package as Hugging Face's kernels loads it, in build/hub, its audit, and a call of it
	$(RUN) release/hub.py build/hub

lint: $(READY)  ## style and types, under a minute
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(CSRC)

format: $(READY)
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .
	$(VENV)/bin/clang-format -i $(CSRC)

docs: build/docs-venv/ready  ## the site of the documentation, in build/docs; a warning is an error
	build/docs-venv/bin/python -m sphinx -W --keep-going -q -c docs -d build/docs-cache . build/docs

build/docs-venv/ready: docs/requirements.txt
	$(PYTHON) -m venv build/docs-venv
	build/docs-venv/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info asa_ops/*.so

$(READY): $(SOURCES)
	@command -v $(PYTHON) >/dev/null || { echo "asa_ops: $(PYTHON) not found: install Python >= 3.10, or name one: make PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "asa_ops: needs Python >= 3.10, $(PYTHON) is $$($(PYTHON) -V 2>&1): make PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "asa_ops: $(PYTHON) cannot make virtual environments: install python3-venv (Debian: apt install python3-venv)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-compile -r requirements.txt
	ASA_OPS_CUDA_ARCHS="$${ASA_OPS_CUDA_ARCHS:-$(GPU)}" $(RUN) -m pip install --quiet --disable-pip-version-check \
		--no-build-isolation --no-deps --editable .
	@$(RUN) -c 'import asa_ops.core.extension as e; e.WHY_MISSING and print("asa_ops:", e.WHY_MISSING)'
	@$(RUN) -c 'import pathlib, sysconfig; pathlib.Path(sysconfig.get_path("include"), "Python.h").exists() or print("asa_ops: Python.h not found: torch.compile cannot build for the CPU, its test is skipped (Debian: apt install python3-dev)")'
	@touch $@
