#!/bin/bash
# Guards: what is wrong with TLS is told in plain words: certificates that are expired, not yet valid or soon expired, at the
# start and after a reload; encrypted keys; and handshakes that fail, of which a scanner cannot fill the log.
# needs: openssl faketime curl
set -euo pipefail
program=$(realpath "$1")
for need in openssl faketime curl; do
    command -v "$need" > /dev/null || { echo "skipped: there is no $need"; exit 77; }
done
dir=$(mktemp -d)
server=
cleanup() { [ -z "$server" ] || kill "$server" 2>/dev/null || true; wait; rm -rf "$dir"; }
trap cleanup EXIT
cd "$dir"
fail() { echo "$1"; exit 1; }
certify() { # name, when, days
    faketime "$2" openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout "$1.key" -out "$1.pem" \
        -days "$3" -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1 2> openssl.err || fail "openssl: $(cat openssl.err)"
}
serve() { # name
    : > out; : > log
    "$program" --home home serve --listen 127.0.0.1:0 --metrics 127.0.0.1:0 --tls-cert "$1.pem" --tls-key "$1.key" > out 2> log & server=$!
    for _ in $(seq 300); do grep -q ready out && break; sleep 0.1; done
    port=$(sed -n 's|.*ready on https://127.0.0.1:\([0-9]*\).*|\1|p' out)
    metrics=$(sed -n 's|.*metrics on http://127.0.0.1:\([0-9]*\).*|\1|p' out)
    [ -n "$port" ] || fail "the server did not start: $(cat log)"
}
await() { # words
    for _ in $(seq 100); do grep -q "$1" log && return; sleep 0.1; done
    fail "the log does not say \"$1\": $(cat log)"
}
end() { kill "$server"; wait "$server" || fail "the server did not end in order: $(tail -3 log)"; server=; }

"$program" --home home init > init.out 2> init.err
certify good now 300
certify expired '400 days ago' 100
certify future '+100 days' 100
certify soon now 5

serve good
grep -q 'WARN' log && fail "a good certificate is warned about: $(cat log)"
gauge=$(curl -s "http://127.0.0.1:$metrics/metrics" | sed -n 's/^keymill_tls_certificate_expiry_seconds //p')
wanted=$(date -d "$(openssl x509 -noout -enddate -in good.pem | cut -d= -f2)" +%s)
[ "$gauge" = "$wanted" ] || fail "the certificate expires at $wanted, and the gauge says $gauge"
# Handshakes: the reason and the remote, and never more than some each second.
for _ in $(seq 150); do curl -s -m 5 "http://127.0.0.1:$port/" > /dev/null || true; done
await 'what came is not TLS'
grep 'what came is not TLS' log | head -1 | grep -q 'remote=127.0.0.1' || fail "the remote is not named: $(head -3 log)"
curl -s -m 5 "https://127.0.0.1:$port/" > /dev/null || true
sleep 2.5
await 'the client did not accept the server'
count=$(curl -s "http://127.0.0.1:$metrics/metrics" | sed -n 's/^keymill_tls_handshakes_failed_total{reason="not_tls"} //p')
[ "$count" = 150 ] || fail "150 handshakes failed, and $count are counted"
lines=$(grep -c 'handshake' log)
[ "$lines" -lt 140 ] || fail "a scanner can fill the log: $lines lines"
# A reload warns, too.
cp soon.key good.key; cp soon.pem good.pem; kill -HUP "$server"
await 'expires on 20'
end

serve expired; await 'expired on 20'; end
serve future; await 'is not valid before 20'; end

openssl pkey -in soon.key -aes256 -passout pass:x -out encrypted8.key
openssl ec -in soon.key -aes256 -passout pass:x -out encrypted1.key 2> /dev/null
for key in encrypted8 encrypted1; do
    if "$program" --home home serve --listen 127.0.0.1:0 --tls-cert soon.pem --tls-key $key.key > out 2> log; then
        fail "an encrypted key was taken"
    fi
    grep -q "$key.key.*is encrypted.*openssl pkey" log || fail "an encrypted key is told so: $(cat log)"
done
