#!/bin/bash
# Class: file systems that lack what a careful program would like to use: hard links (vfat, many SMB and FUSE mounts),
# exclusive renames, and directories that can be synchronised (old CIFS, some FUSE). A home is made on each of them, and
# a disk that fails is still a failure.
# needs: strace
set -euo pipefail
program=$(realpath "$1")
command -v strace >/dev/null || { echo "strace is absent"; exit 77; }
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
cd "$place"
strace -o /dev/null true 2>/dev/null || { echo "strace may not trace here"; exit 77; }
wrong() { echo "$1"; exit 1; }

# holds NAME STRACE-ARGUMENTS...: a home is made and used, and nothing is left beside its files.
holds() {
    local name=$1
    shift
    mkdir -m 700 "$name"
    strace -f -o /dev/null "$@" "$program" --home "$name" init >/dev/null 2>"$name.err" ||
        wrong "$name: init failed: $(cat "$name.err")"
    "$program" --home "$name" generate --key alias/a --create >/dev/null 2>"$name.err" ||
        wrong "$name: the home does not work: $(cat "$name.err")"
    [ "$(ls -A "$name" | sort | tr '\n' ' ')" = "keys.db root.key " ] ||
        wrong "$name: left behind: $(ls -A "$name")"
    # What is there is never replaced, whichever way it was made.
    before=$(sha256sum "$name/root.key")
    rm "$name/keys.db"
    strace -f -o /dev/null "$@" "$program" --home "$name" init >/dev/null 2>&1 &&
        wrong "$name: a root key was overwritten"
    [ "$before" = "$(sha256sum "$name/root.key")" ] || wrong "$name: a root key was replaced"
}

links=link,linkat
for error in EPERM EOPNOTSUPP ENOSYS EMLINK; do
    holds "links-$error" -e trace=$links -e inject=$links:error=$error
done
for error in EINVAL ENOSYS; do
    holds "renames-$error" -e trace=$links,renameat2 -e inject=$links:error=EPERM \
        -e inject=renameat2:error=$error
done
for error in EINVAL EOPNOTSUPP EROFS; do
    holds "sync-$error" -P "$PWD/sync-$error" -e trace=fsync,fdatasync \
        -e inject=fsync,fdatasync:error=$error
done

for error in EIO ENOSPC; do
    mkdir -m 700 "fails-$error"
    strace -f -o /dev/null -P "$PWD/fails-$error" -e trace=fsync,fdatasync \
        -e inject=fsync,fdatasync:error=$error "$program" --home "fails-$error" init >/dev/null 2>&1 &&
        wrong "a disk that fails by $error made a home"
    [ -z "$(ls -A "fails-$error")" ] || wrong "$error: left behind: $(ls -A "fails-$error")"
done
exit 0
