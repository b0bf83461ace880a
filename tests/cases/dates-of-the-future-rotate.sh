#!/bin/bash
# Guards: a date in the future (made while the clock was wrong) does not stop rotation for decades, and what is shown as
# the next rotation agrees with what is done.
# needs: faketime
set -euo pipefail
program=$(realpath "$1")
command -v faketime >/dev/null || { echo "faketime is not installed"; exit 77; }
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT; cd "$dir"
fail() { echo "$1"; exit 1; }
km() { "$program" --home h "$@"; }
km init >/dev/null 2>&1
for alias in r s; do
  faketime 2099-01-01 "$program" --home h key create --alias alias/$alias --rotate-every 7d >/dev/null 2>&1
done
km key run-due >due 2>err || fail "run-due failed: $(cat err)"
[ "$(grep -c '^rotated ' due)" = 2 ] || fail "keys of 2099 were not rotated: $(cat due)"
grep -q 2099 err || fail "nothing was said of the dates: $(cat err)"
year=$(date -u +%Y)
next=$(km key show alias/r 2>/dev/null | grep -i 'next rotation')
[[ $next == *"$year-"* || $next == *"$((year + 1))-"* ]] || fail "the next rotation is shown as $next"
faketime 2099-01-01 "$program" --home h key create --alias alias/t >/dev/null 2>&1
next=$(km key set-rotation alias/t --every 7d 2>/dev/null | grep -i 'next rotation')
[[ $next == *"$year-"* || $next == *"$((year + 1))-"* ]] || fail "set-rotation shows $next"
# What opening does by itself is told.
faketime -f +8d "$program" --home h key list 2>err >/dev/null
[ "$(grep -c 'rotated key-' err)" = 3 ] || fail "opening did not tell what it rotated: $(cat err)"
