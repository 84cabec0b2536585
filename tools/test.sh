#!/usr/bin/env bash
# Runs Go tests with the race detector, each package's in a sandbox of its own,
# and fails when a test fails or leaves something behind.
#
#   tools/test.sh [go test's arguments and packages; ./... when there are none]
#
# The tests find what was built for them in $WORKSPACED_BIN_DIR.
set -euo pipefail
cd "$(dirname "$0")/.."

export WORKSPACED_BIN_DIR=${WORKSPACED_BIN_DIR:-$PWD/bin}
export PATH=$PWD/bin/tools:$PATH:/usr/sbin:/sbin

# footprint lists what of ours a test that escapes its sandbox would leave on the
# host: it looks only where workspaced, containerd and the sandbox write. Others
# work on a developer's machine at the same time: only CI compares.
footprint() {
	{
		cut -d' ' -f5 /proc/self/mountinfo | grep -E '^/(run|tmp|var/lib)/'
		find /sys/fs/cgroup -type d -path '*/workspaced*'
		find /run /tmp /var/lib /var/log -maxdepth 1 -name '*workspaced*'
		find /tmp -maxdepth 1 -name 'ws??????'
		find /run/containerd /run/netns /run/runc /var/lib/containerd /var/lib/cni -maxdepth 2 -xdev
	} 2>/dev/null | sort -u || true # not each of them is everywhere
}

before=""
[[ ${CI-} != true ]] || before=$(footprint)

(($# > 0)) || set -- ./...
code=0
# The race detector needs cgo; vet is a check of its own.
export CGO_ENABLED=1 GOFLAGS="${GOFLAGS-}"
GOFLAGS=${GOFLAGS//-trimpath/}
go test -race -vet=off -count=1 -timeout=25m -json -exec "$PWD/tools/sandbox.sh" "$@" | bin/tools/testreport || code=$?

if [[ ${CI-} == true ]]; then
	# What ends by itself in a moment, like another go command's directory, is
	# not left behind.
	for _ in {1..10}; do
		left=$(comm -13 <(echo "$before") <(footprint))
		[[ -n $left ]] || break
		sleep 1
	done
	if [[ -n $left ]]; then
		printf 'FAIL left behind on the host:\n%s\n' "$left"
		code=1
		# Where a test died its cgroups are empty by now.
		{ grep '^/sys/fs/cgroup/' <<<"$left" || true; } | sort -r | xargs -r rmdir --ignore-fail-on-non-empty
	fi
fi
exit "$code"
