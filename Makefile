# make demo    .venv -> real data -> pretrain -> zero-shot evaluation -> report
# make test    .venv -> lint, types, tests
# make chaos   .venv -> the reliability tests at full length: a hundred kills, a thousand damaged shards (an hour or two)
# make bench   .venv -> side by side with open_clip's trainer; the table of what is measured
PYTHON ?= python3
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test lint chaos bench

demo: .venv/.installed-demo
	$(BIN)/python -m train.pretrain configs/demo.yaml

test: lint
	$(BIN)/python -m pytest -n $$(( $$(nproc) + 1 )) --maxprocesses 4 --dist loadfile --no-loadscope-reorder

chaos: .venv/.installed-dev
	MM_CHAOS=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest --timeout=0 -rP tests/test_chaos.py tests/test_damage.py tests/test_hostile.py \
		tests/test_slurm.py tests/test_peers.py tests/test_sweeping.py

bench: .venv/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m eval.bench

lint: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy mm train eval

.venv/.installed-demo: pyproject.toml | .venv/bin/python
	@echo "installing mm and the packages of the demo into .venv (a few minutes the first time)"
	$(BIN)/python -m pip install -qq -e '.[demo]'
	@touch $@

.venv/.installed-dev: pyproject.toml | .venv/bin/python
	@echo "installing mm and the packages of its tests into .venv (a few minutes the first time)"
	$(BIN)/python -m pip install -qq -e '.[demo,dev]'
	@touch .venv/.installed-demo $@

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "error: mm needs Python 3.11 or later and '$(PYTHON)' is not; name one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; \
		exit 1; }
	@$(PYTHON) -m venv .venv || { \
		rm -rf .venv; \
		echo "error: '$(PYTHON) -m venv' failed; on Debian and Ubuntu it needs: apt-get install python3-venv" >&2; \
		exit 1; }
