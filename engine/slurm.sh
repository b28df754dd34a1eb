#!/bin/bash
# A SLURM job that restarts what failed and requeues itself. Submit it from the checkout:
#
#     sbatch --nodes 4 engine/slurm.sh --config iomm-b-512 data.shards='/data/images/*.tar'
#
# A rank that dies is restarted with all others, up to three times in a job. If that is not enough, or
# a machine is lost (70), a step hangs (71), torchrun is killed (137), or the time limit or a
# preemption stops the run (75), the job goes back into the queue. Mistakes (2) and unexpected errors
# (1) end it. MASTER_PORT is the port at which the machines meet.
#SBATCH --ntasks-per-node=1 --gpus-per-node=8 --requeue --open-mode=append --signal=TERM@300
MOST_REQUEUES=20

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --kill-on-bad-exit=1 python engine/torchrun.py \
    --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-8}" --max-restarts 3 \
    --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$head:${MASTER_PORT:-29500}" \
    engine/launch.py --resume auto "$@"
code=$?
case $code in
    70 | 71 | 137) again=$((${SLURM_RESTART_COUNT:-0} < MOST_REQUEUES)) ;;
    75) again=1 ;;
    *) again=0 ;;
esac
if [ "$again" = 1 ]; then
    echo "iomm: exit code $code, job $SLURM_JOB_ID goes back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
