# Three commands, each doing all of its own set-up:
#
#   make demo    a download through an authenticating proxy, as two identities, on loopback; no compiler, no root
#   make test    everything that is checked; as root it installs the Debian packages of tests/packages.txt first
#
#   make test-windows   the tests that are not about POSIX, and Windows's own, in the Windows CPython under Wine; a minute or two more
#                       the first time, when as root it installs Wine (tests/windows/packages.txt)
#
# And what takes longer:
#
#   make soak    the tests that take minutes: 200 kills of a running queue, 5,000 random schedules of faults, and the like
#   make bench-integrity    how often curl, wget, wget2 and aria2c mix two versions of a file, and how often we do: a table
#   make bench   speed, processor time and memory beside curl, wget, aria2 and others: about nine minutes, a table and a picture
#
# And one for those who change the states of a job:
#
#   make diagram draws them into README.md
#   make bench-readme puts what `make bench` measured last into README.md and docs/
#
# Settings: PYTHON=python3.12, PYTEST_ARGS='-k lane', JOBS=1 (processes that share the tests; else one for each processor),
# BENCH_ARGS='--only tls --rounds 3'.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:
.NOTPARALLEL:
.DEFAULT_GOAL := help
.PHONY: help demo test test-windows soak bench bench-readme bench-integrity diagram packages elogind install-test install-bench lint types pytest clean

# Debian's interpreter can be read by the other users that the tests become; one below a home directory often cannot.
PYTHON ?= $(shell for candidate in /usr/bin/python3 python3; do \
	"$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$candidate" && break; done)

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input --quiet
PACKAGES := $(shell sed 's/\#.*//' tests/packages.txt)
PYTEST_ARGS ?=
BENCH_ARGS ?=
BENCH := .venv-bench
JOBS ?= auto

export PIP_ROOT_USER_ACTION := ignore

help:
	@sed -n 's/^#   make/make/p' Makefile

demo: $(VENV)/pyvenv.cfg
	@mkdir -p .make
	want="$$(cat pyproject.toml | cksum)"
	if [ "$$(cat .make/demo 2>/dev/null || true)" != "$$want" ]; then
		echo "Installing bits_async, from wheels only ..."
		if ! $(PIP) install --only-binary :all: --editable .; then
			echo "make demo: a dependency has no wheel for this Python ($$($(BIN)/python -V), $$(uname -m)), or the package index" >&2
			echo "was not reached; see pip's message above. The demo builds nothing: try a released CPython 3.11 or newer." >&2
			exit 1
		fi
		echo "$$want" > .make/demo
	fi
	$(BIN)/python examples/demo.py

test: lint types pytest

lint: install-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

WINDOWS_MODULES := $(addprefix bits_async/,identity/win32.py identity/windows.py identity/access_tokens.py identity/wts.py auth/sspi.py)

types: install-test
	$(BIN)/mypy
	$(BIN)/mypy --platform win32 $(WINDOWS_MODULES)

# Last, so that the run ends with pytest's list of what was left out.
pytest: lint types
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(PYTEST_ARGS)

test-windows: PACKAGES += $(shell sed 's/\#.*//' tests/windows/packages.txt)
test-windows: install-test
	$(BIN)/python -m tests.windows $(PYTEST_ARGS)

soak: install-test
	$(BIN)/python -m pytest -m soak $(PYTEST_ARGS)

bench-integrity: PACKAGES += aria2 curl wget wget2
bench-integrity: install-test
	$(BIN)/python -m tests.integrity.tools

diagram: install-test
	$(BIN)/python -m tests.diagram

# A virtual environment of its own: the libraries it compares with are nobody else's business.
bench:
	@$(MAKE) --no-print-directory packages PACKAGES="$(PACKAGES) $$(sed 's/#.*//' tests/bench/packages.txt | xargs)"
	$(MAKE) --no-print-directory install-bench
	$(BENCH)/bin/python -m tests.bench $(BENCH_ARGS)

bench-readme: install-bench
	$(BENCH)/bin/python -m tests.bench --readme

install-bench: $(BENCH)/pyvenv.cfg
	@mkdir -p .make
	extras=bench,test
	! command -v krb5-config >/dev/null || extras=bench,kerberos,test
	want="$$extras $$($(BENCH)/bin/python -V) $$(cat pyproject.toml | cksum)"
	[ "$$(cat .make/bench-installed 2>/dev/null || true)" != "$$want" ] || exit 0
	echo "Installing bits_async[$$extras] and what it is compared with ..."
	CFLAGS="-O0 -g0" $(BENCH)/bin/python -m pip --disable-pip-version-check --no-input --quiet install --editable ".[$$extras]"
	echo "$$want" > .make/bench-installed

$(BENCH)/pyvenv.cfg: $(VENV)/pyvenv.cfg
	@rm -f .make/bench-installed
	$(BIN)/python -m venv $(BENCH)

# As root on Debian or Ubuntu: what is missing of tests/packages.txt. Otherwise nothing; pytest lists the tests that were left out.
packages:
	@[ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null || exit 0
	missing=()
	for package in $(PACKAGES); do
		[[ "$$(dpkg-query -W -f '$${db:Status-Abbrev}' "$$package" 2>/dev/null || true)" == ii* ]] || missing+=("$$package")
	done
	[ "$${#missing[@]}" -gt 0 ] || exit 0
	echo "Installing $${missing[*]} ..."
	# The tests start servers of their own; Debian's are kept from starting, now and when the machine is booted again.
	if [ ! -e /usr/sbin/policy-rc.d ]; then
		trap 'rm -f /usr/sbin/policy-rc.d' EXIT
		printf '#!/bin/sh\nexit 101\n' > /usr/sbin/policy-rc.d
		chmod 755 /usr/sbin/policy-rc.d
	fi
	export DEBIAN_FRONTEND=noninteractive
	mkdir -p .make
	if ! { apt-get update && apt-get install -y --no-install-recommends "$${missing[@]}"; } >.make/apt.log 2>&1 </dev/null; then
		tail -n 30 .make/apt.log >&2
		exit 1
	fi
	if [ -d /run/systemd/system ]; then
		for unit in apache2 nginx squid krb5-kdc krb5-admin-server samba-ad-dc; do
			case " $${missing[*]} " in *" $$unit "*) systemctl disable --quiet "$$unit" || true ;; esac
		done
		case " $${missing[*]} " in *" samba "*) systemctl disable --quiet smbd nmbd || true ;; esac
	fi

# elogind is a real logind without systemd. It cannot be installed beside systemd's libraries, so it is unpacked.
elogind: packages
	@[ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && [ ! -e .make/elogind/unpacked ] || exit 0
	rm -rf .make/elogind && mkdir -p .make/elogind && cd .make/elogind
	download() { apt-get -o APT::Sandbox::User=root download elogind libelogind0 >../elogind.log 2>&1 </dev/null; }
	if ! download && ! { apt-get update >/dev/null 2>&1 && download; }; then
		tail -n 30 ../elogind.log >&2
		exit 1
	fi
	for package in *.deb; do dpkg-deb -x "$$package" . && rm "$$package"; done
	touch unpacked

install-test: packages elogind $(VENV)/pyvenv.cfg
	@mkdir -p .make
	# gssapi and krb5 are built: that needs krb5-config, a compiler and Python's headers. Without them the tests that need
	# Kerberos are left out, and pytest says so.
	extras=test
	header='import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))'
	if command -v krb5-config >/dev/null && command -v cc >/dev/null && $(BIN)/python -c "$$header"; then
		extras=kerberos,test
	fi
	want="$$extras $$($(BIN)/python -V) $$(cat pyproject.toml | cksum)"
	[ "$$(cat .make/test 2>/dev/null || true)" != "$$want" ] || exit 0
	echo "Installing bits_async[$$extras] (the first time gssapi and krb5 are built, which takes a minute or two) ..."
	CFLAGS="-O0 -g0" $(PIP) install --editable ".[$$extras]"
	echo "$$want" > .make/test

$(VENV)/pyvenv.cfg:
	@if [ -z "$(PYTHON)" ]; then
		echo "bits_async needs Python 3.11 or newer; none was found (apt-get install python3)." >&2
		exit 1
	fi
	if ! $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null; then
		if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
			{ apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3-venv; } >/dev/null </dev/null
		else
			echo "$(PYTHON) cannot make virtual environments. On Debian and Ubuntu: sudo apt-get install python3-venv" >&2
			exit 1
		fi
	fi
	rm -f .make/demo .make/test
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) $(BENCH) .make .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
