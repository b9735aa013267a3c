#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Pushes the image and the chart of a release to a registry, and signs both there:
# publish.sh DIRECTORY REGISTRY KEY. COSIGN_PASSWORD is the key's; for the registry,
# the login of docker or podman is used.
set -euo pipefail

usage="usage: publish.sh DIRECTORY REGISTRY KEY, such as bin/dist ghcr.io/podshunt cosign.key"
dist=$(realpath "${1:?$usage}")
registry=${2:?$usage}
key=$(realpath "${3:?$usage}")
top=$(git -C "$(dirname "$0")" rev-parse --show-toplevel)
cosign() { go -C "$top/hack/cosign" tool cosign "$@"; }

# What is pushed is what was signed, by the same key.
public=$(mktemp)
trap 'rm "$public"' EXIT
cosign public-key --key "$key" >"$public"
cosign verify-blob --key "$public" --insecure-ignore-tlog --bundle "$dist/checksums.txt.sigstore.json" "$dist/checksums.txt"
(cd "$dist" && sha256sum --check --quiet checksums.txt)
pushed=$(go -C "$top/hack/release" run . push -from "$dist" -to "$registry")
for reference in $pushed; do
	cosign sign --yes --key "$key" --use-signing-config=false --tlog-upload=false "$reference"
	echo "release: pushed and signed $reference"
done
