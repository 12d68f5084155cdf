use super::*;

/// Runs it as each of `world` processes.
fn among<T: Send>(world: usize, run: impl Fn(&Peers) -> T + Sync) -> Vec<T> {
    std::thread::scope(|scope| {
        let run = &run;
        let all: Vec<_> = Peers::threads(world).into_iter().map(|peers| scope.spawn(move || run(&peers))).collect();
        all.into_iter().map(|t| t.join().unwrap()).collect()
    })
}

#[test]
fn what_one_says_all_hear_in_order_and_to_the_last_bit() {
    let all = among(4, |peers| peers.agree(&(peers.rank(), f64::NAN.copysign(-1.0), 0.1 + 0.2)).unwrap());
    for heard in all {
        assert_eq!(heard.iter().map(|x| x.0).collect::<Vec<_>>(), [0, 1, 2, 3]);
        assert!(heard.iter().all(|x| x.1.to_bits() == f64::NAN.copysign(-1.0).to_bits() && x.2 == 0.1 + 0.2));
    }
    assert_eq!(among(3, |peers| peers.any(peers.rank() == 2).unwrap()), [true; 3]);
    assert_eq!(among(3, |peers| peers.any(false).unwrap()), [false; 3]);
    assert_eq!(among(2, |peers| peers.concat(vec![peers.rank(); 2]).unwrap()), [[0, 0, 1, 1]; 2]);
}

#[test]
fn blocks_of_micro_batches_are_whole_and_in_order() {
    assert_eq!(Peers::Alone.block(5), 0..5);
    assert_eq!(among(4, |peers| peers.block(12)), [0..3, 3..6, 6..9, 9..12]);
    // of a validation whose batches do not divide
    assert_eq!(among(4, |peers| peers.block(3)).into_iter().flatten().collect::<Vec<_>>(), [0, 1, 2]);
}

#[test]
fn a_failure_of_one_ends_all_with_its_status_and_the_first_tells() {
    let fails = |who: usize| {
        among(3, move |peers| {
            let own = if peers.rank() == who { Err(Failure::request("no such file")) } else { Ok(()) };
            let failure = peers.all(own).unwrap_err();
            (failure.status(), failure.to_string())
        })
    };
    let elsewhere = (2, "another process of the run failed".to_string());
    assert_eq!(fails(0), [(2, "no such file".into()), elsewhere.clone(), elsewhere.clone()]);
    assert_eq!(fails(2), [(2, "rank 2: no such file".into()), elsewhere.clone(), elsewhere.clone()]);
    let first = among(2, |peers| {
        let step = || -> Result<u8> { Err(Failure::Run(anyhow!("the disk is full"))) };
        peers.first(step).map_err(|e| (e.status(), e.to_string())).unwrap_err()
    });
    assert_eq!(first, [(1, "the disk is full".to_string()), (1, elsewhere.1.clone())]);
}

#[test]
fn the_first_goes_before_the_others() {
    let order = Mutex::new(Vec::new());
    let all = among(4, |peers| {
        peers.in_turn(|| {
            lock(&order).push(peers.rank());
            Ok(peers.rank())
        })
    });
    assert_eq!(all.into_iter().map(Result::unwrap).collect::<Vec<_>>(), [0, 1, 2, 3]);
    let order = order.into_inner().unwrap();
    assert_eq!((order[0], order.len()), (0, 4));
    let told = among(2, |peers| peers.first(|| Ok(peers.rank() + 7)).unwrap());
    assert_eq!(told, [7, 7]);
}

#[test]
fn several_processes_without_an_engine_are_refused() {
    let seat = Seat { world: 2, local_world: 2, launcher: seat::Launcher::Ranks, ..Seat::alone() };
    let Err(failure) = Peers::join(&seat, &hello::hello(0, 2), false, Duration::from_secs(1)) else { panic!("two") };
    assert_eq!(failure.status(), 2);
    assert!(failure.to_string().contains("mpirun"), "{failure}");
    let Err(failure) = Peers::join(&seat, &hello::hello(0, 2), true, Duration::from_secs(1)) else { panic!("two") };
    assert!(failure.to_string().contains("MASTER_ADDR"), "{failure}");
}
