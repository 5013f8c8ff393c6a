#!/bin/bash
# What runs on a node, in its Python environment (inside the container, where there is one). slurm/job.sh calls it:
#   node.sh python ARGUMENT ...                       Python alone
#   node.sh torchrun|deepspeed|alone PROGRAM ARGUMENT ...     the ranks of this node
# It reads what job.sh exports: MM_RUN (empty: nothing to save), MM_JOB, MM_NODES, MM_RANKS, MM_HEAD, MM_PORT, MM_RDZV_ID.

# what activation prints must not get among what is asked of Python
if [ -n "$MM_ACTIVATE" ]; then
  # shellcheck source=/dev/null
  . "$MM_ACTIVATE" >&2 || { echo "error: MM_ACTIVATE=$MM_ACTIVATE cannot be sourced on $(hostname)" >&2; exit 2; }
elif [ -n "$MM_VENV" ]; then
  # shellcheck source=/dev/null
  . "$MM_VENV/bin/activate" >&2 || { echo "error: MM_VENV=$MM_VENV is no virtual environment on $(hostname)" >&2; exit 2; }
fi

launcher=$1
shift
case $launcher in
  python) exec python3 "$@" ;;
  alone) command=(python3 -m "$@") ;;
  torchrun)
    is_host=false
    [ "${SLURM_NODEID:-0}" = 0 ] && is_host=true
    command=(python3 -m torch.distributed.run --nnodes="$MM_NODES" --nproc-per-node="$MM_RANKS"
      --rdzv-backend=c10d --rdzv-endpoint="$MM_HEAD:$MM_PORT" --rdzv-id="$MM_RDZV_ID" --rdzv-conf="is_host=$is_host"
      --local-addr="${SLURMD_NODENAME:-$MM_HEAD}" --max-restarts="${MM_MAX_RESTARTS:-0}" -m "$@")
    ;;
  deepspeed)
    command=(python3 -m deepspeed.launcher.runner --hostfile="$MM_RUN/slurm/hostfile" --no_ssh
      --node_rank="${SLURM_NODEID:-0}" --master_addr="$MM_HEAD" --master_port="$MM_PORT" --module "$@")
    ;;
esac
if [ -n "$MM_DRY_RUN" ]; then
  printf '%q ' "${command[@]}"
  echo
  exit
fi
if [ -z "$MM_RUN" ] || [ "$launcher" = alone ]; then
  exec "${command[@]}"
fi

# Slurm sends SIGTERM here at a pre-emption, and nowhere else: torchrun would pass it on and kill what has not ended after
# 30 seconds. The file reaches all nodes; a run that is only starting takes it away, so it is left again and again.
asked=
trap 'asked=1' TERM USR1
"${command[@]}" &
ranks=$!
status=
while [ -z "$status" ]; do
  if [ -n "$asked" ] && kill -0 "$ranks" 2>/dev/null; then
    : >"$MM_RUN/slurm/asked-$MM_JOB"
    : >"$MM_RUN/stop"
    sleep 1
    continue
  fi
  wait "$ranks"
  ended=$?
  kill -0 "$ranks" 2>/dev/null || status=$ended # else a signal ended the waiting
done
exit "$status"
