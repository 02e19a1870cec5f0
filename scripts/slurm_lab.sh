#!/usr/bin/env bash
# A private Slurm on this one machine, to try and to test sweeps on: loopback only, no services, no cgroups, no root.
#
#   eval "$(scripts/slurm_lab.sh up DIR [NODES])"   start it; prints the `export SLURM_CONF=...` that clients need
#   scripts/slurm_lab.sh down DIR                   stop it
#   scripts/slurm_lab.sh status DIR
#
# All of it (configuration, key, sockets, spools, logs, process ids) is under DIR, whose path must be short: a socket's
# path has about 100 characters. LAB_CPUS: CPUs that each pretended node claims (default 4; may exceed the real ones).
# LAB_DBD=1: accounting too (mariadbd and slurmdbd), so that sacct works.
# Needs the programs of Debian's slurmctld, slurmd, slurm-client and munge, and for LAB_DBD slurmdbd and mariadb-server.
set -euo pipefail
export PATH="$PATH:/usr/sbin:/sbin"

usage() { echo "usage: $0 up DIR [NODES] | down DIR | status DIR" >&2; exit 2; }
[ $# -ge 2 ] || usage
command=$1
lab=$(realpath -m "$2")
nodes=${3:-2}
me=$(id -un)
conf=$lab/slurm.conf

# N free ports in a row, below the range from which clients' own ports are taken
free_ports() {
    python3 - "$1" <<'PY'
import random, socket, sys

count = int(sys.argv[1])
for _ in range(500):
    first, held = random.randint(20000, 31000), []
    try:
        for port in range(first, first + count):
            held.append(socket.socket())
            held[-1].bind(("127.0.0.1", port))
        print(first)
        break
    except OSError:
        continue
    finally:
        for one in held:
            one.close()
PY
}

write_conf() {
    local port memory accounting=accounting_storage/none
    port=$(free_ports $((nodes + 3)))
    memory=$(awk '/MemTotal/ { print int($2 / 1024) }' /proc/meminfo)
    database_port=$((port + nodes + 2)) accounting_port=$((port + nodes + 1))
    [ -z "${LAB_DBD:-}" ] || accounting=accounting_storage/slurmdbd
    cat > "$conf" <<CONF
ClusterName=lab
# by address: nothing here depends on the host's name
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=$port
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
# whoever starts it: so no root is needed
SlurmUser=$me
SlurmdUser=$me
AuthType=auth/munge
CredType=cred/munge
# a job that is queued again waits for cred_expire; the default is 120 s, and less than 5 is refused
AuthInfo=socket=$lab/run/munge.sock,cred_expire=5
StateSaveLocation=$lab/state
SlurmdSpoolDir=$lab/spool.%n
SlurmctldPidFile=$lab/run/slurmctld.pid
SlurmdPidFile=$lab/run/slurmd.%n.pid
SlurmctldLogFile=$lab/log/slurmctld.log
SlurmdLogFile=$lab/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
# without a default a job takes all memory of its node
DefMemPerCPU=256
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
JobRequeue=1
KillWait=5
MinJobAge=300
ReturnToService=2
SlurmdParameters=config_overrides
AccountingStorageType=$accounting
NodeName=n[1-$nodes] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[$((port + 1))-$((port + nodes))] CPUs=${LAB_CPUS:-4} RealMemory=$((memory / nodes)) State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
    [ -z "${LAB_DBD:-}" ] || cat >> "$conf" <<CONF
AccountingStorageHost=127.0.0.1
AccountingStoragePort=$accounting_port
# the connection to slurmdbd does not use AuthInfo's socket
AccountingStoragePass=$lab/run/munge.sock
CONF
}

start_accounting() {
    mariadb-install-db --no-defaults --datadir="$lab/db" --user="$me" --auth-root-authentication-method=socket \
        --skip-test-db --skip-name-resolve < /dev/null > "$lab/log/db-install.log" 2>&1
    cat > "$lab/db.sql" <<SQL
CREATE DATABASE IF NOT EXISTS slurm_acct;
CREATE USER IF NOT EXISTS 'slurm'@'127.0.0.1' IDENTIFIED BY 'lab';
GRANT ALL ON slurm_acct.* TO 'slurm'@'127.0.0.1';
SQL
    mariadbd --no-defaults --datadir="$lab/db" --user="$me" --socket="$lab/run/db.sock" \
        --pid-file="$lab/run/mariadbd.pid" --bind-address=127.0.0.1 --port="$database_port" --skip-name-resolve \
        --skip-log-bin --innodb-buffer-pool-size=32M --innodb-lock-wait-timeout=900 \
        --innodb-flush-log-at-trx-commit=0 --init-file="$lab/db.sql" --log-error="$lab/log/mariadbd.log" \
        < /dev/null >> "$lab/log/out" 2>&1 &
    for _ in $(seq 200); do
        mariadb-admin --no-defaults -h127.0.0.1 -P"$database_port" -uslurm -plab ping > /dev/null 2>&1 && break
        sleep 0.1
    done
    (umask 077; cat > "$lab/slurmdbd.conf" <<CONF
AuthType=auth/munge
AuthInfo=socket=$lab/run/munge.sock
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort=$accounting_port
SlurmUser=$me
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
PidFile=$lab/run/slurmdbd.pid
LogFile=$lab/log/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=$database_port
StorageUser=slurm
StoragePass=lab
StorageLoc=slurm_acct
CONF
    )
    slurmdbd < /dev/null >> "$lab/log/out" 2>&1
    for _ in $(seq 50); do timeout 2 sacctmgr -n show cluster > /dev/null 2>&1 && break; sleep 0.1; done
    timeout 5 sacctmgr -i add cluster lab > /dev/null 2>&1 || true
}

up() {
    local program
    for program in munged slurmctld slurmd sinfo; do
        command -v "$program" > /dev/null || { echo "$program is not installed" >&2; exit 1; }
    done
    mkdir -p "$lab"/{munge,state,log,run}
    chmod 755 "$lab" "$lab/run"
    chmod 700 "$lab/munge"
    [ -f "$lab/munge/key" ] || (umask 077; head -c 1024 /dev/urandom > "$lab/munge/key")
    munged --key-file="$lab/munge/key" --socket="$lab/run/munge.sock" --pid-file="$lab/run/munged.pid" \
        --log-file="$lab/munge/munged.log" --seed-file="$lab/munge/seed" --num-threads=2 < /dev/null
    write_conf
    export SLURM_CONF=$conf
    [ -z "${LAB_DBD:-}" ] || start_accounting
    slurmctld -f "$conf" < /dev/null >> "$lab/log/out" 2>&1
    for i in $(seq "$nodes"); do
        mkdir -p "$lab/spool.n$i"
        slurmd -N "n$i" -f "$conf" < /dev/null >> "$lab/log/out" 2>&1
    done
    for _ in $(seq 150); do
        if [ "$(timeout 2 sinfo -h -t idle -o %D 2> /dev/null)" = "$nodes" ]; then
            echo "export SLURM_CONF=$conf"
            return 0
        fi
        sleep 0.1
    done
    echo "the nodes did not become idle; the logs are in $lab/log" >&2
    return 1
}

# an init that reaps slowly leaves zombies, which `kill -0` takes for living
alive() { [[ $(sed -n 's/^State:[[:space:]]*//p' "/proc/$1/status" 2> /dev/null) == [^Z]* ]]; }

stop_one() {
    local process
    process=$(cat "$1" 2> /dev/null) || return 0
    [ -n "$process" ] && kill -TERM "$process" 2> /dev/null || return 0
    for _ in $(seq 200); do alive "$process" || { rm -f "$1"; return 0; }; sleep 0.05; done
    kill -KILL "$process" 2> /dev/null || true
}

down() {
    export SLURM_CONF=$conf
    timeout 5 scancel --full -u "$me" 2> /dev/null || true
    for _ in $(seq 100); do [ -z "$(timeout 2 squeue -h 2> /dev/null)" ] && break; sleep 0.1; done
    for file in "$lab"/run/slurmd.*.pid "$lab"/run/{slurmctld,slurmdbd,mariadbd,munged}.pid; do stop_one "$file"; done
}

case $command in
    up) up ;;
    down) down ;;
    status) SLURM_CONF=$conf timeout 5 sinfo -N -l ;;
    *) usage ;;
esac
