#!/usr/bin/env bash
# Runs a command beside a Ceph with an S3 gateway: a second kind of real S3 server, for the tests that take one which the
# environment names (KEIKI_TEST_S3_ENDPOINT, _BUCKET, _CREDENTIALS). `make test` calls it.
#
#   packaging/test-ceph.sh COMMAND..
#
# Ceph 16 comes from Debian 12 by way of apt, 70 MB, unpacked into KEIKI_TEST_CACHE (.cache in the checkout if it is not
# set): nothing of the system changes and no root is needed. One monitor, one object server in memory and one gateway on
# loopback, about 20 seconds; they and their directory go when the command ends.
set -euo pipefail
umask 022

say() { echo "test-ceph: $*" >&2; }
fail() { say "error: $1"; [ $# -lt 2 ] || say "hint: $2"; exit 1; }

[ $# -ge 1 ] || fail "there is no command to run" "packaging/test-ceph.sh COMMAND.."
checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cache=${KEIKI_TEST_CACHE:-$checkout/.cache}
root=$cache/ceph-16
library=usr/lib/$(uname -m)-linux-gnu

download() {
    apt-get -q -y -o "Dir::Cache::archives=$1/archives" -o APT::Sandbox::User= -o Debug::NoLocking=1 \
        --no-install-recommends --download-only install radosgw ceph-osd ceph-mon ceph-common </dev/null >>"$1/log" 2>&1
}

# Unpacks Ceph and what it needs beyond what is installed.
unpack() {
    local work package
    mkdir -p "$cache"
    work=$(mktemp -d "$cache/unfinished-ceph.XXXXXX")
    mkdir -p "$work/archives/partial" "$work/root"
    say "unpacking Ceph of Debian 12 into '$root'"
    if ! download "$work" && ! { apt-get -q update </dev/null >>"$work/log" 2>&1 && download "$work"; }; then
        tail -n 20 "$work/log" >&2
        rm -rf "$work"
        fail "cannot download Ceph with apt" "is this Debian 12? as root: apt-get update"
    fi
    for package in "$work"/archives/*.deb; do
        dpkg-deb -x "$package" "$work/root"
    done
    # Two places for libraries are one where the system is newer than the packages.
    cp -a "$work/root/lib/." "$work/root/usr/lib/" 2>/dev/null || true
    rm -rf "$root"
    mv "$work/root" "$root"
    rm -rf "$work"
}

[ -x "$root/usr/bin/radosgw" ] || unpack

dir=$(mktemp -d /tmp/keiki-ceph.XXXXXX)
servers=()
stop() {
    local server
    for server in "${servers[@]}"; do
        kill -9 "$server" 2>/dev/null || true
        while kill -0 "$server" 2>/dev/null; do sleep 0.1; done
    done
    rm -rf "$dir"
}
trap stop EXIT

free_port() {
    python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

# Before a program of Ceph. No function, because the number of the process in the background must be the program's.
with_ceph=(env "LD_LIBRARY_PATH=$root/$library:$root/$library/ceph" "PYTHONPATH=$root/usr/lib/python3/dist-packages"
    "PATH=$root/usr/bin:$PATH")

ceph() { "${with_ceph[@]}" /usr/bin/python3 "$root/usr/bin/ceph" -c "$dir/ceph.conf" "$@"; }

mkdir "$dir"/{mon,osd,run,rgw}
monitor_port=$(free_port) gateway_port=$(free_port)
cluster=$(cat /proc/sys/kernel/random/uuid) osd=$(cat /proc/sys/kernel/random/uuid)
cat >"$dir/ceph.conf" <<CONF
[global]
fsid = $cluster
mon host = [v2:127.0.0.1:$monitor_port/0]
keyring = $dir/keyring
public addr = 127.0.0.1
cluster addr = 127.0.0.1
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 1
osd pool default pgp num = 1
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon allow pool size one = true
mon max pg per osd = 1000
run dir = $dir/run
crash dir = $dir/run
admin socket = $dir/run/\$name.\$pid.asok
log file = $dir/\$name.log
plugin dir = $root/$library/ceph
erasure code dir = $root/$library/ceph/erasure-code
osd class dir = $root/$library/rados-classes
[mon]
mon data = $dir/mon
mon cluster log file = $dir/cluster.log
[osd]
osd objectstore = memstore
memstore device bytes = 2147483648
osd data = $dir/osd
[client]
rgw frontends = beast endpoint=127.0.0.1:$gateway_port
rgw data = $dir/rgw
CONF

begin() {
    "${with_ceph[@]}" monmaptool --create --fsid "$cluster" --addv a "[v2:127.0.0.1:$monitor_port]" "$dir/monmap"
    "${with_ceph[@]}" ceph-authtool --create-keyring "$dir/keyring" --gen-key -n mon. --cap mon 'allow *'
    "${with_ceph[@]}" ceph-authtool "$dir/keyring" --gen-key -n client.admin --cap mon 'allow *' --cap osd 'allow *'
    "${with_ceph[@]}" ceph-mon -c "$dir/ceph.conf" --mkfs -i a --monmap "$dir/monmap" --keyring "$dir/keyring"
    "${with_ceph[@]}" ceph-mon -c "$dir/ceph.conf" -f -i a & servers+=($!); disown
    ceph --connect-timeout 60 osd new "$osd"
    ceph auth get-or-create osd.0 mon 'allow *' osd 'allow *' >>"$dir/keyring"
    "${with_ceph[@]}" ceph-osd -c "$dir/ceph.conf" -i 0 --mkfs --osd-uuid "$osd"
    "${with_ceph[@]}" ceph-osd -c "$dir/ceph.conf" -f -i 0 & servers+=($!); disown
    "${with_ceph[@]}" timeout 120 radosgw-admin -c "$dir/ceph.conf" user create --uid=keiki --display-name=keiki \
        --access-key=AKTEST --secret-key=SKTESTSKTEST
    "${with_ceph[@]}" radosgw -c "$dir/ceph.conf" -f -n client.admin & servers+=($!); disown
}
begin >"$dir/begin.log" 2>&1 || { tail -n 20 "$dir/begin.log" >&2; fail "Ceph does not start"; }

# A bucket, by the older of the two ways to sign, which is a few lines.
make_bucket() {
    python3 - "$1/keiki" <<'PYTHON' 2>"$dir/bucket.log"
import base64, email.utils, hashlib, hmac, sys, urllib.request
date = email.utils.formatdate(usegmt=True)
signed = hmac.new(b"SKTESTSKTEST", f"PUT\n\n\n{date}\n/keiki".encode(), hashlib.sha1).digest()
headers = {"Date": date, "Authorization": "AWS AKTEST:" + base64.b64encode(signed).decode()}
urllib.request.urlopen(urllib.request.Request(sys.argv[1], method="PUT", headers=headers))
PYTHON
}
endpoint=http://127.0.0.1:$gateway_port
tries=0
until make_bucket "$endpoint"; do
    tries=$((tries + 1))
    [ $tries -lt 240 ] || { tail -n 20 "$dir"/*.log >&2; fail "the gateway of Ceph does not answer"; }
    sleep 0.5
done
(umask 077 && printf 'aws_access_key_id = AKTEST\naws_secret_access_key = SKTESTSKTEST\n' >"$dir/credentials")
say "Ceph answers at $endpoint"

KEIKI_TEST_S3_ENDPOINT=$endpoint KEIKI_TEST_S3_BUCKET=keiki KEIKI_TEST_S3_CREDENTIALS=$dir/credentials "$@"
