#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Process 1 of a node, in new pid, mount, network and uts namespaces: makes them
# a machine of its own, on which a chart finds the standard paths. All of it goes
# with this process. Prints "ready" when it is done.
set -euo pipefail

# NAME of the node; CGROUP of its pods, a path in every hierarchy; DIRECTORY for
# its state; DEBS to lay over /usr; BIN with the binaries of the cluster.
name=$1 cgroup=$2 directory=$3 debs=$4 bin=$5

# While this is private, what is unmounted here stays mounted elsewhere.
mount --make-rprivate /
hostname "$name"
mount -t proc proc /proc
mount -t tmpfs -o mode=755 "$name" "$directory"
mkdir "$directory"/{var,opt,run,etc,work,usr,usrwork,cgroup}
mount --rbind /sys/fs/cgroup "$directory/cgroup"
mount -t sysfs sysfs /sys
mount --move "$directory/cgroup" /sys/fs/cgroup
mount -t bpf bpf /sys/fs/bpf
mount -t overlay -o "lowerdir=/etc,upperdir=$directory/etc,workdir=$directory/work" etc /etc
mount -t overlay -o "lowerdir=$debs:/usr" usr /usr
mount --bind "$directory/opt" /opt
mount --bind "$directory/var" /var
mount --bind "$directory/run" /run
mkdir -p /var/{lib,log,tmp} /opt/cni/bin /etc/cni/net.d /run/lock
ln -s /run /var/run
# On a node of its own, the agent would be told the root of cgroup2. This is the
# part of it that has the node's pods, at the same place on all nodes.
mkdir /run/cgroup2
mount --bind "$(findmnt --noheadings --first-only --types cgroup2 --output TARGET)$cgroup" /run/cgroup2
cp "$bin"/{bridge,host-local,loopback,portmap} /opt/cni/bin/

# These settings are the whole machine's. A kubelet that finds what it wants
# leaves them alone.
mkdir "$directory/sysctl"
for setting in vm/overcommit_memory=1 vm/panic_on_oom=0 kernel/panic=10 kernel/panic_on_oops=1 \
	kernel/keys/root_maxkeys=1000000 kernel/keys/root_maxbytes=25000000; do
	path=${setting%=*}
	file=$directory/sysctl/${path//\//.}
	echo "${setting#*=}" >"$file"
	mount --bind "$file" "/proc/sys/$path"
done
# Volumes that the kubelet mounts have to be seen in pods.
mount --make-rshared /

ip link set lo up
echo 1 >/proc/sys/net/ipv4/ip_forward
echo ready
# Bash reaps what the node's processes leave.
while :; do
	sleep infinity &
	wait $! || true
done
