#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Fails unless Helm 3 and Helm 4 make the same of the chart, and that is valid manifests, for
# each file of values and on both sides of Kubernetes 1.30. Helm 4 writes more empty lines.
set -euo pipefail
cd "$(dirname "$0")/.."

# Their paths: to run them by go tool takes longer than all that they do here.
helm3=$(go tool -n -modfile=hack/helm/go.mod helm)
helm4=$(go tool -n -modfile=hack/helm4/go.mod helm)
dir=$(mktemp -d)
trap 'rm -r "$dir"' EXIT
go -C hack/helm build -o "$dir/manifests" ./manifests
for values in charts/podshunt/values*.yaml charts/podshunt/tests/{everything,nothing}.yaml; do
	for version in 1.29 1.34; do
		args=(template podshunt charts/podshunt --values "$values" --kube-version "$version")
		"$helm3" "${args[@]}" >"$dir/3"
		"$helm4" "${args[@]}" >"$dir/4"
		diff --ignore-blank-lines "$dir/3" "$dir/4" || {
			echo "helm.sh: Helm 3 and Helm 4 differ with $values for Kubernetes $version" >&2
			exit 1
		}
		"$dir/manifests" <"$dir/3" || {
			echo "helm.sh: these manifests are not valid with $values for Kubernetes $version" >&2
			exit 1
		}
	done
done
