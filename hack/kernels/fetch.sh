#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Fetches the newest Debian cloud kernel of a series (5.10, 6.1, 6.12, 7.3, or
# 6.12-arm64 for another architecture than amd64) and
# makes .cache/kernels/SERIES/{vmlinuz,base.cpio} of it: busybox, the modules that
# the tests need, and an init that runs one test binary, on
# the root file system of /dev/vda if there is one. apt works beside the
# machine's own, in .cache/apt; nothing is installed but the tools. Ends with 3 if
# no suite has such a kernel.
set -euo pipefail

series=${1:?usage: fetch.sh SERIES, such as 6.1}
top=$(git -C "$(dirname "$0")" rev-parse --show-toplevel)
out=$top/.cache/kernels/$series
apt=$top/.cache/apt
case $series in
*-arm64) arch=arm64 emulator=qemu-system-aarch64 package=qemu-system-arm apt=$apt-arm64 ;;
*) arch=amd64 emulator=qemu-system-x86_64 package=qemu-system-x86 ;;
esac
version=${series%-*}
# The virtio ones are for a guest with a disk, and for the second console of arm64.
modules="veth bridge br_netfilter nf_tables nft_nat nft_chain_nat nft_masq nft_ct inet_diag tcp_diag tls smc virtio_pci virtio_blk virtio_console"
# shellcheck source=hack/apt.sh
. "$top/hack/apt.sh"

# What this file makes is made anew when it changes.
[ "$out/base.cpio" -nt "$0" ] && exit 0
# apt does not wait for itself, and test.sh fetches for two machines side by side.
mkdir -p "$apt"
exec 9>"$apt/lock"
flock 9
for tool in "$emulator" busybox depmod cpio xz mke2fs; do
	command -v "$tool" >/dev/null && continue
	apt_install "$package" busybox-static kmod cpio xz-utils e2fsprogs
	break
done

main=$(archive)
security=$(archive -security)
# The small suites: 5.10 is in the first, 6.1 and 6.12 in the second, all later ones in the third.
# trixie itself is for busybox, which amd64 has from the machine.
apt_beside "$apt" $arch <<SOURCES
deb $security bullseye-security main
deb $security bookworm-security main
deb $main trixie-backports main
$([ $arch = amd64 ] || echo "deb $main trixie main")
SOURCES
newest() {
	apt-cache search --names-only "^linux-image-$version\\.[0-9]+.*-cloud-$arch\$" | cut -d' ' -f1 | sort -V | tail -n 1
}
image=$(newest)
[ -n "$image" ] || { echo "kernels: no suite of $main and $security has a cloud kernel of series $series" >&2; exit 3; }
release=${image#linux-image-}
# From 6.19 on linux-image is empty: its parts have packages of their own.
packages=$(apt-cache search --names-only "^linux-(base|binary|modules)-${release//+/\\+}\$" | cut -d' ' -f1)

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
busybox=$(command -v busybox)
if [ $arch != amd64 ]; then
	packages="${packages:-$image} busybox-static"
	busybox=deb/usr/bin/busybox
fi
# shellcheck disable=SC2086 # a list
apt-get download -q ${packages:-$image}
for deb in ./*.deb; do
	dpkg-deb -x "$deb" deb
done
mkdir -p kernel/lib/modules
for tree in deb/lib/modules deb/usr/lib/modules; do # newer packages use both
	[ ! -d "$tree" ] || cp -a "$tree/." kernel/lib/modules/
done
vmlinuz=deb/boot/vmlinuz-$release
[ -f "$vmlinuz" ] || vmlinuz=kernel/lib/modules/$release/vmlinuz
find "kernel/lib/modules/$release" -name '*.ko.xz' -exec xz -d {} +
depmod -b kernel "$release"

mkdir -p root/{bin,dev,proc,sys,tmp,run,"lib/modules/$release"}
cp "$busybox" root/bin/busybox
cp "kernel/lib/modules/$release"/modules.{builtin,builtin.modinfo,order} "root/lib/modules/$release/"
for module in $modules; do
	# A module that this series lacks is missed by the test that needs it.
	{ modprobe -d kernel -S "$release" --show-depends "$module" 2>/dev/null || true; } | awk '$1 == "insmod" { print $2 }'
done | sort -u | while read -r file; do
	install -D "$file" "root/lib/modules/${file#*/lib/modules/}"
done
depmod -b root "$release"
cat >root/init <<INIT
#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mount -t tmpfs tmp /tmp
mount -t cgroup2 cgroup2 /sys/fs/cgroup
ip link set lo up
for module in $modules; do modprobe \$module 2>/dev/null; done
if [ -b /dev/vda ]; then
	mkdir /disk
	mount -t ext4 /dev/vda /disk
	mount -t tmpfs tmpfs /disk/job
	cp -a /job/. /disk/job/
	umount /sys/fs/cgroup /tmp
	for dir in dev proc sys; do mount -o move /\$dir /disk/\$dir; done
	exec switch_root /disk /bin/sh /job/begin
fi
# The second console, where the test's output goes: see run.sh.
output=/dev/ttyS1
[ ! -c /dev/hvc0 ] || output=/dev/hvc0
cd /job
sh ./run >\$output 2>&1
echo "exit status \$?" >\$output
poweroff -f
INIT
chmod +x root/init
(cd root && find . | cpio -o -H newc --quiet) >base.cpio
mkdir -p "$out"
cp --remove-destination "$vmlinuz" "$out/vmlinuz"
mv base.cpio "$out/base.cpio"
echo "kernels: $series is $release"
