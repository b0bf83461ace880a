#!/bin/bash
# Guards: connections that say nothing do not keep others waiting, however few file descriptors there are: honest clients,
# health checks, and the rotation of the audit log. The number of connections is told when it is lowered.
# needs: curl
set -euo pipefail
program=$(realpath "$1")
command -v curl > /dev/null || { echo "skipped: there is no curl"; exit 77; }
dir=$(mktemp -d)
server=
cleanup() { [ -z "$server" ] || kill "$server" 2>/dev/null || true; wait; rm -rf "$dir"; }
trap cleanup EXIT
cd "$dir"
fail() { echo "$1"; exit 1; }

"$program" --home home init > init.out 2> init.err
(ulimit -n 64; exec "$program" --home home serve --listen 127.0.0.1:0 --metrics 127.0.0.1:0 --threads 2 \
    --audit audit.jsonl > out 2> log) & server=$!
for _ in $(seq 300); do grep -q ready out && break; sleep 0.1; done
port=$(sed -n 's|.*ready on http://127.0.0.1:\([0-9]*\).*|\1|p' out)
metrics=$(sed -n 's|.*metrics on http://127.0.0.1:\([0-9]*\).*|\1|p' out)
[ -n "$port" ] || fail "the server did not start: $(cat log)"
grep -q 'RLIMIT_NOFILE' log || fail "the log does not tell of the limit: $(cat log)"
grep -q 'configured=4096' log || fail "the log does not tell both numbers: $(cat log)"

open=()
crowd() { for _ in $(seq "$1"); do exec {fd}<>"/dev/tcp/127.0.0.1/$port"; open+=("$fd"); done; }
crowd 300
for path in healthz readyz metrics; do
    code=$(curl -s -m 10 -o /dev/null -w '%{http_code}' "http://127.0.0.1:$metrics/$path") || true
    [ "$code" = 200 ] || fail "/$path answers $code behind 300 silent connections"
done
for _ in $(seq 20); do
    code=$(curl -s -m 10 -o answer -w '%{http_code}' -d x "http://127.0.0.1:$port/") || true
    [ "$code" = 415 ] || fail "a client is answered $code behind 300 silent connections"
done
# Descriptors that run out later: somebody else in the process may use them.
if command -v prlimit > /dev/null; then
    prlimit --pid "$server" --nofile=30:30
    crowd 100
    for _ in $(seq 5); do
        code=$(curl -s -m 10 -o answer -w '%{http_code}' -d x "http://127.0.0.1:$port/") || true
        [ "$code" = 415 ] || fail "a client is answered $code when descriptors ran out"
        code=$(curl -s -m 10 -o /dev/null -w '%{http_code}' "http://127.0.0.1:$metrics/healthz") || true
        [ "$code" = 200 ] || fail "/healthz answers $code when descriptors ran out"
    done
    grep -q 'cannot be accepted' log || echo "note: descriptors did not run out"
fi
# A soft limit below the hard one is raised. The crowd's descriptors would be inherited.
for fd in "${open[@]}"; do exec {fd}>&-; done
kill "$server"; wait "$server" || fail "the server did not end in order: $(tail -3 log)"
(ulimit -Sn 64; exec "$program" --home home serve --listen 127.0.0.1:0 --connections 100 > out 2> log) & server=$!
for _ in $(seq 300); do grep -q ready out && break; sleep 0.1; done
if [ "$(ulimit -Hn)" = unlimited ] || [ "$(ulimit -Hn)" -ge 1024 ]; then
    grep -q 'RLIMIT_NOFILE' log && fail "the soft limit was not raised: $(cat log)"
fi
grep -q 'connections=100' log || fail "the limits in force are not in the log: $(cat log)"
