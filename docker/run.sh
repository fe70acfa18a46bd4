#!/usr/bin/env bash
# Run meshloom in the image: docker/run.sh [gpu|cpu] COMMAND…; without a word, gpu if this host has NVIDIA's driver.
# The folder that this is called from is the container's working folder; what it writes there is yours.
set -euo pipefail
home=$(cd "$(dirname "$0")/.." && pwd)
kind=$(command -v nvidia-smi >/dev/null && echo gpu || echo cpu)
case ${1:-} in
  gpu | cpu) kind=$1; shift ;;
esac
export MESHLOOM_WORK=$PWD
export MESHLOOM_CACHE=${MESHLOOM_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/meshloom-docker}
export MESHLOOM_USER=$(id -u):$(id -g)
mkdir -p "$MESHLOOM_CACHE"
exec docker compose --project-directory "$home" -f "$home/compose.yaml" run --rm "$kind" "$@"
