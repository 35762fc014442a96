#!/usr/bin/env bash
# The main job in two minutes: two agents and a PostgreSQL on loopback, a table dropped by accident, and a clone of the
# second before. Everything lies below one temporary directory, which is removed at the end.
#
# Takes: KEIKI (the binary) and KEIKI_TEST_PG15_BIN (directory with initdb and postgres), both set by the Makefile.
set -euo pipefail

pg_bin=${KEIKI_TEST_PG15_BIN:?set KEIKI_TEST_PG15_BIN, or run this as: make demo}
if [ "$(id -u)" = 0 ]; then server_user=postgres; else server_user=$(id -un); fi
# shellcheck source=packaging/demo-lab.sh
source "$(dirname "${BASH_SOURCE[0]}")/demo-lab.sh"

stop_server() { # DATA_DIR
  if [ -f "$1/postmaster.pid" ]; then
    as_server_user "$pg_bin/pg_ctl" -D "$1" -m immediate stop >/dev/null 2>&1 || true
  fi
}

stop_servers() {
  stop_server "$lab/clones/orders-check"
  stop_server "$lab/orders"
}

sql() { "$pg_bin/psql" -X -q -A -t -v ON_ERROR_STOP=1 -h "$1" -p "$2" -U "$server_user" -d postgres -c "$3"; }

bold '1. A PostgreSQL server, "orders", with an archive_command that asks keiki whether a segment is safe.'
pg_port=$(free_port); port_a=$(free_port); port_b=$(free_port); clone_port=$(free_port)
mkdir "$lab/host-a" "$lab/host-b" "$lab/clones" "$lab/run" "$lab/repository"
install -d -m 700 "$lab/orders"
if [ "$(id -u)" = 0 ]; then chown "$server_user" "$lab/orders" "$lab/clones" "$lab/run"; fi
as_server_user "$pg_bin/initdb" -D "$lab/orders" -U "$server_user" -A trust --no-sync >/dev/null
cat >>"$lab/orders/postgresql.conf" <<CONF
listen_addresses = '127.0.0.1'
port = $pg_port
unix_socket_directories = '$lab/run'
archive_mode = on
archive_command = '"$keiki" --socket "$lab/host-a/keiki.sock" wal-push %p'
CONF
as_server_user "$pg_bin/pg_ctl" -D "$lab/orders" -l "$lab/run/orders.log" -w start >/dev/null
show "archive_command = 'keiki wal-push %p'"

bold '2. A certificate authority of our own, and a certificate for each host.'
make_certificates

bold '3. Two agents. Host b cannot reach the repository: it reads it through host a.'
clones="bin_dir = \"$pg_bin\""
write_config a "$port_a" b "$port_b" "file://$lab/repository" "$clones"
cat >>"$lab/host-a/keiki.toml" <<CONF

[[instance]]
name = "orders"
engine = "postgres"
data_dir = "$lab/orders"
bin_dir = "$pg_bin"
socket_dir = "$lab/run"
port = $pg_port
run_as = "$server_user"
ship = "archive_command"
ship_every = "1s"
CONF
write_config b "$port_b" a "$port_a" "peer://a" "$clones"
start_agents
show 'keiki hosts'
on_a hosts | indent

bold '4. Rows are committed, and a base backup is taken while the server works.'
sql "$lab/run" "$pg_port" "CREATE TABLE orders (id int PRIMARY KEY, item text, at timestamptz DEFAULT clock_timestamp())"
sql "$lab/run" "$pg_port" "INSERT INTO orders SELECT i, 'item ' || i FROM generate_series(1, 100000) i"
show 'keiki backup create orders'
on_a backup create orders 2>&1 | indent
sql "$lab/run" "$pg_port" "INSERT INTO orders VALUES (100001, 'the last good order')"
show 'keiki status'
on_a status | indent

bold '5. Then somebody drops the table.'
moment=$(sql "$lab/run" "$pg_port" "SELECT to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS.US') || '+00'")
show "-- it is $moment"
sql "$lab/run" "$pg_port" "DROP TABLE orders"
show 'DROP TABLE orders'
sql "$lab/run" "$pg_port" "SELECT count(*) FROM orders" 2>&1 | indent || true

bold '6. A clone of the moment before, on host b. First the check list, then the clone.'
show "keiki clone orders --to b --as orders-check --at '$moment' --check"
on_a clone orders --to b --as orders-check --port "$clone_port" --at "$moment" --check 2>&1 | indent
show "keiki clone orders --to b --as orders-check --at '$moment'"
on_a clone orders --to b --as orders-check --port "$clone_port" --at "$moment" 2>&1 | indent

bold '7. The rows are there, on the clone. The source goes on as it was.'
show "psql -p $clone_port -c 'SELECT count(*), max(item) ...'"
count=$(sql 127.0.0.1 "$clone_port" "SELECT count(*) FROM orders")
sql 127.0.0.1 "$clone_port" "SELECT count(*) || ' rows; the newest: ' || (SELECT item FROM orders ORDER BY id DESC LIMIT 1) FROM orders" | indent
show 'keiki instances'
on_a instances | indent
if [ "$count" != 100001 ]; then echo "expected 100001 rows" >&2; exit 1; fi
finished=yes
bold 'Done. Everything is stopped and removed again.'
