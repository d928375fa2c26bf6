#!/usr/bin/env bash
# Builds docker/Dockerfile and runs docker/compose.yaml, without a container engine: buildah's chroot
# isolation, network namespaces (test/docker/). For root, on Debian; by hand, since it takes minutes:
# about four where only the guest's image is cached, one afterwards.
#
# usage: scripts/docker-test.sh
#
# What must hold: the same Dockerfile and compose.yaml as for an engine, unchanged. Where Debian's
# image can't be pulled one is made with debootstrap, and stays in buildah's store under its name.
set -euo pipefail
# shellcheck source=scripts/deps.sh
. "$(dirname "$0")/deps.sh"
base=docker.io/library/debian:12-slim
cd "$root"

missing=()
for program in buildah debootstrap docker-compose; do
  command -v $program >/dev/null || missing+=("$program")
done
if [ "$(id -u)" -ne 0 ] || [ ${#missing[@]} -gt 0 ]; then
  echo "SKIPPED, NOTHING WAS TESTED: run as root; apt-get install ${missing[*]:-nothing}" >&2
  exit 77
fi

# Like Debian's slim image: minbase, without documentation and translations.
make_base() {
  local scratch container
  scratch=$(mktemp -d "${TMPDIR:-/var/tmp}/nbdferry-base-XXXXXX")
  debootstrap --variant=minbase bookworm "$scratch/root" >"$scratch/log" || {
    tail -n 5 "$scratch/log" >&2
    rm -rf "$scratch"
    return 1
  }
  rm -rf "$scratch"/root/var/{cache/apt/*.bin,cache/apt/archives/*.deb,lib/apt/lists/*} \
    "$scratch"/root/usr/share/{doc,man,locale}/*
  container=$(buildah from scratch)
  # A tar, so that owners and modes stay what they are.
  tar -C "$scratch/root" --numeric-owner -cf "$scratch/root.tar" .
  buildah add -q "$container" "$scratch/root.tar" / >/dev/null
  buildah config --cmd bash "$container"
  buildah commit -q --rm "$container" "$base" >/dev/null
  rm -rf "$scratch"
}

echo "compose.yaml: parsed, and checked against the schema"
docker-compose -f docker/compose.yaml config -q

if ! buildah inspect --type image "$base" >/dev/null 2>&1; then
  echo "base image"
  buildah pull -q "$base" 2>/dev/null || make_base
fi
for target in guest nbdferry; do
  image=nbdferry
  [ $target = guest ] && image=nbdferry-guest
  echo "image $image"
  # --format docker: OCI's has no health checks.
  buildah bud --isolation chroot --format docker --layers --quiet -t $image --target $target \
    -f docker/Dockerfile .
done
buildah images --format '{{.Name}} {{.Size}}' | grep nbdferry
exec python3 test/docker/compose_run.py
