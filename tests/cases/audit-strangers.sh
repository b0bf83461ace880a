#!/usr/bin/env bash
# Class: audit outputs that are not files of ours. A link that a stranger made in a directory where everybody can is not
# followed, a stranger's file is not written, and one in whose place a bind mount is grows on instead of being renamed.
# needs: unshare mount setpriv
set -euo pipefail
program=$(realpath "$1")
for tool in unshare mount setpriv; do
    command -v "$tool" >/dev/null || { echo "this case needs $tool"; exit 77; }
done
[ "$(id -u)" = 0 ] && unshare -m true 2>/dev/null || { echo "this case needs root"; exit 77; }
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT; cd "$dir"; chmod 755 .
fail() { echo "$1"; exit 1; }
stranger() { setpriv --reuid 65534 --regid 65534 --clear-groups "$@"; }
"$program" --home h init >/dev/null 2>&1
mkdir -m 1777 shared
stranger ln -s "$dir/victim" shared/link
stranger touch shared/file
refused() {
    code=0; timeout 60 "$program" --home h serve --listen 127.0.0.1:0 --audit "$1" >/dev/null 2>err || code=$?
    [ $code = 2 ] && grep -q "$2" err || fail "--audit $1: exit $code, $(cat err)"
}
refused shared/link "is a symbolic link that user 65534 made"
[ ! -e victim ] || fail "the link was followed"
refused shared/file "belongs to user 65534"
[ ! -s shared/file ] || fail "a stranger's file was written"
mkdir "shared/mine"; ln -s "$dir/own.jsonl" shared/mine/link

serve() {
    : >out
    "$program" --home h serve --listen 127.0.0.1:0 --audit "$1" --audit-max-bytes 4096 >out 2>err & server=$!
    for _ in $(seq 600); do grep -q ready out && break; sleep 0.1; done
    grep -q ready out || fail "--audit $1: $(cat err)"
}
# A request that is refused leaves a record.
load() {
    address=$(sed -n 's,.*ready on http://\([^, ]*\).*,\1,p' out)
    for _ in $(seq 40); do
        exec 3<>"/dev/tcp/${address%:*}/${address##*:}"
        printf 'GET /x HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n' >&3; cat <&3 >/dev/null; exec 3>&-
    done
    sleep 1
}
# One's own link is followed, and what it leads to is renamed when it is full: the link stays.
serve shared/mine/link; load; kill $server; wait $server || fail "the server did not end in order: $(cat err)"
[ -L shared/mine/link ] && [ -f own.jsonl ] || fail "the link was replaced"
compgen -G 'own.jsonl.*' >/dev/null || fail "what the link leads to was not rotated: $(ls)"

export program dir
unshare -m bash -euo pipefail -c '
cd "$dir"; touch real.jsonl mounted.jsonl; mount --bind real.jsonl mounted.jsonl
'"$(declare -f fail serve load)"'
serve mounted.jsonl; load
grep -q "cannot be given another name; it grows on" err || fail "nobody tells that it cannot be renamed: $(cat err)"
kill $server; wait $server || fail "the server did not end in order: $(cat err)"
[ "$(stat -c %s real.jsonl)" -gt 4096 ] || fail "it did not grow on"
tail -n 1 real.jsonl | grep -q "\"operation\":\"End\"" || fail "the last line is not the end"
! compgen -G "mounted.jsonl.*" >/dev/null || fail "a name was left behind"
'
