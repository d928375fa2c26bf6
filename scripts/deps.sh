# shellcheck shell=bash
# What has to be installed, by purpose, and how it gets there; where the tree is.
# Sourced by the other scripts. For Debian 12 and later, Ubuntu 24.04 and later.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# packages_for build|test|vm|unit|demo|coverage|check: one a line.
packages_for() {
  case $1 in
    build)
      printf '%s\n' g++ cmake ninja-build pkg-config python3 libnbd-dev libfmt-dev doctest-dev \
        liburing-dev libxxhash-dev libcli11-dev libssl-dev
      # Debian 12's plain libboost-dev is older than what we need, later releases' is newer.
      if apt-cache show libboost-json1.81-dev >/dev/null 2>&1; then
        printf '%s\n' libboost1.81-dev libboost-json1.81-dev
      else
        printf '%s\n' libboost-dev libboost-json-dev
      fi
      ;;
    # qemu-system-common brings qemu-storage-daemon; libnbd-bin nbdinfo and nbdcopy; openssl makes
    # certificates.
    test)
      printf '%s\n' libnbd-bin nbdkit qemu-utils qemu-system-common nbd-server fio curl git \
        iproute2 util-linux openssl
      ;;
    # The tests with a real guest; its kernel is downloaded by them, and not installed.
    vm) printf '%s\n' qemu-system-x86 e2fsprogs iproute2 ;;
    # Judges the systemd unit; nothing has to run under it.
    unit) printf '%s\n' systemd libseccomp2 ;;
    demo) printf '%s\n' libnbd-bin nbdkit qemu-utils fio ;;
    coverage) printf '%s\n' gcovr ;;
    check) printf '%s\n' clang-format clang-tidy shellcheck git ;;
  esac
}

is_installed() {
  [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ]
}

# as_root COMMAND...: without asking for a password.
as_root() {
  if [ "$(id -u)" -eq 0 ]; then
    "$@"
  else
    sudo -n "$@"
  fi
}

# install_for PURPOSE...: asks nothing, and does nothing when all is there.
install_for() {
  local purpose name missing=()
  # Package lists that were never fetched know nothing, not even which Boost there is.
  if ! apt-cache show liburing-dev >/dev/null 2>&1; then
    as_root apt-get update -q </dev/null >/dev/null || true
  fi
  for purpose in "$@"; do
    while read -r name; do
      is_installed "$name" || missing+=("$name")
    done < <(packages_for "$purpose")
  done
  [ ${#missing[@]} -eq 0 ] && return 0
  echo "installing: ${missing[*]}"
  if ! as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -q \
    --no-install-recommends "${missing[@]}" </dev/null >/dev/null; then
    echo "could not install them; as root, run: apt-get install ${missing[*]}" >&2
    return 1
  fi
}

# configure DIRECTORY CMAKE-OPTION...: quiet unless it fails; with ccache where that is installed.
configure() {
  local directory=$1 launcher=()
  shift
  command -v ccache >/dev/null && launcher=(-DCMAKE_CXX_COMPILER_LAUNCHER=ccache)
  cmake -S "$root" -B "$directory" -G Ninja "${launcher[@]}" "$@" >/dev/null
}
