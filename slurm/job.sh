# What the batch scripts share; they source it. A job is Slurm's; an attempt is one start of it, and a requeue makes
# another; a run is a folder of mm. slurm/README.md says what a user sees of this. They set root: the checkout.

# start_job KIND PROGRAM [CONFIG] [key=value ...], KIND: train, eval or sweep. Does not return.
start_job() {
  kind=$1 program=$2
  shift 2
  if [ -z "$SLURM_JOB_ID$MM_DRY_RUN" ]; then
    echo "error: this is a batch script: sbatch slurm/$kind.sbatch ... submits it," \
      "MM_DRY_RUN=1 bash slurm/$kind.sbatch ... shows what it would start" >&2
    exit 2
  fi
  # a task of an array by both numbers: the one of its own may be that of the whole array
  job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
  job=${job:-${SLURM_JOB_ID:-JOB}}
  attempt=$((${SLURM_RESTART_COUNT:-0} + 1))
  asked= # the first notice that this attempt gets
  trap 'asked=${asked:-USR1}' USR1
  trap 'asked=${asked:-TERM}' TERM
  run=''
  recall || read_arguments "$@"
  find_python
  if [ -n "$MM_DRY_RUN" ]; then
    fill_in
    check_config || run_attempt
  fi
  if [ "$kind" = eval ]; then
    code=$root commit='' notes='' log=''
  else
    freeze_run
    # shellcheck source=/dev/null
    [ ! -r "$code/slurm/job.sh" ] || . "$code/slurm/job.sh" # from here on nothing depends on the checkout
  fi
  run_attempt
}

# Python of this machine or of a container -> inside: goes before a command to run here; enter: before one that srun
# starts; container: options of srun. A dry run starts no container: Python of this machine reads the config, if it can
find_python() {
  if [ -z "$MM_VENV$MM_ACTIVATE$MM_CONTAINER" ] && [ -e "$root/.venv/bin/activate" ]; then
    export MM_VENV=$root/.venv
  fi
  inside=() enter=() container=()
  [ -n "$MM_CONTAINER" ] || return 0
  local place mounts='' others
  IFS=, read -ra others <<<"$MM_MOUNTS"
  for place in "$root" "$PWD" "${others[@]}"; do
    [[ "$place" == *:* ]] || place=$place:$place
    [[ ",$mounts," == *",$place,"* ]] || mounts+=${mounts:+,}$place
  done
  if [[ "$MM_CONTAINER" == *.sif ]]; then
    enter=(apptainer exec --nv --bind "$mounts" --pwd "$PWD" "$MM_CONTAINER")
    inside=("${enter[@]}")
  else # pyxis
    container=(--container-image="$MM_CONTAINER" --container-mounts="$mounts" --container-workdir="$PWD")
    inside=(srun --nodes=1 --ntasks=1 --mpi=none --export=ALL "${container[@]}")
  fi
  [ -z "$MM_DRY_RUN" ] || inside=(env -u MM_ACTIVATE MM_VENV="$([ ! -e "$root/.venv/bin/activate" ] || echo "$root/.venv")")
}

# Python with the checkout, before there is a step
ask_python() {
  PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} "${inside[@]}" bash "$root/slurm/node.sh" python "$@"
}

# What the program itself says of its config; it starts nothing else
check_config() {
  if [ ${#inside[@]} -gt 0 ] && ! ask_python -c 'import mm.config, mm.program, mm.runs' 2>/dev/null; then
    echo "mm job $job: the config is not read here: that takes the container"
    run=RUN code=RUN/slurm/code commit='' notes='' log=''
    return 1
  fi
  ask_python -m "$program" "${arguments[@]}" --help >/dev/null || exit
}

# What a dry run has no allocation to tell by: the numbers that the script asks for
fill_in() {
  [ -z "$SLURM_JOB_ID" ] || return 0
  SLURM_JOB_NUM_NODES=${SLURM_JOB_NUM_NODES:-$(asked_for nodes)}
  SLURM_GPUS_PER_NODE=${SLURM_GPUS_PER_NODE:-$(asked_for gpus-per-node)}
  SLURM_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-$(asked_for cpus-per-task)}
}

# An option of the script
asked_for() {
  sed -nE "s/^#SBATCH +--$1[= ]+([A-Za-z][^: ]*:)*([0-9]+).*/\2/p" "$0" | tail -n 1
}

# The program's arguments -> arguments: {task} is the array's task; of the file MM_ARRAY its line comes last
read_arguments() {
  arguments=("$@")
  local line task=$SLURM_ARRAY_TASK_ID
  if [ -z "$task" ] && [[ "$MM_ARRAY$*" == *"{task}"* || -n "$MM_ARRAY" ]]; then
    echo "error: {task} and MM_ARRAY are for an array: sbatch --array=0-3 slurm/$kind.sbatch ..." >&2
    exit 2
  fi
  if [ -n "$MM_ARRAY" ]; then
    line=$(sed -n "${task}p" "$MM_ARRAY")
    if [ -z "$line" ]; then
      echo "error: there is no line $task in MM_ARRAY=$MM_ARRAY; the first is --array=1" >&2
      exit 2
    fi
    # without Python, which may be in the container alone
    if ! xargs -r -n 1 printf '%s' <<<"$line" >/dev/null 2>&1; then
      echo "error: line $task in MM_ARRAY=$MM_ARRAY has a quote without its other one: $line" >&2
      exit 2
    fi
    mapfile -d '' -t -O "${#arguments[@]}" arguments < <(xargs -r -n 1 printf '%s\0' <<<"$line")
  fi
  arguments=("${arguments[@]//\{task\}/$task}")
}

# What an earlier attempt of this job was given -> run, arguments: the config may name another folder by now
recall() {
  [ "$attempt" -gt 1 ] || return
  run=$(sed -n "s/^mm job $job: run folder //p" "$(own_output)" 2>/dev/null | tail -n 1)
  [ -n "$run" ] && [ -r "$run/slurm/arguments-$job" ] || return
  mapfile -d '' -t arguments <"$run/slurm/arguments-$job"
}

# The file that Slurm writes what this script prints to: the attempts before are in it
own_output() {
  readlink "/proc/$$/fd/1"
}

# The code and the config that this run has -> run, code, commit, notes, log, arguments
freeze_run() {
  local options=(--job "$job") frozen=() fields status
  [ -z "$MM_DRY_RUN" ] || options+=(--dry-run)
  [ -z "$run" ] || options+=(--run "$run")
  fields=$(mktemp)
  ask_python "$root/slurm/freeze.py" "${options[@]}" "$root" "$program" "${arguments[@]}" >"$fields"
  status=$?
  mapfile -d '' -t frozen <"$fields"
  rm -f "$fields"
  [ "$status" = 0 ] || exit "$status"
  run=${frozen[0]} commit=${frozen[1]} notes=${frozen[2]}
  arguments=("${frozen[@]:3}")
  echo "mm job $job: run folder $run"
  [[ "$run" == /* ]] || run=$PWD/$run
  code=$run/slurm/code log=$run/slurm/log-$job.txt
}

run_attempt() {
  compose
  if [ -n "$MM_DRY_RUN" ]; then
    [ -z "$notes" ] || echo "mm job $job: $notes"
    printf '%q ' "${step[@]}"
    printf '\n'
    exec env -u MM_ACTIVATE -u MM_VENV bash "$root/slurm/node.sh" "$launcher" "$program" "${arguments[@]}"
  fi
  note "attempt $attempt of job $job, $(date '+%F %T'): $MM_NODES node(s) $SLURM_JOB_NODELIST," \
    "$MM_RANKS rank(s) each${commit:+, commit $commit}"
  [ -z "$notes" ] || say "$notes"
  note "$(printf '%q ' "${step[@]}")"
  [ -z "$log" ] || echo "mm job $job: attempt $attempt on $SLURM_JOB_NODELIST, its log is $log"
  before=$(progress)
  rm -f "$MM_STATUS_FILE" "$run/slurm/asked-$job"
  "${step[@]}" >>"${log:-/dev/stdout}" 2>&1 &
  srun=$!
  wait_for_step
  status=$(cat "$MM_STATUS_FILE" 2>/dev/null)
  note "attempt $attempt ended: ${status:+status $status, }srun ${ended:-still runs}"
  "finish_$kind"
}

# -> step: the command of this attempt; launcher; and what node.sh reads
compose() {
  local cpus threads gpus=${SLURM_GPUS_PER_NODE##*:} # what was asked for: an exclusive node has more
  export MM_NODES=${SLURM_JOB_NUM_NODES:-1} MM_JOB=$job MM_RUN=
  gpus=${gpus:-${SLURM_GPUS_ON_NODE:-1}}
  export MM_RANKS=${MM_RANKS_PER_NODE:-$((gpus > 0 ? gpus : 1))}
  MM_HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" 2>/dev/null | head -n 1)
  export MM_HEAD=${MM_HEAD:-$(hostname)}
  export MM_PORT=$((20000 + ${SLURM_JOB_ID:-0} % 10000)) MM_RDZV_ID=$job.$attempt
  cpus=${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-1}}
  threads=$((cpus / MM_RANKS))
  export OMP_NUM_THREADS=$((threads > 0 ? threads : 1))
  export PYTHONPATH=$code${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1
  case $kind in
    train)
      launcher=${MM_LAUNCHER:-torchrun}
      export MM_RUN=$run MM_STATUS_FILE=$run/slurm/status-$job
      ;;
    eval)
      launcher=torchrun
      export MM_STATUS_FILE=$PWD/slurm-$job.status # it has no folder of its own, and containers see this one
      ;;
    sweep) # trials would take a status file for theirs
      launcher=alone
      unset MM_STATUS_FILE
      ;;
  esac
  case $launcher in
    torchrun | alone) ;;
    deepspeed)
      [ -n "$MM_DRY_RUN" ] ||
        scontrol show hostnames "$SLURM_JOB_NODELIST" | sed "s/\$/ slots=$MM_RANKS/" >"$run/slurm/hostfile"
      ;;
    *)
      echo "error: MM_LAUNCHER=$launcher: there are torchrun and deepspeed" >&2
      exit 2
      ;;
  esac
  step=(srun --nodes="$MM_NODES" --ntasks="$MM_NODES" --ntasks-per-node=1 --mpi=none --kill-on-bad-exit=1 --export=ALL)
  [ -z "$SLURM_CPUS_PER_TASK" ] || step+=(--cpus-per-task="$SLURM_CPUS_PER_TASK") # srun no longer asks the job
  [ "$MM_NODES" = 1 ] || step+=(--label)
  step+=("${container[@]}" "${enter[@]}" bash "$code/slurm/node.sh" "$launcher" "$program" "${arguments[@]}")
}

# Until the step has ended, or Slurm is about to end it -> ended: its exit status, or nothing
wait_for_step() {
  local deadline=
  ended=
  while [ -z "$ended" ]; do
    if [ -n "$asked" ] && kill -0 "$srun" 2>/dev/null; then
      [ -z "$MM_RUN" ] || : >"$MM_RUN/stop" # again and again: a run that is only starting takes it away
      [ -n "$deadline" ] || hear_notice
      [ "$(date +%s)" -lt "$deadline" ] || return
      sleep 1
      continue
    fi
    wait "$srun"
    ended=$?
    ! kill -0 "$srun" 2>/dev/null || ended= # a signal ended the waiting
  done
}

# -> deadline, in seconds since 1970
hear_notice() {
  local now field end margin left=
  [ "$kind" != sweep ] || kill -USR1 "$srun" # which passes it on
  now=$(date +%s)
  field=$(job_field EndTime)
  if [ -n "$field" ] && end=$(date -d "$field" +%s 2>/dev/null); then # of nothing it would make midnight
    margin=$(((end - now) / 3))
    deadline=$((end - (margin < 10 ? margin : 10)))
    [ "$(job_field JobState)" != RUNNING ] || left=", $((end - now)) s before its end" # else it is that of the next one
  else
    deadline=$((now + 1000000)) # unknown: until it has stopped, or Slurm ends it
  fi
  say "got SIG$asked$left"
  [ "$kind" != eval ] || deadline=$now # nothing to save
}

finish_train() {
  case $status in
    0) succeed ;;
    2) refuse ;;
    75)
      rm -f "$run/slurm/retries-$job"
      if [ -n "$asked" ] || [ -e "$run/slurm/asked-$job" ]; then
        requeue "the run has saved and stopped"
      fi
      hold "the run was stopped by \`mm stop\`"
      ;;
  esac
  retry
}

finish_sweep() {
  case $ended in
    0) succeed ;;
    1) # by its own decision: a crash has another one
      is_preempted || fail 1 "the sweep has given up, so it is not tried again; see $log. The same command goes on"
      ;;
    2) refuse ;;
    75)
      rm -f "$run/slurm/retries-$job"
      if [ -n "$asked" ] || is_preempted; then
        requeue "the sweep has stopped"
      fi
      hold "the sweep was stopped by $run/stop"
      ;;
  esac
  if [ -n "$asked" ] && [ "${ended:-0}" -gt 128 ]; then # the signal came while Python started
    requeue "the sweep was ended at its start"
  fi
  retry
}

finish_eval() {
  local stops=$attempt
  rm -f "$MM_STATUS_FILE"
  [ "$ended" != 0 ] || succeed
  [ "$status" != 2 ] || refuse
  ! is_preempted || requeue "stopped for another job; what is evaluated stays"
  [ -n "$asked" ] || fail 1 "the evaluation failed"
  [ "$asked" = USR1 ] || requeue "stopped; what is evaluated stays" # by who ends the job or sends it elsewhere
  if [ -f "$(own_output)" ]; then # which tells of requeues by others apart
    stops=$(($(grep -c "^mm job $job: stopped by a notice.*; requeue$" "$(own_output)") + 1))
  fi
  [ "$stops" -le "${MM_RETRIES:-3}" ] || fail 1 "the evaluation got $stops notices, and MM_RETRIES=${MM_RETRIES:-3}"
  requeue "stopped by a notice, time $stops of ${MM_RETRIES:-3}; what is evaluated stays"
}

# Requeue what did not end well, at most MM_RETRIES times in a row without a new checkpoint. A pre-emption does not count.
retry() {
  local count why=${ended:+the program ended}
  why=${why:-it has not stopped in time}
  if [ "$(progress)" != "$before" ]; then
    rm -f "$run/slurm/retries-$job"
  elif ! is_preempted; then
    count=$(($(cat "$run/slurm/retries-$job" 2>/dev/null || echo 0) + 1))
    if [ "$count" -gt "${MM_RETRIES:-3}" ]; then
      fail 1 "$why without success $count times in a row without a new checkpoint; see $log"
    fi
    echo "$count" >"$run/slurm/retries-$job"
  fi
  requeue "$why without success; see $log"
}

# requeue WHY [COMMAND of scontrol]. Not where Slurm ends this attempt by itself: a job that was cancelled would come back
requeue() {
  local state command=${2:-requeue}
  for _ in 1 2 3 4 5 6; do # the controller may be busy
    state=$(job_field JobState)
    [ -z "$state" ] || break
    sleep 10
  done
  if [ -n "$state" ] && [ "$state" != RUNNING ]; then
    say "$1; Slurm itself is ending this attempt"
    exit 1
  fi
  say "$1; $command"
  if ! scontrol "$command" "$job"; then
    fail 75 "Slurm did not take it back (--no-requeue?); submit it again, the same command goes on"
  fi
  while kill -0 "$srun" 2>/dev/null; do wait "$srun"; done # Slurm gives it KillWait seconds
  exit 0
}

hold() {
  say "$1: scontrol release $job goes on with it, scancel $job ends it"
  requeue "held" requeuehold
}

succeed() {
  rm -f "$run/slurm/retries-$job"
  say "done"
  exit 0
}

refuse() {
  [ -z "$log" ] || grep -E '^([0-9]+: )?error: ' "$log" | tail -n 1
  fail 2 "a mistake in the command or the config, so it is not tried again; see ${log:-above}"
}

fail() {
  say "error: $2"
  exit "$1"
}

# To the log and to Slurm's own output
say() {
  echo "mm job $job: $1"
  [ -z "$log" ] || note "$1"
}

note() {
  echo "== $*" >>"${log:-/dev/stdout}"
}

# What a crash is forgiven for when there is more of it: checkpoints; of a sweep those of its trials, and their models
progress() {
  if [ "$kind" = sweep ]; then
    find "$run" -mindepth 2 -maxdepth 3 '(' -path '*/trial_*/checkpoints/step_*' -o -path '*/trial_*/model' ')' \
      2>/dev/null | sort
  else
    find "$run/checkpoints" -mindepth 1 -maxdepth 1 -name 'step_*' 2>/dev/null | sort -V | tail -n 1
  fi
}

is_preempted() {
  [[ "$(job_field PreemptTime)" =~ ^[0-9] ]]
}

# A field of `scontrol show job`, or nothing
job_field() {
  timeout 30 scontrol show job -o "$job" 2>/dev/null | tr ' ' '\n' | sed -n "s/^$1=//p" | head -n 1
}
