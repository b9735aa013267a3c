#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Installs what `make generate`, `make lint`, `make unit` and `make race` need besides Go,
# from Debian's archive. Does nothing when all of it is there.
set -euo pipefail

packages=(clang-19 llvm-19 clang-format-19 libbpf-dev shellcheck gcc libc6-dev)

if ! command -v apt-get >/dev/null; then
	echo "deps.sh: no apt-get here; needed are the equivalents of Debian's: ${packages[*]}" >&2
	exit 0
fi
missing=()
for package in "${packages[@]}"; do
	status=$(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null) || true
	[[ $status == installed ]] || missing+=("$package")
done
((${#missing[@]})) || exit 0

# shellcheck source=hack/apt.sh
. "$(dirname "$0")/apt.sh"
apt_install "${missing[@]}"
