#!/usr/bin/env bash
# Installs what is missing to run workspaced on Debian: containerd and runc; with
# the argument "test" also curl, which the README's examples use, and the C
# compiler that Go's race detector needs; with "model" that and the model checker.
# Only apt-get runs as root. A containerd service that the package starts is
# left as it is: workspaced does not need it and does not touch it.
set -euo pipefail

# Debian has runc in /usr/sbin, which is not in every user's PATH.
PATH=$PATH:/usr/sbin:/sbin

packages=()
need() { # COMMAND PACKAGE...
	command -v "$1" >/dev/null || packages+=("${@:2}")
}
need containerd containerd
need runc runc
need mount mount
need unshare util-linux
[[ -e /etc/ssl/certs/ca-certificates.crt ]] || packages+=(ca-certificates)
case ${1-} in
test)
	need gcc gcc libc6-dev
	need curl curl
	;;
model)
	need spin spin
	need gcc gcc libc6-dev
	;;
esac

if ((${#packages[@]} == 0)); then
	exit 0
fi
if ! command -v apt-get >/dev/null; then
	echo "missing here: ${packages[*]}. There is no apt-get: please install them." >&2
	exit 1
fi

as_root=()
if ((EUID != 0)); then
	command -v sudo >/dev/null || {
		echo "missing here: ${packages[*]}. Please install them, or sudo." >&2
		exit 1
	}
	as_root=(sudo)
fi
echo "installing ${packages[*]}"
"${as_root[@]}" apt-get update -q
"${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
	apt-get install -q -y --no-install-recommends "${packages[@]}"
