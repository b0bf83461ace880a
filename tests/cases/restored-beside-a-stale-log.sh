#!/bin/bash
# Class: a backup put back over keys.db while the log of a later state still lies beside it. It is told from damage, the
# command that is named mends it, nothing is deleted, and nobody mends a store that is in use.
set -euo pipefail
program=$(realpath "$1")
place=$(mktemp -d)
server=
trap '[ -z "$server" ] || kill -9 "$server" 2>/dev/null || true; rm -rf "$place"' EXIT
cd "$place"
wrong() { echo "$1"; exit 1; }
# A server that keeps the store open, so that its log stays, up to its ready line.
serve() {
    : >served
    "$program" --home h serve --listen 127.0.0.1:0 >served 2>&1 &
    server=$!
    for _ in $(seq 100); do
        grep -q http:// served && return
        kill -0 "$server" 2>/dev/null || wrong "the server ended: $(cat served)"
        sleep 0.1
    done
    wrong "the server never listened: $(cat served)"
}
"$program" --home h init >/dev/null 2>&1
for i in 1 2 3 4 5; do "$program" --home h key create --alias alias/k$i >/dev/null; done
cp -p h/keys.db backup.db
serve
for i in $(seq 6 140); do "$program" --home h key create --alias alias/k$i >/dev/null; done
"$program" --home h mend >said 2>&1 || wrong "a store in use passes its checks: $(cat said)"
kill -9 "$server"
wait "$server" 2>/dev/null || true
server=
cp backup.db h/keys.db
before=$(sha256sum <h/keys.db-wal)
"$program" --home h key list >said 2>&1 && wrong "a mixed store opened"
grep -q 'keymill mend' said || wrong "the command is not named: $(cat said)"
grep -q 'keys.db-wal' said || wrong "the log is not named: $(cat said)"
cmp -s backup.db h/keys.db || wrong "the restored file was written to"
"$program" --home h mend >said 2>&1 || wrong "not mended: $(cat said)"
[ "$("$program" --home h key list | grep -c alias/)" = 5 ] || wrong "the restored keys are not there"
[ "$(sha256sum <h/keys.db-wal.2*)" = "$before" ] || wrong "the log was not kept"
"$program" --home h mend | grep -q 'Nothing to mend' || wrong "mended twice"
exit 0
