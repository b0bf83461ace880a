#!/bin/bash
# Guards: an engine whose refresh fails (one damaged row of another key) does not go on for ever with the clients and keys
# that it knew: it says so at once, is not ready, refuses after its bound, and goes on when the row is put right.
# needs: sqlite3 curl
set -euo pipefail
program=$(realpath "$1")
for tool in sqlite3 curl; do
  command -v $tool >/dev/null || { echo "$tool is not installed"; exit 77; }
done
dir=$(mktemp -d); cd "$dir"; server=
trap 'if [ -n "$server" ]; then kill $server 2>/dev/null || true; wait $server 2>/dev/null || true; fi; rm -rf "$dir"' EXIT
fail() { echo "$1"; cat err 2>/dev/null; exit 1; }
km() { "$program" --home h "$@"; }
km init >/dev/null 2>&1
km key create --alias alias/other --description good >/dev/null
"$program" --home h serve --listen 127.0.0.1:0 --metrics 127.0.0.1:0 --stale-seconds 2 >out 2>err &
server=$!
for _ in $(seq 100); do grep -q ready out && break; sleep 0.1; done
url=$(sed -n 's/.*metrics on \(http[^ ]*\).*/\1/p' out)
metric() { curl -sf "$url/metrics" | sed -n "s/^$1 //p"; }
wait_for() { # metric value
  for _ in $(seq 300); do [ "$(metric "$1")" = "$2" ] && return; sleep 0.1; done
  fail "$1 did not become $2"
}
[ "$(curl -s "$url/readyz")" = ready ] || fail "not ready at the start"
sqlite3 -cmd '.timeout 10000' h/keys.db "UPDATE keys SET description = 'bad'"
# The next change makes every engine read everything, and fails in the command itself.
km key create --alias alias/new >/dev/null 2>&1 || true
sqlite3 -cmd '.timeout 10000' h/keys.db "UPDATE meta SET changes = changes + 1" # the row's MAC is broken as well
wait_for keymill_store_failing 1
curl -s -o body -w '%{http_code}' "$url/readyz" | grep -q 503 || fail "ready beside a damaged store: $(cat body)"
grep -q 'cannot be read' err || fail "the log is silent"
wait_for keymill_store_refusing 1
sqlite3 -cmd '.timeout 10000' h/keys.db "UPDATE meta SET changes = changes - 1; UPDATE keys SET description = 'good' WHERE description = 'bad'"
wait_for keymill_store_failing 0
wait_for keymill_store_refusing 0
for _ in $(seq 100); do grep -q 'can be read again' err && break; sleep 0.1; done
grep -q 'can be read again' err || fail "the log does not tell that it is over"
