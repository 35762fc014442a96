#!/usr/bin/env bash
# The main job on Redis in a minute: two agents and a server on loopback, a FLUSHALL by accident, and a clone of the
# second before. Everything lies below one temporary directory, which is removed at the end.
#
# Takes: KEIKI (the binary) and KEIKI_TEST_REDIS7_BIN (directory with redis-server), both set by the Makefile.
set -euo pipefail

keiki=$(readlink -f "${KEIKI:?set KEIKI to the binary, or run this as: make demo ENGINE=redis}")
redis_bin=${KEIKI_TEST_REDIS7_BIN:?set KEIKI_TEST_REDIS7_BIN, or run this as: make demo ENGINE=redis}
lab=$(mktemp -d /tmp/keiki-demo-XXXXXX)
chmod 755 "$lab"
if [ "$(id -u)" = 0 ]; then server_user=nobody; else server_user=$(id -un); fi
processes=()

as_server_user() {
  if [ "$(id -u)" = 0 ]; then
    setpriv --reuid="$server_user" --regid="$(id -g "$server_user")" --init-groups -- "$@"
  else
    "$@"
  fi
}

clean_up() {
  set +e
  for socket in "$lab/clones/cart-check.run/redis.sock" "$lab/cart/s"; do
    "$redis_bin/redis-cli" -s "$socket" SHUTDOWN NOSAVE >/dev/null 2>&1
  done
  for process in "${processes[@]}"; do kill "$process" 2>/dev/null && wait "$process" 2>/dev/null; done
  if [ "${finished:-no}" != yes ]; then
    echo; echo "the demo did not finish; the last words of the agents:"
    tail -n 15 "$lab"/host-*/agent.log 2>/dev/null
  fi
  rm -rf "$lab"
}
trap clean_up EXIT
trap 'exit 130' INT TERM

bold() { if [ -t 1 ]; then printf '\n\033[1m%s\033[0m\n' "$*"; else printf '\n%s\n' "$*"; fi; }
show() { printf '  $ %s\n' "$*"; }
indent() { sed 's/^/    /'; }
free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }
source_cli() { "$redis_bin/redis-cli" -s "$lab/cart/s" "$@"; }
on_a() { "$keiki" --config "$lab/host-a/keiki.toml" "$@"; }
on_b() { "$keiki" --config "$lab/host-b/keiki.toml" "$@"; }

wait_until() { # DESCRIPTION COMMAND...
  local what=$1 tries=0
  shift
  until "$@" >/dev/null 2>&1; do
    tries=$((tries + 1))
    if [ "$tries" -gt 300 ]; then echo "gave up waiting for $what" >&2; exit 1; fi
    sleep 0.1
  done
}

bold '1. A Redis server, "cart", with an append-only file that has times in it.'
port_a=$(free_port); port_b=$(free_port); clone_port=$(free_port)
mkdir "$lab/host-a" "$lab/host-b" "$lab/clones" "$lab/repository"
install -d -m 700 "$lab/cart"
if [ "$(id -u)" = 0 ]; then chown "$server_user" "$lab/cart" "$lab/clones"; fi
as_server_user "$redis_bin/redis-server" --port 0 --unixsocket "$lab/cart/s" --dir "$lab/cart" \
  --appendonly yes --aof-timestamp-enabled yes >"$lab/cart.log" 2>&1 &
processes+=($!)
wait_until 'the server' source_cli ping
show 'redis-server --appendonly yes --aof-timestamp-enabled yes'

bold '2. A certificate authority of our own, and a certificate for each host.'
"$keiki" ca init "$lab/ca" | indent
"$keiki" ca issue "$lab/ca" --host a | indent
"$keiki" ca issue "$lab/ca" --host b | indent

write_config() { # NAME LISTEN PEER PEER_PORT REPOSITORY
  cat >"$lab/host-$1/keiki.toml" <<CONF
[host]
name = "$1"
state_dir = "$lab/host-$1/state"
control_socket = "$lab/host-$1/keiki.sock"

[listen]
address = "127.0.0.1:$2"

[tls]
ca = "$lab/ca/ca.pem"
certificate = "$lab/ca/issued/$1.pem"
key = "$lab/ca/issued/$1.key"

[repository]
url = "$5"

[[peer]]
name = "$3"
address = "127.0.0.1:$4"

[clone]
data_root = "$lab/clones"
run_as = "$server_user"
listen_addresses = "127.0.0.1"

[clone.redis]
bin_dir = "$redis_bin"
run_as = "$server_user"

[[allow]]
who = "host:*"
may = ["status", "backup", "clone", "accept", "discard", "job", "ship", "read-repository", "write-repository"]
instances = ["*"]
CONF
}

bold '3. Two agents. Host b cannot reach the repository: it reads it through host a.'
write_config a "$port_a" b "$port_b" "file://$lab/repository"
cat >>"$lab/host-a/keiki.toml" <<CONF

[[instance]]
name = "cart"
engine = "redis"
data_dir = "$lab/cart"
socket = "$lab/cart/s"
run_as = "$server_user"
ship_every = "1s"
CONF
write_config b "$port_b" a "$port_a" "peer://a"
for host in a b; do
  "$keiki" --config "$lab/host-$host/keiki.toml" agent >"$lab/host-$host/agent.log" 2>&1 &
  processes+=($!)
done
wait_until 'agent a' on_a hosts
wait_until 'agent b' on_b hosts
show 'keiki repository init'
on_a repository init | indent
archiving() { on_a status | grep -q archiving; }
wait_until 'archiving to begin' archiving

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
show "redis-cli -p $clone_port DBSIZE; redis-cli -p $clone_port HGET cart:2001 item"
"$redis_bin/redis-cli" -p "$clone_port" DBSIZE | indent
"$redis_bin/redis-cli" -p "$clone_port" HGET cart:2001 item | indent
show 'keiki instances'
on_a instances | indent
count=$("$redis_bin/redis-cli" -p "$clone_port" DBSIZE)
if [ "$count" != 2001 ]; then echo "expected 2001 keys, found $count" >&2; exit 1; fi
finished=yes
bold 'Done. Everything is stopped and removed again.'
