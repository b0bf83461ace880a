#!/bin/bash
# Class: root keys as secrets mounts hand them out: owned by root, readable by a group or by an ACL, in a place that the
# service cannot change. They are taken; a key of a stranger, or one that everybody may read, is not.
# needs: setpriv
set -euo pipefail
program=$(realpath "$1")
[ "$(id -u)" = 0 ] || { echo "this needs root"; exit 77; }
command -v setpriv >/dev/null || { echo "setpriv is absent"; exit 77; }
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
chmod 755 "$place"
cd "$place"
install -m 755 "$program" keymill
as() { setpriv --reuid "$1" --regid "$2" --clear-groups "${@:3}"; }
mkdir -m 700 home
mkdir -m 755 secret
chown 61234:61234 home
as 61234 61234 ./keymill --home home init >/dev/null 2>&1
mv home/root.key secret/
ln -s ../secret/root.key home/root.key
wrong() { echo "$1: $(cat said)"; exit 1; }

taken() {
    chown "$1" secret/root.key
    chmod "$2" secret/root.key
    as 61234 61234 ./keymill --home home key list >said 2>&1 || wrong "$1 $2 is refused"
}
refused() {
    chown "$1" secret/root.key
    chmod "$2" secret/root.key
    as 61234 61234 ./keymill --home home key list >said 2>&1 && wrong "$1 $2 is taken"
    grep -q "$3" said || wrong "$1 $2: the remedy is not told"
}
taken 0:61234 440
taken 61234:61234 400
taken 61234:61234 600
taken 61234:61234 640
refused 0:61234 444 'chmod 440'
refused 0:61234 460 'chmod 440'
refused 61234:0 640 'chmod 600'
refused 61234:61234 644 'chmod 600'
# By way of an ACL, in which the group's bits are the mask.
if command -v setfacl >/dev/null && chown 0:0 secret/root.key && chmod 400 secret/root.key &&
    setfacl -m u:61234:r secret/root.key 2>/dev/null; then
    as 61234 61234 ./keymill --home home key list >said 2>&1 || wrong "an ACL is refused"
    setfacl -b secret/root.key
fi
# The superuser does not take what a stranger may change.
chown 61234:61234 secret/root.key
chmod 600 secret/root.key
./keymill --home home key list >said 2>&1 && wrong "the superuser uses a stranger's store"
grep -q 'run it as user 61234' said || wrong "the remedy is not told"
# What this user may not write is named.
chmod 500 home
as 61234 61234 ./keymill --home home key list >said 2>&1 && wrong "a home that cannot be written works"
grep -q 'may not write' said || wrong "what cannot be written is not named"
exit 0
