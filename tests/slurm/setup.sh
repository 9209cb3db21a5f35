#!/bin/bash
# A Slurm of one machine that passes for two nodes, for tests: as root, without systemd and cgroups.
#   apt-get install slurm-wlm munge
#   tests/slurm/setup.sh start <folder>   # then: export SLURM_CONF=<folder>/slurm.conf
#   tests/slurm/setup.sh stop <folder>
# Daemons, ports, key and state are its own, so that one which is there already is left alone.
set -euo pipefail
deed=${1:?start or stop} folder=$(realpath -m "${2:?a folder}")
sbin=/usr/sbin

if [ "$deed" = stop ]; then
    for daemon in slurmd-a slurmd-b slurmctld munged; do
        [ ! -s "$folder/$daemon.pid" ] || kill "$(cat "$folder/$daemon.pid")" 2>/dev/null || true
    done
    exit
fi

mkdir -p "$folder"/{state,spool-a,spool-b}
chmod 755 "$folder"
host=$(hostname -s)
port=${SLURM_TEST_PORT:-26817}

( umask 077; head -c 128 /dev/urandom > "$folder/munge.key" )
"$sbin/munged" --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" \
    --pid-file="$folder/munged.pid" --log-file="$folder/munged.log" --seed-file="$folder/munge.seed"

cat > "$folder/slurm.conf" <<CONF
ClusterName=tests
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
# what is requeued waits for its old credential to expire: seconds, not the usual two minutes
AuthInfo=socket=$folder/munge.socket,cred_expire=3
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool-%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd-%n.log
# nothing that needs control groups
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=60
MinJobAge=600
SchedulerParameters=sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=a NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 1)) CPUs=2 RealMemory=4000
NodeName=b NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 2)) CPUs=2 RealMemory=4000
PartitionName=low Nodes=a,b Default=YES PriorityTier=1 MaxTime=60
PartitionName=high Nodes=a,b PriorityTier=10 PreemptMode=OFF MaxTime=60
CONF
# Before 23.02 there is no "disabled"; version 1, below a folder without one, is as good.
if "$sbin/slurmd" -V | grep -qE ' (1.|2[0-2])\.'; then
    printf 'CgroupPlugin=cgroup/v1\nCgroupMountpoint=%s/cgroup\n' "$folder"
else
    echo "CgroupPlugin=disabled"
fi > "$folder/cgroup.conf"

export SLURM_CONF="$folder/slurm.conf"
"$sbin/slurmctld"
"$sbin/slurmd" -N a
"$sbin/slurmd" -N b
for _ in $(seq 60); do
    [ "$(sinfo --noheader --partition=low --states=idle --format=%D 2>/dev/null)" != 2 ] || exit 0
    sleep 0.5
done
echo "error: no two idle nodes after 30 s; see the logs in $folder" >&2
exit 1
