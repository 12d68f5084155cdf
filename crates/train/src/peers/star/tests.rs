use std::net::TcpListener;

use super::super::hello::hello;
use super::*;

/// A place of this host that nobody has.
fn place() -> Place {
    let port = TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port();
    Place { host: "127.0.0.1".into(), port }
}

const LONG: Duration = Duration::from_secs(20);
const SHORT: Duration = Duration::from_millis(700);

fn meet(hello: Hello, place: &Place, meeting: Duration) -> std::thread::JoinHandle<Result<Star>> {
    let place = place.clone();
    std::thread::spawn(move || Star::meet(&hello, &place, (meeting, LONG)))
}

fn refused(met: std::thread::JoinHandle<Result<Star>>) -> String {
    let Err(failure) = met.join().unwrap() else { panic!("it was to be refused") };
    assert_eq!(failure.status(), 2, "{failure}");
    failure.to_string()
}

#[test]
fn processes_meet_in_any_order_and_agree() {
    let place = place();
    let others: Vec<_> = [2, 1, 3].map(|rank| meet(hello(rank, 4), &place, LONG)).into();
    std::thread::sleep(Duration::from_millis(150));
    let first = meet(hello(0, 4), &place, LONG);
    let stars: Vec<Star> = [first].into_iter().chain(others).map(|t| t.join().unwrap().unwrap()).collect();
    std::thread::scope(|scope| {
        let said = |star: &Star, round: u8| star.agree(vec![star.rank as u8; round as usize], false).unwrap();
        let all: Vec<_> = stars.iter().map(|star| scope.spawn(move || (said(star, 0), said(star, 3)))).collect();
        for t in all {
            let (empty, three) = t.join().unwrap();
            assert_eq!(empty, vec![Vec::<u8>::new(); 4]);
            assert_eq!(three, [[0; 3], [1; 3], [2; 3], [3; 3]]);
        }
        stars.iter().for_each(|star| _ = scope.spawn(|| star.leave()));
    });
}

#[test]
fn processes_that_do_not_belong_together_are_refused_in_words() {
    for (change, word) in [
        (Box::new(|h: &mut Hello| h.binary = "y".into()) as Box<dyn Fn(&mut Hello)>, "another file"),
        (Box::new(|h| h.config = "y".into()), "another configuration"),
        (Box::new(|h| h.world = 3), "was told of 3 processes"),
        (Box::new(|h| h.rank = 0), "two processes are rank 0"),
    ] {
        let place = place();
        let mut other = hello(1, 2);
        change(&mut other);
        let first = meet(hello(0, 2), &place, LONG);
        // rank 0 would go there as the first one: it speaks as one of the others does
        let rank = other.rank;
        let other = match rank {
            0 => {
                let until = Instant::now() + LONG;
                std::thread::spawn(move || go(&other, &place, until).map(|_| unreachable!("it is refused")))
            }
            _ => meet(other, &place, LONG),
        };
        assert!(refused(first).contains(word), "{word}");
        assert!(refused(other).contains(word), "{word}");
    }
}

#[test]
fn two_of_one_number_are_refused() {
    let place = place();
    let all = [hello(0, 3), hello(1, 3), hello(1, 3)].map(|h| meet(h, &place, LONG));
    for met in all {
        assert!(refused(met).contains("two processes are rank 1"));
    }
}

#[test]
fn strangers_and_other_tokens_are_sent_away_and_the_others_still_meet() {
    let place = place();
    let first = meet(hello(0, 2), &place, LONG);
    std::thread::sleep(Duration::from_millis(100));
    let mut stranger = TcpStream::connect((place.host.as_str(), place.port)).unwrap();
    stranger.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    let mut wrong = hello(1, 2);
    wrong.token = "guessed".into();
    assert!(refused(meet(wrong, &place, LONG)).contains("DASHLAB_TOKEN"));
    let second = meet(hello(1, 2), &place, LONG);
    let (first, second) = (first.join().unwrap().unwrap(), second.join().unwrap().unwrap());
    std::thread::scope(|scope| {
        scope.spawn(|| first.leave());
        second.leave();
    });
}

#[test]
fn who_does_not_come_is_named_and_nobody_waits_for_ever() {
    let place = place();
    let all = [hello(0, 3), hello(2, 3)].map(|h| meet(h, &place, SHORT));
    for met in all {
        assert!(refused(met).contains("rank 1 did not come"));
    }
    assert!(refused(meet(hello(1, 3), &place, SHORT)).contains("rank 1 found no rank 0"));
}

#[test]
fn a_port_that_is_taken_is_told_with_what_to_do() {
    let taken = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let place = Place { host: "127.0.0.1".into(), port: taken.local_addr().unwrap().port() };
    assert!(refused(meet(hello(0, 2), &place, SHORT)).contains("MASTER_PORT or DASHLAB_PORT"));
}

#[test]
fn one_that_is_silent_is_named() {
    let place = place();
    let other = meet(hello(1, 2), &place, LONG);
    let first = Star::meet(&hello(0, 2), &place, (LONG, Duration::from_millis(300))).unwrap();
    let other = other.join().unwrap().unwrap();
    let told = first.agree(Vec::new(), false).unwrap_err().to_string();
    assert!(told.contains("rank 1 has not answered rank 0") && told.contains("run.peer_timeout_s"), "{told}");
    std::thread::scope(|scope| {
        scope.spawn(|| first.leave());
        other.leave();
    });
}

/// The first process of the test below; does nothing in a usual run of the tests.
#[test]
fn first_process_of_another_test() {
    let Ok(port) = std::env::var("DASHLAB_TEST_FIRST") else { return };
    let place = Place { host: "127.0.0.1".into(), port: port.parse().unwrap() };
    let hangs = std::env::var("DASHLAB_TEST_HANGS").is_ok();
    let patience =
        if hangs || std::env::var("DASHLAB_TEST_WRITES").is_ok() { Duration::from_millis(200) } else { LONG };
    let star = Star::meet(&hello(0, 2), &place, (LONG, patience)).unwrap();
    if std::env::var("DASHLAB_TEST_WRITES").is_ok() {
        // a checkpoint that takes longer than an update may
        star.expect_updates(true);
        star.patiently(|| std::thread::sleep(GRACE + Duration::from_millis(2500)));
        return star.leave();
    }
    if hangs {
        // as where a GPU waits for another one
        star.expect_updates(true);
        std::thread::sleep(2 * LONG);
    }
    let _ = star.agree(Vec::new(), true);
    panic!("the other process never answers");
}

fn first_process(place: &Place, behaves: Option<&str>) -> std::process::Child {
    let mut first = std::process::Command::new(std::env::current_exe().unwrap());
    first.args(["--exact", "peers::star::tests::first_process_of_another_test", "--nocapture"]);
    first.env("DASHLAB_TEST_FIRST", place.port.to_string());
    behaves.iter().for_each(|name| _ = first.env(name, "1"));
    first.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::piped()).spawn().unwrap()
}

#[test]
fn a_step_that_all_wait_for_may_take_longer_than_an_update() {
    let place = place();
    let first = first_process(&place, Some("DASHLAB_TEST_WRITES"));
    let star = Star::meet(&hello(1, 2), &place, (LONG, LONG)).unwrap();
    star.go_away();
    let output = first.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn one_that_takes_nothing_is_named() {
    let place = place();
    let listener = TcpListener::bind((place.host.as_str(), place.port)).unwrap();
    let other = std::thread::spawn(move || Star::meet(&hello(1, 2), &place, (LONG, Duration::from_millis(300))));
    // a first process that stops after the meeting
    let mut stream = listener.accept().unwrap().0;
    frame::read(&mut stream, 1 << 16).unwrap();
    frame::write(&mut stream, Kind::Welcome, &[]).unwrap();
    let star = other.join().unwrap().unwrap();
    let (says, said) = channel();
    std::thread::spawn(move || {
        let told = star.agree(vec![0; 1 << 26], false).unwrap_err().to_string();
        star.go_away();
        says.send(told).unwrap();
    });
    let told = said.recv_timeout(LONG).expect("it waits for ever");
    assert!(told.contains("rank 0 has taken nothing from rank 1") && told.contains("run.peer_timeout_s"), "{told}");
}

#[test]
fn a_process_whose_other_one_is_gone_ends_in_words() {
    let ended = |hangs: bool, farewell: &dyn Fn(Star)| {
        let place = place();
        let first = first_process(&place, hangs.then_some("DASHLAB_TEST_HANGS"));
        let star = Star::meet(&hello(1, 2), &place, (LONG, LONG)).unwrap();
        let began = Instant::now();
        farewell(star);
        let output = first.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        assert!(began.elapsed() < GRACE + Duration::from_secs(2), "{:?}", began.elapsed());
        String::from_utf8(output.stderr).unwrap()
    };
    // a killed process closes its sockets without a word
    let told = ended(false, &|star| drop(star));
    assert!(told.contains("rank 1 is gone") && told.contains("--resume=auto"), "{told}");
    let told = ended(false, &|star| star.fail("step 7: the disk is full"));
    assert!(told.contains("rank 1 failed: step 7: the disk is full"), "{told}");
    let told = ended(true, &|star| {
        // what the first one says of it must not end this process
        star.go_away();
        let _ = star.hear(0, Some(LONG));
    });
    assert!(told.contains("a process or its GPU hangs"), "{told}");
}
