# shellcheck shell=bash
# What the .sbatch files share: `source slurm/launch.sh SCRIPT WORD...` starts one process a GPU on each of the job's
# nodes and ends the batch shell as they end. Ahead of the time limit Slurm signals the batch shell (--signal=B:), which
# passes it on to the step; a script that then stops with 75 (a checkpoint is written), or that the signal ended before it
# had begun, is queued again. One that stops with 75 for another reason (a STOP file, --max_time) is not: the job ends as
# FAILED with exit code 75, and so it does at once with an error's code. `scancel --batch --signal=USR1 JOB` asks for the
# same as the limit. A job that cannot write its checkpoint in time is lost back to the one before, and not queued again:
# for a large model `sbatch --signal=B:USR1@900` signals it earlier.
#
# `--config_file FILE` among the words is `accelerate launch`'s: its settings become the step's environment. How many
# processes there are is Slurm's to say, not the file's.
set -euo pipefail
signaled=''
trap 'signaled=1' USR1

script=$1
shift
config_file=''
words=()
while (($#)); do
    case $1 in
    --config_file) config_file=${2?--config_file needs a file} && shift ;;
    --config_file=*) config_file=${1#*=} ;;
    *) words+=("$1") ;;
    esac
    shift
done
set -- ${words[@]+"${words[@]}"}
if [[ $config_file ]]; then
    exports=$(python -m utils.launch.launcher "$config_file")
    eval "$exports"
fi

set -- "${@//\%a/${SLURM_ARRAY_TASK_ID-%a}}" # %a in a word is the array's index, as in Slurm's --output
# Queued again, by this file or by Slurm after a node failed or the job was preempted. Of two settings the last counts.
if ((${SLURM_RESTART_COUNT:-0} > 0)) && [[ $script == train_* ]]; then
    set -- "$@" --resume_from_checkpoint latest
fi

num_gpus=${SLURM_GPUS_ON_NODE:-1}
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
export WORLD_SIZE=$((SLURM_NNODES * num_gpus)) LOCAL_WORLD_SIZE=$num_gpus

# Each process finds its GPU among all of the node's by LOCAL_RANK: none is to be hidden from it.
# No torchrun between: it hides the exit code and dies of SIGUSR1. exec, since Slurm signals this very process alone.
# Until the script listens the signal is held back, as a process that has just been started would die of it.
hold='import os, signal, sys; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
os.execvp("python", ["python", *sys.argv[1:]])'
# shellcheck disable=SC2016  # each task's own variables, not the batch shell's
(
    trap '' USR1 # srun would die of it until its own handlers are in place
    exec srun --ntasks="$WORLD_SIZE" --ntasks-per-node="$num_gpus" \
        --cpus-per-task=$((SLURM_CPUS_ON_NODE / num_gpus)) --kill-on-bad-exit=1 --gpu-bind=none \
        bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec python -c "$@"' bash "$hold" "$script" "$@"
) &
step=$!
interrupted=''
pass_on() {
    trap '' USR1
    signaled=1
    for _ in 1 2 3 4 5; do # srun loses one that comes before its processes are there
        kill -USR1 "$step" 2>/dev/null || return 0
        sleep 1
    done
}
trap 'pass_on; interrupted=1' USR1
if [[ $signaled ]]; then sleep 1 && pass_on; fi # signaled before there was a step
code=0
wait "$step" || code=$?
if [[ $interrupted ]]; then # which ended the first wait
    code=0
    wait "$step" || code=$?
fi

# 143: the first process that stops with 75 has the others terminated, which are at their own exit by then. 138: srun or
# a process died of the signal before the script had begun, and nothing is lost.
if [[ $signaled ]] && ((code == 75 || code == 138 || code == 143)); then
    # An array's last task has the job id of the whole array: name the task.
    scontrol requeue "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID+_$SLURM_ARRAY_TASK_ID}"
fi
exit "$code"
