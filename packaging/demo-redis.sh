#!/usr/bin/env bash
# The main job on Redis or Valkey in a minute: two agents and a server on loopback, a FLUSHALL by accident, and a clone of the
# second before. Everything lies below one temporary directory, which is removed at the end.
#
# Takes: KEIKI (the binary) and KEIKI_TEST_REDIS7_BIN or, with PRODUCT=valkey, KEIKI_TEST_VALKEY9_BIN (the directory of the
# server), set by the Makefile.
set -euo pipefail

product=${PRODUCT:-redis}
case $product in
  redis) bin=${KEIKI_TEST_REDIS7_BIN:?set KEIKI_TEST_REDIS7_BIN, or run this as: make demo ENGINE=redis} ;;
  valkey) bin=${KEIKI_TEST_VALKEY9_BIN:?set KEIKI_TEST_VALKEY9_BIN, or run this as: make demo ENGINE=valkey} ;;
  *) echo "error: there is no demo of '$product' here" >&2; exit 2 ;;
esac
if [ "$(id -u)" = 0 ]; then server_user=nobody; else server_user=$(id -un); fi
# shellcheck source=packaging/demo-lab.sh
source "$(dirname "${BASH_SOURCE[0]}")/demo-lab.sh"

stop_servers() {
  for socket in "$lab/clones/cart-check.run/redis.sock" "$lab/cart/s"; do
    "$bin/$product-cli" -s "$socket" SHUTDOWN NOSAVE >/dev/null 2>&1
  done
}

source_cli() { "$bin/$product-cli" -s "$lab/cart/s" "$@"; }

bold "1. A $product server, 'cart', with an append-only file that has times in it."
port_a=$(free_port); port_b=$(free_port); clone_port=$(free_port)
mkdir "$lab/host-a" "$lab/host-b" "$lab/clones" "$lab/repository"
install -d -m 700 "$lab/cart"
if [ "$(id -u)" = 0 ]; then chown "$server_user" "$lab/cart" "$lab/clones"; fi
as_server_user "$bin/$product-server" --port 0 --unixsocket "$lab/cart/s" --dir "$lab/cart" \
  --appendonly yes --aof-timestamp-enabled yes >"$lab/cart.log" 2>&1 &
processes+=($!)
wait_until 'the server' source_cli ping
show "$product-server --appendonly yes --aof-timestamp-enabled yes"

bold '2. A certificate authority of our own, and a certificate for each host.'
make_certificates

bold '3. Two agents. Host b cannot reach the repository: it reads it through host a.'
clones="
[clone.$product]
bin_dir = \"$bin\"
run_as = \"$server_user\""
write_config a "$port_a" b "$port_b" "file://$lab/repository" "$clones"
cat >>"$lab/host-a/keiki.toml" <<CONF

[[instance]]
name = "cart"
engine = "$product"
data_dir = "$lab/cart"
socket = "$lab/cart/s"
run_as = "$server_user"
ship_every = "1s"
CONF
write_config b "$port_b" a "$port_a" "peer://a" "$clones"
start_agents

bold '4. Carts are filled, and a base backup is taken: the server neither forks nor writes for it.'
for number in $(seq 1 2000); do echo "HSET cart:$number item $number pieces $((number % 7 + 1))"; done | source_cli >/dev/null
show 'keiki backup create cart'
on_a backup create cart 2>&1 | indent
source_cli HSET cart:2001 item 'the last good cart' pieces 1 >/dev/null
show 'keiki status'
on_a status | indent

bold '5. Then somebody empties the database.'
sleep 1.1
moment=$(date -u '+%Y-%m-%d %H:%M:%S+00')
show "-- it is $moment"
sleep 1.1
source_cli FLUSHALL | indent
show 'FLUSHALL'

bold '6. A clone of the moment before, on host b. First the check list, then the clone.'
show "keiki clone cart --to b --as cart-check --at '$moment' --check"
on_a clone cart --to b --as cart-check --port "$clone_port" --at "$moment" --check 2>&1 | indent
show "keiki clone cart --to b --as cart-check --at '$moment'"
on_a clone cart --to b --as cart-check --port "$clone_port" --at "$moment" 2>&1 | indent

bold '7. The carts are there, on the clone. The source goes on as it was.'
show "$product-cli -p $clone_port DBSIZE; $product-cli -p $clone_port HGET cart:2001 item"
"$bin/$product-cli" -p "$clone_port" DBSIZE | indent
"$bin/$product-cli" -p "$clone_port" HGET cart:2001 item | indent
show 'keiki instances'
on_a instances | indent
count=$("$bin/$product-cli" -p "$clone_port" DBSIZE)
if [ "$count" != 2001 ]; then echo "expected 2001 keys, found $count" >&2; exit 1; fi
finished=yes
bold 'Done. Everything is stopped and removed again.'
