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
	local file=charts/podshunt/testdata/$1.yaml
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

# notes NAME [FLAG...] checks what an install prints. helm shows that only where
# there is a cluster, so a copy of the chart has it in a manifest.
notes() {
	local copy
	copy=$(mktemp -d)
	cp -R "$chart/." "$copy"
	mv "$copy/templates/NOTES.txt" "$copy"
	printf 'notes: |\n  {{- tpl (.Files.Get "NOTES.txt") . | nindent 2 }}\n' >"$copy/templates/notes.yaml"
	chart=$copy golden "$@" --show-only templates/notes.yaml
	rm -rf "$copy"
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

# accepted FLAG... wants a value to be taken.
accepted() {
	local output
	output=$(render "$@" 2>&1) || {
		echo "chart: refused: $*: $output" >&2
		status=1
	}
}

[[ ${1:-} != -update ]] || update=1
golden default
for values in "$chart"/values-*.yaml; do
	name=${values##*/values-}
	golden "${name%.yaml}" --values "$values"
done
golden everything --values "$chart/testdata/everything.values"
notes notes
notes notes-accept --set agent.kernelHazards=accept

refused --set kernelHazards=accept
refused --set agent.kernelHazard=accept
refused --set agent.kernelHazards=maybe
refused --set agent.maxFlows=many
refused --set 'agent.disableGuards={splice,oob}'
refused --set agent.disableGuards=splice
refused --set 'agent.extraArgs={proc=/host/proc}'
refused --set agent.pinDir=podshunt
refused --set agent.policyLease=300
refused --set agent.refreshInterval=30
refused --set agent.pinDir=/var/lib/podshunt
refused --set agent.pinDir=/sys/fs/bpf
refused --set agent.pinDir=/sys/fs/bpf/..
refused --set agent.pinDir=/sys/fs/bpf/a/podshunt
refused --set agent.healthAddress=19470
# With /agent.sock the longest is the 103 bytes that the agent accepts.
longest=/$(printf '%091d' 0)
accepted --set "agent.runDir=$longest"
refused --set "agent.runDir=${longest}0"
refused --set agent.runDir=/run/größe
refused --set image.name=podshunt
refused --set uninstall.timeout=30
refused --set uninstall.force=maybe
refused --set podMonitor.enable=true
exit "$status"
