#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Unpacks programs of which a newer version than Debian 12's matters into a
# directory, from Debian 13 with all their libraries: newer.sh DIRECTORY. They run
# by the loader that lies beside them, so that the machine's libraries do not matter.
set -euo pipefail

out=${1:?usage: newer.sh DIRECTORY}
packages=(haproxy)

# shellcheck source=hack/apt.sh
. "$(dirname "$0")/../../hack/apt.sh"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
main=$(archive)
security=$(archive -security)
apt_beside "$work" <<SOURCES
deb $main trixie main
deb $security trixie-security main
SOURCES
apt-get install -qqy --no-install-recommends --download-only "${packages[@]}"
mkdir -p "$out"
find "$work/cache/archives" -name '*.deb' -exec dpkg-deb -x {} "$out" \;
rm -rf "${out:?}/usr/share"
