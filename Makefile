# SPDX-License-Identifier: Apache-2.0

VERSION ?= $(shell git describe --always --dirty --tags 2>/dev/null || echo devel)
# Of the chart and the image: what helm takes for a version.
RELEASE ?= $(patsubst v%,%,$(if $(findstring .,$(VERSION)),$(VERSION),0.0.0-g$(VERSION)))
IMAGE ?= ghcr.io/podshunt/podshunt:$(RELEASE)
# Where build has its binaries.
BIN ?= bin
# The objects in bpf/ are committed: another clang makes others.
CLANG ?= clang-19
LLVM_STRIP ?= llvm-strip-19
CLANG_FORMAT ?= clang-format-19
BPF_CFLAGS ?= -O2 -g -mcpu=v3 -Wall -Wextra -Wpadded -Werror -I/usr/include/$(shell uname -m)-linux-gnu
KERNELS ?= 6.12 6.1 7.3 5.10
# Those on which pods take part by default, and the oldest two of them.
APPS_KERNELS ?= $(filter-out 5.%,$(KERNELS))
SMALL_KERNELS ?= $(filter 6.1 6.12,$(KERNELS))
# Names of programs for test-apps-kernels, by regular expression: by default all. FRESH=1 runs
# those again that are known to work.
PROGRAMS ?=
FRESH ?=
# What has to work on every change: splicing, sockets that ask with FIONREAD, sockets in blocking mode.
SMALL := ^(haproxy, HTTP, splice, POST|Go TCP proxy, POST|nginx, proxy, no buffering, POST|nginx, PUT of 20 MB|Python http.server, curl)$$
# Programs of the apps suite that the machine lacks, unpacked; make clean leaves them.
APPS ?= $(CURDIR)/.cache/apps
# What the cluster suite needs besides podshunt; minutes to make, so make clean leaves it.
CLUSTER ?= $(CURDIR)/.cache/cluster
# For go test, such as -v or -run Pairing.
TESTFLAGS ?=
# Flags for bench, such as "-rows '^stream 16 KiB' -cores one -rounds 20", and for bench-apps and bench-apps-quick, such as
# "-programs ^redis". A run of some rows only leaves docs/measurements.md as it is.
BENCH_ARGS ?=
# Where the database of vulnerabilities cannot be reached, vuln and verify only say so, unless this is "required".
VULN ?=
# Where dist and release have their files.
DIST ?= $(CURDIR)/bin/dist
# The private key, a file, that release and publish sign with; COSIGN_PASSWORD is its password.
COSIGN_KEY ?=
# Where publish pushes to: what README installs from.
REGISTRY ?= ghcr.io/podshunt
# What runs the tests of unit, test and test-cluster; CI takes a program that repeats the failures at the end.
GOTEST ?= go test

SUDO := $(if $(filter 0,$(shell id -u)),,sudo -E)
BUILD := go build -trimpath -buildvcs=false -ldflags "-s -w -X main.version=$(VERSION)"
GOLANGCI_LINT := go tool -modfile=hack/tools/go.mod golangci-lint
HELM := go tool -modfile=hack/helm/go.mod helm
HELM4 := go tool -modfile=hack/helm4/go.mod helm
HELM_UNITTEST := go tool -modfile=hack/helm/go.mod helm-unittest --strict
HELM_DOCS := go tool -modfile=hack/helm/go.mod helm-docs --sort-values-order file --log-level warning
PACK := go -C hack/release run .
PLUGINS := github.com/containernetworking/plugins/plugins
UNIT := ./api ./plugin ./agent/...
# Tests of race. The ones left out kill a process at every step that it takes, or sit
# a time out, on one thread: make test has them.
RACE := ./agent ./agent/datapath ./agent/diag ./agent/hazards ./agent/nat ./agent/proc
RACE_SKIP := ^(TestOpenKilled|TestUnloadKilled|TestUnloadGoesOn|TestDeletedMap|TestRestedReader|TestForgottenConnections|TestRefresh)$$
# How long each fuzz target is fuzzed.
FUZZTIME ?= 20s

export CGO_ENABLED = 0
.DEFAULT_GOAL := help
.PHONY: demo test test-kernels test-apps test-apps-kernels test-apps-kernels-small test-apps-table test-cluster test-upgrade test-chart test-release build cni unit race fuzz generate lint verify vuln bench bench-apps bench-apps-quick bin/bench-apps image chart dist release publish clean help

demo: build cni ## two pods on this machine, plain TCP and shortcut side by side (root)
	$(BUILD) -o bin/demo ./hack/demo
	$(SUDO) bin/demo

# One package at a time: kernel tests share the machine.
test: build cni ## all tests; none may be skipped (root)
	REQUIRE_ROOT=1 $(GOTEST) -exec "$(SUDO)" -p 1 -count=1 -timeout 25m $(TESTFLAGS) ./...

test-kernels: build cni ## kernel tests on Debian's kernels in QEMU (root)
	$(SUDO) hack/kernels/test.sh $(KERNELS)

# -v shows each program's result while it runs, and the table.
test-apps: build cni ## real programs between two pods, on plain TCP and with the shortcut (root)
	$(SUDO) e2e/apps/fetch.sh $(APPS)
	REQUIRE_ROOT=1 PODSHUNT_APPS=$(APPS) go -C e2e/apps test -exec "$(SUDO)" -count=1 -timeout 20m -v -run 'TestPrograms|TestJavaBlocking' . $(TESTFLAGS)

# One kernel, KERNELS=6.12, is a piece of work; what works is not run again.
test-apps-kernels: build cni ## real programs with the default settings on Debian's kernels in QEMU (root)
	$(SUDO) PROGRAMS='$(PROGRAMS)' FRESH='$(FRESH)' hack/kernels/apps.sh $(APPS_KERNELS)

test-apps-kernels-small: build cni ## a few of them on two kernels (root)
	$(SUDO) PROGRAMS='$(SMALL)' FRESH='$(FRESH)' hack/kernels/apps.sh $(SMALL_KERNELS)

test-apps-table: ## the table of programs in docs/limits.md, of what test-apps-kernels has found
	go run ./hack/programs -w docs/limits.md .cache/kernels/apps/latest

# It installs the files that dist makes, which are those of a release. -v shows each proof.
test-cluster: build ## podshunt on a real Kubernetes cluster of two nodes on this machine (root)
	mkdir -p $(CLUSTER)
	hack/release/dist.sh $(VERSION) $(RELEASE) $(CLUSTER)/release
	e2e/cluster/build.sh $(CLUSTER)
	cd e2e/cluster && PODSHUNT_CLUSTER=$(CLUSTER) $(GOTEST) -exec "$(SUDO)" -count=1 -parallel 5 -timeout 60m -v $(TESTFLAGS) .

test-upgrade: build ## upgrade and downgrade between versions on such a cluster (root)
	mkdir -p $(CLUSTER)
	e2e/cluster/versions.sh $(CLUSTER)/versions
	hack/release/dist.sh $(VERSION) $(RELEASE) $(CLUSTER)/release
	e2e/cluster/build.sh $(CLUSTER)
	cd e2e/cluster && PODSHUNT_CLUSTER=$(CLUSTER) $(GOTEST) -tags upgrade -exec "$(SUDO)" -count=1 -timeout 30m -v -run '^(TestVersions|TestFirstLayout)$$' $(TESTFLAGS) .

test-chart: ## what the chart makes of its values, and which it refuses (charts/podshunt/tests)
	$(HELM_UNITTEST) charts/podshunt
	go -C hack/helm test -count=1 ./manifests
	hack/helm.sh

# Kept out of unit and verify for its time: it makes a release twice, and cosign takes minutes to build the first time.
test-release: ## two builds of a release are the same bytes, its signature and its bill of materials hold
	go -C hack/cosign mod tidy -diff
	go -C hack/release test -count=1 -timeout 60m -v -run TestRelease $(TESTFLAGS) .

build: ## bin/podshunt (the plugin) and bin/podshunt-agent
	$(BUILD) -o $(BIN)/podshunt ./plugin
	$(BUILD) -o $(BIN)/podshunt-agent ./agent

cni: ## the CNI plugins that tests and demo use, from go.mod's tool block
	$(BUILD) -o $(BIN)/ $(PLUGINS)/main/bridge $(PLUGINS)/ipam/host-local $(PLUGINS)/meta/portmap

# Tests that need root are in files with the constraint !unit.
unit: ## the tests that need no privileges, with the race detector
	CGO_ENABLED=1 $(GOTEST) -race -tags unit -count=1 $(TESTFLAGS) $(UNIT)
	go -C hack/release test -tags unit -count=1 $(TESTFLAGS) .
	go -C e2e/apps test -count=1 $(TESTFLAGS) ./bench

race: build cni ## the tests of the agent and the datapath that need root, with the race detector (root)
	REQUIRE_ROOT=1 CGO_ENABLED=1 $(GOTEST) -exec "$(SUDO)" -race -short -skip '$(RACE_SKIP)' -p 1 -count=1 -timeout 25m $(TESTFLAGS) $(RACE)

fuzz: ## every fuzz target for FUZZTIME
	hack/fuzz.sh $(FUZZTIME)

generate: ## compile bpf/ and make its Go names, and the chart's README
	hack/deps.sh
	BPF2GO_CC=$(CLANG) BPF2GO_STRIP=$(LLVM_STRIP) BPF2GO_CFLAGS="$(BPF_CFLAGS)" go generate ./bpf
	$(HELM_DOCS) --chart-search-root charts/podshunt

lint: ## golangci-lint, clang-format, helm lint, shellcheck
	hack/deps.sh
	$(GOLANGCI_LINT) run
	go -C e2e/apps tool -modfile=$(CURDIR)/hack/tools/go.mod golangci-lint run
	go -C hack/release tool -modfile=$(CURDIR)/hack/tools/go.mod golangci-lint run
	go -C hack/helm tool -modfile=$(CURDIR)/hack/tools/go.mod golangci-lint run ./...
	$(CLANG_FORMAT) --dry-run -Werror bpf/*.c bpf/*.h
	$(HELM) lint --strict --quiet charts/podshunt
	$(HELM4) lint --strict --quiet charts/podshunt
	shellcheck $(wildcard hack/*.sh hack/*/*.sh e2e/*/*.sh) .ci/run

verify: ## what is generated is current, go.mod is tidy, code is formatted, linters are content
	hack/verify.sh

vuln: ## known vulnerabilities in what the programs call; VULN=required fails without the database
	VULN=$(VULN) hack/vuln.sh ./plugin ./agent

bench: build cni ## measure this machine into docs/measurements.md, in some 25 minutes (root)
	$(BUILD) -o bin/bench ./hack/bench
	$(SUDO) bin/bench $(BENCH_ARGS) -svg bin/latency.svg >bin/measurements.md
	go run ./hack/measurements bench bin/measurements.md bin/latency.svg
	go test -exec "$(SUDO)" -run '^$$' -bench 'Guards|Join' ./agent/datapath
	go test -exec "$(SUDO)" -run '^$$' -bench Node -timeout 20m ./e2e

# About an hour. bin/bench-apps -h has the flags.
bench-apps: bin/bench-apps ## measure real programs on this machine into docs/measurements.md (root)
	$(SUDO) PODSHUNT_APPS=$(APPS):$(APPS)-bench bin/bench-apps $(BENCH_ARGS) >bin/measurements-apps.md
	go run ./hack/measurements bench-apps bin/measurements-apps.md

bench-apps-quick: bin/bench-apps ## a few lines of each program, onto the terminal (root)
	$(SUDO) PODSHUNT_APPS=$(APPS):$(APPS)-bench bin/bench-apps -quick $(BENCH_ARGS)

# A program that cannot be had has no line; the run says why.
bin/bench-apps: build cni
	$(SUDO) e2e/apps/fetch.sh $(APPS)
	-$(SUDO) e2e/apps/fetch.sh $(APPS)-bench e2e/apps/bench/packages
	go -C e2e/apps build -trimpath -o $(CURDIR)/$@ ./bench

image: build ## bin/podshunt-image.tar, for ctr images import or docker load
	$(PACK) image -binaries $(CURDIR)/bin -version $(RELEASE) -name $(IMAGE) -o $(CURDIR)/bin/podshunt-image.tar

chart: ## bin/podshunt-RELEASE.tgz, the chart that installs this image
	mkdir -p bin
	$(PACK) chart -version $(RELEASE) -o $(CURDIR)/bin

dist: ## bin/dist: the files of a release, of the working tree and unsigned
	hack/release/dist.sh $(VERSION) $(RELEASE) $(DIST)

release: ## bin/dist: the release of the tag at HEAD, the same bytes everywhere, signed with COSIGN_KEY=FILE
	hack/release/release.sh $(DIST) $(COSIGN_KEY)

publish: ## push image and chart of bin/dist to REGISTRY, and sign them with COSIGN_KEY=FILE
	hack/release/publish.sh $(DIST) $(REGISTRY) $(COSIGN_KEY)

clean: ## remove bin/
	rm -rf bin

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 26
