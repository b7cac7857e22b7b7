# Everything a user or a developer runs. Needs only Python >= 3.11, make and git: the rest goes into .venv.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
DATA   ?=
OUT    ?= demo_output
PATIENTS ?=
RECIPE ?=
BENCH  ?= runs/bench
# Test processes. Each takes its share of the cores, and as many threads (tests/conftest.py): nobody sets any.
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest -n $(WORKERS)
# Without byte-code, which containers like to switch off, every process compiles the package anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install demo starter test test-full lint docs bench clean

# Byte-code of the rest is made here, on every core, where pip would use one; of these, few files are ever imported.
COMPILED_LATER := /tests?/|/transformers/models/|/site-packages/(fhir|pip|setuptools|fontTools|babel|networkx)/
# constraints.txt pins every version; without it torch's default build brings gigabytes of CUDA libraries.
# The kernels are compiled by the installation, so a change of theirs asks for it again.
KERNELS := hatch_build.py ehrseq/kernels/build_library.py $(wildcard ehrseq/kernels/csrc/*)

$(VENV)/.installed: pyproject.toml constraints.txt $(KERNELS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade --constraint constraints.txt pip # an old one takes twice as long for the rest
	$(PIP) install --quiet --no-compile --constraint constraints.txt --editable ".[dev]"
	$(BIN)/python -P tests/modeling/fetch_upstream.py & $(BIN)/python -P tests/modeling/fetch_tools.py & \
	$(BIN)/python -m compileall -qq -j 0 -x '$(COMPILED_LATER)' $(VENV)/lib; wait
	touch $@

install: $(VENV)/.installed

demo: install
	$(BIN)/ehrseq demo --output $(OUT) $(if $(DATA),--data $(DATA)) $(if $(PATIENTS),--patients $(PATIENTS)) $(if $(RECIPE),--recipe $(RECIPE))

test: install
	$(PYTEST) -m "not slow" --durations=15

test-full: install
	$(PYTEST) --hypothesis-profile=full --durations=30

# The checkpoints that come with the package (ehrseq/hub/starter, starter_forecast): a quarter of an hour on two cores.
starter: install
	$(BIN)/ehrseq demo --output build/starter
	$(BIN)/ehrseq train build/starter/dataset --out build/starter/forecaster --recipe demo_forecast
	$(BIN)/python -P -m ehrseq.hub.starter build/starter/checkpoint build/starter/forecaster/pretrained

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: install # build/site/index.html, to be read as files or served; needs no network
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

bench: install
	$(BIN)/python -m benchmarks.speed.bench_import --output $(BENCH)/import.json
	$(BIN)/python -m benchmarks.speed.bench_fhir --output $(BENCH)/fhir.json
	$(BIN)/python -m benchmarks.speed.bench_prepare --output $(BENCH)/prepare.json
	$(BIN)/python -m benchmarks.speed.bench_tokenizer --output $(BENCH)/tokenizer.json
	$(BIN)/python -m benchmarks.speed.bench_scan --output $(BENCH)/scan.json
	$(BIN)/python -m benchmarks.tables.mamba_table --output $(BENCH)
	$(BIN)/python -m benchmarks.speed.bench_hymate --output $(BENCH)/hymate.json
	$(BIN)/python -m benchmarks.speed.bench_encode --output $(BENCH)/encode.json
	$(BIN)/python -m benchmarks.speed.bench_evaluation --output $(BENCH)/evaluation.json
	$(BIN)/python -m benchmarks.speed.bench_context --output $(BENCH)/context.json
	$(BIN)/python -m benchmarks.tables.bench_learning --output $(BENCH)/learning

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
