#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Fetches several kernels: fetch-all.sh SERIES.... Prints the series that could be had.
set -euo pipefail

for one in "$@"; do
	status=0
	"$(dirname "$0")/fetch.sh" "$one" >&2 || status=$?
	case $status in
	0) echo "$one" ;;
	3) echo "== Linux $one is SKIPPED: it cannot be fetched" >&2 ;;
	*) exit "$status" ;;
	esac
done
