#!/usr/bin/env bash
# Moves a running VM, memory and disks, to another host; see --help, and vm/README.md.
set -euo pipefail
exec python3 -B "$(dirname "$(readlink -f "$0")")/vm/migrate.py" "$@"
