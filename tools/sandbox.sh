#!/usr/bin/env bash
# Runs one test binary as root, for `go test -exec tools/sandbox.sh`, so that it
# can't leave anything behind, and fails when it tried to.
#
# The binary gets mount and process namespaces of its own, an empty /run and an
# empty TMPDIR. Afterwards no process, mount, file in TMPDIR, or socket, FIFO or
# file in /run may be left. Go compiles as the user; only this is root.
set -euo pipefail

# inside is the first process of the namespaces.
inside() {
	mount -n -t tmpfs -o mode=755 tmpfs /run
	local mounts before
	mounts() { cut -d' ' -f5 /proc/self/mountinfo | sort; }
	before=$(mounts)

	local code=0
	"$@" || code=$?
	((code == 0)) || exit "$code"

	# What was told to end may need a moment for it.
	local deadline=$((SECONDS + 5)) left
	while left=$(processes) && [[ -n $left ]] && ((SECONDS < deadline)); do
		sleep 0.1
	done
	report processes "$left"
	# Those that vanish are the host's: a mount goes with its mount point.
	report mounts "$(comm -13 <(echo "$before") <(mounts))"
	report "files in TMPDIR" "$(find "$TMPDIR" -mindepth 1 -printf '%y %P\n' | head -20)"
	report "files in /run" "$(find /run -xdev ! -type d -printf '%y %p\n' | head -20)"
	((leaks == 0)) || exit 1
}

# processes lists all in this process namespace but this shell.
processes() {
	local dir args
	for dir in /proc/[0-9]*; do
		# $$ is the shell, BASHPID the subshell of $(processes).
		[[ ${dir#/proc/} == "$$" || ${dir#/proc/} == "$BASHPID" ]] && continue
		args=$(tr '\0' ' ' <"$dir/cmdline" 2>/dev/null) || continue
		[[ -n $args ]] && echo "${dir#/proc/} $args"
	done
	return 0
}

leaks=0
report() { # WHAT LIST
	[[ -n $2 ]] || return 0
	leaks=1
	printf 'LEFT BEHIND, %s:\n%s\n' "$1" "$2"
}

if [[ ${1-} == --inside ]]; then
	shift
	inside "$@"
	exit
fi

self=$(realpath "$0")
if ((EUID != 0)); then
	# The module cache is only read; the build cache must not get root's files.
	pass=("PATH=$PATH" "GOMODCACHE=$(go env GOMODCACHE)" "GOPROXY=off" "GOFLAGS=-buildvcs=false")
	while IFS= read -r name; do
		pass+=("$name=${!name}")
	done < <(compgen -e | grep -E '^(CI|GOTOOLCHAIN|WORKSPACED_.*)$' || true)
	exec sudo env "${pass[@]}" SANDBOX_GOCACHE=1 "$self" "$@"
fi

# Short: what is below has to fit into the 107 bytes of a socket's address.
dir=$(mktemp -d /tmp/wsXXXXXX)
trap 'rm -rf "$dir"' EXIT
mkdir "$dir/t"
export TMPDIR=$dir/t
if [[ -n ${SANDBOX_GOCACHE-} ]]; then
	export GOCACHE=$dir/gocache
fi
# What kills this shell kills all of it.
setpriv --pdeathsig KILL -- unshare --mount --pid --fork --kill-child --mount-proc --propagation private \
	-- "$self" --inside "$@"
