#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Unpacks the container runtime and the tools of kube-proxy from Debian's archive
# into a directory, which nodes lay over /usr. Nothing is installed. Does nothing
# when the directory is complete.
set -euo pipefail

out=${1:?usage: debs.sh DIRECTORY}
here=$(realpath "$(dirname "$0")")
packages=(
	containerd runc libseccomp2 libbtrfs0
	iptables libip4tc2 libip6tc2 libxtables12 libnfnetlink0 libnetfilter-conntrack3 libmnl0 libnftnl11
	nftables libnftables1 libjansson4 libedit2 libbsd0 libgmp10 conntrack
)

[[ -f $out/.packages && $(<"$out/.packages") == "${packages[*]}" ]] && exit 0
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
# shellcheck source=hack/apt.sh
. "$here/../../hack/apt.sh"
apt_alone "$work/apt"
apt-get update -q
apt-get download -q "${packages[@]}"
for deb in *.deb; do
	dpkg-deb -x "$deb" root
done
# Where /bin, /sbin and /lib are links into /usr, as on the node.
for dir in bin sbin lib; do
	[[ ! -d root/$dir ]] || cp -a "root/$dir/." "root/usr/$dir/"
done
# Links that the packages make when they are installed.
for name in iptables iptables-save iptables-restore ip6tables ip6tables-save ip6tables-restore; do
	ln -sf xtables-nft-multi "root/usr/sbin/$name"
done
rm -rf "$out"
mkdir -p "$(dirname "$out")"
mv root/usr "$out"
echo "${packages[*]}" >"$out/.packages"
