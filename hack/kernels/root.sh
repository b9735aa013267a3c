#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Makes .cache/kernels/root.ext4, the disk of guests that run real programs: a
# Debian 12 with the packages of e2e/apps/packages. They are unpacked, not
# installed: no package's script runs, and what the programs need of those is made
# here. Nothing on this machine changes. It needs the
# tools that fetch.sh installs.
set -euo pipefail

top=$(git -C "$(dirname "$0")" rev-parse --show-toplevel)
cache=$top/.cache/kernels
apt=$top/.cache/apt/root
# A root file system's own, which no package depends on.
base=(base-files base-passwd bash coreutils dash debianutils diffutils findutils grep gzip hostname libc-bin mawk mount
	ncurses-base passwd perl-base procps sed tar util-linux)
# shellcheck source=hack/apt.sh
. "$top/hack/apt.sh"

mkdir -p "$cache" "$apt"
exec 9>"$apt/lock"
flock 9
# The disk is made anew when what it is made by changes.
made_by=$(cat "$0" "$top/hack/apt.sh" "$top"/e2e/apps/{newer.sh,packages} | sha256sum | cut -d' ' -f1)
[[ -f $cache/root.ext4 && $(cat "$cache/root.made-by" 2>/dev/null) == "$made_by" ]] && exit 0

mapfile -t packages < <(grep -v '^#' "$top/e2e/apps/packages")
main=$(archive)
security=$(archive -security)
apt_beside "$apt" <<SOURCES
deb $main bookworm main
deb $main bookworm-updates main
deb $security bookworm-security main
SOURCES
# What is no longer wanted would be unpacked too.
rm -f "$apt"/cache/archives/*.deb
apt-get install -qqy --no-install-recommends --download-only "${base[@]}" "${packages[@]}"

work=$(mktemp -d -p "$cache")
trap 'rm -rf "$work"' EXIT
root=$work/root
mkdir -p "$root"/usr/{bin,sbin,lib,lib64,libexec} "$root"/{dev,proc,sys,run,tmp,job,root,etc,var/tmp,var/log}
for dir in bin sbin lib lib64; do
	ln -s "usr/$dir" "$root/$dir"
done
for deb in "$apt"/cache/archives/*.deb; do
	dpkg-deb --fsys-tarfile "$deb" | tar -x -p --keep-directory-symlink -C "$root"
done
rm -rf "$root"/usr/share/{doc,man,locale,info} "$apt"/cache/archives/*.deb
(unset APT_CONFIG && "$top/e2e/apps/newer.sh" "$root/opt/newer")
# What the packages' scripts would do.
cp "$root/usr/share/base-passwd/passwd.master" "$root/etc/passwd"
cp "$root/usr/share/base-passwd/group.master" "$root/etc/group"
printf 'sshd:x:101:65534::/run/sshd:/usr/sbin/nologin\n' >>"$root/etc/passwd"
printf '127.0.0.1 localhost\n::1 localhost\n' >"$root/etc/hosts"
printf 'passwd: files\ngroup: files\nhosts: files\n' >"$root/etc/nsswitch.conf"
ln -sf mawk "$root/usr/bin/awk"
cp "$(command -v busybox)" "$root/usr/bin/busybox"
ldconfig -r "$root"
# Under emulation it takes minutes to compile what a program imports. Some files are not meant to compile.
[ ! -x "$root/usr/bin/python3" ] || chroot "$root" sh -c 'python3 -m compileall -q /usr/lib/python3 /usr/lib/python3.*' >/dev/null || true

# Sparse; what is free is for the programs' data. A guest's writes go to a file of its own, so no journal.
mke2fs -q -t ext4 -O ^has_journal -d "$root" "$work/root.ext4" 6G
mv "$work/root.ext4" "$cache/root.ext4"
echo "$made_by" >"$cache/root.made-by"
echo "kernels: the root has $(du -sm "$root" | cut -f1) MB"
