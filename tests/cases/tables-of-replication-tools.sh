#!/bin/bash
# Class: a tool that writes tables of its own into keys.db. The tool is named, and the command that the message ends
# with, run as it stands, brings the store back.
# needs: sqlite3
set -euo pipefail
program=$(realpath "$1")
command -v sqlite3 >/dev/null || { echo "sqlite3 is absent"; exit 77; }
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
wrong() { echo "$1"; exit 1; }
# A quote in the path is the shell's to understand.
cd "$place"
mkdir "it's"
home="it's/h"
"$program" --home "$home" init >/dev/null 2>&1
"$program" --home "$home" key create --alias alias/a >/dev/null
sqlite3 "$home/keys.db" 'CREATE TABLE _litestream_seq (id INTEGER PRIMARY KEY, seq INTEGER);
    CREATE TABLE _litestream_lock (id INTEGER)'
"$program" --home "$home" key list >said 2>&1 && wrong "a foreign table was taken"
grep -q 'Litestream' said || wrong "the tool is not named: $(cat said)"
sed -n 's/.*and run: //p' said >command
[ -s command ] || wrong "no command: $(cat said)"
sh command || wrong "the command fails: $(cat command)"
"$program" --home "$home" key list | grep -q alias/a || wrong "the store is not back"
exit 0
