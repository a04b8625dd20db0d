#!/bin/sh
# Makes the secrets for deploy/compose.yaml and the Helm chart, each in its own file; files that exist
# are kept.
#   sh deploy/secrets.sh [REDIS_HOST]      The host in the store's URL; by default compose's, redis.
set -eu
umask 077
redis=${1:-redis}
here=$(cd "$(dirname "$0")" && pwd)
secrets=$here/secrets
mkdir -p "$secrets"

random() { od -An -N32 -tx1 /dev/urandom | tr -d ' \n'; }

write() {
    [ -e "$secrets/$1" ] && return
    printf '%s\n' "$2" >"$secrets/$1"
    # Containers have another user; compose gives them this file's group. The directory stays closed.
    chmod 0440 "$secrets/$1"
}

password=$(random)
write rpc-token "$(random)"
write store-key "$(random)"
write api-keys "admin: sk-$(random)"
write grafana-password "$(random)"
if [ ! -e "$secrets/redis.conf" ] || [ ! -e "$secrets/store-url" ]; then
    rm -f "$secrets/redis.conf" "$secrets/store-url"  # They hold one password.
    write redis.conf "requirepass $password"
    write store-url "redis://:$password@$redis:6379/0"
fi
grep -qs '^OPTICNERVE_SECRETS_GID=' "$here/.env" ||
    echo "OPTICNERVE_SECRETS_GID=$(id -g)" >>"$here/.env"
echo "secrets are in $secrets; the API key is in api-keys, Grafana's password (admin) in grafana-password"
