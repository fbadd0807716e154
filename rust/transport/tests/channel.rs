//! Both ends of a channel in one process: what a host and its worker may rely on.

// Helpers of tests are tests too.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::io::Write;
use std::os::fd::AsFd;
use std::sync::mpsc;
use std::sync::{Arc, Barrier};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use inferpool_transport::body::{Gather, parse};
use inferpool_transport::control::Control;
use inferpool_transport::record::Kind;
use inferpool_transport::{
    End, Error, Event, Frame, Host, Notifier, Outcome, Outgoing, Patience, ReplyPort, Settings,
    SignalGate, WaitPolicy, Worker,
};

/// Longest that any test may take.
const LIMIT: Duration = Duration::from_secs(30);
/// Calls that a worker can have in flight.
const SLOTS: usize = 256;
/// The smallest window of unread answers, see `flow`.
const WINDOW: usize = 1 << 20;

const PATIENT: Patience<'static> = Patience::Park {
    until: None,
    gate: None,
};

/// To sleep, but not for long: comes back with [`Error::TimedOut`].
fn briefly() -> Patience<'static> {
    Patience::Park {
        until: Some(Instant::now() + Duration::from_millis(5)),
        gate: None,
    }
}

/// A host, a worker, and whatever threads serve the worker's end.
struct Pair {
    host: Arc<Host>,
    worker: Arc<Worker>,
    servants: Vec<JoinHandle<()>>,
    /// Ends the process when a test takes too long.
    _watchdog: mpsc::Sender<()>,
}

impl Drop for Pair {
    fn drop(&mut self) {
        self.worker.shut_down();
        let served: Vec<_> = self.servants.drain(..).map(JoinHandle::join).collect();
        // Before the host's end of the control socket closes, which would end this process.
        self.worker.join_heartbeat();
        assert!(served.iter().all(Result::is_ok) || std::thread::panicking());
    }
}

fn watchdog() -> mpsc::Sender<()> {
    let (alive, ended) = mpsc::channel();
    let test = std::thread::current().name().unwrap_or("?").to_owned();
    std::thread::spawn(move || {
        if ended.recv_timeout(LIMIT) == Err(mpsc::RecvTimeoutError::Timeout) {
            // Past the harness, which would keep it for a report that never comes.
            let _ = writeln!(std::io::stderr(), "{test} did not end within {LIMIT:?}");
            std::process::abort();
        }
    });
    alive
}

/// A channel whose worker lives in this process. The worker watches the process that stands where
/// its host would: this one's parent.
fn pair(capacity: usize) -> Pair {
    let settings = Settings {
        frame_limit: 4 << 20,
        wait: WaitPolicy::Adaptive,
    };
    let host = Host::create(capacity, settings).unwrap();
    let inherited = host.inheritance().unwrap();
    let parent = i32::try_from(std::os::unix::process::parent_id()).unwrap();
    let worker = Worker::attach(inherited, parent, settings).unwrap();
    Pair {
        host,
        worker,
        servants: Vec::new(),
        _watchdog: watchdog(),
    }
}

impl Pair {
    /// Answers every request with its own parts and an END.
    fn serve_echo(&mut self) {
        let worker = Arc::clone(&self.worker);
        self.servants.push(std::thread::spawn(move || {
            while let Some(request) = worker.receive(PATIENT).unwrap() {
                echo(&worker, &request);
            }
        }));
    }

    /// Same, but receives in one thread while it answers in another.
    fn serve_echo_both_ways_at_once(&mut self) {
        let (received, requests) = mpsc::channel::<Frame>();
        let worker = Arc::clone(&self.worker);
        self.servants.push(std::thread::spawn(move || {
            while let Some(request) = worker.receive(PATIENT).unwrap() {
                received.send(request).unwrap();
            }
        }));
        let worker = Arc::clone(&self.worker);
        self.servants.push(std::thread::spawn(move || {
            for request in requests {
                echo(&worker, &request);
            }
        }));
    }

    /// The next request, and where its answer goes.
    fn receive(&self) -> (Frame, ReplyPort) {
        let request = self.worker.receive(PATIENT).unwrap().expect("a request");
        let port = ReplyPort::new(Arc::clone(&self.worker), &request.header);
        (request, port)
    }

    /// A call that the worker has received.
    fn open_call(&self) -> (u64, ReplyPort) {
        let call = send(&self.host, &[b"go"]);
        let (request, port) = self.receive();
        assert_eq!(request.header.call, call);
        (call, port)
    }

    /// The host alone, after the worker has gone and its descriptors are closed.
    fn without_worker(self) -> Arc<Host> {
        Arc::clone(&self.host)
    }
}

fn echo(worker: &Arc<Worker>, request: &Frame) {
    let parts = parts(request);
    let parts: Vec<&[u8]> = parts.iter().map(Vec::as_slice).collect();
    let port = ReplyPort::new(Arc::clone(worker), &request.header);
    let body = Gather::new(&parts).unwrap();
    match port.send(Kind::Data, &body, PATIENT) {
        Ok(()) | Err(Error::Cancelled) => end(&port),
        Err(Error::Closed) => {}
        Err(error) => panic!("{error}"),
    }
}

fn end(port: &ReplyPort) {
    match port.send(Kind::End, &Gather::empty(), PATIENT) {
        Ok(()) | Err(Error::Closed) => {}
        Err(error) => panic!("{error}"),
    }
}

fn data(port: &ReplyPort, bytes: &[u8], patience: Patience<'_>) -> Result<(), Error> {
    port.send(Kind::Data, &Gather::new(&[bytes]).unwrap(), patience)
}

fn parts(frame: &Frame) -> Vec<Vec<u8>> {
    let body = frame.body.as_slice();
    let ranges = parse(body).unwrap();
    ranges.into_iter().map(|part| body[part].to_vec()).collect()
}

fn try_send(host: &Host, parts: &[&[u8]]) -> Result<u64, Error> {
    let body = Gather::new(parts).unwrap();
    let mut outgoing = Outgoing::default();
    while !host.try_send(&mut outgoing, &body, None)? {
        host.wait_to_send(&outgoing, PATIENT)?;
    }
    Ok(outgoing.call().unwrap())
}

fn send(host: &Host, parts: &[&[u8]]) -> u64 {
    try_send(host, parts).unwrap()
}

fn wait_data(host: &Host, call: u64) -> Frame {
    match host.wait(call, PATIENT).unwrap() {
        Event::Data(frame) => frame,
        Event::Done(outcome) => panic!("no data but {outcome:?}"),
    }
}

fn wait_outcome(host: &Host, call: u64) -> Outcome {
    match host.wait(call, PATIENT).unwrap() {
        Event::Done(outcome) => outcome,
        Event::Data(frame) => panic!("no outcome but {frame:?}"),
    }
}

/// A call that waits for nothing but the end of its answer, which the worker has received.
fn open_whole(pair: &Pair) -> (u64, ReplyPort) {
    let mut outgoing = Outgoing::for_whole_answer();
    let body = Gather::new(&[b"go"]).unwrap();
    assert!(pair.host.try_send(&mut outgoing, &body, None).unwrap());
    let (_, port) = pair.receive();
    (outgoing.call().unwrap(), port)
}

/// Sends, and takes the echo.
fn round_trip(host: &Host, sent: &[&[u8]]) {
    let call = send(host, sent);
    let frame = wait_data(host, call);
    assert_eq!(frame.header.call, call);
    assert!(parts(&frame) == sent, "another's echo, or a garbled one");
    assert!(matches!(wait_outcome(host, call), Outcome::Ended));
}

/// Bytes that differ from call to call and along their length.
fn payload(seed: usize, length: usize) -> Vec<u8> {
    (0..length)
        .map(|at| (seed.wrapping_mul(131) + at + (at >> 8)) as u8)
        .collect()
}

fn is_readable(host: &Host) -> bool {
    let mut polled: Vec<_> = host
        .descriptors()
        .into_iter()
        .map(|fd| rustix::event::PollFd::from_borrowed_fd(fd, rustix::event::PollFlags::IN))
        .collect();
    rustix::event::poll(&mut polled, Some(&rustix::event::Timespec::default())).unwrap() > 0
}

#[test]
fn a_request_comes_back() {
    let mut pair = pair(4096);
    pair.serve_echo();
    round_trip(&pair.host, &[b"message", b"", &[1; 100]]);
    round_trip(&pair.host, &[]);
    assert_eq!(pair.host.in_flight(), [0; 0]);
}

#[test]
fn an_answer_that_is_wanted_whole_comes_in_one_record() {
    let pair = pair(4096);
    let (call, port) = open_whole(&pair);
    data(&port, b"item", PATIENT).unwrap();
    assert!(pair.host.spin_for_answer(call).unwrap().is_none());
    end(&port);
    let answer = pair.host.spin_for_answer(call).unwrap().unwrap();
    assert_eq!(parts(&answer), [b"item"]);
    assert_eq!(pair.host.counters().frames_received, 1);
    assert_eq!(pair.host.in_flight(), [0; 0]);
    assert!(matches!(data(&port, b"more", PATIENT), Err(Error::Closed)));
}

#[test]
fn an_answer_that_is_wanted_whole_may_turn_out_otherwise() {
    let pair = pair(4096);
    let (call, port) = open_whole(&pair);
    for item in [b"one", b"two"] {
        data(&port, item, PATIENT).unwrap();
    }
    assert_eq!(parts(&wait_data(&pair.host, call)), [b"one"]);
    assert_eq!(parts(&wait_data(&pair.host, call)), [b"two"]);
    data(&port, b"three", PATIENT).unwrap();
    assert_eq!(parts(&wait_data(&pair.host, call)), [b"three"]);
    end(&port);
    assert!(pair.host.spin_for_answer(call).unwrap().is_none());
    let waited = pair.host.wait_for_answer(call, PATIENT).unwrap();
    assert!(waited.is_none());
    assert!(matches!(wait_outcome(&pair.host, call), Outcome::Ended));

    // Nobody holds back what takes long to copy.
    let (call, port) = open_whole(&pair);
    data(&port, &[7; 900], PATIENT).unwrap();
    end(&port);
    assert_eq!(parts(&wait_data(&pair.host, call)), [[7; 900]]);

    let (call, port) = open_whole(&pair);
    data(&port, b"item", PATIENT).unwrap();
    let why = Gather::new(&[b"why"]).unwrap();
    port.send(Kind::Error, &why, PATIENT).unwrap();
    let waited = pair.host.wait_for_answer(call, PATIENT).unwrap();
    assert!(waited.is_none());
    assert!(matches!(wait_outcome(&pair.host, call), Outcome::Failed(_)));
}

#[test]
fn an_answer_is_waited_for_until_its_end() {
    let pair = pair(4096);
    let (call, port) = open_whole(&pair);
    // Too large to be held back, so it arrives before the end does.
    data(&port, &[7; 900], PATIENT).unwrap();
    let soon = Patience::Park {
        until: Some(Instant::now() + Duration::from_millis(20)),
        gate: None,
    };
    let waited = pair.host.wait_for_answer(call, soon);
    assert!(matches!(waited, Err(Error::TimedOut)));
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| pair.host.wait_for_answer(call, PATIENT).unwrap());
        end(&port);
        assert_eq!(parts(&waiting.join().unwrap().unwrap()), [[7; 900]]);
    });
    assert_eq!(pair.host.in_flight(), [0; 0]);
}

#[test]
fn no_call_starts_cancelled() {
    let pair = pair(4096);
    let (_, port) = pair.open_call();
    assert!(!port.abort_token().is_set());
    assert!(!pair.worker.abort_token().is_set());
}

#[test]
fn frames_may_be_larger_than_the_ring_in_both_directions_at_once() {
    let mut pair = pair(4096);
    pair.serve_echo_both_ways_at_once();
    std::thread::scope(|scope| {
        for seed in 0..3 {
            let host = &pair.host;
            scope.spawn(move || {
                for length in [100_000, 4096, 300_000, 1, 70_001] {
                    round_trip(host, &[&payload(seed, length), b"and a tail"]);
                }
            });
        }
    });
}

#[test]
fn a_frame_above_the_limit_is_refused_on_both_sides() {
    let pair = pair(4096);
    let huge = vec![0; (4 << 20) + 1];
    let refused = try_send(&pair.host, &[&huge]);
    assert!(matches!(refused, Err(Error::TooLarge { limit, .. }) if limit == 4 << 20));
    let (_, port) = pair.open_call();
    let refused = data(&port, &huge, PATIENT);
    assert!(matches!(refused, Err(Error::TooLarge { .. })));
    data(&port, b"smaller", PATIENT).unwrap();
}

#[test]
fn a_full_ring_makes_the_sender_wait_until_the_worker_reads() {
    let pair = pair(4096);
    let bytes = payload(1, 10_000);
    let part = [bytes.as_slice()];
    let body = Gather::new(&part).unwrap();
    let mut outgoing = Outgoing::default();
    assert!(!pair.host.try_send(&mut outgoing, &body, None).unwrap());
    let waited = pair.host.wait_to_send(&outgoing, briefly());
    assert!(matches!(waited, Err(Error::TimedOut)));
    let waited = pair.host.wait_to_send(&outgoing, Patience::Spin);
    assert!(matches!(waited, Err(Error::WouldPark)));
    std::thread::scope(|scope| {
        let received = scope.spawn(|| pair.receive().0);
        while !pair.host.try_send(&mut outgoing, &body, None).unwrap() {
            pair.host.wait_to_send(&outgoing, PATIENT).unwrap();
        }
        assert!(parts(&received.join().unwrap()) == [bytes.clone()]);
    });
    let counters = pair.host.counters();
    assert_eq!((counters.frames_sent, counters.full_waits), (1, 1));
}

#[test]
fn calls_beyond_the_slots_wait_for_one_to_end() {
    let pair = pair(1 << 16);
    let calls: Vec<_> = (0..SLOTS).map(|_| send(&pair.host, &[])).collect();
    let body = Gather::new(&[]).unwrap();
    let mut outgoing = Outgoing::default();
    assert!(!pair.host.try_send(&mut outgoing, &body, None).unwrap());
    assert_eq!(outgoing.call(), None);
    let waited = pair.host.wait_to_send(&outgoing, briefly());
    assert!(matches!(waited, Err(Error::TimedOut)));
    std::thread::scope(|scope| {
        scope.spawn(|| end(&pair.receive().1));
        pair.host.wait_to_send(&outgoing, PATIENT).unwrap();
        assert!(pair.host.try_send(&mut outgoing, &body, None).unwrap());
    });
    assert!(matches!(wait_outcome(&pair.host, calls[0]), Outcome::Ended));
}

#[test]
fn an_answer_pauses_at_the_window_until_somebody_takes_from_it() {
    let pair = pair(4 * WINDOW);
    let (call, port) = pair.open_call();
    let quarter = payload(2, WINDOW / 4);
    for _ in 0..4 {
        data(&port, &quarter, PATIENT).unwrap();
    }
    assert!(matches!(data(&port, b"x", briefly()), Err(Error::TimedOut)));
    assert!(matches!(
        data(&port, b"x", Patience::Spin),
        Err(Error::WouldPark)
    ));
    std::thread::scope(|scope| {
        let sender = scope.spawn(|| data(&port, b"x", PATIENT));
        assert!(parts(&wait_data(&pair.host, call)) == [quarter.clone()]);
        sender.join().unwrap().unwrap();
    });
    assert!(matches!(data(&port, b"y", briefly()), Ok(())));
}

#[test]
fn a_host_knows_whether_it_holds_a_worker_up() {
    let pair = pair(4 * WINDOW);
    let (call, port) = pair.open_call();
    let quarter = payload(5, WINDOW / 4);
    for _ in 0..4 {
        data(&port, &quarter, PATIENT).unwrap();
    }
    assert!(!pair.host.is_reader_behind());
    // A look reads what has arrived.
    assert!(!pair.host.is_over(call).unwrap());
    assert!(pair.host.is_reader_behind());
    wait_data(&pair.host, call);
    assert!(!pair.host.is_reader_behind());
}

#[test]
fn a_host_knows_whether_a_request_was_taken() {
    let pair = pair(1 << 16);
    let mut outgoing = Outgoing::default();
    let body = Gather::new(&[b"go"]).unwrap();
    assert_eq!(outgoing.position(), None);
    assert!(pair.host.try_send(&mut outgoing, &body, None).unwrap());
    let position = outgoing.position().unwrap();
    assert!(!pair.host.has_taken(position));
    pair.receive();
    assert!(pair.host.has_taken(position));
}

#[test]
fn a_host_knows_when_a_worker_is_done_with_a_call_that_was_given_up() {
    let pair = pair(1 << 16);
    let (call, port) = pair.open_call();
    assert!(!pair.host.is_over(call).unwrap());
    pair.host.abandon(call);
    assert!(!pair.host.is_over(call).unwrap());
    end(&port);
    assert!(pair.host.is_over(call).unwrap());
}

#[test]
fn what_would_wait_can_be_tried_again() {
    let pair = pair(4 * WINDOW);
    assert!(pair.worker.poll().unwrap().is_none());
    let (call, port) = pair.open_call();
    let (all, one): (&[&[u8]], &[&[u8]]) = (&[&payload(3, WINDOW)], &[b"x"]);
    let attempt = |parts| port.try_send(Kind::Data, &Gather::new(parts).unwrap());
    assert!(matches!(attempt(all), Some(Ok(()))));
    assert!(attempt(one).is_none());
    wait_data(&pair.host, call);
    assert!(matches!(attempt(one), Some(Ok(()))));
    let above_the_limit: &[&[u8]] = &[&payload(4, (4 << 20) + 1)];
    assert!(matches!(
        attempt(above_the_limit),
        Some(Err(Error::TooLarge { .. }))
    ));
    end(&port);
    send(&pair.host, &[b"next"]);
    assert!(pair.worker.poll().unwrap().is_some());
}

#[test]
fn a_union_of_tokens_is_set_once_one_of_them_is() {
    let pair = pair(1 << 16);
    let (_, first) = pair.open_call();
    let (call, second) = pair.open_call();
    let union = first.abort_token().union(&second.abort_token());
    assert!(!union.is_set() && !union.is_cancelled());
    pair.host.cancel(call);
    assert!(union.is_set() && union.is_cancelled() && !first.abort_token().is_set());
    let (other, of_worker) = (first.abort_token(), pair.worker.abort_token());
    pair.worker.shut_down();
    assert!(of_worker.union(&other).is_set());
}

#[test]
fn the_last_frame_does_not_wait_for_the_window() {
    let pair = pair(4 * WINDOW);
    let (call, port) = pair.open_call();
    data(&port, &vec![0; WINDOW], PATIENT).unwrap();
    assert!(matches!(data(&port, b"x", briefly()), Err(Error::TimedOut)));
    end(&port);
    wait_data(&pair.host, call);
    assert!(matches!(wait_outcome(&pair.host, call), Outcome::Ended));
}

#[test]
fn a_cancellation_reaches_a_worker_that_waits_for_the_window() {
    let pair = pair(4 * WINDOW);
    for _ in 0..20 {
        let (call, port) = pair.open_call();
        data(&port, &vec![0; WINDOW], PATIENT).unwrap();
        std::thread::scope(|scope| {
            let sender = scope.spawn(|| data(&port, b"x", PATIENT));
            std::thread::yield_now();
            pair.host.cancel(call);
            assert!(matches!(sender.join().unwrap(), Err(Error::Cancelled)));
        });
        assert!(port.abort_token().is_cancelled());
        end(&port);
        assert!(matches!(wait_outcome(&pair.host, call), Outcome::Cancelled));
        round_of_nothing(&pair);
    }
    assert_eq!(pair.host.in_flight(), [0; 0]);
}

#[test]
fn a_cancelled_call_says_so_even_if_its_slot_had_another_before() {
    let pair = pair(1 << 16);
    let (first, port) = pair.open_call();
    pair.host.cancel(first);
    end(&port);
    assert!(matches!(
        wait_outcome(&pair.host, first),
        Outcome::Cancelled
    ));
    // Reads the worker's last frame, after which the slot may be used again.
    round_of_nothing(&pair);
    let ports: Vec<_> = (0..SLOTS).map(|_| pair.open_call().1).collect();
    assert!(ports.iter().all(|port| !port.abort_token().is_set()));
}

/// Lets the host read whatever the worker has sent.
fn round_of_nothing(pair: &Pair) {
    let (call, port) = pair.open_call();
    end(&port);
    assert!(matches!(wait_outcome(&pair.host, call), Outcome::Ended));
}

#[test]
fn what_a_cancelled_call_still_sends_is_dropped() {
    let pair = pair(1 << 16);
    let (call, port) = pair.open_call();
    data(&port, b"early", PATIENT).unwrap();
    pair.host.cancel(call);
    assert!(matches!(
        data(&port, b"late", PATIENT),
        Err(Error::Cancelled)
    ));
    end(&port);
    assert!(matches!(wait_outcome(&pair.host, call), Outcome::Cancelled));
    round_of_nothing(&pair);
    assert_eq!(pair.host.counters().dropped_late, 2);
}

#[test]
fn a_frame_half_out_when_its_call_is_cancelled_goes_on_waiting_for_space() {
    let pair = pair(4096);
    let (call, port) = pair.open_call();
    let bytes = payload(3, 20_000);
    assert!(matches!(
        data(&port, &bytes, briefly()),
        Err(Error::TimedOut)
    ));
    pair.host.cancel(call);
    // It sleeps: a sender that kept looking instead would never notice the time.
    assert!(matches!(
        data(&port, &bytes, briefly()),
        Err(Error::TimedOut)
    ));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            data(&port, &bytes, PATIENT).unwrap();
            assert!(matches!(
                data(&port, b"more", PATIENT),
                Err(Error::Cancelled)
            ));
            end(&port);
        });
        assert!(matches!(wait_outcome(&pair.host, call), Outcome::Cancelled));
        // Somebody has to read the ring for the frame to get out.
        let ping = pair.host.ask(Control::Ping, None).unwrap();
        while pair.host.counters().dropped_late < 2 {
            let _ = pair.host.wait(ping, briefly());
            std::thread::yield_now();
            pair.host.look(&Notifier::for_loop().unwrap()).unwrap();
        }
    });
}

/// A call whose worker has sent part of an item, after which the ring is full.
fn open_half_answered(pair: &Pair, bytes: &[u8]) -> (u64, ReplyPort) {
    let (call, port) = pair.open_call();
    let part = [bytes];
    let body = Gather::new(&part).unwrap();
    assert!(port.try_send(Kind::Data, &body).is_none());
    (call, port)
}

#[test]
fn a_failure_replaces_an_item_that_is_half_out() {
    let pair = pair(4096);
    let item = payload(7, 20_000);
    // Of one record, of several, and of as many bytes as the item.
    for length in [300, 5000, item.len()] {
        let (call, port) = open_half_answered(&pair, &item);
        let why = payload(8, length);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let part = [why.as_slice()];
                let body = Gather::new(&part).unwrap();
                port.send(Kind::Error, &body, PATIENT).unwrap();
            });
            match wait_outcome(&pair.host, call) {
                Outcome::Failed(frame) => assert!(parts(&frame) == [why.clone()]),
                other => panic!("{other:?}"),
            }
        });
    }
    assert_eq!(pair.host.counters().violations, 0);
}

#[test]
fn the_end_replaces_an_item_that_is_half_out() {
    let pair = pair(4096);
    let (call, port) = open_half_answered(&pair, &payload(7, 20_000));
    std::thread::scope(|scope| {
        scope.spawn(|| end(&port));
        assert!(matches!(wait_outcome(&pair.host, call), Outcome::Ended));
    });
}

#[test]
fn another_item_is_refused_until_the_rest_of_one_is_out() {
    let pair = pair(4096);
    let item = payload(7, 20_000);
    let (call, port) = open_half_answered(&pair, &item);
    let shorter = data(&port, &item[1..], PATIENT);
    assert!(matches!(shorter, Err(Error::HalfSent)));
    let part = [b"x".as_slice()];
    let other = port.try_send(Kind::Data, &Gather::new(&part).unwrap());
    assert!(matches!(other, Some(Err(Error::HalfSent))));
    // Nor may anything follow on a failure that is half out but its rest.
    let failure = [&item[..10_000]];
    let failure = Gather::new(&failure).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| data(&port, &item, PATIENT).unwrap());
        assert!(parts(&wait_data(&pair.host, call)) == [item.clone()]);
    });
    assert!(port.try_send(Kind::Error, &failure).is_none());
    let other = port.send(Kind::Error, &Gather::new(&[&item[..300]]).unwrap(), PATIENT);
    assert!(matches!(other, Err(Error::HalfSent)));
    std::thread::scope(|scope| {
        scope.spawn(|| port.send(Kind::Error, &failure, PATIENT).unwrap());
        assert!(matches!(wait_outcome(&pair.host, call), Outcome::Failed(_)));
    });
}

#[test]
fn a_request_given_up_half_sent_leaves_the_channel_intact() {
    let pair = pair(4096);
    let bytes = payload(4, 20_000);
    let part = [bytes.as_slice()];
    let mut outgoing = Outgoing::default();
    let body = Gather::new(&part).unwrap();
    assert!(!pair.host.try_send(&mut outgoing, &body, None).unwrap());
    pair.host.withdraw(&outgoing);
    std::thread::scope(|scope| {
        let next = scope.spawn(|| send(&pair.host, &[b"next"]));
        let (withdrawn, port) = pair.receive();
        assert_eq!(Some(withdrawn.header.call), outgoing.call());
        assert!(withdrawn.body.is_empty());
        assert!(port.abort_token().is_cancelled());
        end(&port);
        let (request, port) = pair.receive();
        assert!(parts(&request) == [b"next"]);
        end(&port);
        let next = next.join().unwrap();
        assert!(matches!(wait_outcome(&pair.host, next), Outcome::Ended));
    });
    assert_eq!(pair.host.counters().dropped_late, 1);
    assert_eq!(pair.host.in_flight(), [0; 0]);
}

#[test]
fn a_worker_learns_of_a_request_given_up_half_sent_without_another_one() {
    let pair = pair(4096);
    let bytes = payload(4, 20_000);
    for full in [true, false] {
        let part = [bytes.as_slice()];
        let body = Gather::new(&part).unwrap();
        let mut outgoing = Outgoing::default();
        assert!(!pair.host.try_send(&mut outgoing, &body, None).unwrap());
        let call = outgoing.call().unwrap();
        if full {
            pair.host.withdraw(&outgoing);
            assert!(pair.worker.poll().unwrap().is_none());
            // Whoever asks how the call is doing tells the worker.
            assert!(!pair.host.is_over(call).unwrap());
        } else {
            assert!(pair.worker.poll().unwrap().is_none());
            pair.host.withdraw(&outgoing);
        }
        let withdrawn = pair.worker.poll().unwrap().expect("the withdrawal");
        assert_eq!(withdrawn.header.call, call);
        end(&ReplyPort::new(Arc::clone(&pair.worker), &withdrawn.header));
        assert!(pair.host.is_over(call).unwrap());
    }
}

#[test]
fn a_cancellation_ends_the_wait_of_a_request_that_is_half_sent() {
    let pair = pair(4096);
    let bytes = payload(6, 20_000);
    let part = [bytes.as_slice()];
    let body = Gather::new(&part).unwrap();
    let mut outgoing = Outgoing::default();
    assert!(!pair.host.try_send(&mut outgoing, &body, None).unwrap());
    let call = outgoing.call().unwrap();
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| pair.host.wait_to_send(&outgoing, PATIENT));
        while pair.host.counters().parks == 0 {
            std::thread::yield_now();
        }
        pair.host.cancel(call);
        waiting.join().unwrap().unwrap();
    });
    let sent = pair.host.try_send(&mut outgoing, &body, None);
    assert!(matches!(sent, Err(Error::Cancelled)));
    let event_loop = Notifier::for_loop().unwrap();
    assert!(!pair.host.await_space(&outgoing, &event_loop).unwrap());
}

#[test]
fn a_request_given_up_before_it_began_leaves_nothing() {
    let pair = pair(1 << 16);
    for _ in 0..2 * SLOTS {
        let outgoing = Outgoing::default();
        pair.host.withdraw(&outgoing);
    }
    round_of_nothing(&pair);
}

#[test]
fn a_ping_tells_how_far_the_worker_is() {
    let pair = pair(1 << 16);
    round_of_nothing(&pair);
    let ping = pair.host.ask(Control::Ping, None).unwrap();
    match wait_outcome(&pair.host, ping) {
        Outcome::Pong(progress) => {
            assert_eq!((progress.requests, progress.replies), (1, 1));
            assert_eq!((progress.finished, progress.polls), (1, 0));
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn pings_from_many_threads_are_each_answered() {
    let pair = pair(4096);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..100 {
                    let ping = pair.host.ask(Control::Ping, None).unwrap();
                    assert!(matches!(wait_outcome(&pair.host, ping), Outcome::Pong(_)));
                }
            });
        }
    });
}

#[test]
fn a_question_given_up_does_no_harm() {
    let pair = pair(4096);
    for _ in 0..20 {
        let ping = pair.host.ask(Control::Ping, None).unwrap();
        pair.host.cancel(ping);
        let next = pair.host.ask(Control::Ping, None).unwrap();
        assert!(matches!(wait_outcome(&pair.host, next), Outcome::Pong(_)));
        assert!(matches!(wait_outcome(&pair.host, ping), Outcome::Cancelled));
    }
}

#[test]
fn a_control_message_without_sense_is_counted_and_the_receiver_told() {
    let pair = pair(4096);
    let nonsense = pair.host.ask(Control::Ack, None).unwrap();
    assert!(pair.worker.receive(PATIENT).unwrap().is_none());
    assert_eq!(pair.worker.unexpected_control(), 1);
    assert!(!pair.worker.is_shutting_down());
    let waited = pair.host.wait(nonsense, briefly());
    assert!(matches!(waited, Err(Error::TimedOut)));
    round_of_nothing(&pair);
}

#[test]
fn a_shutdown_is_acknowledged_and_ends_the_workers_waits() {
    let pair = pair(1 << 16);
    let (_, port) = pair.open_call();
    std::thread::scope(|scope| {
        let receiver = scope.spawn(|| pair.worker.receive(PATIENT).unwrap().is_none());
        let sender = scope.spawn(|| {
            loop {
                if let Err(error) = data(&port, &[0; 1000], PATIENT) {
                    return error;
                }
            }
        });
        let shutdown = pair.host.ask(Control::Shutdown, None).unwrap();
        let outcome = wait_outcome(&pair.host, shutdown);
        assert!(matches!(outcome, Outcome::Acknowledged));
        assert!(receiver.join().unwrap());
        assert!(matches!(sender.join().unwrap(), Error::Closed));
    });
    assert!(pair.worker.is_shutting_down());
    assert!(port.abort_token().is_set() && !port.abort_token().is_cancelled());
}

#[test]
fn an_answer_ends_once() {
    let pair = pair(4096);
    let (_, port) = pair.open_call();
    end(&port);
    assert!(matches!(data(&port, b"more", PATIENT), Err(Error::Closed)));
    let again = port.send(Kind::End, &Gather::empty(), PATIENT);
    assert!(matches!(again, Err(Error::Closed)));
}

#[test]
fn a_failure_arrives_with_its_body() {
    let pair = pair(4096);
    let (call, port) = pair.open_call();
    let part: [&[u8]; 1] = [b"why"];
    port.send(Kind::Error, &Gather::new(&part).unwrap(), PATIENT)
        .unwrap();
    match wait_outcome(&pair.host, call) {
        Outcome::Failed(frame) => assert!(parts(&frame) == [b"why"]),
        other => panic!("{other:?}"),
    }
}

#[test]
fn many_threads_with_many_calls_get_their_own_answers() {
    const THREADS: usize = 12;
    const CALLS: usize = 150;
    let mut pair = pair(4096);
    pair.serve_echo_both_ways_at_once();
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let host = &pair.host;
            scope.spawn(move || {
                for call in 0..CALLS {
                    let seed = thread * CALLS + call;
                    // Some fit beside others, some take the ring several times over.
                    let length = [0, 10, 900, 2500, 9000][seed % 5];
                    round_trip(host, &[&seed.to_le_bytes(), &payload(seed, length)]);
                }
            });
        }
    });
    let counters = pair.host.counters();
    let total = (THREADS * CALLS) as u64;
    assert_eq!(
        (counters.frames_sent, counters.frames_received),
        (total, 2 * total)
    );
    assert_eq!((counters.dropped_late, pair.host.in_flight().len()), (0, 0));
}

#[test]
fn threads_that_share_one_channel_hand_the_reading_on() {
    // Each answers after all the others wait, so whoever reads for them leaves first.
    const THREADS: usize = 8;
    let mut pair = pair(1 << 16);
    pair.serve_echo();
    let start = Barrier::new(THREADS);
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let (host, start) = (&pair.host, &start);
            scope.spawn(move || {
                for round in 0..300 {
                    start.wait();
                    round_trip(host, &[&[thread as u8, round as u8]]);
                }
            });
        }
    });
    assert_eq!(pair.host.in_flight(), [0; 0]);
}

#[test]
fn calls_that_are_cancelled_among_others_harm_none() {
    let mut pair = pair(4096);
    pair.serve_echo_both_ways_at_once();
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let host = &pair.host;
            scope.spawn(move || {
                for seed in 0..100 {
                    let bytes = payload(seed, 3000);
                    if (seed + thread) % 3 > 0 {
                        round_trip(host, &[&bytes]);
                        continue;
                    }
                    let call = send(host, &[&bytes]);
                    host.cancel(call);
                    let outcome = loop {
                        if let Event::Done(outcome) = host.wait(call, PATIENT).unwrap() {
                            break outcome;
                        }
                    };
                    assert!(matches!(outcome, Outcome::Cancelled | Outcome::Ended));
                }
            });
        }
    });
    assert_eq!(pair.host.in_flight(), [0; 0]);
}

#[test]
fn closing_ends_the_waits_of_all_threads() {
    let pair = pair(1 << 16);
    let calls: Vec<_> = (0..4).map(|_| send(&pair.host, &[])).collect();
    std::thread::scope(|scope| {
        let waiters: Vec<_> = calls
            .iter()
            .map(|&call| scope.spawn(move || call))
            .map(|call| call.join().unwrap())
            .map(|call| {
                let host = &pair.host;
                scope.spawn(move || wait_outcome(host, call))
            })
            .collect();
        std::thread::yield_now();
        pair.host.close();
        for waiter in waiters {
            let outcome = waiter.join().unwrap();
            assert!(matches!(outcome, Outcome::Lost(End::Closed)));
        }
    });
    assert!(matches!(try_send(&pair.host, &[]), Err(Error::Closed)));
    let ping = pair.host.ask(Control::Ping, None);
    assert!(matches!(ping, Err(Error::Closed)));
}

#[test]
fn closing_ends_the_wait_for_space() {
    let pair = pair(4096);
    std::thread::scope(|scope| {
        let sender = scope.spawn(|| try_send(&pair.host, &[&[0; 50_000]]));
        std::thread::yield_now();
        pair.host.close();
        assert!(matches!(sender.join().unwrap(), Err(Error::Closed)));
    });
}

#[test]
fn answers_in_the_ring_are_no_violation_after_closing() {
    let pair = pair(4096);
    let (call, port) = pair.open_call();
    data(&port, b"unread", PATIENT).unwrap();
    end(&port);
    pair.host.close();
    let outcome = wait_outcome(&pair.host, call);
    assert!(matches!(outcome, Outcome::Lost(End::Closed)));
    let loops = Notifier::for_loop().unwrap();
    assert!(!pair.host.look(&loops).unwrap());
    assert_eq!(pair.host.end(), Some(End::Closed));
}

#[test]
fn a_worker_that_leaves_loses_its_calls_but_not_what_it_sent() {
    let pair = pair(1 << 16);
    let parent = i32::try_from(std::os::unix::process::parent_id()).unwrap();
    pair.host.watch(parent).unwrap();
    let (answered, port) = pair.open_call();
    let (pending, _) = pair.open_call();
    data(&port, b"last words", PATIENT).unwrap();
    end(&port);
    drop(port);
    let host = pair.without_worker();
    let outcome = wait_outcome(&host, pending);
    assert!(matches!(outcome, Outcome::Lost(End::PeerDied)));
    assert!(parts(&wait_data(&host, answered)) == [b"last words"]);
    assert!(matches!(wait_outcome(&host, answered), Outcome::Ended));
    assert!(matches!(try_send(&host, &[]), Err(Error::PeerDied)));
}

#[test]
fn waiting_again_after_the_end_does_not_hang() {
    let pair = pair(4096);
    let (call, port) = pair.open_call();
    end(&port);
    assert!(matches!(wait_outcome(&pair.host, call), Outcome::Ended));
    assert!(matches!(wait_outcome(&pair.host, call), Outcome::Cancelled));
}

#[test]
fn a_wait_goes_as_far_as_it_is_told() {
    let pair = pair(4096);
    let (call, port) = pair.open_call();
    assert!(pair.host.poll(call).unwrap().is_none());
    let waited = pair.host.wait(call, Patience::Spin);
    assert!(matches!(waited, Err(Error::WouldPark)));
    let waited = pair.host.wait(call, briefly());
    assert!(matches!(waited, Err(Error::TimedOut)));
    let received = pair.worker.receive(Patience::Spin);
    assert!(matches!(received, Err(Error::WouldPark)));
    let received = pair.worker.receive(briefly());
    assert!(matches!(received, Err(Error::TimedOut)));
    end(&port);
    assert!(matches!(wait_outcome(&pair.host, call), Outcome::Ended));
}

/// The signal is there before the look and let through by it, so that it always comes amid it.
#[test]
fn a_look_is_not_interrupted_by_a_signal() {
    extern "C" fn ignore(_: libc::c_int) {}
    let handler: extern "C" fn(libc::c_int) = ignore;
    // SAFETY: the handler does nothing.
    unsafe { libc::signal(libc::SIGUSR1, handler as libc::sighandler_t) };
    let pair = pair(4096);
    let (call, _port) = pair.open_call();
    for past in [true, false] {
        let gate = SignalGate::close();
        // SAFETY: a handled signal for this thread, which gets it once the gate lets it through.
        unsafe { libc::raise(libc::SIGUSR1) };
        let now = Instant::now();
        let until = if past { now } else { now + LIMIT };
        let patience = Patience::Park {
            until: Some(until),
            gate: Some(&gate),
        };
        match pair.host.wait(call, patience) {
            Err(Error::TimedOut) => assert!(past),
            Err(Error::Interrupted) => assert!(!past),
            other => panic!("{other:?}"),
        }
    }
}

/// The items are so close together that each of them makes spinning for the next one pay.
#[test]
fn a_stream_of_another_call_keeps_nobody_from_its_deadline() {
    const APART: Duration = Duration::from_micros(20);
    const FAR_FROM_ALL: u64 = 1000;
    let pair = pair(4096);
    let (_, streaming) = pair.open_call();
    let (call, _port) = pair.open_call();
    // Not one of the pair's servants: their worker shuts down while they work, which ends a stream.
    std::thread::scope(|scope| {
        let (_stop, stopped) = mpsc::channel::<()>();
        scope.spawn(move || {
            // Until the window of the stream, which nobody reads, is full.
            while stopped.try_recv() == Err(mpsc::TryRecvError::Empty) {
                let sent = streaming.try_send(Kind::Data, &Gather::new(&[b"item"]).unwrap());
                assert!(matches!(sent, None | Some(Ok(()))), "{sent:?}");
                let next = Instant::now() + APART;
                while Instant::now() < next {
                    std::hint::spin_loop();
                }
            }
        });
        let waited = pair.host.wait(call, Patience::Spin);
        assert!(matches!(waited, Err(Error::WouldPark)));
        let waited = pair.host.wait(call, briefly());
        assert!(matches!(waited, Err(Error::TimedOut)));
    });
    let read = pair.host.counters().frames_received;
    assert!(read < FAR_FROM_ALL, "{read} items");
}

#[test]
fn an_event_loop_learns_of_frames_through_its_descriptors() {
    let pair = pair(1 << 16);
    let event_loop = Notifier::for_loop().unwrap();
    let mut outgoing = Outgoing::default();
    let body = Gather::new(&[]).unwrap();
    let sent = pair.host.try_send(&mut outgoing, &body, Some(&event_loop));
    assert!(sent.unwrap());
    let call = outgoing.call().unwrap();
    let (_, port) = pair.receive();
    assert!(pair.host.look(&event_loop).unwrap());
    assert!(!is_readable(&pair.host) && event_loop.take_ready().is_empty());
    for frames in 0..3 {
        data(&port, b"item", PATIENT).unwrap();
        assert!(is_readable(&pair.host), "after {frames} frames");
        assert!(pair.host.look(&event_loop).unwrap());
        assert_eq!(event_loop.take_ready(), [call]);
        let event = pair.host.poll(call).unwrap();
        assert!(matches!(event, Some(Event::Data(_))));
        assert!(pair.host.poll(call).unwrap().is_none());
    }
    end(&port);
    assert!(pair.host.look(&event_loop).unwrap());
    assert_eq!(event_loop.take_ready(), [call]);
    let event = pair.host.poll(call).unwrap();
    assert!(matches!(event, Some(Event::Done(Outcome::Ended))));
}

#[test]
fn an_event_loop_learns_of_space_through_its_descriptors() {
    let pair = pair(4096);
    let event_loop = Notifier::for_loop().unwrap();
    let bytes = payload(5, 6000);
    let part = [bytes.as_slice()];
    let body = Gather::new(&part).unwrap();
    let mut outgoing = Outgoing::default();
    let mut send = || {
        let sent = pair
            .host
            .try_send(&mut outgoing, &body, Some(&event_loop))
            .unwrap();
        sent || {
            let must_wait = pair.host.await_space(&outgoing, &event_loop).unwrap();
            assert!(must_wait, "the worker has read nothing since");
            false
        }
    };
    assert!(!send());
    std::thread::scope(|scope| {
        let receiver = scope.spawn(|| pair.receive().0);
        let told = || {
            pair.host.look(&event_loop).unwrap();
            event_loop.take_ready().contains(&Notifier::SPACE)
        };
        while !told() {
            std::thread::yield_now();
        }
        let mut sent = outgoing_rest(&pair.host, &mut outgoing, &body);
        while !sent {
            sent = outgoing_rest(&pair.host, &mut outgoing, &body);
        }
        assert!(parts(&receiver.join().unwrap()) == [bytes.clone()]);
    });
}

fn outgoing_rest(host: &Host, outgoing: &mut Outgoing, body: &Gather<'_>) -> bool {
    std::thread::yield_now();
    host.try_send(outgoing, body, None).unwrap()
}

#[test]
fn a_thread_and_an_event_loop_may_share_a_channel() {
    let mut pair = pair(4096);
    pair.serve_echo_both_ways_at_once();
    let event_loop = Notifier::for_loop().unwrap();
    std::thread::scope(|scope| {
        let host = &pair.host;
        let threads: Vec<_> = (0..2)
            .map(|seed| {
                scope.spawn(move || {
                    (0..100).for_each(|_| round_trip(host, &[&payload(seed, 500)]));
                })
            })
            .collect();
        for _ in 0..100 {
            let mut outgoing = Outgoing::default();
            let body = Gather::new(&[]).unwrap();
            while !host
                .try_send(&mut outgoing, &body, Some(&event_loop))
                .unwrap()
            {
                std::thread::yield_now();
            }
            let call = outgoing.call().unwrap();
            host.look(&event_loop).unwrap();
            loop_until_done(host, &event_loop, call);
        }
        threads
            .into_iter()
            .for_each(|thread| thread.join().unwrap());
    });
}

/// What an event loop does for one call: sleep on the descriptors, look, and ask what is ready.
fn loop_until_done(host: &Host, event_loop: &Arc<Notifier>, call: u64) {
    loop {
        while let Some(event) = host.poll(call).unwrap() {
            if let Event::Done(outcome) = event {
                assert!(matches!(outcome, Outcome::Ended));
                return;
            }
        }
        let fds = host
            .descriptors()
            .into_iter()
            .chain([event_loop.as_fd()])
            .map(|fd| rustix::event::PollFd::from_borrowed_fd(fd, rustix::event::PollFlags::IN));
        rustix::event::poll(&mut fds.collect::<Vec<_>>(), None).unwrap();
        host.look(event_loop).unwrap();
        event_loop.take_ready();
    }
}
