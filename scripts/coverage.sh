#!/usr/bin/env bash
# How much of mirror/ the unit tests and the simulator reach: lines, and branches without those of
# exceptions and of assertions, which no correct program takes. Fails below 95 %.
#
# usage: scripts/coverage.sh [HISTORIES]   of the simulator, 20000 unless told
set -euo pipefail
# shellcheck source=scripts/deps.sh
. "$(dirname "$0")/deps.sh"
install_for build coverage

build=$root/build-coverage
# Not optimised: a branch of the source is one of the program.
configure "$build" -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_FLAGS='--coverage -fprofile-update=atomic'
ninja -C "$build" -j2 --quiet unit_mirror sim
find "$build" -name '*.gcda' -delete
"$build/test/unit_mirror" --minimal
"$build/test/sim/sim" --histories "${1:-20000}" --seed 1 >/dev/null
gcovr --root "$root" --filter "$root/mirror/" --exclude "$root/mirror/assert" \
  --exclude-throw-branches --exclude-unreachable-branches \
  --exclude-branches-by-pattern '.*NBDFERRY_(ASSERT|MUTANT).*' \
  --exclude-lines-by-pattern '.*NBDFERRY_ASSERT\(false.*' \
  --object-directory "$build" --print-summary --branches \
  --fail-under-line 95 --fail-under-branch 95 "$build"
