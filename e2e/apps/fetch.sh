#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Puts the programs of `make test-apps` that this machine lacks into a directory,
# from Debian's archive: fetch.sh DIRECTORY. Does nothing when the directory has
# them all. With a list of packages, fetch.sh DIRECTORY LIST, they are those.
#
# They are unpacked, not installed: no package's script runs, so no service is
# started or enabled and no user is made, and nothing changes outside of the
# directory.
set -euo pipefail

out=${1:?usage: fetch.sh DIRECTORY [LIST]}
own=$(dirname "$0")/packages
list=${2:-$own}
mapfile -t packages < <(grep -v '^#' "$list")

if ! command -v apt-get >/dev/null; then
	[ -d "$out" ] && exit 0
	echo "fetch.sh: no apt-get here; make $out, empty, and install the equivalents of Debian's: ${packages[*]}" >&2
	exit 3
fi
# What it is made by.
made_by=$(cat "$(dirname "$0")"/{fetch.sh,newer.sh} "$list" | sha256sum)
[[ -f $out/.made-by && $(<"$out/.made-by") == "$made_by" ]] && exit 0
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# shellcheck source=hack/apt.sh
. "$(dirname "$0")/../../hack/apt.sh"
apt_alone "$work/apt"
mkdir "$work/root"
apt-get update -q
# apt finds out which packages and libraries are missing here or older than the others want.
apt-get install -qy --no-install-recommends --download-only "${packages[@]}"
find "$work/apt/cache/archives" -name '*.deb' -exec dpkg-deb -x {} "$work/root" \;
for dir in bin sbin lib lib64; do # of packages from before /usr was merged
	[ ! -d "$work/root/$dir" ] || cp -a "$work/root/$dir/." "$work/root/usr/$dir/"
done
[ "$list" != "$own" ] || (unset APT_CONFIG && "$(dirname "$0")/newer.sh" "$work/root/opt/newer")
echo "$made_by" >"$work/root/.made-by"
rm -rf "$out"
mkdir -p "$(dirname "$out")"
mv "$work/root" "$out"
