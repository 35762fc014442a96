# Everything somebody working on keiki types. `make` alone lists it.
#
# CARGO_TARGET_DIR is honoured. Nothing here asks a question: every target runs unattended and ends non-zero when
# something failed.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
# One at a time: cargo uses all cores by itself, and the parts of `test` share one target directory.
.NOTPARALLEL:

CARGO ?= cargo
# What `make demo` shows: postgres, mariadb, mysql, redis or valkey.
ENGINE ?= postgres
TARGET_DIR := $(or $(CARGO_TARGET_DIR),target)

# The tests find their servers through the environment: packaging/test-servers.sh says where it is.
WITH_SERVERS = set -a; source "$$(packaging/test-servers.sh env-file)"; set +a;

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-22s %s\n", $$1, $$2 }' Makefile

.PHONY: build
build: ## build the optimised binary
	$(CARGO) build --release --locked
	@echo "built '$(TARGET_DIR)/release/keiki'"

.PHONY: test
test: install-test-servers lint run-tests story-postgres story-mariadb story-mysql story-redis story-valkey story-s3 contract-on-ceph ## install what tests need, then lint, every test and the stories

.PHONY: install-test-servers
install-test-servers: ## install the compiler and the servers that tests need
	@packaging/test-servers.sh

.PHONY: lint
lint: ## formatting, clippy without warnings, and what the dependencies may be
	$(CARGO) fmt --check
	$(CARGO) clippy --locked --all-targets -- -D warnings
	@if $(CARGO) deny --version >/dev/null 2>&1; then \
		$(CARGO) deny --locked check bans licenses sources; \
	else \
		echo "cargo-deny is not installed: deny.toml was not checked"; \
	fi

# The stories run on their own afterwards, so that what they print can be read.
.PHONY: run-tests
run-tests: install-test-servers ## every test but the stories
	@$(WITH_SERVERS) \
	if $(CARGO) nextest --version >/dev/null 2>&1; then \
		$(CARGO) nextest run --locked --no-fail-fast -E 'not test(/(^|::)story_(postgres|mariadb|mysql|redis|valkey|s3)/)'; \
		$(CARGO) test --locked --quiet --doc; \
	else \
		$(CARGO) test --locked --no-fail-fast -- --skip story_postgres --skip story_mariadb --skip story_mysql --skip story_redis --skip story_valkey --skip story_s3; \
	fi

# A story that is not there would pass in silence, so it is looked for first.
TELL = @$(WITH_SERVERS) \
	listed=$$($(CARGO) test --locked --quiet --test it -- --list); \
	grep -q '$(subst -,_,$@).*: test$$' <<<"$$listed" || \
		{ echo "error: tests/it has no test called '$(subst -,_,$@)'" >&2; exit 1; }; \
	$(CARGO) test --locked --test it $(subst -,_,$@) -- --nocapture --test-threads=1

.PHONY: story-postgres story-mariadb story-mysql story-redis story-valkey story-s3
story-postgres: install-test-servers ## the ledger: clones to many moments, each row checked, on every PostgreSQL
	$(TELL)
story-mariadb: install-test-servers ## the ledger on MariaDB 10.11 and 11.8: clones to many moments, each row checked
	$(TELL)
story-mysql: install-test-servers ## the ledger on MySQL 9.7: clones to many moments, each row checked
	$(TELL)
story-redis: install-test-servers ## the ledger on Redis: clones to many moments, each key compared by DUMP
	$(TELL)
story-valkey: install-test-servers ## the same on Valkey
	$(TELL)
story-s3: install-test-servers ## the ledger of PostgreSQL with the repository in a bucket of a real S3 server
	$(TELL)

# A measurement and not a test: times prove nothing on a busy machine.
.PHONY: bench-replay
bench-replay: install-test-servers ## how fast logs of MariaDB are replayed, against its own replica and mariadb-binlog | mariadb
	@$(WITH_SERVERS) KEIKI_BENCH_FULL=1 $(CARGO) test --locked --test it bench_replay -- --nocapture --test-threads=1

.PHONY: deb
deb: build ## build the Debian package
	packaging/package.sh deb

.PHONY: rpm
rpm: build ## build the RPM package (needs rpmbuild)
	packaging/package.sh rpm

.PHONY: demo
demo: install-test-servers ## two agents, a PostgreSQL, a dropped table, and a clone of the second before; or ENGINE=mariadb, mysql, redis, valkey
	@case '$(ENGINE)' in postgres|mariadb|mysql|redis|valkey) ;; *) echo "error: there is no demo of engine '$(ENGINE)'" >&2; exit 2 ;; esac
	@$(CARGO) build --locked --quiet
	@$(WITH_SERVERS) KEIKI="$(TARGET_DIR)/debug/keiki" packaging/demo$(patsubst %,-%,$(filter-out postgres,$(ENGINE))).sh

# SeaweedFS is the server of all other tests. Here it is the S3 gateway of a Ceph, or the server that
# KEIKI_TEST_S3_ENDPOINT, _BUCKET, _CREDENTIALS (and _REGION) name.
CONTRACT_OF_S3 = $(CARGO) test --locked --test it -- store_contract::of_s3_on_a_real_server:: --nocapture
.PHONY: contract-on-ceph story-on-ceph contract-on-s3
contract-on-ceph: install-test-servers ## what every store promises, on the S3 gateway of Ceph
	@$(WITH_SERVERS) packaging/test-ceph.sh $(CONTRACT_OF_S3)
story-on-ceph: install-test-servers ## the same, and a story of PostgreSQL with its repository there; not part of test
	@$(WITH_SERVERS) packaging/test-ceph.sh $(CONTRACT_OF_S3) story_s3::
contract-on-s3: install-test-servers ## both on an S3 server of yours
	@[ -n "$${KEIKI_TEST_S3_ENDPOINT:-}" ] || { echo "error: no server is named: set KEIKI_TEST_S3_ENDPOINT, _BUCKET and _CREDENTIALS" >&2; exit 2; }
	@$(WITH_SERVERS) $(CONTRACT_OF_S3) story_s3::

# Part of `test` already, through run-tests; here to be run alone, with what they measure.
.PHONY: story-faults
story-faults: install-test-servers ## kills, fencing, slots and cost on real servers
	@$(WITH_SERVERS) $(CARGO) test --locked --test it -- story_killing story_fencing story_slot story_cost --nocapture --test-threads=1

# Needs cargo-fuzz and a nightly compiler, so it is part of nothing; `make test` attacks the same parsers without either.
PARSER ?= mysql_binlog
.PHONY: fuzz
fuzz: ## attack one parser of foreign bytes for ten minutes: PARSER=mysql_binlog, see tests/fuzz/README.md
	KEIKI_WRITE_CORPUS="$(TARGET_DIR)/corpus" $(CARGO) test --locked --quiet --test it -- hostile_bytes::$(PARSER) --exact
	$(CARGO) +nightly fuzz run --fuzz-dir tests/fuzz $(PARSER) "$(TARGET_DIR)/corpus/$(PARSER)" -- -max_total_time=600
