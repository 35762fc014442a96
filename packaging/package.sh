#!/usr/bin/env bash
# Builds a package from the optimised binary: packaging/package.sh deb|rpm
#
# `make build` comes first; KEIKI_BINARY names another binary. The package lies in target/package afterwards and its
# path is printed. It holds the binary, the systemd unit, the group, the directories, the sample configuration and
# the licence. It neither enables nor starts the agent: that needs a configuration first.
set -euo pipefail
umask 022
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() { echo "error: $1" >&2; [ $# -lt 2 ] || echo "hint: $2" >&2; exit 1; }

target_directory=${CARGO_TARGET_DIR:-target}
binary=${KEIKI_BINARY:-$target_directory/release/keiki}
output=$target_directory/package
version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)
summary=$(sed -n 's/^description = "\(.*\)"/\1/p' Cargo.toml)
[ -x "$binary" ] || fail "there is no binary '$binary'" "run 'make build' first"
# The same commit gives the same times in the package.
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || date +%s)}
export SOURCE_DATE_EPOCH

# The files as they will lie on the host.
stage() {
    local root=$1
    rm -rf "$root"
    install -D -m 755 "$binary" "$root/usr/bin/keiki"
    strip --strip-debug "$root/usr/bin/keiki"
    install -D -m 644 systemd/keiki.service "$root/usr/lib/systemd/system/keiki.service"
    install -D -m 644 systemd/keiki.sysusers.conf "$root/usr/lib/sysusers.d/keiki.conf"
    install -D -m 644 systemd/keiki.tmpfiles.conf "$root/usr/lib/tmpfiles.d/keiki.conf"
    install -D -m 644 config/keiki.toml "$root/etc/keiki/keiki.toml"
    install -d -m 755 "$root/usr/share/doc/keiki"
    install -m 644 LICENSE "$root/usr/share/doc/keiki/copyright"
    gzip -9nc CHANGELOG.md >"$root/usr/share/doc/keiki/changelog.gz"
}

# The newest symbol version of the C library that the binary asks for: `2.36`; nothing for a static binary.
needed_libc() {
    objdump -T "$1" 2>/dev/null | sed -n 's/.*(\?GLIBC_\([0-9][0-9.]*\).*/\1/p' | sort -Vu | tail -n 1
}

build_deb() {
    local root=$output/deb libc architecture depends="systemd"
    stage "$root"
    libc=$(needed_libc "$root/usr/bin/keiki")
    [ -z "$libc" ] || depends="libc6 (>= $libc), libgcc-s1, $depends"
    architecture=$(dpkg --print-architecture)
    install -d -m 755 "$root/DEBIAN"
    install -m 755 packaging/deb/postinst packaging/deb/prerm packaging/deb/postrm "$root/DEBIAN/"
    echo /etc/keiki/keiki.toml >"$root/DEBIAN/conffiles"
    (cd "$root" && find usr -type f -print0 | sort -z | xargs -0 md5sum) >"$root/DEBIAN/md5sums"
    cat >"$root/DEBIAN/control" <<END
Package: keiki
Version: $version
Architecture: $architecture
Maintainer: The keiki authors <keiki@localhost>
Installed-Size: $(du -sk --exclude=DEBIAN "$root" | cut -f 1)
Depends: $depends
Section: database
Priority: optional
Description: $summary
 keiki runs as an agent beside the database servers of a host. It ships what
 they write, takes base backups online, and grows clones at any moment of the
 past on another host, each with an archive of its own.
END
    local package="$output/keiki_${version}_$architecture.deb"
    dpkg-deb --root-owner-group -Zxz --build "$root" "$package" >/dev/null
    echo "$package"
}

build_rpm() {
    command -v rpmbuild >/dev/null || fail "there is no rpmbuild" "on Debian: apt-get install rpm"
    local root top architecture
    root=$(realpath -m "$output/rpm/files")
    top=$(realpath -m "$output/rpm/build")
    architecture=$(uname -m)
    rm -rf "$top"
    stage "$root"
    mkdir -p "$top"
    # What rpmbuild would do to the files is done already, so every one of its own steps is off.
    rpmbuild --quiet -bb --target "$architecture-linux" --define "_topdir $top" --define "_rpmdir $output" \
        --define "_build_name_fmt keiki-%%{VERSION}-%%{RELEASE}.%%{ARCH}.rpm" \
        --define "keiki_version $version" --define "keiki_summary $summary" --define "keiki_files $root" \
        --define "_binary_payload w6.xzdio" --define "debug_package %{nil}" --define "__os_install_post %{nil}" \
        --define "_build_id_links none" --define "source_date_epoch_from_changelog 0" \
        --define "use_source_date_epoch_as_buildtime 1" --define "clamp_mtime_to_source_date_epoch 1" \
        packaging/rpm/keiki.spec
    echo "$output/keiki-$version-1.$architecture.rpm"
}

mkdir -p "$output"
case ${1:-} in
deb) build_deb ;;
rpm) build_rpm ;;
*) fail "which package? '${1:-}' is neither deb nor rpm" ;;
esac
