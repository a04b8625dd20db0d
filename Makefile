# make demo: the whole stack answers questions about bundled pictures.  make test: everything tested.
# make test-fast: the half of the tests that needs no other process, in four minutes.
# make soak: half an hour of mixed load on a whole stack while its parts are killed.
# make test-clients: client programs of others, installed and tried against a whole stack.
# make test-images: what the images install, in environments of their own, from which all runs.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
INSTALLED := .venv/.installed
JOBS ?= 2

.PHONY: demo docs test test-fast test-clients test-images lint serve bench soak measure gpu protos clean programs

demo: $(INSTALLED)
	$(BIN)/opticnerve demo

# JOBS tests at a time, each with one thread; those of one file are never split.
test: $(INSTALLED) programs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(PYTEST_ARGS)

test-fast: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) -m "not slow and not process" $(PYTEST_ARGS)

test-clients: $(INSTALLED)  # ARGS="newest node": only those of tests/clients/table.py.
	$(BIN)/python -m tests.clients.run $(ARGS)

test-images: $(INSTALLED) programs
	$(BIN)/python -m tests.image_environments

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/yamllint deploy

serve: $(INSTALLED)
	$(BIN)/opticnerve up $(ARGS)

bench: $(INSTALLED) programs
	for name in store split engine memory preprocess routing; do $(BIN)/python -m bench.$$name || exit 1; done
	$(BIN)/python -m bench.load --quick

soak: $(INSTALLED) programs  # ARGS="--minutes 3 --seed 5" for less, or for other faults.
	$(BIN)/python -m bench.soak $(ARGS)

measure: $(INSTALLED)  # ARGS="--before COMMIT" adds that commit's figures.
	$(BIN)/python -m bench.measure $(ARGS)

gpu:  # With the machine's own Python where that has torch; else with ours.
	@for python in $(PYTHON) python3; do \
		$$python -c 'import sys, PIL, torch, transformers.utils; assert sys.version_info >= (3, 11)' 2>/dev/null && exec $$python -m bench.gpu $(ARGS); \
	done; $(MAKE) $(INSTALLED) && $(BIN)/python -m bench.gpu $(ARGS)

docs: $(INSTALLED)  # The site, in build/docs.
	$(BIN)/zensical build --strict

protos: $(INSTALLED)
	$(BIN)/python hatch_build.py

programs:
	@sh tests/install_programs.sh

clean:
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache opticnerve/pb/*_pb2*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml constraints.txt hatch_build.py $(wildcard protos/*.proto)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check -q -c constraints.txt -e '.[all,onnx,engine,otel,plan,plot,tensorrt-rtx,dev]'
	touch $@
