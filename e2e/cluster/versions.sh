#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Makes in a directory the releases that the cluster suite upgrades from and to, besides
# that of the working tree: versions.sh DIRECTORY. base/ is the last tag, or, until there
# is one, the first commit with a layout number; other/ is HEAD with maps of another layout;
# first/ is the oldest commit whose kernel objects can be replaced. What is there already is
# not made again.
set -euo pipefail

to=$(realpath -m "${1:?usage: versions.sh DIRECTORY}")
top=$(git -C "$(dirname "$0")" rev-parse --show-toplevel)
cd "$top"
work=$(mktemp -d)
trap 'git worktree remove --force "$work/tree" 2>/dev/null; rm -rf "$work"' EXIT

# checkout makes a work tree of a commit, unless DIRECTORY/NAME is of it already.
checkout() {
	local name=$1 commit=$2
	if [[ $(cat "$to/$name/commit" 2>/dev/null) == "$commit" ]]; then
		return 1
	fi
	echo "versions: $name is $commit" >&2
	git worktree remove --force "$work/tree" 2>/dev/null || true
	git worktree add --quiet --detach "$work/tree" "$commit"
	rm -rf "${to:?}/$name"
	mkdir -p "$to/$name"
}

base=$(git describe --tags --abbrev=0 --match='v[0-9]*' 2>/dev/null ||
	git log --reverse --format=%H -S'enum layout { LAYOUT' -- bpf/flow.h | sed -n 1p)
base=$(git rev-parse "$base^{commit}")
if checkout base "$base"; then
	"$work/tree/hack/release/dist.sh" "$base" "0.0.0-base" "$to/base/release"
	sed -n '/^enum layout/p' "$work/tree/bpf/flow.h" >"$to/base/layout"
	echo "$base" >"$to/base/commit"
fi

# Fields in front of those that other builds read, and another number.
head=$(git rev-parse HEAD)
if checkout other "$head"; then
	sed -i -e 's/^enum layout { LAYOUT = /&9/' \
		-e 's/^\t__u64 cookie\[SIDE_MAX\]; \/\* FROZEN \*\/$/\t__u64 moved[8];\n&/' \
		-e 's/sizeof(struct flow) == 8 + /&64 + /' \
		-e 's/^struct settings {$/&\n\t__u64 moved;/' "$work/tree/bpf/flow.h"
	make -C "$work/tree" --no-print-directory generate
	"$work/tree/hack/release/dist.sh" "$head-other" "0.0.0-other" "$to/other/release"
	echo "$head" >"$to/other/commit"
fi

first=$(git rev-parse dbe51ab)
if checkout first "$first"; then
	make -C "$work/tree" --no-print-directory build
	go -C "$work/tree" run ./hack/image -name ghcr.io/podshunt/podshunt:0.0.0 -o "$work/image.tar"
	mkdir "$to/first/release"
	mv "$work/image.tar" "$to/first/release/podshunt-image-0.0.0.tar"
	go tool -modfile=hack/helm/go.mod helm package "$work/tree/charts/podshunt" --version 0.0.0 --app-version 0.0.0 --destination "$to/first/release"
	echo "$first" >"$to/first/commit"
fi
