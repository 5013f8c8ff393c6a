#!/bin/bash
# Jobs that wait for each other: each starts when the one before is done, and is cancelled when that fails.
#   slurm/chain.sh [SBATCH OPTIONS --] [SBATCH OPTIONS] PROGRAM CONFIG [key=value ...] [-- [SBATCH OPTIONS] PROGRAM ...] ...
# PROGRAM: train.pretrain, train.finetune, train.sweep, eval.suite. Options before the first -- are for all jobs:
#   slurm/chain.sh --partition=gpu --account=me -- \
#     --nodes=16 train.pretrain my.yaml out=runs/p -- \
#     --nodes=2 train.finetune vqa.yaml model=runs/p out=runs/f -- eval.suite suite.yaml model=runs/f
# Prints the number and the program of each job, one a line. MM_DRY_RUN=1 shows the commands instead.

fail() {
  echo "error: $1; see slurm/README.md" >&2
  exit 2
}

# Words of a stage -> options, program, arguments
split() {
  options=() program='' arguments=()
  while [ $# -gt 0 ] && [[ "$1" != train.* && "$1" != eval.* ]]; do
    options+=("$1")
    shift
  done
  [ $# -gt 0 ] || return
  program=$1
  shift
  arguments=("$@")
}

# A stage is fit to be submitted
check() {
  split "$@"
  if [ -z "$program" ]; then
    [ "$stages$common_given" = 0 ] || fail "no program (train.* or eval.*) in: $*"
    common=("${options[@]}") common_given=1
    return
  fi
  stages=$((stages + 1))
}

submit() {
  local script words=()
  split "$@"
  case $program in
    '') return ;;
    train.sweep) script=sweep ;;
    train.*) script=train words=("$program") ;;
    eval.*) script=eval words=("$program") ;;
  esac
  words=(sbatch --parsable --kill-on-invalid-dep=yes ${after:+--dependency=afterok:$after}
    "${common[@]}" "${options[@]}" "slurm/$script.sbatch" "${words[@]}" "${arguments[@]}")
  if [ -n "$MM_DRY_RUN" ]; then
    printf '%q ' "${words[@]}"
    echo
    after=JOB
    return
  fi
  after=$("${words[@]}") || exit
  after=${after%%;*} # where there are several clusters it names its own
  echo "$after $program"
}

# each ACTION WORD ...: of every stage
each() {
  local word action=$1 stage=()
  shift
  for word in "$@" --; do
    if [ "$word" != -- ]; then
      stage+=("$word")
      continue
    fi
    "$action" "${stage[@]}"
    stage=()
  done
}

[ -r slurm/train.sbatch ] || fail "there is no slurm/train.sbatch here: start it from the root of the checkout"
after='' common=() common_given='' stages=0
each check "$@"
[ "$stages" -gt 0 ] || fail "nothing to submit"
each submit "$@"
