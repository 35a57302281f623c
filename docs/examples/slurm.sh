#!/bin/bash
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@60
#SBATCH --requeue
#SBATCH --open-mode=append
# A minute before the time is up SLURM sends SIGTERM to the processes; lipgan saves after the step under way and ends with
# status 143, upon which the job goes back into the queue. Every start resumes what is there.
#   sbatch slurm.sh runs/photographs --recipe sngan --data photographs/ --size 64 --steps 200000
out=$1
shift
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
resume=()
if [ -e "$out/checkpoint.pt" ]; then resume=(--resume); fi
# One process for each GPU, in the variables by which torch.distributed finds the others.
srun bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS exec python -m lipgan train "$@"' \
  train --out "$out" "$@" "${resume[@]}"
status=$?
if [ "$status" = 143 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$status"
