#!/usr/bin/env bash
# The main job on MariaDB in a minute: two agents and a server on loopback, a table dropped by accident, and a clone of
# the second before. Everything lies below one temporary directory, which is removed at the end.
#
# Takes: KEIKI (the binary), set by the Makefile, and the programs of MariaDB where Debian puts them, or all of them in
# the directory KEIKI_TEST_MARIADB_BIN.
set -euo pipefail

PATH=${KEIKI_TEST_MARIADB_BIN:+$KEIKI_TEST_MARIADB_BIN:}$PATH:/usr/sbin
for program in mariadbd mariadb-install-db mariadb-backup mariadb; do
  command -v "$program" >/dev/null ||
    { echo "error: there is no '$program' of MariaDB: run this as: make demo ENGINE=mariadb" >&2; exit 1; }
done
if [ "$(id -u)" = 0 ]; then server_user=nobody; else server_user=$(id -un); fi
# shellcheck source=packaging/demo-lab.sh
source "$(dirname "${BASH_SOURCE[0]}")/demo-lab.sh"

# A clone's own process works in its directory; it was started by the agent.
stop_servers() {
  local pid_file
  for pid_file in "$lab/clones/shop-check.run/mariadb.pid" "$lab/shop.run/pid"; do
    if [ -f "$pid_file" ]; then kill -9 "$(cat "$pid_file")" 2>/dev/null; fi
  done
}

sql() { as_server_user mariadb --no-defaults -N -S "$lab/shop.run/s" -u "$server_user" -e "$1"; }
clone_sql() {
  MYSQL_PWD=$(cat "$lab/clones/shop-check.run/password") \
    mariadb --no-defaults -N --protocol=tcp -h 127.0.0.1 -P "$clone_port" -u keiki_agent -e "$1"
}

bold '1. A MariaDB server, "shop", with a binary log.'
port_a=$(free_port); port_b=$(free_port); clone_port=$(free_port)
mkdir "$lab/host-a" "$lab/host-b" "$lab/clones" "$lab/repository"
install -d -m 700 "$lab/shop" "$lab/shop.run"
if [ "$(id -u)" = 0 ]; then chown "$server_user" "$lab/shop" "$lab/shop.run" "$lab/clones"; fi
cd "$lab/clones" # where the server's user may be
as_server_user mariadb-install-db --no-defaults --datadir="$lab/shop" --auth-root-authentication-method=socket \
  --auth-root-socket-user="$server_user" --skip-test-db >"$lab/install.log" 2>&1 || { cat "$lab/install.log"; exit 1; }
as_server_user "$(command -v mariadbd)" --no-defaults --datadir="$lab/shop" --socket="$lab/shop.run/s" \
  --pid-file="$lab/shop.run/pid" --skip-networking --log-bin=binlog --binlog-format=ROW --sync-binlog=1 --server-id=5 \
  >"$lab/shop.log" 2>&1 &
processes+=($!)
wait_until 'the server' sql 'DO 0'
show 'mariadbd --log-bin=binlog --binlog-format=ROW --sync-binlog=1'

bold '2. A certificate authority of our own, and a certificate for each host.'
make_certificates

bold '3. Two agents. Host b cannot reach the repository: it reads it through host a.'
clones="
[clone.mariadb]
run_as = \"$server_user\""
write_config a "$port_a" b "$port_b" "file://$lab/repository" "$clones"
cat >>"$lab/host-a/keiki.toml" <<CONF

[[instance]]
name = "shop"
engine = "mariadb"
data_dir = "$lab/shop"
socket = "$lab/shop.run/s"
user = "$server_user"
run_as = "$server_user"
ship_every = "1s"
CONF
write_config b "$port_b" a "$port_a" "peer://a" "$clones"
start_agents

bold '4. Orders are committed, and a base backup is taken while the server works.'
sql 'CREATE DATABASE shop'
sql 'CREATE TABLE shop.orders (id INT PRIMARY KEY, item TEXT)'
sql "INSERT INTO shop.orders SELECT seq, CONCAT('item ', seq) FROM shop.seq_1_to_100000"
show 'keiki backup create shop'
on_a backup create shop 2>&1 | indent
sql "INSERT INTO shop.orders VALUES (100001, 'the last good order')"
show 'keiki status'
on_a status | indent

bold '5. Then somebody drops the table.'
sleep 1.1
moment=$(date -u '+%Y-%m-%d %H:%M:%S+00')
show "-- it is $moment"
sleep 1.1
sql 'DROP TABLE shop.orders'
show 'DROP TABLE shop.orders'
sql 'SELECT COUNT(*) FROM shop.orders' 2>&1 | indent || true

bold '6. A clone of the moment before, on host b. First the check list, then the clone.'
show "keiki clone shop --to b --as shop-check --at '$moment' --check"
on_a clone shop --to b --as shop-check --port "$clone_port" --at "$moment" --check 2>&1 | indent
show "keiki clone shop --to b --as shop-check --at '$moment'"
on_a clone shop --to b --as shop-check --port "$clone_port" --at "$moment" 2>&1 | indent

bold '7. The orders are there, on the clone. The source goes on as it was.'
show "mariadb -P $clone_port -e 'SELECT COUNT(*), ...'"
count=$(clone_sql 'SELECT COUNT(*) FROM shop.orders')
clone_sql "SELECT CONCAT(COUNT(*), ' rows; the newest: ', (SELECT item FROM shop.orders ORDER BY id DESC LIMIT 1)) FROM shop.orders" | indent
show 'keiki instances'
on_a instances | indent
if [ "$count" != 100001 ]; then echo "expected 100001 rows, found $count" >&2; exit 1; fi
finished=yes
bold 'Done. Everything is stopped and removed again.'
