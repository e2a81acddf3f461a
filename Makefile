# The two commands of the README. Each makes .venv by itself: with uv when it is on the PATH, else with venv and pip.

PYTHON ?= python3
FLEET ?=
BIN := .venv/bin

.PHONY: up check check-training clean

up: .venv/.up
	@exec $(BIN)/waterline up $(FLEET)

check: .venv/.check
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	@# Two cores: one looks at types, and both compile the rehearsal, once for all tests.
	@$(BIN)/python tools/compile_rehearsal.py alone logged & compiles=$$!; \
	$(BIN)/mypy && $(BIN)/lint-imports && $(BIN)/python tools/compile_rehearsal.py shared; looked=$$?; \
	wait $$compiles && exit $$looked
	$(BIN)/pytest --numprocesses=auto --dist=loadfile

# The recipe of the small model needs torch, which on Linux brings gigabytes of CUDA unless a CPU build is at hand.
check-training: .venv/.check-training
	$(BIN)/pytest tests/training

.venv/.check-training: EXTRAS = dev,training
.venv/.up: EXTRAS = embedded,rehearse
.venv/.check: EXTRAS = dev
.venv/.up .venv/.check .venv/.check-training: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14) and "Waterline runs on Python 3.11 to 3.13, this is " + sys.version.split()[0] + ". Try: make PYTHON=python3.12 $(patsubst .%,%,$(@F))")'
	@echo "Installing Waterline into .venv …"
	@if command -v uv >/dev/null; then \
	  { [ -x $(BIN)/python ] || uv venv --quiet --python "$$(command -v $(PYTHON))" .venv; } && \
	  uv pip install --quiet --python $(BIN)/python --editable '.[$(EXTRAS)]'; \
	else \
	  { [ -x $(BIN)/pip ] || $(PYTHON) -m venv .venv; } && \
	  $(BIN)/pip install --quiet --no-compile --disable-pip-version-check --editable '.[$(EXTRAS)]'; \
	fi
	@touch $@

clean:
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
