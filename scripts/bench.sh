#!/usr/bin/env bash
# Measures what nbdferry must reach, against its peers, in one run, as ratios. Installs and builds
# what is missing first; leaves nothing behind but the build directory.
set -euo pipefail
# shellcheck source=scripts/deps.sh
. "$(dirname "$0")/deps.sh"

usage() {
  cat <<'USAGE'
usage: scripts/bench.sh [copy|link|mirror|transport|memory|front|vm]... [--runs N] [--dir DIR]
                        [--cases LIST] [--svg FILE]

  copy     idle copy of a 2 GiB disk over loopback TCP to nbdkit, against nbdcopy
  link     of mirror, the case link alone
  mirror   the mirror under load: a link of 1 Gb/s, tmpfs, a guest that outruns the link, a target
           that hangs, one that is far away, 300 pivots; against QEMU's mirror in both modes (root)
  transport  several links at once, unequal ones, one that is cut, a long one, --bandwidth, what a
           mirrored write waits for beside the copy (root)
  memory   resident memory under load, and how soon a disk of 16 TiB serves
  front    4 KiB reads and writes, at depth 32 and 1, against qemu-nbd and nbdkit
  vm       a guest moves, memory and disks, against QEMU's own way (needs root)

  --runs N   interleaved runs of each contender (default: 10, and 3 when nothing is named)
  --dir DIR  where the disks lie (default: /dev/shm; 6 GiB are needed)
  --cases L  only these, with commas between; of mirror: link tmpfs outrun hang far pivots; of
             transport: two unequal cut far limit wait tls
  --svg FILE of mirror: the guest's latency in the case link (default: build/bench-mirror.svg)

Without a name: all of them. Each result is a line of the table at the end and a line of JSON:
the median over the runs, the quartiles and the extremes. Contenders take turns, so that what else
the machine does hits all of them; only ratios from the same run mean something.
USAGE
}

names=()
runs=
cases=
svg=$root/build/bench-mirror.svg
dir=/dev/shm
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help)
      usage
      exit 0
      ;;
    copy | link | mirror | transport | memory | front | vm) names+=("$1") ;;
    --runs | --dir | --cases | --svg)
      [ $# -ge 2 ] || { usage >&2; exit 2; }
      case $1 in
        --runs) runs=$2 ;;
        --dir) dir=$2 ;;
        --cases) cases=$2 ;;
        --svg) svg=$2 ;;
      esac
      shift
      ;;
    *)
      usage >&2
      exit 2
      ;;
  esac
  shift
done
if [ ${#names[@]} -eq 0 ]; then
  names=(copy mirror transport memory front vm)
  runs=${runs:-3}
fi

install_for build test
install_for vm || true
configure "$root/build" -DCMAKE_BUILD_TYPE=RelWithDebInfo
ninja -C "$root/build" -j2 --quiet nbdferry nbd_load raw_load guest_writer relay
export NBDFERRY=$root/build/proxy/nbdferry NBD_LOAD=$root/build/test/bench/nbd_load
export GUEST_WRITER=$root/build/test/vm/guest_writer GUEST_CACHE=$root/build/vm-guest
export MIRROR_CASES=$cases TRANSPORT_CASES=$cases MIRROR_SVG=$svg
export RAW_LOAD=$root/build/test/bench/raw_load TMPDIR=$dir PYTHONDONTWRITEBYTECODE=1
exec python3 "$root/test/bench/bench.py" --runs "${runs:-10}" "${names[@]}"
