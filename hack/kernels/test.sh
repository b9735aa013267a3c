#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# The tests that need a kernel, on other kernels than the machine's own, where
# trampolines are allowed: test.sh SERIES.... Two virtual machines run side by
# side. Left out are tests that move hundreds of MiB or wait for the agent by the
# second, as QEMU emulates the CPU here. What is in the lists "once" and "watched" is about
# podshunt's own steps more than about the kernel, and runs on the first SERIES alone. So do not
# the suites that are about no kernel's architecture on another than amd64. A kernel before 6.1
# has to be refused.
set -euo pipefail

top=$(git -C "$(dirname "$0")" rev-parse --show-toplevel)
cache=$top/.cache/kernels
declare -A tests=(
	[datapath]='^(TestPairing|TestOnePortTwoServers|TestRelease|TestHalfClose|TestPeerCloses|TestUnload|TestBlockingKeptOut|TestStalledReader|TestMPTCPUnsafe|TestMPTCPListener|TestMPTCPListenerRace|TestUnsupported|TestWaitall|TestLowat|TestZerocopy|TestGuards|TestRefusedTLS|TestBlockingListener|TestEdges|TestUnloadClosedUnread|TestReusedSocket|TestReusedID|TestKernelSockets|TestTrial|TestTrialStream|TestPiggyback|TestLate|TestOtherProgram|TestBlockingHalfClose|TestSpliceOfTCPBytes|TestSendfileFromSocket|TestSpliceMarkStays|TestSpliceBesideSends|TestNoReads|TestRecount|TestRecountRefused|TestUntraced|TestUnreadMemory|TestLimitGrows|TestWindow|TestJoin|TestJoinNotReady|TestJoinMeetsEnds|TestJoinAfterKill|TestJoinThroughNAT|TestJoinUnloads|TestJoinAgain|TestJoinBlocking|TestEvictLate|TestWatch|TestWatchWithoutAgent|TestWatchReused|TestWatchMeetsEnds|TestWatchUnloads|TestOtherCallbacks|TestOtherStates|TestLeave|TestLeaveAndReturn|TestLeaveRefused)$'
	[once]='^(TestUnloadKilled|TestDeletedPins|TestReplacing|TestUnloadOtherLayout|TestTakeOver|TestPodBudget|TestJoinStorm|TestRefresh|TestNotPaired|TestGenerationAfterCrash|TestGenerationDue|TestLease|TestLeaseUnderLoad|TestFlowsFull|TestWatchStaysOut|TestWatchSwept|TestJoinStaysOut|TestDrain|TestCompare|TestCompareBoth|TestCompareCalm|TestGuardsComeAndGo|TestTrialIsLearned|TestTrialOfLargeBursts|TestEarly|TestUnsupportedGo|TestRecountTrial|TestJoinsLater|TestJoinsLaterOnce|TestJoinsLaterDefaults|TestJoinsLaterUnjoined|TestTrialAddsUp|TestWatchBulk)$'
	[hazards]='^TestHazards$'
	[agent]='^(TestOptIns|TestHazardsRefused|TestDoctor|TestForget|TestUnloadWithoutAgent|TestForce)$'
	[chain]='^TestVerbs$'
	[conformance]='^(TestConformance|TestLimits)$'
	[watched]='^TestWatched$'
)

# refused checks that the doctor of an old kernel says which one is needed.
refused() {
	local output status=0
	output=$("$top/hack/kernels/run.sh" "$1" "$top/bin/podshunt-agent" doctor) || status=$?
	printf '%s\n' "$output"
	((status == 4)) && [[ $output == *"needed is Linux 6.1 or later with BTF"* ]] && return
	echo "kernels: got status $status, want 4 and the kernel that is needed"
	return 1
}

# run_suite runs one suite on one series.
run_suite() {
	local flags=(-test.v=test2json -test.short -test.timeout 40m -test.run "${tests[$2]:-}")
	case $2 in
	doctor)
		refused "$1"
		return
		;;
	# What would harm the machine harms the guest only.
	datapath | once) flags+=(-own-machine) ;;
	conformance) flags+=(-mptcp) ;;
	# The other one has fexit, where the kernel allows it.
	watched) flags+=(-mptcp -observer tracepoint) ;;
	esac
	local binary=$2
	case $2 in
	once) binary=datapath ;;
	watched) binary=conformance ;;
	esac
	case $1 in
	*-arm64) binary=arm64/$binary ;;
	esac
	go tool -modfile="$top/hack/tools/go.mod" gotestsum --format=pkgname --jsonfile "$cache/$1: $2.json" --raw-command -- \
		go tool test2json -t -p "linux-$1/$2" \
		"$top/hack/kernels/run.sh" "$1" "$cache/$binary.test" "${flags[@]}"
}

# build makes a static test binary of a package.
build() { (cd "$top" && CGO_ENABLED=0 go test -c -o "$cache/$1.test" "$2"); }

mkdir -p "$cache"
if [[ $* == *-arm64* ]]; then
	export GOARCH=arm64
	make -C "$top" build cni BIN="$cache/arm64"
	build arm64/datapath ./agent/datapath
	build arm64/hazards ./agent/hazards
	build arm64/conformance ./e2e/conformance
	unset GOARCH
fi
if [[ " $* " =~ \ [0-9.]+\  ]]; then
	build datapath ./agent/datapath
	build hazards ./agent/hazards
	build agent ./agent
	build chain ./e2e
	build conformance ./e2e/conformance
fi
status=0
list=$("$top/hack/kernels/fetch-all.sh" "$@")
read -ra fetched <<<"${list//$'\n'/ }"
# The longest first, so that both have work until the end.
running=0
logs=()
for suite in datapath once conformance watched agent chain hazards doctor; do
	for one in "${fetched[@]}"; do
		case $one:$suite in
		5.*:doctor) ;;
		5.*:* | *:doctor) continue ;;
		*-arm64:datapath | *-arm64:conformance | *-arm64:hazards) ;;
		*-arm64:*) continue ;;
		"${fetched[0]}:once" | "${fetched[0]}:watched") ;;
		*:once | *:watched) continue ;;
		esac
		if ((running == 2)); then
			wait -n || status=1
			running=1
		fi
		logs+=("$one: $suite")
		run_suite "$one" "$suite" >"$cache/$one: $suite.log" 2>&1 &
		running=$((running + 1))
	done
done
while ((running > 0)); do
	wait -n || status=1
	running=$((running - 1))
done
for log in "${logs[@]}"; do
	echo "== Linux $log"
	cat "$cache/$log.log"
	[[ $log == *doctor ]] && continue
	echo "-- the slowest"
	go tool -modfile="$top/hack/tools/go.mod" gotestsum tool slowest --num 10 --threshold 10s --jsonfile "$cache/$log.json"
done
exit "$status"
