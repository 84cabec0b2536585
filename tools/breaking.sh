#!/usr/bin/env bash
# Compares the API with the one that landed last, by `buf breaking`.
#
#   tools/breaking.sh [COMMIT]
#
# COMMIT is by default where HEAD left main; on main itself the commit before.
# The base is built with today's .protodeps, so that only our own .proto count.
set -euo pipefail
cd "$(dirname "$0")/.."

base=${1-}
if [[ -z $base ]]; then
	for main in origin/main main; do
		if git rev-parse -q --verify "$main^{commit}" >/dev/null; then
			base=$(git merge-base "$main" HEAD)
			break
		fi
	done
	if [[ -n $base && $base == "$(git rev-parse HEAD)" ]]; then
		base=$(git rev-parse -q --verify 'HEAD^' || true)
	fi
fi
if [[ -z $base ]] || ! git cat-file -e "$base:proto" 2>/dev/null; then
	echo "buf breaking: no earlier commit of main holds the API: nothing to compare with"
	exit 0
fi

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
git archive "$base" proto | tar -x -C "$tmp"
cp buf.yaml "$tmp"
cp -r .protodeps "$tmp"
buf build "$tmp/proto" -o "$tmp/base.binpb"
echo "buf breaking --against $(git log -1 --format='%h (%s)' "$base")"
buf breaking proto --against "$tmp/base.binpb"
