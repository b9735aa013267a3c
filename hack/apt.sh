# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0
#
# To be sourced: apt beside whatever else uses apt on the machine, and for suites
# that the machine itself does not use. Lists and archives are in directories of
# their own. Where Debian's archive is, the machine's own sources say.

# apt_alone makes apt-get, apt-cache and so on keep their lists and archives in a
# directory, for the machine's packages and sources. The machine's own are locked
# while another apt is at work, and apt waits for no lock but dpkg's.
apt_alone() {
	mkdir -p "$1"/{lists,cache/archives}/partial
	cat >"$1/conf" <<-CONF
		${APT_CONFIG:+#include "$APT_CONFIG";}
		Dir::State::lists "$1/lists";
		Dir::Cache "$1/cache";
		APT::Sandbox::User "root";
		DPkg::Lock::Timeout "600";
	CONF
	export APT_CONFIG=$1/conf
}

# archive prints where the machine gets Debian's archive from, or with "-security"
# its security updates. Works behind a mirror of any name and path, as long as the
# machine's sources have Debian's suites; else DEBIAN_MIRROR says it.
archive() {
	local kind=${1:-} found
	if [ -n "${DEBIAN_MIRROR:-}" ]; then
		echo "${DEBIAN_MIRROR%/}/debian$kind"
		return
	fi
	# Where only one of the two is among the sources, the other has its usual place beside it.
	# shellcheck disable=SC2016 # apt's variables
	found=$(apt-get indextargets --no-release-info --format '$(CREATED_BY) $(RELEASE) $(REPO_URI)' 2>/dev/null | awk -v kind="$kind" '
		$1 == "Packages" && $2 ~ /^(bullseye|bookworm|trixie|forky|sid|(old)*stable|testing|unstable)(-|$)/ {
			sub("/$", "", $3)
			if (($2 ~ /-security$/) == (kind == "-security")) own = own == "" ? $3 : own
			else if (sub("/debian(-security)?$", "/debian" kind, $3)) beside = beside == "" ? $3 : beside
		}
		END { print own == "" ? beside : own }')
	if [ -z "$found" ]; then
		echo "apt.sh: apt's sources on this machine have no suite of Debian; set DEBIAN_MIRROR to the address that has /debian and /debian-security below it" >&2
		return 1
	fi
	echo "$found"
}

# apt_beside makes apt-get, apt-cache and so on work on a directory and on the
# sources that are its standard input, of an architecture (default the machine's);
# nothing counts as installed.
apt_beside() {
	local dir=$1 arch=${2:-}
	apt_alone "$dir"
	: >"$dir/status"
	cat >"$dir/sources.new"
	# Lists of other sources are as good as none.
	if ! cmp -s "$dir/sources.new" "$dir/sources"; then
		rm -f "$dir"/lists/*_*
		mv "$dir/sources.new" "$dir/sources"
	fi
	cat >>"$dir/conf" <<-CONF
		${arch:+APT::Architecture "$arch"; APT::Architectures "$arch";}
		Dir::State "$dir";
		Dir::State::lists "$dir/lists";
		Dir::State::status "$dir/status";
		Dir::Etc::sourcelist "$dir/sources";
		Dir::Etc::sourceparts "-";
		Acquire::Languages "none";
		Acquire::IndexTargets::deb::DEP-11::DefaultEnabled "false";
		Acquire::IndexTargets::deb::DEP-11-icons-small::DefaultEnabled "false";
		Acquire::IndexTargets::deb::DEP-11-icons::DefaultEnabled "false";
	CONF
	# A suite that is gone must not hide the others. Lists of an hour ago may name files that are replaced.
	find "$dir/lists" -maxdepth 1 -name '*_InRelease' -mmin -60 | grep -q . || apt-get update -q || true
}

# apt_install installs packages of the machine's own sources.
apt_install() (
	sudo=()
	((EUID == 0)) || sudo=(sudo)
	dir=$(mktemp -d)
	trap '"${sudo[@]}" rm -rf "$dir"' EXIT
	apt_alone "$dir"
	"${sudo[@]}" env APT_CONFIG="$APT_CONFIG" apt-get update -q
	"${sudo[@]}" env APT_CONFIG="$APT_CONFIG" DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends "$@"
)
