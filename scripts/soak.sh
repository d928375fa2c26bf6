#!/usr/bin/env bash
# The soak: real processes, a guest that checks all it reads, and random kills, cuts, freezes and
# switchovers, back and forth, until the time is over. Installs and builds what is missing first.
#
# usage: scripts/soak.sh [--minutes N] [--seed N]   default: 5 minutes, and a seed that it prints
set -euo pipefail
# shellcheck source=scripts/deps.sh
. "$(dirname "$0")/deps.sh"
case ${1-} in
  -h | --help)
    sed -n '2,5s/^# \{0,1\}//p' "$0"
    exit 0
    ;;
esac
install_for build test
configure "$root/build" -DCMAKE_BUILD_TYPE=RelWithDebInfo
ninja -C "$root/build" -j2 --quiet nbdferry nbd_load
export NBDFERRY=$root/build/proxy/nbdferry NBD_LOAD=$root/build/test/bench/nbd_load
export PYTHONDONTWRITEBYTECODE=1
exec python3 "$root/test/soak/soak.py" "$@"
