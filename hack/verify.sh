#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Fails when something that is made from the sources is not what they make, or
# when a linter complains. Generated files have to be committed or staged.
set -euo pipefail
cd "$(dirname "$0")/.."

# committed fails if files differ from the index.
committed() {
	git diff --exit-code --stat -- "$@" || {
		echo "verify: these differ from the index; if that is meant, commit or stage them" >&2
		exit 1
	}
}

make generate
committed bpf charts/podshunt/README.md
# helm-docs takes a value without a comment.
if grep -n '|  |$' charts/podshunt/README.md; then
	echo "verify: these values have no description in charts/podshunt/values.yaml" >&2
	exit 1
fi
go mod tidy -diff
go -C hack/tools mod tidy -diff
go -C hack/helm mod tidy -diff
go -C hack/helm4 mod tidy -diff
go -C hack/release mod tidy -diff
go -C e2e/apps mod tidy -diff
go -C e2e/cluster mod tidy -diff
go tool -modfile=hack/tools/go.mod golangci-lint fmt --diff
make lint
make test-chart
# helm-unittest makes a snapshot that is not there.
committed charts/podshunt/tests
# golangci-lint has vetted the rest.
go -C e2e/cluster vet -tags upgrade . ./peer
# Last, so that it is seen when the database cannot be reached.
make vuln
