#!/usr/bin/env bash
# Runs every fuzz target of the repository in turn, each for the given time.
# What fails is kept in the package's testdata/fuzz, where `make test` runs it
# from then on.
#
#   tools/fuzz.sh 30s
set -euo pipefail
cd "$(dirname "$0")/.."

# Target and package of each, one a line; grep fails where there is none.
targets=$(grep -rHoE --include='*_test.go' '^func Fuzz[A-Za-z0-9_]+' cmd runtime server store |
	sed -E 's,^(.*)/[^/]*:func (.*)$,\2 ./\1,' | sort)
failed=()
while read -r target package; do
	echo "== $package $target"
	go test "$package" -run '^$' -fuzz "^$target\$" -fuzztime "$1" || failed+=("$package $target")
done <<<"$targets"
((${#failed[@]} == 0)) || { printf 'FAIL %s\n' "${failed[@]}"; exit 1; }
