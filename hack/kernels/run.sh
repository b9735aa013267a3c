#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Runs a static test binary under a kernel that fetch.sh has fetched, in QEMU
# without KVM: run.sh SERIES BINARY [ARGUMENT]... The CNI plugins of bin/ are in
# the guest's PODSHUNT_BIN. With VM_DISK, which root.sh makes, the guest runs on that
# file system; the file is not written to, so that several guests may share it. What
# the binary prints is in VM_OUTPUT, if that is set, while it runs. Ends with the
# binary's exit status, or 125 if the guest did not come to an end in VM_TIMEOUT
# seconds (default 2700).
set -euo pipefail

series=${1:?usage: run.sh SERIES BINARY [ARGUMENT]...}
binary=${2:?usage: run.sh SERIES BINARY [ARGUMENT]...}
shift 2
top=$(git -C "$(dirname "$0")" rev-parse --show-toplevel)
kernel=$top/.cache/kernels/$series
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

output=${VM_OUTPUT:-$work/output}
second=(-serial "file:$output")
mkdir -p "$work/root/job/bin"
cp "$binary" "$work/root/job/test"
case $series in
*-arm64)
	bin=$top/.cache/kernels/arm64
	# Pointer authentication as QEMU does it fast, and not by the standard's algorithm.
	machine=(qemu-system-aarch64 -M virt -cpu "max,pauth-impdef=on")
	console=ttyAMA0
	# The machine has one serial port.
	second=(-chardev "file,id=output,path=$output" -device virtio-serial-pci -device "virtconsole,chardev=output")
	;;
*)
	bin=$top/bin
	machine=(qemu-system-x86_64 -M q35 -cpu "max,la57=off")
	console=ttyS0
	;;
esac
cp "$bin"/{bridge,host-local,portmap,podshunt,podshunt-agent} "$work/root/job/bin/"
path=/bin
disk=()
if [ -n "${VM_DISK:-}" ]; then
	path=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin
	disk=(-drive "file=$VM_DISK,format=raw,if=virtio,snapshot=on")
	# What is set up where init is a distribution's.
	cat >"$work/root/job/begin" <<-BEGIN
		mount -t cgroup2 cgroup2 /sys/fs/cgroup
		mount -t tmpfs tmpfs /tmp
		mount -t tmpfs tmpfs /run
		mkdir -p /dev/pts /dev/shm
		mount -t devpts devpts /dev/pts
		mount -t tmpfs tmpfs /dev/shm
		ln -s /proc/self/fd /dev/fd
		ln -s /proc/self/fd/0 /dev/stdin
		ln -s /proc/self/fd/1 /dev/stdout
		ln -s /proc/self/fd/2 /dev/stderr
		chmod 1777 /tmp /dev/shm
		cd /job
		sh ./run >/dev/ttyS1 2>&1
		echo "exit status \$?" >/dev/ttyS1
		busybox poweroff -f
	BEGIN
fi
printf 'export REQUIRE_ROOT=1 PODSHUNT_BIN=/job/bin PATH=%s HOME=/tmp\nexec ./test %s\n' "$path" "${*@Q}" >"$work/root/job/run"
(cd "$work/root" && find . | cpio -o -H newc --quiet) >"$work/job.cpio"
cat "$kernel/base.cpio" "$work/job.cpio" >"$work/initrd"

# One thread for both CPUs: with one for each, the kernel's text patching has been seen to race.
timeout --foreground "${VM_TIMEOUT:-2700}" "${machine[@]}" -accel tcg,thread=single \
	-smp 2 -m "${VM_MEMORY:-2048}" "${disk[@]}" -nographic -no-reboot -nodefaults -display none \
	-kernel "$kernel/vmlinuz" -initrd "$work/initrd" -append "console=$console panic=-1 quiet" \
	-serial "file:$work/console" "${second[@]}" </dev/null || true
tr -d '\r' <"$output" | sed '/^exit status [0-9]*$/d'
status=$(tr -d '\r' <"$output" | sed -n 's/^exit status \([0-9]*\)$/\1/p' | tail -n 1)
if [ -z "$status" ]; then
	echo "kernels: $series did not come to an end; its console's last lines:" >&2
	tail -n 20 "$work/console" >&2
	exit 125
fi
exit "$status"
