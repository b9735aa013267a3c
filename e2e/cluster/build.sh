#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Makes in a directory all that the cluster suite runs besides podshunt itself:
# usr/ from Debian's archive, bin/ from go.mod. The first time takes minutes.
set -euo pipefail

cache=$(realpath -m "${1:?usage: build.sh DIRECTORY}")
cd "$(dirname "$0")"

./debs.sh "$cache/usr"

version=$(go list -m -f '{{.Version}}' k8s.io/kubernetes)
IFS=. read -r major minor _ <<<"${version#v}"
flags="-s -w"
for package in k8s.io/component-base/version k8s.io/client-go/pkg/version; do
	flags+=" -X $package.gitVersion=$version -X $package.gitMajor=$major -X $package.gitMinor=$minor"
done
mkdir -p "$cache/bin"
export CGO_ENABLED=0
go build -trimpath -ldflags "$flags" -o "$cache/bin/" ./kubestack
for name in etcd kube-apiserver kube-controller-manager kube-scheduler kubelet kube-proxy kubectl; do
	ln -sf kubestack "$cache/bin/$name"
done
go list -f '{{.ImportPath}}' tool | xargs go build -trimpath -ldflags "-s -w" -o "$cache/bin/"
go build -trimpath -ldflags "-s -w" -o "$cache/bin/" ./peer
# Beside helm, which is Helm 3. Without -trimpath its packages are those that go tool compiles.
go -C ../../hack/helm4 build -ldflags "-s -w" -o "$cache/bin/helm4" helm.sh/helm/v4/cmd/helm
