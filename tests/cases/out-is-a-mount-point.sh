#!/usr/bin/env bash
# Class: outputs over which nothing can be renamed. --out is a file that is bind-mounted by itself, as
# `docker run -v ./rows:/out/rows` makes it: that is found out before the work, and rows are written into it; a run that
# does not end leaves it empty, and one that has not begun leaves it as it was.
# needs: unshare mount
set -euo pipefail
[ $# -eq 1 ] || { echo "usage: $0 PROGRAM"; exit 1; }
program=$(realpath "$1")
for needed in unshare mount; do
    command -v "$needed" >/dev/null || { echo "$needed is not installed"; exit 77; }
done
unshare -m true 2>/dev/null || { echo "no mount namespace can be made here; it takes root"; exit 77; }
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
cd "$scratch"
fail() { echo "$1"; exit 1; }

touch host out
"$program" --home h generate --key alias/a --create >/dev/null 2>&1
export program
mounted() { unshare -m sh -c "mount --bind host out; $1"; }

mounted '"$program" --home h generate --key alias/a --count 20000 --out out' 2>said || fail "it failed: $(cat said)"
[ "$(wc -l <host)" = 20000 ] || fail "$(wc -l <host) of 20000 rows are there"
grep -q 'is a mount point' said || fail "it did not say that the file is a mount point: $(cat said)"
[ "$(stat -c %a host)" = 600 ] || fail "others may read the keys"

# Shorter than what was there, and nothing of that is left.
mounted '"$program" --home h generate --key alias/a --count 2 --out out' 2>/dev/null || fail "it failed"
[ "$(wc -l <host)" = 2 ] || fail "$(wc -l <host) rows are there, and not 2"

# Refused before the first row: as it was.
mounted '"$program" --home none generate --key alias/a --out out' 2>/dev/null && fail "there is no key store"
[ "$(wc -l <host)" = 2 ] || fail "what was there is lost, and nothing came in its place"

# Ended in the middle: empty.
mounted 'ulimit -f 100; "$program" --home h generate --key alias/a --count 100000 --out out' 2>/dev/null \
    && fail "a limit of the size was not met"
[ -s host ] && fail "part of the rows looks like all"
[ -z "$(find . -name '*.part')" ] || fail "a passing file is left"
exit 0
