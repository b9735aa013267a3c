#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Fails when something that is made from the sources is not what they make, or
# when a linter complains. Generated files have to be committed or staged.
set -euo pipefail
cd "$(dirname "$0")/.."

make generate
git diff --exit-code --stat -- bpf || {
	echo "verify: bpf/ differs from the index; commit or stage what make generate made" >&2
	exit 1
}
go mod tidy -diff
go -C hack/tools mod tidy -diff
go -C hack/helm mod tidy -diff
go -C hack/image mod tidy -diff
go -C e2e/apps mod tidy -diff
go -C e2e/cluster mod tidy -diff
go tool -modfile=hack/tools/go.mod golangci-lint fmt --diff
make lint
hack/chart.sh
go vet ./...
go -C hack/image vet .
go -C e2e/apps vet ./...
go -C e2e/cluster vet . ./peer
