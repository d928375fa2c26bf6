#!/usr/bin/env bash
# Installs what is missing, builds, and runs every test: first the unit tests and a short simulation
# under the address and undefined behaviour sanitizers, then all of it as it ships (assertions are on
# in every build).
#
# usage: scripts/test.sh [CTEST-OPTION...]   for example: scripts/test.sh -R interop
set -euo pipefail
# shellcheck source=scripts/deps.sh
. "$(dirname "$0")/deps.sh"
install_for build test
# Without these the tests with a VM, and of the systemd unit, are skipped, and say so.
install_for vm || true
install_for unit || true

echo "building with sanitizers"
configure "$root/build-sanitize" -DCMAKE_BUILD_TYPE=RelWithDebInfo \
  -DNBDFERRY_SANITIZE=address,undefined
ninja -C "$root/build-sanitize" -j2 --quiet unit_and_sim
ctest --test-dir "$root/build-sanitize" --output-on-failure -j2 \
  -R '^(unit\..*|sim\.histories|sim\.regressions)$' "$@"

echo "building as it ships"
configure "$root/build" -DCMAKE_BUILD_TYPE=RelWithDebInfo
ninja -C "$root/build" -j2 --quiet
ctest --test-dir "$root/build" --output-on-failure -j2 "$@"
