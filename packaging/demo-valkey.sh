#!/usr/bin/env bash
# The demo of Redis on Valkey 9.
set -euo pipefail

PRODUCT=valkey exec "$(dirname "${BASH_SOURCE[0]}")/demo-redis.sh"
