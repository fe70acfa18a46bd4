#!/usr/bin/env bash
# Build the image: docker/build.sh [gpu|cpu]; without a word, gpu if this host has NVIDIA's driver.
set -euo pipefail
cd "$(dirname "$0")/.."
kind=${1:-$(command -v nvidia-smi >/dev/null && echo gpu || echo cpu)}
case $kind in
  gpu | cpu) ;;
  *) echo "build.sh: expected gpu or cpu, got '$kind'" >&2; exit 2 ;;
esac
exec docker compose build "$kind"
