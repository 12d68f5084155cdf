use super::*;

/// What an environment of these variables, `NAME=VALUE` in words, asks.
fn of(env: &str) -> Result<Asked> {
    let find = |name: &str| {
        env.split_whitespace().find_map(|word| word.split_once('=').filter(|(n, _)| *n == name).map(|(_, v)| v.into()))
    };
    asked(&find)
}

fn sits(env: &str) -> Seat {
    match of(env).unwrap() {
        Asked::Sit(seat) => seat,
        Asked::Spawn(brood) => panic!("{brood:?}"),
    }
}

fn seat(numbers: [usize; 4], launcher: Launcher, place: Option<(&str, u16)>) -> Seat {
    let [rank, world, local_rank, local_world] = numbers;
    let place = place.map(|(host, port)| Place { host: host.into(), port });
    Seat { rank, world, local_rank, local_world, launcher, place }
}

#[test]
fn recorded_environments_of_launchers() {
    assert_eq!(sits("HOME=/root"), Seat::alone());
    let torchrun = "LOCAL_RANK=1 RANK=9 GROUP_RANK=1 LOCAL_WORLD_SIZE=8 WORLD_SIZE=16 MASTER_ADDR=node03 MASTER_PORT=29400 \
                    TORCHELASTIC_RUN_ID=none TORCHELASTIC_RESTART_COUNT=0";
    assert_eq!(sits(torchrun), seat([9, 16, 1, 8], Launcher::Ranks, Some(("node03", 29400))));
    // torchrun itself listens on its port then
    let agent = format!("{torchrun} TORCHELASTIC_USE_AGENT_STORE=True");
    assert_eq!(sits(&agent).place.unwrap().port, 29401);
    assert_eq!(sits(&format!("{agent} DASHLAB_PORT=7000")).place.unwrap().port, 7000);
    // PyTorchJob: one process a pod
    let pod = "MASTER_ADDR=job-master-0 MASTER_PORT=23456 WORLD_SIZE=4 RANK=2 PYTHONUNBUFFERED=0 PET_NNODES=4 PET_NODE_RANK=2";
    assert_eq!(sits(pod), seat([2, 4, 0, 1], Launcher::Ranks, Some(("job-master-0", 23456))));

    let open_mpi = "OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_LOCAL_RANK=1 OMPI_COMM_WORLD_LOCAL_SIZE=2 \
                    OMPI_UNIVERSE_SIZE=2 PMIX_RANK=1";
    assert_eq!(sits(open_mpi), seat([1, 2, 1, 2], Launcher::OpenMpi, Some(("127.0.0.1", PORT))));
    let hosts =
        "OMPI_COMM_WORLD_RANK=9 OMPI_COMM_WORLD_SIZE=16 OMPI_COMM_WORLD_LOCAL_RANK=1 OMPI_COMM_WORLD_LOCAL_SIZE=8";
    assert_eq!(sits(hosts), seat([9, 16, 1, 8], Launcher::OpenMpi, None), "no host is named: -x MASTER_ADDR=...");
    assert_eq!(sits(&format!("{hosts} MASTER_ADDR=a")).place.unwrap().host, "a");
    let mpich = "PMI_RANK=3 PMI_SIZE=4 MPI_LOCALRANKID=3 MPI_LOCALNRANKS=4 PMI_FD=9";
    assert_eq!(sits(mpich), seat([3, 4, 3, 4], Launcher::Mpich, Some(("127.0.0.1", PORT))));

    let srun = "SLURM_PROCID=9 SLURM_LOCALID=1 SLURM_NODEID=1 SLURM_NTASKS=16 SLURM_STEP_NUM_TASKS=16 SLURM_STEP_ID=0 \
                SLURM_STEP_TASKS_PER_NODE=8(x2) SLURM_STEP_NODELIST=node[03-04] SLURM_JOB_ID=4100";
    assert_eq!(sits(srun), seat([9, 16, 1, 8], Launcher::Slurm, Some(("node03", 61_444))));
    // srun --mpi=pmi2, which has no number on the host in PMI's variables
    assert_eq!(sits(&format!("{srun} PMI_RANK=9 PMI_SIZE=16 PMI_FD=9")), sits(srun));
    // mpirun of MPICH starts a proxy on each host by srun, and the proxy the processes
    assert_eq!(sits(&format!("{srun} {mpich}")), sits(mpich));
}

#[test]
fn a_job_script_of_slurm_is_one_process() {
    let batch =
        "SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NTASKS=16 SLURM_NNODES=2 SLURM_JOB_ID=7 SLURM_JOB_NODELIST=node[03-04]";
    assert_eq!(sits(batch), Seat::alone());
    let shell = "SLURM_PROCID=0 SLURM_STEP_NUM_TASKS=1 SLURM_STEP_NODELIST=node03 SLURM_STEP_ID=0 SLURM_NTASKS=16";
    assert_eq!(sits(shell), Seat::alone());
}

#[test]
fn a_host_of_kubeflow_starts_its_processes() {
    let env =
        "PET_NNODES=2 PET_NPROC_PER_NODE=4 PET_NODE_RANK=1 PET_MASTER_ADDR=job-node-0-0.job PET_MASTER_PORT=29500";
    let place = Place { host: "job-node-0-0.job".into(), port: 29500 };
    assert_eq!(of(env).unwrap(), Asked::Spawn(Brood { ranks: 4..8, world: 8, place }));
    assert_eq!(sits("PET_NNODES=1 PET_NPROC_PER_NODE=1 PET_NODE_RANK=0"), Seat::alone());
    for wrong in [
        "PET_NNODES=x",
        "PET_NNODES=2 PET_NPROC_PER_NODE=auto",
        "PET_NNODES=2 PET_NODE_RANK=2",
        "PET_NNODES=2",
        "PET_NNODES=4294967296 PET_NPROC_PER_NODE=4294967296 PET_MASTER_ADDR=a",
        "PET_NNODES=1 PET_NPROC_PER_NODE=70000",
    ] {
        assert_eq!(of(wrong).unwrap_err().status(), 2, "{wrong}");
    }
}

#[test]
fn what_cannot_be_is_refused_by_name() {
    let told = |env: &str| {
        let failure = of(env).unwrap_err();
        assert_eq!(failure.status(), 2);
        format!("{failure:?}")
    };
    assert!(told("WORLD_SIZE=4").contains("RANK is not"));
    assert!(told("RANK=1").contains("WORLD_SIZE is not"));
    assert!(told("RANK=4 WORLD_SIZE=4").contains("process 4 of 4"));
    assert!(told("RANK=-1 WORLD_SIZE=4").contains("RANK"));
    assert!(told("RANK=0 WORLD_SIZE=0").contains("cannot be"));
    assert!(told("RANK=0 WORLD_SIZE=18446744073709551615").contains("more than 65535 processes"));
    assert!(told("RANK=0 WORLD_SIZE=4 LOCAL_RANK=2 LOCAL_WORLD_SIZE=2").contains("on this host 2 of 2"));
    assert!(told("RANK=0 WORLD_SIZE=4 MASTER_PORT=70000").contains("65535"));
}

#[test]
fn lists_of_slurm() {
    for (list, first) in [("a", "a"), ("a,b", "a"), ("n[03-05,09],m", "n03"), ("n[1,3]-x,y", "n1-x"), ("n[12]", "n12")]
    {
        assert_eq!(first_host(list).as_deref(), Some(first), "{list}");
    }
    assert_eq!(first_host(""), None);
    assert_eq!(
        ["8(x2),4", "8(x2),4", "8(x2),4"].iter().zip([0, 1, 2]).map(|(l, n)| tasks_of_node(l, n)).collect::<Vec<_>>(),
        [Some(8), Some(8), Some(4)]
    );
    assert_eq!((tasks_of_node("8(x2),4", 3), tasks_of_node("x", 0)), (None, None));
}
