#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Makes all files of a release, unsigned, in a directory: dist.sh BINARIES-VERSION
# VERSION DIRECTORY. What they are made of is the working tree; the time that they
# have is that of HEAD's commit.
set -euo pipefail

binaries_version=${1:?usage: dist.sh BINARIES-VERSION VERSION DIRECTORY}
version=${2:?usage: dist.sh BINARIES-VERSION VERSION DIRECTORY}
dist=$(realpath -m "${3:?usage: dist.sh BINARIES-VERSION VERSION DIRECTORY}")
top=$(git -C "$(dirname "$0")" rev-parse --show-toplevel)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# Of go.mod, or a newer one: the compiler is the one thing that a build takes from outside of the repository.
go=$(go -C "$top" mod edit -json | sed -n 's/^\t"Toolchain": "\(.*\)",\?$/\1/p')
binaries=()
for architecture in amd64 arm64; do
	# Settings of the one who builds must not show in the binaries.
	env GOENV=off GOPROXY="$(go env GOPROXY)" GOCACHE="$(go env GOCACHE)" GOMODCACHE="$(go env GOMODCACHE)" \
		GOTOOLCHAIN="$go" GOOS=linux GOARCH="$architecture" GOAMD64=v1 GOARM64=v8.0 GOEXPERIMENT= GOFIPS140=off \
		GOFLAGS=-mod=readonly GOWORK=off CGO_ENABLED=0 \
		make -C "$top" --no-print-directory build BIN="$work/$architecture" VERSION="$binaries_version"
	binaries+=(-binaries "$architecture=$work/$architecture")
done
rm -rf "$dist"
GOTOOLCHAIN=$go go -C "$top/hack/release" run . files -top "$top" -version "$version" \
	-revision "$(git -C "$top" rev-parse HEAD)" -created "$(git -C "$top" log -1 --format=%ct)" "${binaries[@]}" -o "$dist"
echo "release: the files of $version are in $dist"
