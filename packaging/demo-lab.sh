# What the demos share: a laboratory below one temporary directory, certificates, two agents, and how it is told.
#
# To be sourced by bash with `set -euo pipefail`, after these are set: KEIKI (the binary) and server_user (who runs the
# database servers). The demo itself defines stop_servers, adds what it starts in the background to `processes`, and
# sets finished=yes at its end.
# shellcheck shell=bash

keiki=$(readlink -f "${KEIKI:?set KEIKI to the binary, or run this as: make demo}")
: "${server_user:?}"
lab=$(mktemp -d /tmp/keiki-demo-XXXXXX)
chmod 755 "$lab"
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
  for process in "${processes[@]}"; do kill "$process" 2>/dev/null && wait "$process" 2>/dev/null; done
  stop_servers
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

# Prints what it makes.
make_certificates() {
  "$keiki" ca init "$lab/ca" | indent
  "$keiki" ca issue "$lab/ca" --host a | indent
  "$keiki" ca issue "$lab/ca" --host b | indent
}

write_config() { # NAME LISTEN PEER PEER_PORT REPOSITORY SETTINGS_OF_CLONES
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
$6

[[allow]]
who = "host:*"
may = ["status", "backup", "clone", "accept", "discard", "job", "ship", "read-repository", "write-repository"]
instances = ["*"]
CONF
}

# Starts both agents and waits until the source is archived.
start_agents() {
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
}
