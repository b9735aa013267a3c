#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Real programs between pods of an agent with the default settings, on other
# kernels than the machine's own: apps.sh SERIES.... Two guests run side by side.
# PROGRAMS is a regular expression for the programs' names (default all), and
# PROGRAM_TIMEOUT how long one run of a program may take (default 10m).
#
# What was found of a program is kept in .cache/kernels/apps, by what podshunt and
# the suite are built of, and a program that works is not run again until that
# changes or FRESH is 1. So a run may be stopped and taken up again.
set -euo pipefail

top=$(git -C "$(dirname "$0")" rev-parse --show-toplevel)
cache=$top/.cache/kernels

file_of() { printf '%s/%s.json' "$1" "$(tr -c 'A-Za-z0-9\n' - <<<"$2")"; }

# collect keeps what a guest has printed of each program.
collect() {
	local line name
	[ -f "$1/output" ] || return 0
	tr -d '\r' <"$1/output" | sed -n 's/^outcome //p' | while read -r line; do
		name=${line#'{"program":"'}
		echo "$line" >"$(file_of "$1" "${name%%\"*}")"
	done
	mv "$1/output" "$1/output.collected"
}

# series runs the programs that are not known to work on one kernel.
series() {
	local dir=$results/$1 name wanted=() pattern status=0
	mkdir -p "$dir"
	collect "$dir" # of a run that was stopped
	while read -r name; do
		[[ ${FRESH:-} != 1 ]] && grep -qs '"works":true' "$(file_of "$dir" "$name")" && continue
		wanted+=("$name")
	done < <(grep -E "${PROGRAMS:-.}" "$results/programs")
	if ((${#wanted[@]} == 0)); then
		echo "all of them are known to work"
		return
	fi
	pattern=$(printf '%s\n' "${wanted[@]}" | sed 's/[][().*+?^$|\\]/\\&/g' | paste -sd '|')
	VM_DISK=$cache/root.ext4 VM_MEMORY=${VM_MEMORY:-3072} VM_TIMEOUT=${VM_TIMEOUT:-14400} VM_OUTPUT=$dir/output \
		go tool -modfile="$top/hack/tools/go.mod" gotestsum --format=testname --raw-command -- \
		go tool test2json -p "linux-$1/apps" \
		"$top/hack/kernels/run.sh" "$1" "$results/apps.test" -test.v=test2json -test.timeout 5h \
		-test.run '^TestDefaults$' -program-timeout "${PROGRAM_TIMEOUT:-10m}" -programs "^($pattern)\$" || status=$?
	collect "$dir"
	return "$status"
}

# What the results stand for: podshunt without its version, the suite, and the programs.
mkdir -p "$cache/apps"
build=$(mktemp -d -p "$cache/apps")
trap 'rm -rf "$build"' EXIT
(cd "$top" && CGO_ENABLED=0 go build -trimpath -buildvcs=false -o "$build/" ./plugin ./agent)
(cd "$top/e2e/apps" && CGO_ENABLED=0 go test -trimpath -buildvcs=false -c -o "$build/apps.test" .)
list=$("$top/hack/kernels/fetch-all.sh" "$@")
read -ra fetched <<<"${list//$'\n'/ }"
"$top/hack/kernels/root.sh"
key=$(cat "$build"/* "$cache/root.made-by" | sha256sum | cut -c1-16)
results=$cache/apps/$key
mkdir -p "$results"
ln -sfn "$key" "$cache/apps/latest"
mv "$build/apps.test" "$results/apps.test"
rm -rf "$build"
"$results/apps.test" -list >"$results/programs"
if ! grep -qE "${PROGRAMS:-.}" "$results/programs"; then
	echo "apps.sh: PROGRAMS=$PROGRAMS matches none of these:" >&2
	cat "$results/programs" >&2
	exit 2
fi

status=0
running=0
for one in "${fetched[@]}"; do
	if ((running == 2)); then
		wait -n || status=1
		running=1
	fi
	series "$one" >"$results/$one.log" 2>&1 &
	running=$((running + 1))
	echo "== Linux $one: what it prints is in $results/$one/output" >&2
done
while ((running > 0)); do
	wait -n || status=1
	running=$((running - 1))
done
for one in "${fetched[@]}"; do
	echo "== Linux $one"
	cat "$results/$one.log"
done
(cd "$top" && go run ./hack/programs "$results")
exit "$status"
