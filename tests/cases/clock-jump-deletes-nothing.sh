#!/bin/bash
# Guards: irreversible work never follows from one look at the wall clock. A key is to be deleted in 7 days; commands run
# while the clock is wrong, and the deletion can be called off afterwards. By hand, a clock far ahead has to be confirmed.
# needs: faketime
set -euo pipefail
program=$(realpath "$1")
command -v faketime >/dev/null || { echo "faketime is not installed"; exit 77; }
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT; cd "$dir"
fail() { echo "$1"; exit 1; }
km() { "$program" --home h "$@"; }
at() { local when=$1; shift; faketime -f "$when" "$program" --home h "$@"; }
km generate --key alias/a --create --count 1 >keys.jsonl 2>/dev/null
km key schedule-deletion alias/a --days 7 >/dev/null
for when in +8d +40d +10y; do
  at "$when" key list >list 2>err || fail "key list failed at $when: $(cat err)"
  grep -q alias/a list || fail "key list deleted the key at $when"
  grep -Eq 'to be deleted|its deletion' err || fail "nothing was said of the deletion that is due at $when"
  at "$when" key show alias/a >/dev/null 2>&1 || fail "key show deleted the key at $when"
  at "$when" generate --key alias/b --create --count 1 >/dev/null 2>&1 || fail "generate failed at $when"
  km key show alias/a >/dev/null 2>&1 || fail "generate deleted the key at $when"
done
status=0; at +10y key run-due >/dev/null 2>err || status=$?
[ "$status" = 1 ] || fail "run-due exited $status with a clock ten years ahead"
grep -q -- 'clock' err || fail "run-due did not speak of the clock: $(cat err)"
km key cancel-deletion alias/a >/dev/null 2>&1 || fail "the deletion could not be cancelled"
km decrypt --in keys.jsonl >/dev/null 2>&1 || fail "the key is damaged"
km key schedule-deletion alias/a --days 7 >/dev/null 2>&1
at +8d key run-due 2>/dev/null | grep -q '^deleted ' || fail "run-due did not delete what was due yesterday"
km generate --key alias/c --create --count 1 >/dev/null 2>&1
km key schedule-deletion alias/c --days 7 >/dev/null 2>&1
at +10y key run-due --clock-is-right 2>/dev/null | grep -q '^deleted ' || fail "--clock-is-right did not delete"
