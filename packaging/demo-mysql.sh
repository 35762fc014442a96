#!/usr/bin/env bash
# The main job on MySQL in a minute: two agents and a server on loopback, a table dropped by accident, and a clone of the
# moment before. Everything lies below one temporary directory, which is removed at the end.
#
# Takes: KEIKI (the binary) and KEIKI_TEST_MYSQL9_ROOT (usr/sbin/mysqld and usr/bin/mysql lie there), set by the Makefile.
set -euo pipefail

root=${KEIKI_TEST_MYSQL9_ROOT:?run this as: make demo ENGINE=mysql}
for program in usr/sbin/mysqld usr/bin/mysql; do
  [ -x "$root/$program" ] || { echo "error: there is no '$program' in '$root': run 'make install-test-servers'" >&2; exit 1; }
done
if [ "$(id -u)" = 0 ]; then server_user=nobody; else server_user=$(id -un); fi
# shellcheck source=packaging/demo-lab.sh
source "$(dirname "${BASH_SOURCE[0]}")/demo-lab.sh"

# A clone's own process works in its directory; it was started by the agent.
stop_servers() {
  local pid_file
  for pid_file in "$lab/clones/shop-check.run/mysql.pid" "$lab/shop.run/pid"; do
    if [ -f "$pid_file" ]; then kill -9 "$(cat "$pid_file")" 2>/dev/null; fi
  done
}

sql() { "$root/usr/bin/mysql" --no-defaults -N -S "$lab/shop.run/s" -u root -e "$1"; }
clone_sql() {
  MYSQL_PWD=$(cat "$lab/clones/shop-check.run/password") \
    "$root/usr/bin/mysql" --no-defaults -N --protocol=tcp -h 127.0.0.1 -P "$clone_port" -u keiki_agent -e "$1"
}

bold '1. A MySQL server, "shop", with a binary log, and an account for the agent.'
port_a=$(free_port); port_b=$(free_port); clone_port=$(free_port)
mkdir "$lab/host-a" "$lab/host-b" "$lab/clones" "$lab/repository"
install -d -m 700 "$lab/shop.run"
if [ "$(id -u)" = 0 ]; then chown "$server_user" "$lab/shop.run" "$lab/clones"; fi
cd "$lab/clones" # where the server's user may be
as_server_user "$root/usr/sbin/mysqld" --no-defaults --initialize-insecure --secure-file-priv=NULL \
  --datadir="$lab/shop.run/data" >"$lab/install.log" 2>&1 || { cat "$lab/install.log"; exit 1; }
as_server_user "$root/usr/sbin/mysqld" --no-defaults --datadir="$lab/shop.run/data" --socket="$lab/shop.run/s" \
  --pid-file="$lab/shop.run/pid" --skip-networking --mysqlx=OFF --secure-file-priv=NULL --log-bin=binlog --server-id=5 \
  --gtid-mode=ON --enforce-gtid-consistency=ON --innodb-buffer-pool-size=64M >"$lab/shop.log" 2>&1 &
processes+=($!)
wait_until 'the server' sql 'DO 0'
show 'mysqld --log-bin=binlog --gtid-mode=ON --enforce-gtid-consistency=ON'
printf 'a secret\n' >"$lab/password"
for statement in "INSTALL PLUGIN clone SONAME 'mysql_clone.so'" "CREATE USER keiki@localhost IDENTIFIED BY 'a secret'" \
  'GRANT SELECT, PROCESS, REPLICATION CLIENT, BACKUP_ADMIN ON *.* TO keiki@localhost'; do
  show "$statement"
  sql "$statement"
done

bold '2. A certificate authority of our own, and a certificate for each host.'
make_certificates

bold '3. Two agents. Host b cannot reach the repository: it reads it through host a.'
clones="
[clone.mysql]
bin_dir = \"$root/usr/sbin\"
run_as = \"$server_user\""
write_config a "$port_a" b "$port_b" "file://$lab/repository" "$clones"
cat >>"$lab/host-a/keiki.toml" <<CONF

[[instance]]
name = "shop"
engine = "mysql"
data_dir = "$lab/shop.run/data"
socket = "$lab/shop.run/s"
user = "keiki"
password_file = "$lab/password"
run_as = "$server_user"
ship_every = "1s"
CONF
write_config b "$port_b" a "$port_a" "peer://a" "$clones"
start_agents

bold '4. Orders are committed, and a base backup is taken while the server works.'
sql 'CREATE DATABASE shop'
sql 'CREATE TABLE shop.orders (id INT PRIMARY KEY, item TEXT)'
sql "INSERT INTO shop.orders SELECT ROW_NUMBER() OVER (), CONCAT('item ', ROW_NUMBER() OVER ()) FROM mysql.help_relation AS
  one JOIN mysql.help_relation AS other LIMIT 100000"
show 'keiki backup create shop'
on_a backup create shop 2>&1 | indent
sql "INSERT INTO shop.orders VALUES (100001, 'the last good order')"
show 'keiki status'
on_a status | indent

bold '5. Then somebody drops the table.'
moment=$(date -u '+%Y-%m-%d %H:%M:%S.%6N+00')
show "-- it is $moment"
sql 'DROP TABLE shop.orders'
show 'DROP TABLE shop.orders'
sql 'SELECT COUNT(*) FROM shop.orders' 2>&1 | indent || true

bold '6. A clone of the moment before, on host b. First the check list, then the clone.'
show "keiki clone shop --to b --as shop-check --at '$moment' --check"
on_a clone shop --to b --as shop-check --port "$clone_port" --at "$moment" --check 2>&1 | indent
show "keiki clone shop --to b --as shop-check --at '$moment'"
on_a clone shop --to b --as shop-check --port "$clone_port" --at "$moment" 2>&1 | indent

bold '7. The orders are there, on the clone. The source goes on as it was.'
show "mysql -P $clone_port -e 'SELECT COUNT(*), ...'"
count=$(clone_sql 'SELECT COUNT(*) FROM shop.orders')
clone_sql "SELECT CONCAT(COUNT(*), ' rows; the newest: ', (SELECT item FROM shop.orders ORDER BY id DESC LIMIT 1)) FROM shop.orders" | indent
show 'keiki instances'
on_a instances | indent
if [ "$count" != 100001 ]; then echo "expected 100001 rows, found $count" >&2; exit 1; fi
finished=yes
bold 'Done. Everything is stopped and removed again.'
