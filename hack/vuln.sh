#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Looks for known vulnerabilities in what the programs call: vuln.sh PACKAGE.... The
# database is Go's, or another one (GOVULNDB). Where Go's cannot be reached, nothing is
# checked: that is said, and fails if VULN is "required".
set -euo pipefail
cd "$(dirname "$0")/.."

output=$(mktemp)
trap 'rm "$output"' EXIT
status=0
go tool -modfile=hack/tools/go.mod govulncheck ${GOVULNDB:+-db "$GOVULNDB"} "$@" >"$output" 2>&1 || status=$?
cat "$output"
if ((status == 0)); then
	echo "vuln: checked"
elif ((status == 1)) && grep -q '^govulncheck: fetching vulnerabilities: ' "$output"; then
	echo "vuln: NOT CHECKED: the database of vulnerabilities cannot be reached (VULN=required makes that fail, GOVULNDB=URL names a copy)" >&2
	[[ ${VULN:-} != required ]] || exit 1
else
	exit "$status"
fi
