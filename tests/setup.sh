#!/bin/bash
# Installs what is missing on Debian 12, 13 or Ubuntu 24.04 and newer, and mounts bpffs. A second run changes nothing.
#
#     tests/setup.sh GROUP...        groups: venv, run, demo, test, lint, vm
set -eu

declare -A packages=(
	[venv]="python3-venv"
	# The program: BCC's Python binding (brings libbpf and libLLVM), the filter, the kernel's UAPI headers.
	[run]="python3-bpfcc libseccomp2 linux-libc-dev"
	# The test network and the two PHP programs.
	[demo]="iproute2 nftables ethtool util-linux php-cli"
	# Programs in C under the seccomp filter, with glibc and with musl; the layouts of bpf/abi.h by a C compiler; the
	# memory of maps; kill -9 at the n-th system call. With a question mark: only where the archive has it; Ubuntu 24.04
	# has no package bpftool. Nodes as they are: containerd with its CRI socket, runc alone, Podman, and containers of one
	# static program, busybox. Prometheus: promtool for the rules, the server for scrapes.
	# Certificates for the agent's server: openssl.
	# The image: buildah, on a base by debootstrap.
	[test]="gcc libc6-dev musl-tools strace bpftool? containerd runc podman busybox-static prometheus openssl buildah debootstrap"
	[lint]="shellcheck clang-format"
	# Other kernels under QEMU.
	[vm]="qemu-system-x86 kmod busybox-static debian-archive-keyring"
)
oldest_bcc=0.26
policy=/usr/sbin/policy-rc.d
policy_mark='# weir/tests/setup.sh: no service starts while packages are installed'

fail() {
	printf 'set-up: %s\n' "$1" >&2
	exit 1
}

require_root() {
	[ "$(id -u)" = 0 ] || fail "this needs root ($1); become root and run the same command again"
}

is_installed() {
	[ "$(dpkg-query -W -f='${db:Status-Status}' "$1" 2>/dev/null)" = installed ]
}

candidate() {
	apt-cache policy "$1" | sed -n 's/^ *Candidate: //p'
}

# BCC below 0.26 (Ubuntu 22.04 has 0.18) lacks maps and helpers that the programs use.
check_bcc() {
	local version=$1
	case $version in '' | '(none)')
		fail "this system's archive has no python3-bpfcc; weir runs on Debian 12 and 13 and on Ubuntu 24.04 and newer"
		;;
	esac
	dpkg --compare-versions "$version" ge "$oldest_bcc" ||
		fail "python3-bpfcc is $version here, weir needs $oldest_bcc or newer: use Debian 12, 13 or Ubuntu 24.04 and newer"
}

install_missing() {
	local package missing=() found=()
	export DEBIAN_FRONTEND=noninteractive
	for package in "$@"; do
		[[ $package = *'?' ]] || is_installed "$package" || missing+=("$package")
	done
	if [ "${#missing[@]}" != 0 ]; then
		require_root "to install ${missing[*]}"
		apt-get update -qq || fail "apt-get update failed: check the network and /etc/apt"
		[[ " ${missing[*]} " != *' python3-bpfcc '* ]] || check_bcc "$(candidate python3-bpfcc)"
	fi
	for package in "$@"; do
		[[ $package = *'?' ]] || continue
		package=${package%'?'}
		is_installed "$package" && continue
		case $(candidate "$package") in '' | '(none)') ;; *) found+=("$package") ;; esac
	done
	missing+=("${found[@]}")
	[ "${#missing[@]}" = 0 ] && return
	require_root "to install ${missing[*]}"
	echo "set-up: installing ${missing[*]}"
	forbid_services
	apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null ||
		fail "apt-get could not install ${missing[*]}; what it said is above"
	disable_services "${missing[@]}"
}

# A package that brings a service starts it (containerd does) unless /usr/sbin/policy-rc.d ends with 101, see
# invoke-rc.d(8). A machine that has such a file has decided for itself.
forbid_services() {
	[ -e "$policy" ] && ! grep -qF "$policy_mark" "$policy" && return
	trap 'rm -f "$policy"' EXIT
	printf '#!/bin/sh\n%s\nexit 101\n' "$policy_mark" >"$policy"
	chmod 755 "$policy"
}

# Nor at the next boot. Only services of packages that were just installed, so that no decision of a person is undone.
disable_services() {
	local unit
	command -v systemctl >/dev/null || return 0
	while read -r unit; do
		case $unit in
		*/systemd/system/*) systemctl --quiet disable "${unit##*/}" ;;
		*/systemd/user/*) systemctl --quiet --global disable "${unit##*/}" ;;
		esac
	done < <(dpkg -L "$@" | grep -E '\.(service|socket|timer|path)$')
}

mount_bpffs() {
	mountpoint -q /sys/fs/bpf && return
	mount -t bpf bpf /sys/fs/bpf ||
		fail "bpffs cannot be mounted on /sys/fs/bpf; in a container, start it privileged and with the host's /sys/fs/bpf"
}

wanted=()
for group in "$@"; do
	[ -n "${packages[$group]-}" ] || fail "there is no group $group; groups: ${!packages[*]}"
	read -ra names <<<"${packages[$group]}"
	wanted+=("${names[@]}")
done
command -v apt-get >/dev/null ||
	fail "this is neither Debian nor Ubuntu; README.md lists what weir needs"
install_missing "${wanted[@]}"
case " $* " in *' run '*)
	check_bcc "$(dpkg-query -W -f='${Version}' python3-bpfcc)"
	require_root "BPF programs and network namespaces"
	mount_bpffs
	;;
esac
