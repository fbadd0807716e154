//! Models of the ring and of its park/wake protocol.

use loom::sync::{Arc, Condvar, Mutex};
use loom::thread;

use super::{Seen, assert_slept_and_was_spared, bounded, explore};
use crate::record::{ALIGN, FIRST, HEADER, Header, Kind, LAST};
use crate::ring::{Consumer, Memory, Producer, nudge};
use crate::segment::RingMemory;
use crate::sync::{AtomicU64, Ordering};

/// Four cells, so a record with a body takes half of it.
const CAPACITY: usize = 4 * ALIGN;
/// Bytes of body that make a record take half of the ring.
const HALF: usize = CAPACITY / 2 - HEADER;

/// As the eventfd of production: rings are not lost, and one wait takes all of them.
#[derive(Clone)]
struct Bell(Arc<(Mutex<bool>, Condvar)>);

impl Bell {
    fn new() -> Self {
        Self(Arc::new((Mutex::new(false), Condvar::new())))
    }

    fn ring(&self) {
        *self.0.0.lock().unwrap() = true;
        self.0.1.notify_one();
    }

    fn wait(&self) {
        let mut rung = self.0.0.lock().unwrap();
        while !*rung {
            rung = self.0.1.wait(rung).unwrap();
        }
        *rung = false;
    }
}

fn body(sequence: u32, length: usize) -> Vec<u8> {
    (0..length)
        .map(|at| (sequence as usize * 37 + at + 1) as u8)
        .collect()
}

/// Pushes record number `sequence`; `None` when the ring is full.
fn try_push(ring: &mut Producer<RingMemory>, sequence: u32, length: usize) -> Option<bool> {
    let header = Header {
        length: length as u32,
        kind: Kind::Data,
        flags: FIRST | LAST,
        call: 7,
        sequence,
        slot: 0,
        total: length as u64,
    };
    ring.push(&header, |write| {
        let bytes = body(sequence, length);
        let (start, end) = bytes.split_at(length / 3);
        write(start);
        write(end);
    })
    .unwrap()
}

/// Takes the next record, checks that it is number `sequence` with its body intact, and releases
/// it; `None` when nothing is published.
fn try_pop(ring: &mut Consumer<RingMemory>, sequence: u32, length: usize) -> Option<bool> {
    let record = ring.peek().unwrap()?;
    assert_eq!(
        (record.header.sequence, record.header.length as usize),
        (sequence, length)
    );
    let mut bytes = vec![0; length];
    // SAFETY: the target has the record's length, and the record is the last one peeked.
    unsafe { ring.copy_body(&record, bytes.as_mut_ptr()) };
    assert_eq!(bytes, body(sequence, length));
    Some(ring.release(record))
}

fn push_or_sleep(
    ring: &mut Producer<RingMemory>,
    (sequence, length): (u32, usize),
    space: &Bell,
    seen: &Seen,
) -> bool {
    loop {
        if let Some(wanted) = try_push(ring, sequence, length) {
            return wanted;
        }
        if seen.armed(ring.arm(|ring| ring.fits(length)).unwrap()) {
            space.wait();
            ring.disarm();
        }
    }
}

fn pop_or_sleep(
    ring: &mut Consumer<RingMemory>,
    (sequence, length): (u32, usize),
    published: &Bell,
    seen: &Seen,
) -> bool {
    loop {
        if let Some(wanted) = try_pop(ring, sequence, length) {
            return wanted;
        }
        if seen.armed(ring.arm().unwrap()) {
            published.wait();
            ring.disarm();
        }
    }
}

/// (a) Records arrive in order with their bodies intact, past the end of the ring and its padding,
/// also where the ring was found empty and started over; SYNC POINTs A and B alone, without a fence
/// or a doorbell that would order anything else.
#[test]
fn loom_records_arrive_in_order_across_the_wrap() {
    // The third does not fit behind the first two: 32 bytes of padding go before it. The fourth
    // fits behind it, but also starts over if the ring is empty then.
    const LENGTHS: [usize; 4] = [0, HALF, HALF - 5, 2];
    const END: u64 = 32 + 64 + 32 + 64 + 64;
    let started_over = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let count = std::sync::Arc::clone(&started_over);
    let (executions, ..) = explore("in order", bounded(), move |_| {
        let memory = RingMemory::new(CAPACITY);
        let mut writer = Producer::new(memory.clone());
        let mut reader = Consumer::new(memory.clone());
        let producer = thread::spawn(move || {
            for (sequence, length) in (0..).zip(LENGTHS) {
                while try_push(&mut writer, sequence, length).is_none() {
                    thread::yield_now();
                }
            }
        });
        for (sequence, length) in (0..).zip(LENGTHS) {
            while try_pop(&mut reader, sequence, length).is_none() {
                thread::yield_now();
            }
        }
        producer.join().unwrap();
        assert!(reader.peek().unwrap().is_none());
        let tail = memory.tail().load(Ordering::Relaxed);
        assert!(tail >= END);
        if tail > END {
            count.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        }
    });
    assert!(executions > 10, "only {executions} executions");
    let started_over = started_over.load(std::sync::atomic::Ordering::Relaxed);
    assert!(
        (1..executions).contains(&started_over),
        "{started_over} of {executions}"
    );
}

/// (a) Every order, without a bound, of four records through a ring that holds `records` of them;
/// of three in a short run.
fn exhaust(name: &str, records: usize) {
    let operations = if bounded() >= Some(3) { 4 } else { 3 };
    let (executions, ..) = explore(name, None, move |_| {
        let memory = RingMemory::new(records * 2 * ALIGN);
        let mut writer = Producer::new(memory.clone());
        let mut reader = Consumer::new(memory);
        let producer = thread::spawn(move || {
            for sequence in 0..operations {
                while try_push(&mut writer, sequence, ALIGN).is_none() {
                    thread::yield_now();
                }
            }
        });
        for sequence in 0..operations {
            while try_pop(&mut reader, sequence, ALIGN).is_none() {
                thread::yield_now();
            }
        }
        producer.join().unwrap();
    });
    assert!(executions > 10, "only {executions} executions");
}

#[test]
fn loom_exhausts_a_ring_of_one_record() {
    exhaust("ring of one record", 1);
}

#[test]
fn loom_exhausts_a_ring_of_two_records() {
    exhaust("ring of two records", 2);
}

/// (b) A consumer that sleeps on an empty ring is woken for every record: SYNC POINT C.
#[test]
fn loom_sleeping_consumer_is_woken() {
    let counts = explore("sleeping consumer", bounded(), |seen| {
        let memory = RingMemory::new(CAPACITY);
        let published = Bell::new();
        let mut writer = Producer::new(memory.clone());
        let mut reader = Consumer::new(memory);
        let producer = {
            let published = published.clone();
            thread::spawn(move || {
                for sequence in 0..2 {
                    if try_push(&mut writer, sequence, 0).expect("space for both") {
                        published.ring();
                    }
                }
            })
        };
        for sequence in 0..2 {
            pop_or_sleep(&mut reader, (sequence, 0), &published, seen);
        }
        producer.join().unwrap();
    });
    assert_slept_and_was_spared(counts);
}

/// (b) A consumer whose sleep ends early takes its flag down and may sleep again; a ring for the
/// first sleep never stands in for the second.
#[test]
fn loom_consumer_that_gave_up_is_woken_the_next_time() {
    let counts = explore("consumer that gave up", bounded(), |seen| {
        let memory = RingMemory::new(CAPACITY);
        let published = Bell::new();
        let mut writer = Producer::new(memory.clone());
        let mut reader = Consumer::new(memory);
        let producer = {
            let published = published.clone();
            thread::spawn(move || {
                if try_push(&mut writer, 0, 0).expect("an empty ring") {
                    published.ring();
                }
            })
        };
        if reader.arm().unwrap() {
            reader.disarm();
        }
        pop_or_sleep(&mut reader, (0, 0), &published, seen);
        producer.join().unwrap();
    });
    assert_slept_and_was_spared(counts);
}

/// (c) A producer that sleeps on a full ring is woken when a record is released: SYNC POINT D.
#[test]
fn loom_sleeping_producer_is_woken() {
    let counts = explore("sleeping producer", bounded(), |seen| {
        let memory = RingMemory::new(CAPACITY);
        let space = Bell::new();
        let mut writer = Producer::new(memory.clone());
        let mut reader = Consumer::new(memory);
        for sequence in 0..2 {
            assert_eq!(try_push(&mut writer, sequence, HALF), Some(false));
        }
        let consumer = {
            let space = space.clone();
            thread::spawn(move || {
                for sequence in 0..2 {
                    if try_pop(&mut reader, sequence, HALF).expect("written before") {
                        space.ring();
                    }
                }
                reader
            })
        };
        for sequence in 2..4 {
            push_or_sleep(&mut writer, (sequence, HALF), &space, seen);
        }
        let mut reader = consumer.join().unwrap();
        for sequence in 2..4 {
            assert!(try_pop(&mut reader, sequence, HALF).is_some());
        }
    });
    assert_slept_and_was_spared(counts);
}

/// (c) Who takes a producer's flag down knows what the producer noted before it put it up: SYNC
/// POINT E.
#[test]
fn loom_what_is_noted_before_arming_is_known_to_who_rings() {
    let counts = explore("noted before arming", bounded(), |seen| {
        let memory = RingMemory::new(CAPACITY);
        let noted = Arc::new(AtomicU64::new(0));
        let mut writer = Producer::new(memory.clone());
        let mut reader = Consumer::new(memory);
        for sequence in 0..2 {
            assert_eq!(try_push(&mut writer, sequence, HALF), Some(false));
        }
        let producer = {
            let (noted, seen) = (Arc::clone(&noted), seen.clone());
            thread::spawn(move || {
                noted.fetch_add(1, Ordering::Relaxed);
                seen.armed(writer.arm(|ring| ring.fits(HALF)).unwrap());
            })
        };
        if try_pop(&mut reader, 0, HALF).expect("written before") {
            assert_eq!(noted.load(Ordering::Relaxed), 1);
        }
        producer.join().unwrap();
    });
    assert_slept_and_was_spared(counts);
}

/// (d) A producer that sleeps until the other side grants credit in a word of its own is woken by
/// [`nudge`]: SYNC POINT D for anything but the ring's head.
#[test]
fn loom_producer_that_waits_for_credit_is_woken() {
    const ENOUGH: u64 = 2;
    let counts = explore("credit", bounded(), |seen| {
        let memory = RingMemory::new(CAPACITY);
        let credit = Arc::new(AtomicU64::new(0));
        let space = Bell::new();
        let mut writer = Producer::new(memory.clone());
        let host = {
            let (credit, space) = (Arc::clone(&credit), space.clone());
            thread::spawn(move || {
                for granted in 1..=ENOUGH {
                    credit.store(granted, Ordering::Release);
                    if nudge(&memory) {
                        space.ring();
                    }
                }
            })
        };
        let enough = || credit.load(Ordering::Acquire) >= ENOUGH;
        while !enough() {
            if seen.armed(writer.arm(|_| Ok(enough())).unwrap()) {
                space.wait();
                writer.disarm();
            }
        }
        assert!(try_push(&mut writer, 0, 0).is_some());
        host.join().unwrap();
    });
    assert_slept_and_was_spared(counts);
}

/// (e) Both sides sleep on one ring, one when it is full and one when it is empty.
#[test]
fn loom_both_sides_sleep_on_one_ring() {
    const LENGTHS: [usize; 4] = [HALF, 0, HALF, HALF];
    let counts = explore("both sides", bounded(), |seen| {
        let memory = RingMemory::new(CAPACITY);
        let (published, space) = (Bell::new(), Bell::new());
        let mut writer = Producer::new(memory.clone());
        let mut reader = Consumer::new(memory);
        let producer = {
            let (published, space, seen) = (published.clone(), space.clone(), seen.clone());
            thread::spawn(move || {
                for record in (0..).zip(LENGTHS) {
                    if push_or_sleep(&mut writer, record, &space, &seen) {
                        published.ring();
                    }
                }
            })
        };
        for record in (0..).zip(LENGTHS) {
            if pop_or_sleep(&mut reader, record, &published, seen) {
                space.ring();
            }
        }
        producer.join().unwrap();
    });
    assert_slept_and_was_spared(counts);
}

/// (e) Question and answer over two rings: each side sleeps until the other has spoken.
#[test]
fn loom_ping_pong() {
    let counts = explore("ping-pong", bounded(), |seen| {
        let (questions, answers) = (RingMemory::new(CAPACITY), RingMemory::new(CAPACITY));
        let (asked, answered) = (Bell::new(), Bell::new());
        let mut ask = Producer::new(questions.clone());
        let mut hear = Consumer::new(questions);
        let mut answer = Producer::new(answers.clone());
        let mut listen = Consumer::new(answers);
        let worker = {
            let (asked, answered, seen) = (asked.clone(), answered.clone(), seen.clone());
            thread::spawn(move || {
                for round in 0..2 {
                    pop_or_sleep(&mut hear, (round, 0), &asked, &seen);
                    if try_push(&mut answer, round, HALF).expect("space for one") {
                        answered.ring();
                    }
                }
            })
        };
        for round in 0..2 {
            if try_push(&mut ask, round, 0).expect("space for one") {
                asked.ring();
            }
            pop_or_sleep(&mut listen, (round, HALF), &answered, seen);
        }
        worker.join().unwrap();
    });
    assert_slept_and_was_spared(counts);
}
