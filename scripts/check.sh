#!/usr/bin/env bash
# The gate before a commit: format, shell scripts, layout, warnings as errors, clang-tidy, tests.
#
# usage: scripts/check.sh [--quick]   --quick leaves out clang-tidy and the tests
set -euo pipefail
# shellcheck source=scripts/deps.sh
. "$(dirname "$0")/deps.sh"
quick=no
case ${1-} in
  '') ;;
  --quick) quick=yes ;;
  *)
    echo "usage: scripts/check.sh [--quick]" >&2
    exit 2
    ;;
esac
install_for build test check
cd "$root"

echo "format"
git ls-files '*.cpp' '*.hpp' | xargs clang-format --dry-run -Werror
echo "shell scripts"
git ls-files '*.sh' .ci/run | xargs shellcheck -x
echo "layout"
python3 test/layout.py .
echo "build"
configure build -DCMAKE_BUILD_TYPE=RelWithDebInfo
ninja -C build -j2 --quiet
[ $quick = yes ] && exit 0
echo "clang-tidy"
# Three to four minutes of two cores. g++ knows warnings that clang does not.
git ls-files 'mirror/*.cpp' 'transport/*.cpp' 'proxy/*.cpp' |
  xargs -P2 -n1 clang-tidy -p build --quiet --extra-arg=-Wno-unknown-warning-option
echo "tests"
exec scripts/test.sh
