#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Does `apt-get update`, and waits up to ten minutes for another apt that is at it:
# DPkg::Lock::Timeout is for dpkg's lock, not for that of the lists (apt 2.6).
# Arguments are passed on.
set -euo pipefail

end=$((SECONDS + 600))
until output=$(LC_ALL=C apt-get update -q -o DPkg::Lock::Timeout=600 "$@" 2>&1); do
	if [[ $output != *"Could not get lock"* ]] || ((SECONDS >= end)); then
		echo "$output" >&2
		exit 1
	fi
	sleep 2
done
echo "$output"
