#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Fetches the newest Debian cloud kernel of a series that apt knows (6.1, 6.12)
# and makes .cache/kernels/SERIES/{vmlinuz,base.cpio} of it: busybox, the modules
# that the tests need, and an init that runs one test binary. Nothing is installed
# but the tools.
set -euo pipefail

series=${1:?usage: fetch.sh SERIES, such as 6.1}
top=$(git -C "$(dirname "$0")" rev-parse --show-toplevel)
out=$top/.cache/kernels/$series
modules="veth bridge br_netfilter nf_tables nft_nat nft_chain_nat nft_masq nft_ct inet_diag tcp_diag"

[ -f "$out/base.cpio" ] && exit 0
for tool in qemu-system-x86_64 busybox depmod cpio xz; do
	command -v "$tool" >/dev/null && continue
	apt-get update -q
	apt-get install -qy --no-install-recommends qemu-system-x86 busybox-static kmod cpio xz-utils
	break
done
newest() {
	apt-cache search --names-only "^linux-image-$series\\.[0-9]+.*-cloud-amd64\$" | cut -d' ' -f1 | sort -V | tail -n 1
}
package=$(newest)
if [ -z "$package" ]; then # perhaps a machine that has no lists yet
	apt-get update -q
	package=$(newest)
fi
[ -n "$package" ] || { echo "kernels: apt has no cloud kernel of series $series" >&2; exit 3; }

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
apt-get download -q -o APT::Sandbox::User=root "$package"
dpkg-deb -x ./*.deb deb
release=$(basename deb/lib/modules/*)
find "deb/lib/modules/$release" -name '*.ko.xz' -exec xz -d {} +
depmod -b deb "$release"

mkdir -p root/{bin,dev,proc,sys,tmp,run,"lib/modules/$release"}
cp "$(command -v busybox)" root/bin/busybox
cp "deb/lib/modules/$release"/modules.{builtin,builtin.modinfo,order} "root/lib/modules/$release/"
for module in $modules; do
	modprobe -d deb -S "$release" --show-depends "$module" 2>/dev/null | awk '$1 == "insmod" { print $2 }'
done | sort -u | while read -r file; do
	install -D "$file" "root/${file##*/deb/}"
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
cd /job
sh ./run >/dev/ttyS1 2>&1
echo "exit status \$?" >/dev/ttyS1
poweroff -f
INIT
chmod +x root/init
(cd root && find . | cpio -o -H newc --quiet) >base.cpio
mkdir -p "$out"
cp "deb/boot/vmlinuz-$release" "$out/vmlinuz"
mv base.cpio "$out/base.cpio"
echo "kernels: $series is $release"
