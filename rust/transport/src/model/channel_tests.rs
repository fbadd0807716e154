//! Models of a whole channel: the production host, worker and heartbeat over a small segment.

use std::sync::Arc;

use loom::thread;

use super::{bounded, explore};
use crate::assemble::Frame;
use crate::body::Gather;
use crate::calls::{End, Event, Outcome};
use crate::control::Control;
use crate::error::Error;
use crate::host::{Host, Outgoing};
use crate::platform::{self, ControlSocket, Death, Doorbell};
use crate::record::{ALIGN, Kind};
use crate::segment::Segment;
use crate::spin::WaitPolicy;
use crate::worker::{ReplyPort, Worker};
use crate::{Notifier, Patience, Settings};

/// Four cells: two records, if they are short.
const CAPACITY: usize = 4 * ALIGN;
const PATIENT: Patience<'static> = Patience::Park {
    until: None,
    gate: None,
};

struct Pair {
    host: Arc<Host>,
    worker: Arc<Worker>,
    death: Death,
}

fn pair() -> Pair {
    let settings = Settings {
        frame_limit: 1024,
        wait: WaitPolicy::Park,
    };
    let segment = Segment::new(CAPACITY);
    let (control, worker_control) = ControlSocket::pair();
    let (bell, worker_bell) = Doorbell::pair();
    let (space_bell, worker_space_bell) = Doorbell::pair();
    let host = Host::assemble(segment.clone(), control, bell, space_bell, settings);
    let bells = [worker_bell, worker_space_bell];
    let worker = Worker::assemble(segment, worker_control, bells, settings).unwrap();
    let death = Death::default();
    host.death.set(death.clone()).unwrap();
    Pair {
        host: Arc::new(host),
        worker,
        death,
    }
}

fn send(host: &Host, parts: &[&[u8]], waiter: Option<&Arc<Notifier>>) -> crate::Result<u64> {
    send_as(Outgoing::default(), host, parts, waiter)
}

fn send_as(
    mut outgoing: Outgoing,
    host: &Host,
    parts: &[&[u8]],
    waiter: Option<&Arc<Notifier>>,
) -> crate::Result<u64> {
    let body = Gather::new(parts).unwrap();
    while !host.try_send(&mut outgoing, &body, waiter)? {
        host.wait_to_send(&outgoing, PATIENT)?;
    }
    Ok(outgoing.call().unwrap())
}

fn next(host: &Host, call: u64) -> Event {
    host.wait(call, PATIENT).unwrap()
}

/// A call whose answer of one item is wanted whole: spins, as far as that goes here, and then waits.
fn ask(host: &Host) -> (usize, Outcome) {
    let call = send_as(Outgoing::for_whole_answer(), host, &[], None).unwrap();
    let spun = host.spin_for_answer(call).unwrap();
    match spun.or_else(|| host.wait_for_answer(call, PATIENT).unwrap()) {
        Some(_) => (1, Outcome::Ended),
        None => outcome(host, call),
    }
}

/// The call's outcome, and how many items came before it.
fn outcome(host: &Host, call: u64) -> (usize, Outcome) {
    let mut items = 0;
    loop {
        match next(host, call) {
            Event::Data(_) => items += 1,
            Event::Done(outcome) => return (items, outcome),
        }
    }
}

fn receive(worker: &Worker) -> Option<Frame> {
    worker.receive(PATIENT).unwrap()
}

/// Answers one request with so many items and an end, as far as the host wants them.
fn answer(worker: &Arc<Worker>, items: usize) -> Option<()> {
    let request = receive(worker)?;
    let port = ReplyPort::new(Arc::clone(worker), &request.header);
    for _ in 0..items {
        match port.send(Kind::Data, &Gather::empty(), PATIENT) {
            Ok(()) => {}
            Err(Error::Cancelled | Error::Closed) => break,
            Err(error) => panic!("{error}"),
        }
    }
    match port.send(Kind::End, &Gather::empty(), PATIENT) {
        Ok(()) | Err(Error::Closed) => Some(()),
        Err(error) => panic!("{error}"),
    }
}

/// A call that is answered while another thread cancels it ends once, and its slot is free for the
/// next call, which none of its late frames reach.
#[test]
fn loom_cancel_against_reply() {
    let seen = std::sync::Arc::new([const { std::sync::atomic::AtomicUsize::new(0) }; 2]);
    let counts = std::sync::Arc::clone(&seen);
    let (executions, ..) = explore("cancel against reply", bounded(), move |_| {
        let Pair { host, worker, .. } = pair();
        let call = send(&host, &[], None).unwrap();
        let serving = thread::spawn(move || {
            answer(&worker, 1).unwrap();
            answer(&worker, 1).unwrap();
        });
        let cancelling = {
            let host = Arc::clone(&host);
            thread::spawn(move || host.cancel(call))
        };
        let (items, outcome) = outcome(&host, call);
        let index = match outcome {
            Outcome::Ended => {
                assert_eq!(items, 1);
                0
            }
            Outcome::Cancelled => 1,
            other => panic!("{other:?}"),
        };
        counts[index].fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        cancelling.join().unwrap();
        assert!(matches!(ask(&host), (1, Outcome::Ended)));
        serving.join().unwrap();
        assert_eq!((host.end(), host.in_flight().len()), (None, 0));
    });
    assert!(executions > 10, "only {executions} executions");
    for count in &*seen {
        assert!(count.load(std::sync::atomic::Ordering::Relaxed) > 0);
    }
}

/// Closing while a call waits, a request is on its way, the worker serves and its heartbeat is
/// asked: everybody comes home.
#[test]
fn loom_close_against_everything() {
    let (executions, ..) = explore("close against everything", bounded(), |_| {
        let Pair { host, worker, .. } = pair();
        worker.start_heartbeat(0).unwrap();
        let serving = thread::spawn(move || {
            while answer(&worker, 1).is_some() {}
            worker.join_heartbeat();
        });
        let calling = {
            let host = Arc::clone(&host);
            thread::spawn(move || match send(&host, &[], None) {
                Ok(call) => match outcome(&host, call) {
                    (1, Outcome::Ended) | (_, Outcome::Lost(End::Closed)) => {}
                    other => panic!("{other:?}"),
                },
                Err(Error::Closed) => {}
                Err(error) => panic!("{error}"),
            })
        };
        host.close();
        calling.join().unwrap();
        serving.join().unwrap();
        assert_eq!(host.end(), Some(End::Closed));
        assert!(matches!(send(&host, &[], None), Err(Error::Closed)));
    });
    assert!(executions > 10, "only {executions} executions");
}

/// Two threads share the reading: whoever leads hands the other's frames over, and the lead when
/// it leaves.
#[test]
fn loom_callers_hand_the_lead_over() {
    let (executions, ..) = explore("two callers", bounded(), |_| {
        let Pair { host, worker, .. } = pair();
        let serving = thread::spawn(move || {
            answer(&worker, 0).unwrap();
            answer(&worker, 0).unwrap();
        });
        let calling = {
            let host = Arc::clone(&host);
            thread::spawn(move || {
                let call = send(&host, &[], None).unwrap();
                assert!(matches!(outcome(&host, call), (0, Outcome::Ended)));
            })
        };
        let call = send(&host, &[], None).unwrap();
        assert!(matches!(outcome(&host, call), (0, Outcome::Ended)));
        calling.join().unwrap();
        serving.join().unwrap();
    });
    assert!(executions > 10, "only {executions} executions");
}

/// A request and an answer of several fragments each: both sides sleep on full rings and empty
/// ones, and every byte arrives.
#[test]
fn loom_fragments_both_ways() {
    const BYTES: [u8; 3 * ALIGN] = [7; 3 * ALIGN];
    let (executions, ..) = explore("fragments", bounded(), |_| {
        let Pair { host, worker, .. } = pair();
        let serving = thread::spawn(move || {
            let request = receive(&worker).unwrap();
            assert!(request.body.as_slice().ends_with(&BYTES));
            let port = ReplyPort::new(Arc::clone(&worker), &request.header);
            let body = Gather::new(&[&BYTES]).unwrap();
            port.send(Kind::Data, &body, PATIENT).unwrap();
            port.send(Kind::End, &Gather::empty(), PATIENT).unwrap();
        });
        let call = send(&host, &[&BYTES], None).unwrap();
        match next(&host, call) {
            Event::Data(frame) => assert!(frame.body.as_slice().ends_with(&BYTES)),
            Event::Done(outcome) => panic!("{outcome:?}"),
        }
        assert!(matches!(outcome(&host, call), (0, Outcome::Ended)));
        serving.join().unwrap();
    });
    assert!(executions > 10, "only {executions} executions");
}

/// A stream of twice its window: the worker sleeps for credit, and every item arrives.
#[test]
fn loom_stream_beyond_its_window() {
    const ITEMS: usize = 4;
    let (executions, ..) = explore("credit of a stream", bounded(), |_| {
        let Pair { host, worker, .. } = pair();
        let serving = thread::spawn(move || answer(&worker, ITEMS).unwrap());
        let call = send(&host, &[], None).unwrap();
        assert!(matches!(outcome(&host, call), (ITEMS, Outcome::Ended)));
        serving.join().unwrap();
    });
    assert!(executions > 10, "only {executions} executions");
}

/// What a worker committed before it died arrives; then the call is lost, and so is the next.
#[test]
fn loom_death_after_a_frame() {
    let (executions, ..) = explore("death after a frame", bounded(), |_| {
        let Pair {
            host,
            worker,
            death,
        } = pair();
        let serving = thread::spawn(move || {
            let request = receive(&worker).unwrap();
            let port = ReplyPort::new(worker, &request.header);
            port.send(Kind::Data, &Gather::empty(), PATIENT).unwrap();
            death.0.ring();
        });
        let call = send(&host, &[], None).unwrap();
        assert!(matches!(
            outcome(&host, call),
            (1, Outcome::Lost(End::PeerDied))
        ));
        serving.join().unwrap();
        assert!(send(&host, &[], None).is_err());
    });
    assert!(executions > 10, "only {executions} executions");
}

/// A ping is answered by the heartbeat while another thread calls.
#[test]
fn loom_ping_beside_a_call() {
    let (executions, ..) = explore("ping beside a call", bounded(), |_| {
        let Pair { host, worker, .. } = pair();
        worker.start_heartbeat(0).unwrap();
        let pinging = {
            let host = Arc::clone(&host);
            thread::spawn(move || {
                let ping = host.ask(Control::Ping, None).unwrap();
                assert!(matches!(outcome(&host, ping), (0, Outcome::Pong(_))));
            })
        };
        let call = send(&host, &[], None).unwrap();
        answer(&worker, 0).unwrap();
        assert!(matches!(outcome(&host, call), (0, Outcome::Ended)));
        pinging.join().unwrap();
        worker.join_heartbeat();
    });
    assert!(executions > 10, "only {executions} executions");
}

/// An event loop that sleeps on the descriptors alone is told of its frames, whoever reads them:
/// itself, or a thread that calls meanwhile.
#[test]
fn loom_event_loop_beside_a_thread() {
    event_loop_beside("event loop beside a thread", |host| {
        let call = send(host, &[], None).unwrap();
        assert!(matches!(outcome(host, call), (0, Outcome::Ended)));
    });
}

/// The same with a thread that reads for a moment and waits for nothing.
#[test]
fn loom_event_loop_beside_a_brief_spin() {
    event_loop_beside("event loop beside a brief spin", |host| {
        let call = send(host, &[], None).unwrap();
        let _ = host.spin_for_answer(call).unwrap();
        host.abandon(call);
    });
}

fn event_loop_beside(name: &str, caller: impl Fn(&Host) + Copy + Send + Sync + 'static) {
    let (executions, ..) = explore(name, bounded(), move |_| {
        let Pair { host, worker, .. } = pair();
        let serving = thread::spawn(move || {
            answer(&worker, 0).unwrap();
            answer(&worker, 0).unwrap();
        });
        let calling = {
            let host = Arc::clone(&host);
            thread::spawn(move || caller(&host))
        };
        let notifier = Notifier::for_loop().unwrap();
        let call = send(&host, &[], Some(&notifier)).unwrap();
        while host.poll(call).unwrap().is_none() {
            host.look(&notifier).unwrap();
            if !notifier.take_ready().contains(&call) {
                let sources = [Some(notifier.source()), Some(host.bell_source())];
                platform::wait(sources, None, None).unwrap();
                // The bell may be rung for a leader that is about to take the ring.
                thread::yield_now();
            }
        }
        calling.join().unwrap();
        serving.join().unwrap();
    });
    assert!(executions > 10, "only {executions} executions");
}
