#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# The kernel tests of the datapath on other kernels than the machine's own, where
# trampolines are allowed: test.sh SERIES.... Left out are the tests that move
# hundreds of MiB, as QEMU emulates the CPU here.
set -euo pipefail

top=$(git -C "$(dirname "$0")" rev-parse --show-toplevel)
tests='^(TestPairing|TestHazards|TestSleepersKeptOut|TestStalledReader)$'
binary=$top/.cache/kernels/datapath.test
status=0

mkdir -p "$top/.cache/kernels"
(cd "$top" && CGO_ENABLED=0 go test -c -o "$binary" ./agent/datapath)
for series in "$@"; do
	echo "== Linux $series"
	fetched=0
	"$top/hack/kernels/fetch.sh" "$series" || fetched=$?
	if ((fetched == 3)); then
		echo "== Linux $series is SKIPPED: it cannot be fetched"
	elif ((fetched)); then
		status=$fetched
	else
		"$top/hack/kernels/run.sh" "$series" "$binary" -test.v -test.run "$tests" || status=$?
	fi
done
exit "$status"
