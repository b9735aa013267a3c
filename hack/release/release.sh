#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Makes the release of the tag at HEAD in a directory, and signs it with the key of a
# file, if one is given: release.sh DIRECTORY [KEY]. COSIGN_PASSWORD is the key's.
set -euo pipefail

dist=${1:?usage: release.sh DIRECTORY [KEY]}
key=${2:-}
top=$(git -C "$(dirname "$0")" rev-parse --show-toplevel)

tag=$(git -C "$top" describe --tags --exact-match --match 'v[0-9]*.[0-9]*.[0-9]*' 2>/dev/null) || {
	echo "release: HEAD has no tag such as v1.2.3: check out the tag of a release, or see \`make dist\`" >&2
	exit 1
}
if [[ $(git -C "$top" status --porcelain) ]]; then
	echo "release: the working tree is not what $tag is: commit, stash or remove these" >&2
	git -C "$top" status --short >&2
	exit 1
fi
"$top/hack/release/dist.sh" "$tag" "${tag#v}" "$dist"
if [[ -z $key ]]; then
	echo "release: NOT SIGNED: COSIGN_KEY=FILE has the key" >&2
	exit 0
fi
key=$(realpath "$key")
cosign() { go -C "$top/hack/cosign" tool cosign "$@"; }
# A key that is a file is in no transparency log.
cosign sign-blob --yes --key "$key" --use-signing-config=false --tlog-upload=false --bundle "$(realpath "$dist")/checksums.txt.sigstore.json" "$(realpath "$dist")/checksums.txt"
cosign public-key --key "$key" --outfile "$(realpath "$dist")/cosign.pub"
echo "release: signed $dist/checksums.txt"
