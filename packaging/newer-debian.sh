#!/usr/bin/env bash
# Unpacks programs of a newer Debian, with every library that they need, into a directory of their own. Nothing of the
# system changes, and no root is needed.
#
#   packaging/newer-debian.sh SUITE DIRECTORY PACKAGE..
#
# The packages come from the mirror that apt is set up to use, with apt's own check of signatures; an own list of
# sources and an empty list of what is installed make apt bring the whole closure, libc included. Programs are then told
# to use those libraries, so DIRECTORY must stay where it is. It gets its name when it is complete.
set -euo pipefail
umask 022

say() { echo "newer-debian: $*" >&2; }
fail() { say "error: $1"; [ $# -lt 2 ] || say "hint: $2"; exit 1; }

[ $# -ge 3 ] || fail "a suite, a directory and the names of packages are needed"
suite=$1 directory=$2
shift 2
command -v patchelf >/dev/null || fail "there is no patchelf on the PATH" "it is in Debian's package patchelf"

work=$(mktemp -d "$directory.unfinished.XXXXXX")
trap 'rm -rf "$work"' EXIT
chmod 755 "$work"

# Of all the places that apt has Debian's main section from, the first.
# shellcheck disable=SC2016  # apt-get expands them
mirror=$(apt-get indextargets --format '$(SITE) $(REPO_URI) $(COMPONENT) $(LABEL)' 'Created-By: Packages' 2>/dev/null |
    awk '$3 == "main" && $4 == "Debian" { print $2; exit }')
[ -n "$mirror" ] || fail "apt on this machine has no mirror of Debian to take '$suite' from" "run 'apt-get update' first"
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
[ -r "$keyring" ] || fail "there is no '$keyring'" "it is in Debian's package debian-archive-keyring"

mkdir -p "$work/apt/lists/partial" "$work/apt/cache/archives/partial" "$work/root"
: >"$work/apt/status"
echo "deb [signed-by=$keyring] $mirror $suite main" >"$work/apt/sources.list"
# A mirror that is a picture of one day is past the date until which its lists are good; they are signed all the same.
apt=(apt-get -q -o "Dir::Etc::sourcelist=$work/apt/sources.list" -o Dir::Etc::sourceparts=/dev/null
    -o Dir::Etc::preferencesparts=/dev/null -o Dir::Etc::preferences=/dev/null
    -o "Dir::State::Lists=$work/apt/lists" -o "Dir::State::status=$work/apt/status" -o "Dir::Cache=$work/apt/cache"
    -o Acquire::Check-Valid-Until=false -o Acquire::Languages=none -o Acquire::Retries=3 -o APT::Default-Release= -o APT::Install-Recommends=0
    -o APT::Sandbox::User= -o Debug::NoLocking=1)
"${apt[@]}" update </dev/null >"$work/log" 2>&1 && "${apt[@]}" -y --download-only install "$@" </dev/null >>"$work/log" 2>&1 || {
    tail -n 20 "$work/log" >&2
    fail "cannot download with apt from '$suite' of '$mirror': $*"
}
for package in "$work"/apt/cache/archives/*.deb; do
    dpkg -x "$package" "$work/root"
done

libraries=$directory/usr/lib/$(uname -m)-linux-gnu
unpacked_libraries=$work/root/usr/lib/$(uname -m)-linux-gnu
for loader in "$unpacked_libraries"/ld-linux-*.so.*; do
    [ -e "$loader" ] || fail "the packages of '$suite' have no loader in '$unpacked_libraries'"
    loader=$libraries/$(basename "$loader")
    break
done
# The tools of Redis and Valkey are the servers under another name: they look at the name that they are called by.
for product in redis valkey; do
    [ ! -e "$work/root/usr/bin/$product-check-rdb" ] || ln -sfn "$product-check-rdb" "$work/root/usr/bin/$product-server"
done
for program in "$work"/root/usr/{bin,sbin}/{mysql*,mariadb*,mbstream,my_print_defaults,resolveip,redis-*,valkey-*}; do
    # Scripts and links to other programs of the list need nothing.
    [ -f "$program" ] && [ ! -L "$program" ] && patchelf --print-interpreter "$program" >/dev/null 2>&1 || continue
    # RPATH rather than RUNPATH, so that plugins find the libraries too.
    patchelf --set-interpreter "$loader" --force-rpath --set-rpath "$libraries" "$program"
done
rm -rf "$work"/root/usr/share/{doc,man,locale,info}
rm -rf "$directory"
mv "$work/root" "$directory"
chmod 755 "$directory"
