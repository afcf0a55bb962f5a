# make            lists the targets
# SCALE=smoke     the whole pipeline in three minutes    SCALE=tiny  the default
# SCALE=full      more chains, hours                     WORKERS=N   processes side by side
# ENV=here        use the python on PATH (conda) instead of making .venv
SCALE   ?= tiny
WORKERS ?=
ENV     ?= venv
NAME    ?=
# The notebooks of a scale. The runs of those that have some go into one batch first.
OWN_RUNS := fig02_tldr fig05_termination fig06_ngram fig08_best_of_n fig13_hh fig15_webgpt \
            fig19_value_weights fig21_temperature table3_apps \
            $(if $(filter $(SCALE),smoke tiny full),fig09_scaling horizon) \
            $(if $(filter $(SCALE),smoke full),estimators official)
FIGURES  := $(OWN_RUNS) fig04_win_rates table2_scores table5_settings
RUNS     := $(strip $(filter $(OWN_RUNS),$(FIGURES)) \
            $(if $(filter fig06_ngram,$(FIGURES)),fig07_ngram_hh))

export MARLHF_RUNS    ?= $(CURDIR)/runs
export MARLHF_RESULTS ?= $(CURDIR)/results

ifeq ($(ENV),here)
PY    := python
STAMP :=
else
PY    := .venv/bin/python
STAMP := .venv/.installed
endif
NOTEBOOK := $(PY) notebooks/run.py --scale $(SCALE) $(if $(WORKERS),-p workers $(WORKERS))

# The sandbox's best isolation, where it may be installed: as root or by sudo without a password.
APT := timeout 120 env DEBIAN_FRONTEND=noninteractive apt-get -qq -o Acquire::Retries=0 -o Acquire::http::Timeout=15
BUBBLEWRAP = if command -v apt-get >/dev/null && ! command -v bwrap >/dev/null; then \
	  root=$$(test "$$(id -u)" = 0 || echo sudo -n); \
	  { $$root $(APT) install -y bubblewrap || \
	    { $$root $(APT) update && $$root $(APT) install -y bubblewrap; }; } >/dev/null 2>&1 </dev/null || \
	  echo 'bubblewrap is not here and could not be installed: the sandbox goes on without' >&2; fi

.DEFAULT_GOAL := help
.PHONY: help setup reproduce figure plan lab test stress lint bench clean

help:            ## this list
	@grep -E '^[a-z]+: .*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

setup: $(STAMP)  ## make .venv from requirements.lock (the other targets do it when it is due)

.venv/.installed: requirements.lock pyproject.toml
	@python=; for p in python3.11 python3.12 python3.13 python3; do \
	  if $$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; \
	  then python=$$p; break; fi; done; \
	if [ -z "$$python" ]; then \
	  echo 'marlhf needs Python 3.11 or newer with venv (Debian: apt install python3-venv)' >&2; \
	  exit 1; fi; \
	test -x .venv/bin/python || $$python -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	.venv/bin/python -m pip install --quiet --disable-pip-version-check \
	  --no-deps --no-build-isolation -e .
	@$(BUBBLEWRAP)
	@touch $@

reproduce: $(STAMP)  ## every figure and table: results/$(SCALE)/ and the README's numbers
	$(if $(RUNS),$(PY) -m marlhf plan $(RUNS) --scale $(SCALE))
	$(if $(RUNS),$(PY) -m marlhf run $(RUNS) --scale $(SCALE) $(if $(WORKERS),--workers $(WORKERS)) >/dev/null)
	$(NOTEBOOK) $(FIGURES)
	$(PY) -m marlhf.report --scale $(SCALE)

figure: $(STAMP)  ## one notebook: make figure NAME=fig02_tldr
	$(NOTEBOOK) $(or $(NAME),$(error say which: make figure NAME=fig02_tldr))

plan: $(STAMP)  ## what reproduce would run, and how long it takes
	$(PY) -m marlhf plan $(RUNS) --scale $(SCALE)

lab: $(STAMP)  ## JupyterLab in notebooks/, start with quickstart
	$(PY) -m jupyter lab notebooks

test: lint  ## lint, tests, every notebook at SCALE=smoke, lessons against their stored outputs
	$(PY) -m pytest -n $$($(PY) -c 'import os; print(min(os.cpu_count(), 8))') --dist loadfile \
	  --nbval-lax tests notebooks --ignore-glob='*/lesson*.ipynb'
	$(PY) -m pytest -n $$($(PY) -c 'import os; print(min(os.cpu_count(), 8))') --dist loadfile \
	  --nbval $(wildcard notebooks/lesson*.ipynb)

stress: $(STAMP)  ## the long tests that `test` leaves out
	$(PY) -m pytest -m stress

lint: $(STAMP)  ## ruff, rules and format
	$(PY) -m ruff check . && $(PY) -m ruff format --check .

bench: $(STAMP) benchmarks/.venv-trl/.installed  ## speed, as ratios in one run
	-$(PY) -m benchmarks.bench_macro
	-$(PY) -m benchmarks.bench_sandbox
	$(PY) -m benchmarks.bench_update

benchmarks/.venv-trl/.installed: benchmarks/requirements-trl.txt | $(STAMP)
	$(PY) -m venv benchmarks/.venv-trl
	benchmarks/.venv-trl/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	benchmarks/.venv-trl/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

clean:           ## caches and smoke results; runs/ and .venv stay (delete them by hand)
	rm -rf build *.egg-info .pytest_cache .ruff_cache .hypothesis results/smoke
	find . -path ./.venv -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf
