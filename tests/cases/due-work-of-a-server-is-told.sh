#!/bin/bash
# Guards: what a server does by itself leaves a trace. Eight days later one starts: it rotates one key, says so in its log
# and its metrics, and keeps the other one, whose deletion is due, until its clock has been watched for a day.
# needs: faketime curl
set -euo pipefail
program=$(realpath "$1")
for tool in faketime curl; do
  command -v $tool >/dev/null || { echo "$tool is not installed"; exit 77; }
done
dir=$(mktemp -d); cd "$dir"; server=
trap 'if [ -n "$server" ]; then kill $server 2>/dev/null || true; wait $server 2>/dev/null || true; fi; rm -rf "$dir"' EXIT
fail() { echo "$1"; cat err 2>/dev/null; exit 1; }
km() { "$program" --home h "$@"; }
km init >/dev/null 2>&1
km key create --alias alias/r --rotate-every 7d >/dev/null
km key create --alias alias/d >/dev/null
km key schedule-deletion alias/d --days 7 >/dev/null
# LD_PRELOAD is set by the wrapper, so the server is its child.
eval "$(faketime -f +8d env | grep -E '^(LD_PRELOAD|FAKETIME[A-Z_]*)=' | sed "s/=\(.*\)/='\1'/; s/^/export /")"
"$program" --home h serve --listen 127.0.0.1:0 --metrics 127.0.0.1:0 >out 2>err &
server=$!
unset LD_PRELOAD
for _ in $(seq 100); do grep -q ready out && break; sleep 0.1; done
grep -q ready out || fail "the server did not start"
grep -q 'rotated key-' err || fail "the log does not tell of the rotation"
grep -q 'to be deleted since' err || fail "the log does not warn of the deletion"
url=$(sed -n 's/.*metrics on \(http[^ ]*\).*/\1/p' out)
curl -sf "$url/metrics" >metrics || fail "no metrics"
grep -q '^keymill_due_rotations_total 1$' metrics || fail "the rotation was not counted"
grep -q '^keymill_due_deletions_total 0$' metrics || fail "a deletion was counted"
km key show alias/d >/dev/null 2>&1 || fail "the server deleted a key at its start"
