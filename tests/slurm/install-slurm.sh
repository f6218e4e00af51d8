#!/usr/bin/env bash
# install-slurm.sh: Debian's packages for start-local-slurm.sh, as root. Starts no service.
set -euo pipefail
[[ $(id -u) -eq 0 ]] || { echo "$0: must be root" >&2; exit 2; }
have() { [[ -x /usr/sbin/munged && -x /usr/sbin/slurmctld && -x /usr/sbin/slurmd && -x /usr/bin/sbatch ]]; }
! have || exit 0
policy=/usr/sbin/policy-rc.d
if [[ ! -e $policy ]]; then # keep the packages from starting services
  printf '#!/bin/sh\nexit 101\n' >"$policy"
  chmod 755 "$policy"
  trap 'rm -f "$policy"' EXIT
fi
apt-get update -q -o Acquire::Retries=3
DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends \
  -o Acquire::Retries=3 -o DPkg::Lock::Timeout=120 slurmctld slurmd slurm-client munge
have
