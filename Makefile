# The two commands of the README are `make run` and `make test`; the rest is for those who change the node.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check
WORKERS ?= 2

.PHONY: help run test peers interop ceph soak radosgw check bench clean

help:  ## what there is
	@grep -E '^[a-z]+:.*##' Makefile | sed 's/:.*##/\t/' | expand -t 12

$(VENV)/runtime: requirements/runtime.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo 'dicom-node needs Python 3.11 or newer; name it: make PYTHON=python3.12 run'; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo 'No venv module: apt-get install python3-venv'; exit 1; }
	@echo 'Installing what the node needs into $(VENV) (some minutes the first time) ...'
	$(PIP) --requirement requirements/runtime.txt
	$(PIP) --no-deps --editable .
	@touch $@

$(VENV)/development: requirements/dev.txt $(VENV)/runtime
	@echo 'Installing what tests and checks need ...'
	$(PIP) --requirement requirements/dev.txt
	@touch $@

run: $(VENV)/runtime  ## start the node with the embedded defaults
	@exec $(BIN)/dicom-node serve

test: $(VENV)/development  ## everything that needs no system package
	$(BIN)/pytest -n $(WORKERS) --dist worksteal -m 'not peer'

peers:  ## install DCMTK, dicom3tools, Orthanc, PostgreSQL, rsyslog and the like (needs root)
	apt-get update -qq
	DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
		dcmtk dicom3tools eatmydata gcc libc6-dev odil orthanc orthanc-dicomweb postgresql \
		python3-venv rsyslog rsyslog-gnutls rsyslog-openssl strace tcpdump >/dev/null
	@# Debian starts an Orthanc and a PostgreSQL of its own; the tests start theirs on ports of their own.
	@service orthanc stop >/dev/null 2>&1 || true
	@service postgresql stop >/dev/null 2>&1 || true

interop: $(VENV)/development  ## tests against the peers
	$(BIN)/pytest -n $(WORKERS) --dist worksteal -m peer

ceph:  ## install what make radosgw runs: a monitor, an OSD and a gateway of Ceph (needs root)
	apt-get update -qq
	DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends ceph-mon ceph-osd radosgw >/dev/null

MINUTES ?= 60
ROUNDS ?= 20
SOAK ?= --minutes $(MINUTES)

soak: $(VENV)/development  ## faults, for MINUTES (60) or by count (SOAK='--runs 10000 --cuts 500 --kills 1000'); as root for all of it
	$(BIN)/pytest -n 0 -m soak tests/faults --ignore tests/faults/test_ceph.py
	$(BIN)/python -m tests.faults.walk --kills 500 --syscalls --errors
	$(BIN)/python -m tests.system.cluster --rounds $(ROUNDS)
	@! $(BIN)/python -m tests.ceph --installed || $(MAKE) --no-print-directory radosgw
	$(BIN)/python -m tests.faults.soak --processes $(WORKERS) $(SOAK)

radosgw: $(VENV)/development  ## the S3 tests and faults against Ceph's radosgw, and three nodes on it for ROUNDS (20); part of make soak
	$(BIN)/pytest -n 0 --s3 radosgw tests/storage/test_s3.py tests/storage/test_objects.py tests/system/test_s3_node.py
	$(BIN)/pytest -n 0 -m soak tests/faults/test_ceph.py
	$(BIN)/python -m tests.faults.walk --s3 radosgw --store land --points 1 --senders 1
	$(BIN)/python -m tests.faults.walk --s3 radosgw --store archive --points 1 --senders 1
	$(BIN)/python -m tests.faults.schedules --s3 radosgw --runs 20
	$(BIN)/python -m tests.system.cluster --s3 radosgw --rounds $(ROUNDS)

check: $(VENV)/development  ## ruff, mypy, import-linter, the Dockerfile
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint Dockerfile

bench: $(VENV)/development  ## measure
	$(BIN)/python -m bench

clean:  ## remove the environment and caches (never data)
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
