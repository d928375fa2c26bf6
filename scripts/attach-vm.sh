#!/usr/bin/env bash
# Runs a QEMU guest on nbdferry disks; see --help, and vm/README.md.
set -euo pipefail
exec python3 -B "$(dirname "$(readlink -f "$0")")/vm/attach.py" "$@"
