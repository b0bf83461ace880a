#!/usr/bin/env bash
# Class: remembered lengths of files that others change, and a disk that is full in the midst of a line. A second server
# on one audit log is refused; a full disk and a cut file leave no NUL, at most one broken line each time, and every
# request that was answered while the log was whole has its record.
# needs: unshare mount python3 curl
set -euo pipefail
program=$(realpath "$1")
for tool in unshare mount python3 curl; do
    command -v "$tool" >/dev/null || { echo "this case needs $tool"; exit 77; }
done
unshare -m true 2>/dev/null || { echo "this case needs the right to make mounts (root)"; exit 77; }
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT; cd "$dir"; mkdir disk
export program
unshare -m bash -euo pipefail -c '
fail() { echo "$1"; exit 1; }
mount -t tmpfs -o size=128m tmpfs disk
"$program" --home h init >/dev/null 2>&1
"$program" --home h key create --alias alias/a >/dev/null
"$program" --home h client create --name c --out c.json --password-file c.pw --keys "*" --allow all >/dev/null
: >out
"$program" --home h serve --listen 127.0.0.1:0 --metrics 127.0.0.1:0 --audit disk/audit.jsonl >out 2>err &
server=$!
trap "kill $server 2>/dev/null || true" EXIT
for _ in $(seq 600); do grep -q ready out && break; sleep 0.1; done
url=$(sed -n "s/.*ready on \(http:[^, ]*\).*/\1/p" out); metrics=$(sed -n "s/.*metrics on \(.*\)/\1/p" out)
[ -n "$metrics" ] || fail "the server is not ready: $(cat err)"
load() {
    "$program" bench --server "$url" --client-key c.json --password-file c.pw --key alias/a \
        --filter job=random --connections 2 --seconds "$1" >/dev/null 2>&1 || true
}
metric() { curl -s "$metrics/metrics" | awk -v name="$1" "index(\$1, name) == 1 { sum += \$2 } END { print sum + 0 }"; }
failing() { for _ in $(seq 600); do [ "$(metric keymill_audit_failing)" = "$1" ] && return; sleep 0.1; done; fail "keymill_audit_failing is not $1"; }

load 1
code=0; "$program" --home h serve --listen 127.0.0.1:0 --audit disk/audit.jsonl >/dev/null 2>second || code=$?
[ $code = 2 ] && grep -q "another process has locked it" second || fail "a second server was not refused: $code, $(cat second)"
# Odd lengths, so that a line breaks off.
for round in 1 2 3; do
    head -c 200m /dev/zero >disk/filler 2>/dev/null || true
    load 1
    failing 1
    rm disk/filler
    failing 0
    load 1
done
cp disk/audit.jsonl before.jsonl
answered=$(metric keymill_requests_total); skipped=$(metric keymill_audit_skipped_total)
sleep 1
cp disk/audit.jsonl whole.jsonl
# As logrotate does with copytruncate.
: >disk/audit.jsonl
load 1
kill $server; wait $server || fail "the server did not end in order: $(cat err)"
python3 - "$answered" "$skipped" <<"PYTHON"
import json, sys
answered, skipped = (int(float(text)) for text in sys.argv[1:])
def read(name):
    text = open(name, "rb").read()
    assert b"\0" not in text, name + " holds NULs"
    assert text.endswith(b"\n"), name + " ends in the midst of a line"
    good, broken = [], 0
    for line in text.splitlines():
        try: good.append(json.loads(line))
        except ValueError: broken += 1
    return good, broken
good, broken = read("whole.jsonl")
assert broken <= 3, "%d lines are broken" % broken
ids = [line["request_id"] for line in good if "request_id" in line]
assert len(ids) == answered - skipped, "%d records of %d requests, of which %d were only counted" % (len(ids), answered, skipped)
assert len(set(ids)) == len(ids), "records stand there twice"
after, broken = read("disk/audit.jsonl")
assert broken == 0 and len(after) > 1 and after[-1]["operation"] == "End", after[-1:]
PYTHON
'
