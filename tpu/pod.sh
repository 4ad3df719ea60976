#!/usr/bin/env bash
# A TPU slice from creation to deletion: tpu/pod.sh [OPTIONS] COMMAND [ARGS]
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: tpu/pod.sh [OPTIONS] COMMAND

commands
  create           make the slice, or with --queued ask for it
  wait             until a queued slice is there
  install          copy this checkout to every host, and install it with its TPU extra
  start -- ARGS    run `python -m flax_diffusion.train ARGS` on every host, in the background; a run that was cut off
                   goes on from its last checkpoint
  status           whether it runs, host by host
  log              follow the log of the first host
  stop             ask the run to stop, on every host
  fetch FROM TO    copy a folder of the first host, or gs://…, to here
  delete           the slice, and its request if it was queued
  jobset IMAGE -- ARGS
                   print a JobSet that trains on a slice of GKE, for `kubectl apply -f -`; tpu/Dockerfile makes the image

options
  --name NAME      of the slice (default flax-diffusion)
  --zone ZONE      such as us-west4-a (default gcloud's)
  --project NAME   (default gcloud's)
  --type TYPE      accelerator type (default v5litepod-4)
  --version NAME   runtime version (default that of the type)
  --queued         create: by a queued resource
  --spot           create: cheaper, and taken back when others need it
  --dry-run        print the commands instead of running them
TEXT
}

fail() {
  printf 'error: %s\n' "$1" >&2
  exit 2
}

name=flax-diffusion zone='' project='' type=v5litepod-4 version='' queued='' spot='' dry=''
while [ $# -gt 0 ]; do
  case $1 in
    --name | --zone | --project | --type | --version)
      [ $# -gt 1 ] || fail "$1 needs a value"
      printf -v "${1#--}" %s "$2"
      shift 2
      ;;
    --queued | --spot) printf -v "${1#--}" %s yes && shift ;;
    --dry-run) dry=yes && shift ;;
    -h | --help) usage && exit ;;
    --*) fail "unknown option $1; see tpu/pod.sh --help" ;;
    *) break ;;
  esac
done
[ $# -gt 0 ] || fail "no command; see tpu/pod.sh --help"
command=$1 && shift

where=()
[ -z "$zone" ] || where+=(--zone "$zone")
[ -z "$project" ] || where+=(--project "$project")

run() {
  if [ -n "$dry" ]; then
    printf '%q ' "$@" && echo
  else
    "$@"
  fi
}

on() { # on WORKER COMMAND: runs it there by ssh
  run gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker "$1" --command "$2"
}

check_type() { # of a generation that is known: whether it comes in that size
  local size=${type##*-}
  case $type in
    v5e-*) fail "--type $type: that is v5litepod-$size" ;;
    v5litepod-* | v6e-*)
      case $size in
        1 | 4 | 8 | 16 | 32 | 64 | 128 | 256) ;;
        *) fail "--type $type: ${type%-*}-N has N chips, which are 1, 4, 8, 16, 32, 64, 128 or 256" ;;
      esac
      ;;
    v4-* | v5p-*)
      [[ $size =~ ^[1-9][0-9]*$ ]] && [ $((size % 8)) -eq 0 ] ||
        fail "--type $type: ${type%-*}-N has N cores, two a chip, which are a multiple of 8"
      ;;
  esac
}

runtime() {
  case $type in
    v4-*) echo tpu-ubuntu2204-base ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) fail "--type $type: give its runtime with --version; types known are v4-N, v5litepod-N, v5p-N and v6e-N" ;;
  esac
}

create() {
  check_type
  [ -n "$version" ] || version=$(runtime)
  local options=()
  [ -z "$spot" ] || options+=(--spot)
  if [ -n "$queued" ]; then
    run gcloud compute tpus queued-resources create "$name" "${where[@]}" --node-id "$name" \
      --accelerator-type "$type" --runtime-version "$version" "${options[@]}"
  else
    run gcloud compute tpus tpu-vm create "$name" "${where[@]}" \
      --accelerator-type "$type" --version "$version" "${options[@]}"
  fi
}

await() {
  local state='' ask=(gcloud compute tpus queued-resources describe "$name" "${where[@]}" '--format=value(state.state)')
  if [ -n "$dry" ]; then
    run "${ask[@]}"
    return
  fi
  while true; do
    state=$("${ask[@]}")
    printf '%s\n' "$state"
    case $state in
      ACTIVE) return ;;
      FAILED | SUSPENDED | SUSPENDING | DELETING) fail "the request for $name is $state: delete it, and create again" ;;
    esac
    sleep "${POLL_SECONDS:-30}"
  done
}

install() {
  local root archive
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  archive=$(mktemp -d)
  # shellcheck disable=SC2064  # the folder of now
  trap "rm -rf '$archive'" EXIT
  run tar --exclude=.git --exclude=runs -czf "$archive/flax-diffusion.tgz" -C "$root" .
  run gcloud compute tpus tpu-vm scp "$archive/flax-diffusion.tgz" "$name:" "${where[@]}" --worker all
  # The checkout must be there to install it, and a virtual environment keeps clear of what the image brings, which is
  # Python 3.10: too old. uv brings the Python that constraints.txt is for.
  on all "mkdir -p flax-diffusion && tar -xzf flax-diffusion.tgz -C flax-diffusion && sudo apt-get install -qq -y \
python3-venv >/dev/null && python3 -m venv tools && tools/bin/pip install -q uv && tools/bin/uv venv -q --clear \
--seed --python 3.11 venv && venv/bin/pip install -q -c flax-diffusion/constraints.txt -e './flax-diffusion[tpu]'"
}

start() {
  [ "${1:-}" != -- ] || shift
  [ $# -gt 0 ] || fail "start: give what to train, as in: tpu/pod.sh start -- text_to_image --config configs/sd15_tpu.yaml"
  local words
  words=$(printf '%q ' "$@")
  case " $* " in
    *" --resume_from_checkpoint"*) ;;
    *) words+="--resume_from_checkpoint latest " ;;
  esac
  on all "cd flax-diffusion || exit; nohup ../venv/bin/python -m flax_diffusion.train $words>../train.log 2>&1 \
</dev/null & echo \$! >../train.pid"
}

arrangement() { # of the chips: "TOPOLOGY CHIPS"
  case $type in
    v5litepod-1 | v6e-1) echo 1x1 1 ;;
    v5litepod-4 | v6e-4) echo 2x2 4 ;;
    v5litepod-8 | v6e-8) echo 2x4 8 ;;
    v5litepod-16 | v6e-16) echo 4x4 16 ;;
    v5litepod-32 | v6e-32) echo 4x8 32 ;;
    v5litepod-64 | v6e-64) echo 8x8 64 ;;
    v5litepod-128 | v6e-128) echo 8x16 128 ;;
    v5litepod-256 | v6e-256) echo 16x16 256 ;;
    v4-8 | v5p-8) echo 2x2x1 4 ;; # these are named for their cores, two a chip
    v4-16 | v5p-16) echo 2x2x2 8 ;;
    v4-32 | v5p-32) echo 2x2x4 16 ;;
    v4-64 | v5p-64) echo 2x4x4 32 ;;
    v4-128 | v5p-128) echo 4x4x4 64 ;;
    *) fail "--type $type: not known to jobset; give v5litepod-N or v6e-N of 1 to 256, v4-N or v5p-N of 8, 16, 32, 64 or 128" ;;
  esac
}

jobset() {
  [ $# -ge 3 ] && [ "$2" = -- ] || fail "jobset: give an image and what to train, as in: tpu/pod.sh jobset IMAGE -- \
text_to_image --config configs/sd15_tpu.yaml --output_dir gs://bucket/run"
  local image=$1 arranged topology chips hosts here label words='' word
  shift 2
  check_type
  arranged=$(arrangement)
  read -r topology chips <<<"$arranged"
  case $type in
    v4-*) label=tpu-v4-podslice ;;
    v5litepod-*) label=tpu-v5-lite-podslice ;;
    v5p-*) label=tpu-v5p-slice ;;
    v6e-*) label=tpu-v6e-slice ;;
  esac
  here=$((chips < 4 ? chips : 4)) # chips a host
  hosts=$((chips / here))
  case " $* " in *" --resume_from_checkpoint"*) ;; *) set -- "$@" --resume_from_checkpoint latest ;; esac
  for word in "$@"; do # a string of YAML
    word=${word//\\/\\\\}
    words+=", \"${word//\"/\\\"}\""
  done
  cat <<TEXT
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name
spec:
  failurePolicy: {maxRestarts: 10}  # a host that is taken back; the run goes on from its last checkpoint
  replicatedJobs:
    - name: slice
      replicas: 1
      template:
        spec:
          parallelism: $hosts
          completions: $hosts
          backoffLimit: 0
          template:
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: 120
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: $label
                cloud.google.com/gke-tpu-topology: $topology
${spot:+                cloud.google.com/gke-spot: \"true\"
}              containers:
                - name: train
                  image: $image
                  command: ["python", "-m", "flax_diffusion.train"$words]
                  resources: {limits: {google.com/tpu: $here}}
TEXT
}

case $command in
  create) create ;;
  wait) await ;;
  install) install ;;
  start) start "$@" ;;
  status) on all "if kill -0 \$(cat train.pid) 2>/dev/null; then echo runs; else echo ended: \$(tail -n 1 train.log); fi" ;;
  log) on 0 "tail -n 50 -f train.log" ;;
  stop) on all "kill -TERM \$(cat train.pid)" ;;
  jobset) jobset "$@" ;;
  fetch)
    [ $# -eq 2 ] || fail "fetch: give the folder there and the one here, as in: tpu/pod.sh fetch flax-diffusion/runs/sd runs"
    case $1 in
      gs://*) run gcloud storage cp --recursive "$1" "$2" ;;
      *) run gcloud compute tpus tpu-vm scp --recurse "$name:$1" "$2" "${where[@]}" --worker 0 ;;
    esac
    ;;
  delete)
    if [ -n "$queued" ]; then
      run gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
    else
      run gcloud compute tpus tpu-vm delete "$name" "${where[@]}" --quiet
    fi
    ;;
  *) fail "unknown command $command; see tpu/pod.sh --help" ;;
esac
