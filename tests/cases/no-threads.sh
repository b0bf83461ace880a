#!/bin/bash
# No more threads, as in a container with a limit of processes: the work is done by the threads there are, the caller's
# alone if need be. A stack that is larger than the address space stands for the limit: it binds root, too.
# needs: prlimit curl
set -euo pipefail

keymill=$(realpath "$1")
for need in prlimit curl; do
  command -v "$need" >/dev/null || { echo "needs $need"; exit 77; }
done
work=$(mktemp -d)
server=
trap '[ -z "$server" ] || kill "$server" 2>/dev/null || true; rm -rf "$work"' EXIT
cd "$work"
fail() { echo "$*"; exit 1; }
alone() { RUST_MIN_STACK=99000000000 prlimit --as=16000000000 "$@"; }

"$keymill" init --home home >/dev/null
"$keymill" --home home key create --alias alias/app >/dev/null 2>&1 ||
  "$keymill" key create --home home --alias alias/app >/dev/null
export KEYMILL_HOME=$work/home

alone "$keymill" generate --key alias/app --count 100000 --out keys.jsonl 2>err || {
  cat err; fail "generate fails without threads"; }
grep -q panicked err && { cat err; fail "generate panics without threads"; }
[ "$(wc -l <keys.jsonl)" = 100000 ] || fail "generate without threads wrote $(wc -l <keys.jsonl) lines of 100000"
alone "$keymill" generate --key alias/app --count 100000 --format arrow --out keys.arrow 2>err || {
  cat err; fail "generate of Arrow fails without threads"; }
alone "$keymill" decrypt --in keys.jsonl --out plain.jsonl 2>err || {
  cat err; fail "decrypt fails without threads"; }
grep -q panicked err && { cat err; fail "decrypt panics without threads"; }
[ "$(wc -l <plain.jsonl)" = 100000 ] || fail "decrypt without threads wrote $(wc -l <plain.jsonl) lines of 100000"

# A server answers on the thread that it has.
RUST_MIN_STACK=99000000000 prlimit --as=16000000000 "$keymill" serve --listen 127.0.0.1:0 --metrics 127.0.0.1:0 >ready 2>log &
server=$!
for _ in $(seq 100); do
  grep -q metrics ready log && break
  kill -0 "$server" 2>/dev/null || { cat log; fail "serve ends without threads"; }
  sleep 0.1
done
grep -q 'ready on http' ready || { cat log; fail "the ready line is not written without threads"; }
metrics=$(grep -oh 'metrics[^0-9]*127.0.0.1:[0-9]*' ready log | grep -o '127.0.0.1:[0-9]*' | head -1)
[ -n "$metrics" ] || { cat ready log; fail "the server does not say where its metrics are"; }
for path in healthz readyz metrics; do
  curl -sf --max-time 10 "http://$metrics/$path" >/dev/null || { cat log; fail "/$path fails without threads"; }
done
grep -q panicked log && { cat log; fail "serve panics without threads"; }
kill "$server"
wait "$server" || fail "serve did not end in order"
server=
