#!/bin/sh
# Tests start programs of their own: a Redis server, a browser for the pages, a Prometheus. This
# puts what is missing on the machine. Where it cannot, the tests that need it are skipped.
set -eu
missing=""
for pair in redis-server:redis-server chromium:chromium chromedriver:chromium-driver prometheus:prometheus; do
    command -v "${pair%%:*}" >/dev/null 2>&1 || missing="$missing ${pair#*:}"
done
[ -n "$missing" ] || exit 0
as_root=""
[ "$(id -u)" = 0 ] || as_root="sudo -n"
if ! command -v apt-get >/dev/null 2>&1 || ! $as_root true 2>/dev/null; then
    echo "not installed, and their tests are skipped:$missing" >&2
    exit 0
fi
# The packages would start services on the standard ports; nothing here wants one.
export RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive
echo "installing for the tests:$missing"
$as_root apt-get update -qq
# shellcheck disable=SC2086  # A list of packages.
$as_root apt-get install -y -qq --no-install-recommends $missing >/dev/null
