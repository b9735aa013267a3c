#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Fails unless two helm commands make the same of the chart, for each file of values and on both
# sides of Kubernetes 1.30. Helm 4 writes more empty lines.
set -euo pipefail
cd "$(dirname "$0")/.."
read -ra one <<<"${1:?usage: helm.sh HELM HELM}"
read -ra other <<<"${2:?usage: helm.sh HELM HELM}"

dir=$(mktemp -d)
trap 'rm -r "$dir"' EXIT
for values in charts/podshunt/values*.yaml; do
	for version in 1.29 1.34; do
		args=(template podshunt charts/podshunt --values "$values" --kube-version "$version")
		"${one[@]}" "${args[@]}" >"$dir/one"
		"${other[@]}" "${args[@]}" >"$dir/other"
		diff --ignore-blank-lines "$dir/one" "$dir/other" || {
			echo "helm.sh: $1 and $2 differ with $values for Kubernetes $version" >&2
			exit 1
		}
	done
done
