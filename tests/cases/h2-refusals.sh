#!/bin/bash
# Guards: a refusal of a request whose body is still on its way reaches the client over HTTP/2, too. curl, h2load and
# haproxy's HTTP/2 backend each take a reset behind the answer for the loss of it, and hundreds of resets end a connection.
# needs: curl h2load haproxy openssl
set -euo pipefail
program=$(realpath "$1")
for need in curl h2load haproxy openssl; do
    command -v "$need" > /dev/null || { echo "skipped: there is no $need"; exit 77; }
done
dir=$(mktemp -d)
children=
cleanup() { [ -z "$children" ] || kill $children 2>/dev/null || true; wait; rm -rf "$dir"; }
trap cleanup EXIT
cd "$dir"
fail() { echo "$1"; exit 1; }

"$program" --home home init > init.out 2> init.err
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout tls.key -out tls.pem -days 2 -subj /CN=localhost \
    -addext subjectAltName=IP:127.0.0.1 2> openssl.err || fail "openssl: $(cat openssl.err)"
"$program" --home home serve --listen 127.0.0.1:0 --metrics 127.0.0.1:0 > out 2> log & children="$!"
"$program" --home home serve --listen 127.0.0.1:0 --tls-cert tls.pem --tls-key tls.key > tls.out 2> tls.log & children="$children $!"
for _ in $(seq 300); do grep -q ready out && grep -q ready tls.out && break; sleep 0.1; done
port=$(sed -n 's|.*ready on http://127.0.0.1:\([0-9]*\).*|\1|p' out)
metrics=$(sed -n 's|.*metrics on http://127.0.0.1:\([0-9]*\).*|\1|p' out)
secret=$(sed -n 's|.*ready on https://127.0.0.1:\([0-9]*\).*|\1|p' tls.out)
[ -n "$port" ] && [ -n "$secret" ] || fail "the servers did not start: $(cat log tls.log)"

printf 'thirteen byte' > small
head -c 200000 /dev/zero > middle
head -c 100000000 /dev/zero > huge

# curl: every request has an answer with a body. 415: it is no protobuf. (curl 7.88 cannot use a connection twice with prior
# knowledge, whatever the server.)
check() { # what
    good=$(grep -c '^415 [1-9]' codes || true)
    [ "$good" = 200 ] || fail "$1: $good of 200 refusals came: $(sort codes | uniq -c)"
}
report='%{http_code} %{size_download} %{errormsg}\n'
urls=$(for _ in $(seq 200); do printf 'url = "https://127.0.0.1:%s/"\noutput = "answer"\n' "$secret"; done)
for body in small middle; do
    for _ in $(seq 200); do
        curl -s --http2-prior-knowledge --data-binary "@$body" -o answer -w "$report" "http://127.0.0.1:$port/" || true
    done > codes
    check "curl with the $body body, a connection for each"
    echo "$urls" | curl -s --http2 --cacert tls.pem --data-binary "@$body" -w "$report" -K - > codes || true
    check "curl over TLS with the $body body, on one connection"
done
for n in $(seq 20); do
    code=$(curl -s --http2-prior-knowledge --data-binary @huge -o answer -w '%{http_code} %{size_download}' "http://127.0.0.1:$port/") \
        || fail "curl number $n with the huge body: exit code $?"
    [[ $code =~ ^413\ [1-9] ]] || fail "curl with the huge body has $code"
done

# h2load: thousands on each connection, many at once.
h2load -n 6000 -c 2 -m 20 -d small "http://127.0.0.1:$port/" > load
grep -Eq '6000 done,.* 0 errored, 0 timeout' load || fail "h2load: $(grep requests: load)"
grep -q ' 6000 4xx' load || fail "h2load: $(grep 'status codes' load)"

# haproxy in front, speaking HTTP/2 to the server.
cat > haproxy.cfg <<CFG
defaults
    mode http
    timeout connect 5s
    timeout client 30s
    timeout server 30s
frontend in
    bind "unix@$dir/proxy.sock"
    default_backend keymill
backend keymill
    retries 0
    server one 127.0.0.1:$port proto h2
CFG
haproxy -db -f haproxy.cfg > proxy.log 2>&1 & children="$children $!"
for _ in $(seq 100); do [ -S proxy.sock ] && break; sleep 0.1; done
for body in small middle; do
    curl -s --unix-socket proxy.sock --data-binary "@$body" -w '%{http_code} %{size_download}\n' \
        $(for _ in $(seq 300); do printf 'http://keymill/ -o answer '; done) > codes || fail "curl through haproxy: exit code $?"
    good=$(grep -c '^415 [1-9]' codes || true)
    [ "$good" = 300 ] || fail "through haproxy $good of 300 refusals of the $body body came: $(sort codes | uniq -c)"
done

failed=$(curl -s "http://127.0.0.1:$metrics/metrics" | sed -n 's/^keymill_connections_failed_total //p')
[ "$failed" = 0 ] || fail "$failed connections count as failed: $(tail -3 log)"
