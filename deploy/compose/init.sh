#!/bin/sh
# Credentials of the federation in compose.yaml: a certificate authority of its own, a certificate for the
# coordinator, a token for Prometheus, an enrolment bundle for each client and for an operator, and the
# policy of the clients with the coordinator's identity in it. What exists is kept, but for the certificate,
# which is renewed at every start. Secrets go from file to file: none is printed, none is an argument.
set -eu
umask 077

state=/var/lib/fedsim
authority=/etc/fedsim/authority
tls=/etc/fedsim/tls
metrics=/etc/fedsim/metrics
scrape=/etc/fedsim/scrape
enrolment=/etc/fedsim/enrolment
operator=/etc/fedsim/operator

# The authority's key stays in a volume that only this service mounts.
fedsim certs dev "$authority" --name coordinator --name localhost --name 127.0.0.1
for file in ca.pem server.pem server.key; do
    cp "$authority/$file" "$tls/$file.new"
    mv "$tls/$file.new" "$tls/$file"
done

# Two files with one content: the coordinator wants a file that nobody else can read, and Prometheus is
# another user of the same group.
if [ ! -e "$metrics/token" ]; then
    python -c 'import secrets; print(secrets.token_urlsafe(32))' > "$metrics/token.new"
    mv "$metrics/token.new" "$metrics/token"
fi
cp "$metrics/token" "$scrape/token.new"
chmod 0640 "$scrape/token.new"
mv "$scrape/token.new" "$scrape/token"

for client in client-1 client-2 client-3; do
    if [ ! -e "$enrolment/$client.toml" ]; then
        fedsim node invite --state "$state" --name "$client" --label "site=$client" \
            --server coordinator:8470 --ca "$tls/ca.pem" --out "$enrolment/$client.toml"
    fi
done

# Bundles are good for one enrolment; who has enrolled keeps a key in a volume of its own.
if [ ! -e "$operator/operator.toml" ]; then
    fedsim node invite --state "$state" --role operator --name operator \
        --server coordinator:8470 --ca "$tls/ca.pem" --out "$operator/operator.toml"
fi

# The template allows a coordinator of zeros, that is, nobody.
server_id=$(sed -n 's/^server_id = "\([0-9a-f]\{64\}\)"$/\1/p' "$enrolment/client-1.toml")
if [ -z "$server_id" ]; then
    echo "init: no server_id in $enrolment/client-1.toml" >&2
    exit 1
fi
sed "s/\"0\{64\}\"/\"$server_id\"/" /etc/fedsim/policy.toml > "$enrolment/policy.toml.new"
mv "$enrolment/policy.toml.new" "$enrolment/policy.toml"
