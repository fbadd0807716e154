//! A worker that was taken over: whatever it writes, sends and closes, the host neither crashes nor
//! hangs nor reads outside of the segment, and says what was wrong.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use inferpool_transport::body::{Gather, parse};
use inferpool_transport::control::{Control, Progress, SIZE};
use inferpool_transport::record::{FIRST, HEADER, Header, Kind, LAST};
use inferpool_transport::{
    End, Error, Event, Host, Notifier, Outcome, Outgoing, Patience, Settings, Violation,
    WaitPolicy, Worker,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use rustix::net::{
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, Shutdown, send, sendmsg, shutdown,
};

/// Where things are, see `segment`.
const REQUEST_TAIL: usize = 4096;
const REPLY_TAIL: usize = 4096 + 512;
const STEP: usize = 128;
const DATA: usize = 24_576;
const CAPACITY: usize = 4096;
const REPLIES: usize = DATA + CAPACITY;
const END: usize = REPLIES + CAPACITY;
const WINDOW: usize = 1 << 20;
const FRAME_LIMIT: usize = 4 << 20;

/// A host, and the worker's end in hostile hands.
struct Attack {
    host: Arc<Host>,
    notifier: Arc<Notifier>,
    inherited: inferpool_transport::Inherited,
    start: *mut u8,
    /// Where the next forged record goes.
    tail: u64,
}

impl Drop for Attack {
    fn drop(&mut self) {
        // SAFETY: mapped in `new` with this length.
        unsafe { munmap(self.start.cast(), END) }.unwrap();
    }
}

impl Attack {
    fn new() -> Self {
        let settings = Settings {
            frame_limit: FRAME_LIMIT,
            wait: WaitPolicy::Park,
        };
        let host = Host::create(CAPACITY, settings).unwrap();
        let inherited = host.inheritance().unwrap();
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let start = unsafe {
            mmap(
                std::ptr::null_mut(),
                END,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                &inherited.segment,
                0,
            )
        };
        Self {
            host,
            notifier: Notifier::for_loop().unwrap(),
            inherited,
            start: start.unwrap().cast(),
            tail: 0,
        }
    }

    fn write(&self, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= END);
        for (offset, &byte) in bytes.iter().enumerate() {
            // SAFETY: within the mapping, which is nobody's Rust object.
            unsafe { self.start.add(at + offset).write_volatile(byte) };
        }
    }

    fn read(&self, at: usize) -> u64 {
        // SAFETY: as above; every word lies at a multiple of eight.
        unsafe { self.start.add(at).cast::<u64>().read_volatile() }
    }

    fn set(&self, at: usize, word: u64) {
        self.write(at, &word.to_le_bytes());
    }

    fn try_send(&self, bytes: &[u8]) -> Result<Option<u64>, Error> {
        let mut outgoing = Outgoing::default();
        let parts = [bytes];
        let sent = self.host.try_send(
            &mut outgoing,
            &Gather::new(&parts).unwrap(),
            Some(&self.notifier),
        );
        let call = outgoing.call();
        Ok(sent?.then(|| call.unwrap()))
    }

    fn send(&self) -> u64 {
        self.try_send(b"go").unwrap().unwrap()
    }

    /// An honest header of an item for this call, which is the first and has the first slot.
    fn header(call: u64, length: usize) -> Header {
        Header {
            length: length as u32,
            kind: Kind::Data,
            flags: FIRST | LAST,
            call,
            sequence: 0,
            slot: 0,
            total: length as u64,
        }
    }

    /// Publishes a record as the worker's code would, with whatever header.
    fn forge(&mut self, header: Header, body: &[u8]) {
        let offset = self.tail as usize % CAPACITY;
        let space = header.span();
        assert!(offset + space <= CAPACITY, "forgeries here need no padding");
        self.write(REPLIES + offset, &header.to_wire());
        self.write(REPLIES + offset + HEADER, body);
        self.tail += space as u64;
        self.set(REPLY_TAIL, self.tail);
    }

    /// Publishes padding of this size, header included.
    fn forge_padding(&mut self, space: usize) {
        let header = Header {
            kind: Kind::Pad,
            ..Self::header(0, space - HEADER)
        };
        self.forge(header, &[]);
    }

    /// What the host finds when it looks, without waiting.
    fn look(&self) -> Option<End> {
        self.host.look(&self.notifier).unwrap();
        self.host.end()
    }

    fn expect(&self, violation: Violation) {
        assert_eq!(self.look(), Some(End::Violated(violation)));
        assert!(matches!(self.try_send(b""), Err(Error::Protocol(found)) if found == violation));
        assert_eq!(self.host.counters().violations, 1);
    }

    /// Waits for the call as a thread does, but not for long.
    fn wait(&self, call: u64) -> Result<Event, Error> {
        let until = Some(Instant::now() + Duration::from_millis(20));
        self.host.wait(call, Patience::Park { until, gate: None })
    }
}

fn is_readable(source: impl AsFd) -> bool {
    let mut fds = [PollFd::new(&source, PollFlags::IN)];
    poll(&mut fds, Some(&Timespec::default())).unwrap() == 1
}

fn report(what: &str, attempts: usize) {
    println!("hostile: {what}: {attempts} attempts");
}

#[test]
fn every_value_of_every_control_byte() {
    // How far the host has written when it first looks at the worker's position: before the first
    // frame of a 64th of the ring that has room in front, where it goes if the ring is empty.
    const LOOKED: u64 = 64 + 128;
    let mut attempts = 0;
    let words = [REQUEST_TAIL, REPLY_TAIL].map(|words| (0..4).map(move |word| words + word * STEP));
    for at in words.into_iter().flatten().flat_map(|word| word..word + 8) {
        for value in 0..=255 {
            let attack = Attack::new();
            let call = attack.send();
            attack.write(at, &[value]);
            let end = attack.look();
            if (REPLY_TAIL..REPLY_TAIL + 8).contains(&at) && value > 0 {
                // Nothing was published, so nothing is there whatever it says.
                assert!(matches!(end, Some(End::Violated(_))), "{at}: {value}");
                assert!(matches!(
                    attack.host.poll(call).unwrap(),
                    Some(Event::Done(Outcome::Lost(End::Violated(_))))
                ));
            } else {
                assert_eq!(end, None, "{at}: {value}");
                // Until the ring is full.
                let sent = (0..64).try_for_each(|_| attack.try_send(&[0; 64]).map(drop));
                let head = attack.read(REQUEST_TAIL + STEP);
                let plausible = head <= LOOKED && head.is_multiple_of(32);
                assert_eq!(sent.is_ok(), plausible, "{at}: {value}: {sent:?}");
            }
            attempts += 1;
        }
    }
    report("values of control bytes", attempts);
}

#[test]
fn every_value_of_every_header_byte() {
    let (mut attempts, mut accepted) = (0, 0);
    let body = [
        1, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8,
    ];
    for at in 0..HEADER + body.len() {
        for value in 0..=255 {
            let mut attack = Attack::new();
            let call = attack.send();
            attack.forge(Attack::header(call, body.len()), &body);
            attack.write(REPLIES + at, &[value]);
            let end = attack.look();
            match attack.host.poll(call).unwrap() {
                Some(Event::Data(frame)) => {
                    assert_eq!(end, None);
                    accepted += usize::from(parse(frame.body.as_slice()).is_ok());
                }
                Some(Event::Done(Outcome::Ended | Outcome::Failed(_))) => assert_eq!(end, None),
                Some(Event::Done(Outcome::Lost(lost))) => assert_eq!(end, Some(lost)),
                // The first part of a larger frame.
                None => assert_eq!((end, at), (None, at)),
                other => panic!("{other:?}"),
            }
            attempts += 1;
        }
    }
    assert!(accepted > 0 && accepted < attempts / 4, "{accepted}");
    report("values of header and body bytes", attempts);
}

#[test]
fn frames_that_the_format_forbids() {
    type Forgery = fn(Header) -> Header;
    let cases: [(Violation, Forgery); 13] = [
        (Violation::Kind, |header| Header {
            kind: Kind::Request,
            ..header
        }),
        (Violation::Length, |header| Header {
            kind: Kind::Pad,
            ..header
        }),
        (Violation::Length, |header| Header {
            length: 4096,
            total: 4096,
            ..header
        }),
        (Violation::Length, |header| Header {
            length: 33,
            ..header
        }),
        (Violation::Length, |header| Header {
            length: 64,
            total: 64,
            ..header
        }),
        // More than the whole frame, though it lies within what is published.
        (Violation::Length, |header| Header {
            total: 31,
            ..header
        }),
        (Violation::Kind, |header| Header {
            flags: FIRST | LAST | 4,
            ..header
        }),
        (Violation::UnknownCall, |header| Header {
            call: header.call + 1,
            ..header
        }),
        (Violation::UnknownCall, |header| Header {
            call: u64::MAX,
            ..header
        }),
        (Violation::UnknownCall, |header| Header {
            slot: u32::MAX,
            ..header
        }),
        (Violation::Sequence, |header| Header {
            sequence: u32::MAX,
            ..header
        }),
        (Violation::Fragment, |header| Header { flags: 0, ..header }),
        (Violation::TooLarge, |header| Header {
            flags: FIRST,
            total: u64::MAX,
            ..header
        }),
    ];
    let attempts = cases.len();
    for (violation, forgery) in cases {
        let mut attack = Attack::new();
        let call = attack.send();
        attack.forge(Attack::header(call, 32), &[0; 32]);
        attack.write(REPLIES, &forgery(Attack::header(call, 32)).to_wire());
        attack.expect(violation);
    }
    report("forbidden frames", attempts);
}

#[test]
fn what_was_said_before_is_not_said_again() {
    let mut attack = Attack::new();
    let call = attack.send();
    attack.forge(Attack::header(call, 0), &[]);
    assert_eq!(attack.look(), None);
    attack.forge(Attack::header(call, 0), &[]);
    attack.expect(Violation::Sequence);

    let mut attack = Attack::new();
    let call = attack.send();
    let end = Header {
        kind: Kind::End,
        ..Attack::header(call, 0)
    };
    attack.forge(end, &[]);
    assert_eq!(attack.look(), None);
    assert!(matches!(
        attack.host.poll(call).unwrap(),
        Some(Event::Done(Outcome::Ended))
    ));
    attack.forge(end, &[]);
    attack.expect(Violation::UnknownCall);
}

#[test]
fn positions_that_run_backwards() {
    for back in [1, 32, 64, 1 << 40] {
        let mut attack = Attack::new();
        let call = attack.send();
        for sequence in 0..4 {
            attack.forge(
                Header {
                    sequence,
                    ..Attack::header(call, 0)
                },
                &[],
            );
        }
        assert_eq!(attack.look(), None);
        attack.set(REPLY_TAIL, attack.tail.wrapping_sub(back));
        attack.expect(Violation::Position);
    }
}

#[test]
fn a_position_within_a_record() {
    let mut attack = Attack::new();
    let call = attack.send();
    attack.forge(Attack::header(call, 0), &[]);
    attack.set(REPLY_TAIL, attack.tail + 1);
    attack.expect(Violation::Position);
    assert_eq!(attack.host.counters().frames_received, 0);
}

#[test]
fn a_record_that_passes_the_end_of_the_ring() {
    let mut attack = Attack::new();
    let call = attack.send();
    for sequence in 0..126 {
        let header = Header {
            sequence,
            ..Attack::header(call, 0)
        };
        attack.forge(header, &[]);
    }
    assert_eq!(attack.look(), None);
    let header = Header {
        sequence: 126,
        ..Attack::header(call, 4000)
    };
    attack.write(REPLIES + attack.tail as usize, &header.to_wire());
    attack.set(REPLY_TAIL, attack.tail + CAPACITY as u64);
    attack.expect(Violation::Length);
}

#[test]
fn fragments_without_end() {
    // Of nothing, of more than was declared, and of another frame than the first.
    let begun = |attack: &mut Attack| {
        let call = attack.send();
        let first = Header {
            flags: FIRST,
            total: 100,
            ..Attack::header(call, 64)
        };
        attack.forge(first, &[0; 64]);
        assert_eq!(attack.look(), None);
        first
    };
    let cases: [fn(Header) -> Header; 4] = [
        |first| Header {
            flags: 0,
            length: 0,
            ..first
        },
        |first| Header {
            flags: 0,
            length: 64,
            ..first
        },
        |first| Header {
            flags: 0,
            length: 32,
            total: 64,
            ..first
        },
        |first| Header {
            flags: FIRST,
            ..first
        },
    ];
    for case in cases {
        let mut attack = Attack::new();
        let first = begun(&mut attack);
        attack.forge(case(first), &[0; 64]);
        attack.expect(Violation::Fragment);
    }
}

#[test]
fn padding_without_a_record_after_it() {
    let mut attack = Attack::new();
    attack.send();
    attack.forge_padding(CAPACITY);
    attack.expect(Violation::Length);

    let mut attack = Attack::new();
    let call = attack.send();
    let header = Attack::header(call, 256);
    attack.forge(header, &[0; 256]);
    assert_eq!(attack.look(), None);
    attack.forge_padding(CAPACITY - header.span());
    attack.forge_padding(header.span());
    attack.expect(Violation::Length);
}

/// Items of a call until the host has had enough of them.
fn flood(attack: &mut Attack, call: u64) -> (End, usize) {
    let item = 1000;
    for sequence in 0..4 * WINDOW as u32 / 1000 {
        let header = Header {
            sequence,
            ..Attack::header(call, item)
        };
        if attack.tail as usize % CAPACITY + header.span() > CAPACITY {
            attack.forge_padding(CAPACITY - attack.tail as usize % CAPACITY);
        }
        attack.forge(header, &[7; 1000]);
        if let Some(end) = attack.look() {
            return (end, sequence as usize * item);
        }
    }
    panic!("no limit");
}

#[test]
fn frames_without_end_are_limited_by_the_window() {
    for cancelled in [false, true] {
        let mut attack = Attack::new();
        let call = attack.send();
        if cancelled {
            attack.host.cancel(call);
        }
        let (end, bytes) = flood(&mut attack, call);
        assert_eq!(end, End::Violated(Violation::Window));
        assert!(bytes <= WINDOW, "{bytes}");
        assert_eq!(attack.host.counters().dropped_late > 0, cancelled);
    }
}

/// One frame in fragments of a byte, published as fast as the host reads them: the ring is never
/// empty. Gives `attempt` a count of the records that the host has read.
fn with_fragments_of_a_byte(attempt: impl FnOnce(&Attack, u64, &dyn Fn() -> u64)) {
    const SPACE: u64 = 64;
    let mut attack = Attack::new();
    let call = attack.send();
    let first = Header {
        flags: FIRST,
        total: FRAME_LIMIT as u64,
        ..Attack::header(call, 1)
    };
    attack.forge(first, &[7]);
    assert_eq!(attack.look(), None);
    for offset in (0..CAPACITY).step_by(SPACE as usize) {
        attack.write(REPLIES + offset, &Header { flags: 0, ..first }.to_wire());
    }
    let stop = AtomicBool::new(false);
    let start = attack.start.addr();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let [tail, head] = [0, STEP].map(|word| (start + REPLY_TAIL + word) as *mut u64);
            while !stop.load(Ordering::Relaxed) {
                // SAFETY: in the mapping, which outlives the scope.
                unsafe { tail.write_volatile(head.read_volatile() + CAPACITY as u64) };
            }
        });
        while attack.read(REPLY_TAIL) == SPACE {
            std::thread::yield_now();
        }
        let attempted = catch_unwind(AssertUnwindSafe(|| {
            attempt(&attack, call, &|| attack.read(REPLY_TAIL + STEP) / SPACE);
        }));
        stop.store(true, Ordering::Relaxed);
        attempted.unwrap_or_else(|panic| resume_unwind(panic));
    });
}

#[test]
fn fragments_that_never_stop_coming_keep_nobody() {
    /// An eighth of what the frame declares, after which the flood would end.
    const MANY: u64 = FRAME_LIMIT as u64 / 8;
    with_fragments_of_a_byte(|attack, call, read| {
        let Attack { host, notifier, .. } = attack;
        let bounded = |what: &str, attempt: &mut dyn FnMut()| {
            let before = read();
            attempt();
            let count = read() - before;
            assert!(count < MANY, "{what}: {count} records");
            assert_eq!(host.end(), None, "{what}");
        };
        let limit = Instant::now() + Duration::from_secs(10);
        // Where the other thread is held up the ring is armed after all, and there is no need.
        while !is_readable(&**notifier) {
            assert!(Instant::now() < limit, "a loop is not told to come back");
            std::thread::yield_now();
            bounded("a loop that looks", &mut || {
                assert!(host.look(notifier).unwrap());
            });
        }
        bounded("a loop that spins", &mut || {
            assert!(!host.spin(call).unwrap());
        });
        bounded("a caller with the GIL", &mut || {
            assert!(host.spin_for_answer(call).unwrap().is_none());
        });
        bounded("a thread that spins", &mut || {
            let spun = host.wait(call, Patience::Spin);
            assert!(matches!(spun, Err(Error::WouldPark)), "{spun:?}");
        });
        bounded("a thread with a deadline", &mut || {
            assert!(matches!(attack.wait(call), Err(Error::TimedOut)));
        });
        bounded("a timer", &mut || {
            host.abandon(call);
            assert!(!host.is_over(call).unwrap());
        });
    });
    with_fragments_of_a_byte(|attack, _, read| {
        shutdown(&attack.inherited.control, Shutdown::Both).unwrap();
        let before = read();
        assert_eq!(attack.look(), Some(End::PeerDied));
        assert!(read() - before < MANY);
    });
}

/// A record that changes while it is read: what was checked is what is used.
#[test]
fn lengths_that_change_between_check_and_use() {
    const ROUNDS: usize = 300;
    let mut outcomes = [0; 2];
    for _ in 0..ROUNDS {
        let mut attack = Attack::new();
        let call = attack.send();
        for sequence in 0..8 {
            attack.forge(
                Header {
                    sequence,
                    ..Attack::header(call, 64)
                },
                &[0xff; 64],
            );
        }
        let stop = AtomicBool::new(false);
        let begun = Barrier::new(2);
        let start = attack.start.addr();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let lengths = [64, 0, 32, 65, 4096, u32::MAX];
                let records = (0..8).cycle().zip(lengths.into_iter().cycle());
                for (count, (at, length)) in records.enumerate() {
                    if count == 8 {
                        begun.wait();
                    }
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    let field = (start + REPLIES + at * 96) as *mut u32;
                    // SAFETY: in the mapping, which outlives the scope.
                    unsafe { field.write_volatile(length) };
                }
            });
            begun.wait();
            let end = attack.look();
            while let Some(Event::Data(frame)) = attack.host.poll(call).unwrap() {
                // Part counts of four billion, or nothing at all.
                assert!(parse(frame.body.as_slice()).is_err() || frame.body.is_empty());
            }
            outcomes[usize::from(end.is_some())] += 1;
            stop.store(true, Ordering::Relaxed);
        });
    }
    report("records changed while read", ROUNDS * 8);
    assert!(outcomes[1] > 0, "{outcomes:?}");
}

#[test]
fn random_bytes_over_the_whole_segment_while_the_host_works() {
    const ROUNDS: usize = 100;
    let mut writes = 0;
    for seed in 0..ROUNDS as u64 {
        let attack = Attack::new();
        let stop = AtomicBool::new(false);
        let start = attack.start.addr();
        let began = Instant::now();
        writes += std::thread::scope(|scope| {
            let scribbler = scope.spawn(|| {
                let mut state = seed * 2 + 1;
                let mut writes = 0_usize;
                while !stop.load(Ordering::Relaxed) {
                    // https://en.wikipedia.org/wiki/Xorshift, 64 bits.
                    state ^= state << 13;
                    state ^= state >> 7;
                    state ^= state << 17;
                    // Half of the writes go to where they do most harm.
                    let words = [REQUEST_TAIL, REPLY_TAIL];
                    let at = match state >> 63 {
                        0 => (state >> 8) as usize % END,
                        _ => words[state as usize >> 9 & 1] + (state >> 10) as usize % (4 * STEP),
                    };
                    // SAFETY: in the mapping, which outlives the scope.
                    unsafe { ((start + at) as *mut u8).write_volatile(state as u8) };
                    writes += 1;
                }
                writes
            });
            for _ in 0..200 {
                let Ok(Some(call)) = attack.try_send(&[1; 200]) else {
                    break;
                };
                let _ = attack.wait(call);
                attack.host.abandon(call);
                if began.elapsed() > Duration::from_secs(1) || attack.host.end().is_some() {
                    break;
                }
            }
            stop.store(true, Ordering::Relaxed);
            scribbler.join().unwrap()
        });
        assert!(began.elapsed() < Duration::from_secs(30), "a hang");
    }
    report("random bytes", writes);
}

#[test]
fn garbage_on_the_control_socket() {
    let mut attempts = 0;
    let pong = Control::Pong(Progress::default());
    let mut messages: Vec<Vec<u8>> = (1..SIZE * 4).map(|length| vec![0; length]).collect();
    messages.extend((0..=255).map(|kind| vec![kind; SIZE]));
    for nonce in [0, 1, 2, u64::MAX] {
        for message in [Control::Ping, Control::Shutdown, Control::Ack, pong] {
            messages.push(message.to_wire(nonce).to_vec());
        }
    }
    for message in messages {
        let attack = Attack::new();
        attack.send();
        send(&attack.inherited.control, &message, SendFlags::DONTWAIT).unwrap();
        attack.expect(Violation::Control);
        attempts += 1;
    }
    report("control messages", attempts);
}

#[test]
fn an_answer_with_more_behind_it() {
    let attack = Attack::new();
    let ping = attack.host.ask(Control::Ping, Some(&attack.notifier));
    let mut message = Control::Pong(Progress::default())
        .to_wire(ping.unwrap())
        .to_vec();
    message.push(0);
    send(&attack.inherited.control, &message, SendFlags::DONTWAIT).unwrap();
    attack.expect(Violation::Control);
}

#[test]
fn an_answer_given_twice_is_one_too_many() {
    let attack = Attack::new();
    let ping = attack
        .host
        .ask(Control::Ping, Some(&attack.notifier))
        .unwrap();
    let pong = Control::Pong(Progress::default()).to_wire(ping);
    send(&attack.inherited.control, &pong, SendFlags::DONTWAIT).unwrap();
    assert_eq!(attack.look(), None);
    assert!(matches!(
        attack.host.poll(ping).unwrap(),
        Some(Event::Done(Outcome::Pong(_)))
    ));
    send(&attack.inherited.control, &pong, SendFlags::DONTWAIT).unwrap();
    attack.expect(Violation::Control);
}

/// Sends a message and a hundred descriptors.
fn send_along(socket: impl AsFd, message: &[u8], attack: &Attack) -> Result<usize, Errno> {
    let fds = [attack.inherited.segment.as_fd(); 100];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(100))];
    let mut along = SendAncillaryBuffer::new(&mut space);
    assert!(along.push(SendAncillaryMessage::ScmRights(&fds)));
    sendmsg(
        socket,
        &[IoSlice::new(message)],
        &mut along,
        SendFlags::DONTWAIT,
    )
}

/// Who receives them closes them, which can take long.
#[test]
#[cfg(not(feature = "posix"))]
fn descriptors_are_refused_where_the_kernel_can() {
    let attack = Attack::new();
    let inherited = &attack.inherited;
    let mut passes: libc::c_int = 1;
    let mut length = size_of_val(&passes) as libc::socklen_t;
    // SAFETY: both are valid for the call; 83 is `SO_PASSRIGHTS`.
    let known = unsafe {
        let fd = std::os::fd::AsRawFd::as_raw_fd(&inherited.bell);
        let value = (&raw mut passes).cast();
        libc::getsockopt(fd, libc::SOL_SOCKET, 83, value, &raw mut length) == 0
    };
    for socket in [&inherited.control, &inherited.bell, &inherited.space_bell] {
        let sent = send_along(socket, b"!", &attack);
        assert_eq!(sent, if known { Err(Errno::PERM) } else { Ok(1) });
    }
}

#[test]
fn descriptors_sent_along_are_not_kept() {
    let open = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let attack = Attack::new();
    let pings: Vec<_> = (0..20)
        .map(|_| {
            attack
                .host
                .ask(Control::Ping, Some(&attack.notifier))
                .unwrap()
        })
        .collect();
    let before = open();
    for ping in pings {
        let pong = Control::Pong(Progress::default()).to_wire(ping);
        if send_along(&attack.inherited.control, &pong, &attack).is_err() {
            send(&attack.inherited.control, &pong, SendFlags::DONTWAIT).unwrap();
        }
        assert_eq!(attack.look(), None);
        assert!(matches!(
            attack.host.poll(ping).unwrap(),
            Some(Event::Done(Outcome::Pong(_)))
        ));
    }
    // Other tests run meanwhile, and have descriptors of their own; 2,000 would stand out.
    assert!(open() < before + 1000);
    report("descriptors", 2000);
}

#[test]
fn a_doorbell_rung_without_cause() {
    let attack = Attack::new();
    attack.send();
    let rings = [b'!'; 4096];
    let mut sent = 0;
    while let Ok(count) = send(&attack.inherited.bell, &rings, SendFlags::DONTWAIT) {
        sent += count;
    }
    attack.expect(Violation::Doorbell);
    report("rings", sent);
}

/// Nothing but the clock ends the wait: once because the answer's wake-up is still on its way, and
/// once because it never will be.
#[test]
fn a_wake_up_that_was_lost_is_counted_and_no_other() {
    for lost in [false, true] {
        let mut attack = Attack::new();
        let call = attack.send();
        attack.write(REPLIES, &Attack::header(call, 0).to_wire());
        let [tail, flag] = [0, 2].map(|word| attack.start.addr() + REPLY_TAIL + word * STEP);
        attack.tail = HEADER as u64;
        std::thread::scope(|scope| {
            scope.spawn(|| {
                // SAFETY: in the mapping, which outlives the scope.
                unsafe {
                    while (flag as *mut u32).read_volatile() == 0 {
                        std::thread::yield_now();
                    }
                    (tail as *mut u64).write_volatile(HEADER as u64);
                    if !lost {
                        (flag as *mut u32).write_volatile(0);
                    }
                }
            });
            let until = Some(Instant::now() + Duration::from_millis(300));
            let waited = attack.host.wait(call, Patience::Park { until, gate: None });
            assert!(matches!(waited, Ok(Event::Data(_))), "{waited:?}");
        });
        assert_eq!(attack.host.counters().rescued_waits, u64::from(lost));
    }
}

/// However short the waits are, and for an event loop too.
#[test]
fn a_worker_asleep_in_front_of_a_request_is_rung_again() {
    let asleep = || {
        let attack = Attack::new();
        let call = attack.send();
        attack.write(REQUEST_TAIL + 2 * STEP, &[1]);
        (attack, call)
    };
    let [(thread, call), (event_loop, _)] = [asleep(), asleep()];
    let began = Instant::now();
    let is_rung = |attack: &Attack| is_readable(&attack.inherited.bell);
    while !(is_rung(&thread) && is_rung(&event_loop)) {
        assert!(began.elapsed() < Duration::from_secs(10), "nobody is rung");
        assert!(matches!(thread.wait(call), Err(Error::TimedOut)));
        assert_eq!(event_loop.look(), None);
    }
    assert!(began.elapsed() >= Duration::from_secs(2));
    for attack in [thread, event_loop] {
        let counters = attack.host.counters();
        assert_eq!((counters.rescued_waits, counters.wakes_sent), (1, 1));
    }
}

/// `O_NONBLOCK` belongs to both processes. The host neither relies on it nor waits for a peer that
/// reads nothing.
#[test]
fn descriptors_that_were_made_to_block() {
    let mut attack = Attack::new();
    let inherited = &attack.inherited;
    for fd in [&inherited.control, &inherited.bell, &inherited.space_bell] {
        rustix::fs::fcntl_setfl(fd, rustix::fs::OFlags::empty()).unwrap();
    }
    let questions = (0..2000)
        .map_while(|_| attack.host.ask(Control::Ping, Some(&attack.notifier)).ok())
        .count();
    assert!(questions > 100, "{questions}");
    assert!(matches!(
        attack.host.ask(Control::Ping, None),
        Err(Error::QueueFull)
    ));
    // The flags say that the worker sleeps, again and again, and it takes none of its rings.
    for _ in 0..2000 {
        attack.set(REQUEST_TAIL + 2 * STEP, 1);
        attack.set(REPLY_TAIL + 3 * STEP, 1);
        attack.set(REQUEST_TAIL + STEP, attack.read(REQUEST_TAIL));
        let call = attack.send();
        attack.host.abandon(call);
        let end = Header {
            kind: Kind::End,
            ..Attack::header(call, 0)
        };
        attack.forge(end, &[]);
        assert_eq!(attack.look(), None);
    }
    assert!(attack.host.counters().wakes_sent >= 4000);
}

#[test]
fn ends_that_are_closed_end_the_channel() {
    let attack = Attack::new();
    let call = attack.send();
    shutdown(&attack.inherited.bell, Shutdown::Both).unwrap();
    assert_eq!(attack.look(), Some(End::PeerDied));
    assert!(matches!(
        attack.wait(call),
        Ok(Event::Done(Outcome::Lost(End::PeerDied)))
    ));

    let attack = Attack::new();
    attack.send();
    shutdown(&attack.inherited.control, Shutdown::Both).unwrap();
    assert_eq!(attack.look(), Some(End::PeerDied));
}

#[test]
#[cfg(not(feature = "posix"))]
fn the_segment_can_not_be_cut_off() {
    let attack = Attack::new();
    for length in [0, 4096, END as u64 + 1] {
        let cut = rustix::fs::ftruncate(&attack.inherited.segment, length);
        assert_eq!(cut, Err(Errno::PERM));
    }
    attack.send();
    assert_eq!(attack.look(), None);
}

/// The worker checks what its host wrote, too: a host whose memory is damaged should not damage it.
#[test]
fn requests_that_the_format_forbids() {
    let honest = Header {
        kind: Kind::Request,
        ..Attack::header(1, 0)
    };
    let forged = [
        Header {
            kind: Kind::Data,
            ..honest
        },
        Header {
            slot: 256,
            ..honest
        },
        Header {
            sequence: 1,
            ..honest
        },
    ];
    let parent = i32::try_from(std::os::unix::process::parent_id()).unwrap();
    let settings = Settings {
        frame_limit: FRAME_LIMIT,
        wait: WaitPolicy::Park,
    };
    for (request, allowed) in forged
        .into_iter()
        .map(|header| (header, false))
        .chain([(honest, true)])
    {
        let attack = Attack::new();
        let worker = Worker::attach(attack.host.inheritance().unwrap(), parent, settings).unwrap();
        attack.write(DATA, &request.to_wire());
        attack.set(REQUEST_TAIL, 32);
        let received = worker.receive(Patience::Park {
            until: Some(Instant::now() + Duration::from_secs(10)),
            gate: None,
        });
        match received {
            Ok(Some(_)) => assert!(allowed, "{request:?}"),
            Err(Error::Protocol(violation)) => {
                assert!(!allowed);
                assert_eq!(violation, Violation::Kind);
            }
            other => panic!("{other:?}"),
        }
        // Before the host's end of the control socket closes, which would end this process.
        worker.join_heartbeat();
    }
}
