"""The machine, the other processes of a run, and files that survive a crash.

In come paths, signals and the environment that torchrun or SLURM set. Out go open files, locks,
devices, collectives over the processes, and errors that a user can fix.

    errors.py       errors that a user can fix, and exit codes
    extras.py       optional libraries, named with the extra that brings them
    files.py        atomic writes, folders, free disk space; the files that come with the package
    lock.py         one writer a folder
    signals.py      reacts to signals: save and stop
    slurm.py        SLURM: one task, and queueing a job again
    quota.py        cores that a container or SLURM leaves to this process
    machine.py      cores, memory allocator, copying arrays to the device
    ranks.py        waiting for the other processes of a run, and naming one that is lost
    dist.py         torch.distributed as plain functions; the identity with one process
    environment.py  versions, threads and hardware that can change a run's last bits
    launch.py       how a long command starts and can be stopped
    workers.py      processes that decode pictures: how many, and how their ends are reported
"""
