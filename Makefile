# make demo       train a small decoder on this machine's own text, from nothing, in a few minutes
# make test       the whole test suite
# make test-fast  three quarters of the tests, two at a time: no training jobs, faults, Slurm, browser or S3 (minutes)
# make test-elsewhen   the suite with the clock a year ahead, in another time zone and another locale
# make faults     every fault injected into checkpoints: kills, damage, storage trouble (minutes; make test takes a sample)
# make chaos      2,000 steps with a fault about every 20: the job is started again and ends with the same bits (minutes)
# make gpu        the first minutes on a GPU: is it right, how fast is it (the machine's own Python, nothing is installed)
# make figures    lines room by room, and what breaks the rules of the house
# make lint, make types   ruff and mypy; make docs   pages of the core's functions and classes, in build/docs
# All build .venv first. Another torch: make demo TORCH=torch==2.12.0. Another Python: make demo PYTHON=python3.12.

TORCH ?= torch==2.13.0
PYTHON ?= python3
PYTEST_ARGS ?=
GPU_ARGS ?=
FIGURES_ARGS ?=
DEMO_ARGS ?=

DOCS := $(addprefix internlm_lite.,mesh layers models optim pipeline generate batch errors units)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input install
# The stamp's name holds the wanted torch and Python: asking for others installs anew.
BASE := $(VENV)/base-$(shell printf '%s|%s' '$(TORCH)' '$(PYTHON)' | cksum | cut -d' ' -f1)
READY := $(VENV)/ready

define CHECK_PYTHON
import sys
if sys.version_info < (3, 10):
    sys.exit("found Python " + sys.version.split()[0] + " at " + sys.executable + "; expected 3.10 or newer: "
             "install one and say make PYTHON=python3.12")
try:
    import ensurepip, venv
except ImportError as error:
    sys.exit("this Python cannot build virtual environments (" + str(error) + "): install its venv package, "
             "on Debian and Ubuntu: apt-get install python3-venv")
endef
export CHECK_PYTHON

# Nothing may depend on the day, the zone or the language. +12:45, or +13:45 in summer: often another day, never the same
# minute. Turkish: a decimal comma, other messages, and i is not I. tests/elsewhen.c says how the clock is ahead.
ELSEWHEN_SECONDS ?= 31536000
ELSEWHEN_ZONE ?= Pacific/Chatham
ELSEWHEN_LOCALE ?= tr_TR
ELSEWHEN := $(abspath $(VENV))/elsewhen
define CHECK_ELSEWHEN
command -v $(CC) && command -v localedef && [ -e /usr/share/i18n/locales/$(ELSEWHEN_LOCALE) ] && [ -e /usr/share/zoneinfo/$(ELSEWHEN_ZONE) ]
endef

.PHONY: help venv demo test test-fast test-elsewhen faults chaos gpu figures lint types docs clean
.DEFAULT_GOAL := help

help:
	@sed -n '/^$$/q; s/^# //p' Makefile

venv: $(READY)

# torch comes first and alone; its exact version then binds every other package, so nothing pulls in another build.
$(BASE):
	@command -v $(PYTHON) >/dev/null || { echo "found no $(PYTHON): install Python 3.10 or newer, or say make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c "$$CHECK_PYTHON"
	@rm -f $(VENV)/base-* $(READY)
	@if [ "$$($(BIN)/python -V 2>/dev/null)" = "$$($(PYTHON) -V)" ]; then echo "keeping $(VENV)"; else $(PYTHON) -m venv --clear $(VENV); fi
	$(PIP) '$(TORCH)'
	@$(BIN)/python -c "from importlib.metadata import version; print('torch==' + version('torch'))" > $(VENV)/torch.txt
	@touch $@

$(READY): pyproject.toml setup.py $(BASE)
	$(PIP) --constraint $(VENV)/torch.txt --editable '.[dev]'
	@touch $@

demo: venv
	$(BIN)/python tools/demo.py $(DEMO_ARGS)

# What starts no jobs runs two at a time, the rest alone. pytest ends with 5 where PYTEST_ARGS leave a half without tests.
test: venv
	$(BIN)/python -m pytest -m 'not slow' -n 2 $(PYTEST_ARGS) || [ $$? = 5 ]
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS) || [ $$? = 5 ]

test-fast: venv
	$(BIN)/python -m pytest -m 'not slow' -n 2 $(PYTEST_ARGS)

test-elsewhen: venv
	@{ $(CHECK_ELSEWHEN); } >/dev/null || { echo "needs a C compiler, sources of locales, time zones: on Debian and Ubuntu: apt-get install gcc libc6-dev locales tzdata" >&2; exit 1; }
	@mkdir -p $(ELSEWHEN)
	@[ -d $(ELSEWHEN)/$(ELSEWHEN_LOCALE).UTF-8 ] || localedef -i $(ELSEWHEN_LOCALE) -f UTF-8 $(ELSEWHEN)/$(ELSEWHEN_LOCALE).UTF-8
	@$(CC) -O2 -Wall -shared -fPIC -o $(ELSEWHEN)/clock.so tests/elsewhen.c -ldl
	LD_PRELOAD=$(ELSEWHEN)/clock.so ELSEWHEN_SECONDS=$(ELSEWHEN_SECONDS) TZ=$(ELSEWHEN_ZONE) LOCPATH=$(ELSEWHEN) \
		LC_ALL=$(ELSEWHEN_LOCALE).UTF-8 $(BIN)/python -m pytest $(PYTEST_ARGS)

faults: venv
	FAULTS=all OMP_NUM_THREADS=1 $(BIN)/python -m pytest -s tests/faults tests/checkpoint/test_damage.py $(PYTEST_ARGS)

chaos: venv
	CHAOS=all OMP_NUM_THREADS=1 $(BIN)/python -m pytest -s tests/faults/test_chaos.py $(PYTEST_ARGS)

gpu:
	$(PYTHON) tools/gpu_check.py $(GPU_ARGS)

figures: venv
	$(BIN)/python -m tests.test_house $(FIGURES_ARGS)

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: venv
	$(BIN)/mypy

# What pdoc cannot trace is inherited from torch; every other warning is an error.
docs: venv
	rm -rf build/docs
	$(BIN)/python -W error::UserWarning -W 'ignore:Cannot determine where' -m pdoc --output-directory build/docs $(DOCS)
	@echo "see build/docs/index.html"

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
