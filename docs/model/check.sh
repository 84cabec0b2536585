#!/usr/bin/env bash
# Checks the model with spin: the protocol holds, and every mutant of it breaks.
# A mutant that holds means that the model looks away.
set -euo pipefail
model=$(cd "$(dirname "$0")" && pwd)/kick.pml
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# check NAME: sets errors and states; fails unless the search was complete.
check() {
	mkdir "$work/$1"
	cd "$work/$1"
	spin "-DMUTANT_$1" -a "$model" >spin.out || { cat spin.out; return 2; }
	"${CC:-cc}" -O2 -DSAFETY -DCOLLAPSE -o pan pan.c
	if ! timeout 300 ./pan -m100000 -w24 >pan.out || grep -q 'max search depth too small\|out of memory' pan.out; then
		echo "FAIL $1: the search was cut short"
		return 2
	fi
	errors=$(sed -n 's/.*errors: \([0-9]*\).*/\1/p' pan.out)
	states=$(sed -n 's/ *\([0-9.e+]*\) states, stored.*/\1/p' pan.out)
	cd "$work"
}

check NONE
if [ "$errors" != 0 ]; then
	cp "$model" "$work/NONE"
	(cd "$work/NONE" && spin -DMUTANT_NONE -t -p kick.pml | tail -60) || true
	echo "FAIL the protocol does not hold; the steps that break it are above"
	exit 1
fi
echo "ok   the protocol holds in all $states states"

for mutant in $(sed -n 's/^#ifn\{0,1\}def MUTANT_\(.*\)$/\1/p' "$model" | sort -u); do
	check "$mutant"
	if [ "$errors" = 0 ]; then
		echo "FAIL $mutant holds too: the model does not see it"
		exit 1
	fi
	echo "ok   $mutant breaks it: $(sed -n 's/pan:1: \(.*\) (at depth.*/\1/p' "$work/$mutant/pan.out" | cut -c1-70)"
done
