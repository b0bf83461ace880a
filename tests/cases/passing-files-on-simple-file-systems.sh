#!/usr/bin/env bash
# Class: files that come to their place on a file system that lacks hard links, renames without replacing, or cannot
# synchronise a directory or a file (vfat, SMB, FUSE), played by strace. Outputs and the two files of `client create`.
# needs: strace
set -euo pipefail
[ $# -eq 1 ] || { echo "usage: $0 PROGRAM"; exit 1; }
program=$(realpath "$1")
command -v strace >/dev/null || { echo "strace is not installed"; exit 77; }
strace -o /dev/null true 2>/dev/null || { echo "strace may not trace here"; exit 77; }
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
cd "$scratch"
fail() { echo "$1"; exit 1; }
"$program" --home h generate --key alias/a --create >/dev/null 2>&1

mkdir out
played() {
    strace -f -o /dev/null -P "$PWD/out" -e trace=fsync,fdatasync -e inject=fsync,fdatasync:error=EINVAL "$@"
}
played "$program" --home h generate --key alias/a --count 3 --out out/rows || fail "no directory fsync: rows"
[ "$(wc -l <out/rows)" = 3 ] || fail "rows are missing"

linkless() {
    strace -f -o /dev/null -e trace=link,linkat,renameat2 \
        -e inject=link,linkat:error=EPERM -e inject=renameat2:error=EINVAL "$@"
}
linkless "$program" --home h client create --name a --out out/key.json --password-file out/password \
    --keys '*' --allow all >/dev/null || fail "no hard links: client create"
[ -s out/key.json ] && [ -s out/password ] || fail "a file is missing or empty"
[ "$(stat -c %a out/key.json out/password | sort -u)" = 600 ] || fail "others may read the files"

# Still nothing is replaced.
before=$(cat out/key.json)
linkless "$program" --home h client create --name b --out out/key.json --password-file out/password \
    --keys '*' --allow all >/dev/null 2>said && fail "a key file was replaced"
grep -q 'exists already' said || fail "it says something else: $(cat said)"
[ "$(cat out/key.json)" = "$before" ] || fail "a key file was changed"
[ -z "$(find . -name '*.part')" ] || fail "a passing file is left"
exit 0
