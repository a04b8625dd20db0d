#!/bin/sh
# Tests start a redis-server of their own on a free port; this puts the program on the machine.
set -eu
command -v redis-server >/dev/null 2>&1 && exit 0
if ! command -v apt-get >/dev/null 2>&1; then
    echo "redis-server is missing; install Redis 6 or later with your package manager" >&2
    exit 1
fi
as_root=""
[ "$(id -u)" = 0 ] || as_root="sudo"
# The package would start a service on the standard port; nothing here wants one.
export RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive
echo "installing redis-server for the tests"
$as_root apt-get update -qq
$as_root apt-get install -y -qq --no-install-recommends redis-server >/dev/null
