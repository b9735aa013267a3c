#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Compares what the chart makes of its defaults and of each distribution's values
# with charts/podshunt/testdata, and sees the schema refuse what it has to.
# With -update it writes the files instead.
set -euo pipefail
cd "$(dirname "$0")/.."

chart=charts/podshunt
helm() { go tool -modfile=hack/helm/go.mod helm "$@"; }
render() { helm template podshunt "$chart" --namespace podshunt --kube-version 1.34.4 "$@"; }

status=0
# golden NAME [FLAG...] checks the manifests of one set of values.
golden() {
	local file=$chart/testdata/$1.yaml
	shift
	if [[ ${update:-} ]]; then
		render "$@" >"$file"
		return
	fi
	render "$@" | diff -u "$file" - || {
		echo "chart: $file differs; if that is meant, run hack/chart.sh -update" >&2
		status=1
	}
}

# refused FLAG... wants the schema to refuse a value, not something else to fail.
refused() {
	local output
	if output=$(render "$@" 2>&1); then
		echo "chart: accepted: $*" >&2
		status=1
	elif [[ $output != *"meet the specifications of the schema"* ]]; then
		echo "chart: $*: $output" >&2
		status=1
	fi
}

[[ ${1:-} != -update ]] || update=1
golden default
for values in "$chart"/values-*.yaml; do
	name=${values##*/values-}
	golden "${name%.yaml}" --values "$values"
done
golden everything --values "$chart/testdata/everything.values"

refused --set kernelHazards=accept
refused --set agent.kernelHazard=accept
refused --set agent.kernelHazards=maybe
refused --set agent.maxPods=many
refused --set agent.pinDir=podshunt
refused --set agent.policyLease=300
refused --set agent.refreshInterval=30
refused --set image.name=podshunt
refused --set uninstall.timeout=30
refused --set uninstall.force=maybe
refused --set podMonitor.enable=true
exit "$status"
