//! What holds for any input: the ring against a model of it, bodies and headers there and back,
//! and a peer that scribbles over everything.

#![allow(clippy::disallowed_types, clippy::unwrap_used)]

use std::cell::UnsafeCell;
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use inferpool_transport::body::{Gather, PART_ALIGN, parse};
use inferpool_transport::control::{Control, Progress, SIZE};
use inferpool_transport::record::{ALIGN, FIRST, HEADER, Header, Kind, LAST};
use inferpool_transport::ring::{Consumer, Memory, Producer};
use inferpool_transport::{Assembler, Violation};
use proptest::collection::vec;
use proptest::prelude::*;

/// A ring on the heap.
#[derive(Clone)]
struct Heap(Arc<Shared>);

struct Shared {
    tail: AtomicU64,
    head: AtomicU64,
    consumer_armed: AtomicU32,
    producer_armed: AtomicU32,
    data: Box<[UnsafeCell<u8>]>,
}

// SAFETY: the bytes are reached through raw pointers only, as in a segment that two processes map.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Heap {
    fn new(capacity: usize) -> Self {
        Self(Arc::new(Shared {
            tail: AtomicU64::new(0),
            head: AtomicU64::new(0),
            consumer_armed: AtomicU32::new(0),
            producer_armed: AtomicU32::new(0),
            data: (0..capacity).map(|_| UnsafeCell::new(0)).collect(),
        }))
    }

    /// The first of `length` bytes from `offset`, which must lie in the ring in any build.
    fn at(&self, offset: usize, length: usize) -> *mut u8 {
        UnsafeCell::raw_get(self.0.data[offset..offset + length].as_ptr())
    }
}

// SAFETY: `at` keeps every access inside the data.
unsafe impl Memory for Heap {
    fn tail(&self) -> &AtomicU64 {
        &self.0.tail
    }

    fn head(&self) -> &AtomicU64 {
        &self.0.head
    }

    fn consumer_armed(&self) -> &AtomicU32 {
        &self.0.consumer_armed
    }

    fn producer_armed(&self) -> &AtomicU32 {
        &self.0.producer_armed
    }

    fn capacity(&self) -> usize {
        self.0.data.len()
    }

    unsafe fn write(&self, offset: usize, source: &[u8]) {
        // SAFETY: in bounds, as `at` has checked.
        unsafe {
            self.at(offset, source.len())
                .copy_from_nonoverlapping(source.as_ptr(), source.len());
        }
    }

    unsafe fn read(&self, offset: usize, target: *mut u8, length: usize) {
        // SAFETY: as for `write`; the caller vouches for the target.
        unsafe { target.copy_from_nonoverlapping(self.at(offset, length), length) };
    }
}

fn span(length: usize) -> usize {
    HEADER + length.next_multiple_of(ALIGN)
}

fn data_header(sequence: u32, length: usize) -> Header {
    Header {
        length: length as u32,
        kind: Kind::Data,
        flags: FIRST | LAST,
        call: u64::from(sequence) << 7,
        sequence,
        slot: sequence % 256,
        total: length as u64,
    }
}

fn payload(sequence: u32, length: usize) -> Vec<u8> {
    (0..length)
        .map(|at| (sequence as usize * 31 + at) as u8)
        .collect()
}

// ---- the ring against a deque ----

#[derive(Debug, Clone)]
enum Step {
    /// Push a record with so many bytes, taken modulo what a record may have, cut at `at`.
    Push {
        length: usize,
        at: usize,
    },
    /// Look at the next record and leave it there.
    Peek,
    /// Take the next record.
    Pop,
    /// Ask whether so many bytes would fit.
    Fits(usize),
    ArmConsumer,
    DisarmConsumer,
    /// Arm the producer until so many bytes fit.
    ArmProducer(usize),
    DisarmProducer,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (any::<usize>(), any::<usize>()).prop_map(|(length, at)| Step::Push { length, at }),
        1 => Just(Step::Peek),
        4 => Just(Step::Pop),
        1 => any::<usize>().prop_map(Step::Fits),
        1 => Just(Step::ArmConsumer),
        1 => Just(Step::DisarmConsumer),
        1 => any::<usize>().prop_map(Step::ArmProducer),
        1 => Just(Step::DisarmProducer),
    ]
}

/// What the ring should do: its records, and where they lie.
#[derive(Default)]
struct Model {
    capacity: usize,
    records: VecDeque<(u32, usize, usize)>,
    tail: usize,
    head: usize,
    pushed: u32,
    consumer_armed: bool,
    producer_armed: bool,
}

impl Model {
    /// Where a record would start, past the padding before it.
    fn start(&self, length: usize) -> usize {
        let offset = self.tail % self.capacity;
        let long = length >= self.capacity / 64;
        let starts_over = self.records.is_empty() && long && span(length) <= offset;
        if span(length) > self.capacity - offset || starts_over {
            self.tail.next_multiple_of(self.capacity)
        } else {
            self.tail
        }
    }

    fn fits(&self, length: usize) -> bool {
        self.records.is_empty() || self.start(length) + span(length) - self.head <= self.capacity
    }

    fn push(&mut self, length: usize) -> Option<bool> {
        if !self.fits(length) {
            return None;
        }
        self.tail = self.start(length) + span(length);
        self.records.push_back((self.pushed, length, self.tail));
        self.pushed += 1;
        Some(std::mem::take(&mut self.consumer_armed))
    }

    fn pop(&mut self) -> Option<bool> {
        let (_, _, end) = self.records.pop_front()?;
        self.head = end;
        Some(std::mem::take(&mut self.producer_armed))
    }
}

fn check_steps(capacity: usize, steps: &[Step]) -> Result<(), TestCaseError> {
    let memory = Heap::new(capacity);
    let mut producer = Producer::new(memory.clone());
    let mut consumer = Consumer::new(memory.clone());
    let mut model = Model {
        capacity,
        ..Model::default()
    };
    let max_body = producer.max_body();
    let cut = |length: usize| length % (max_body + 1);
    for step in steps {
        match *step {
            Step::Push { length, at } => {
                let length = cut(length);
                let was_empty = model.records.is_empty();
                let header = data_header(model.pushed, length);
                let bytes = payload(model.pushed, length);
                let pushed = producer.push(&header, |write| {
                    let (start, end) = bytes.split_at(at % (length + 1));
                    write(start);
                    write(end);
                });
                prop_assert_eq!(pushed, Ok(model.push(length)));
                prop_assert!(
                    pushed != Ok(None) || !was_empty,
                    "no space in an empty ring"
                );
            }
            Step::Peek | Step::Pop => {
                prop_assert_eq!(consumer.is_ready(), !model.records.is_empty());
                let record = consumer.peek().unwrap();
                let expected = model.records.front();
                prop_assert_eq!(
                    record.map(|record| record.header),
                    expected.map(|&(sequence, length, _)| data_header(sequence, length))
                );
                let Some(record) = record else { continue };
                let mut bytes = vec![0; record.header.length as usize];
                // SAFETY: the target has the record's length; the record is the last one peeked.
                unsafe { consumer.copy_body(&record, bytes.as_mut_ptr()) };
                prop_assert_eq!(&bytes, &payload(record.header.sequence, bytes.len()));
                if matches!(step, Step::Pop) {
                    prop_assert_eq!(Some(consumer.release(record)), model.pop());
                }
            }
            Step::Fits(length) => {
                let length = cut(length);
                prop_assert_eq!(producer.fits(length), Ok(model.fits(length)));
            }
            Step::ArmConsumer => {
                model.consumer_armed = model.records.is_empty();
                prop_assert_eq!(consumer.arm(), Ok(model.consumer_armed));
            }
            Step::DisarmConsumer => {
                model.consumer_armed = false;
                consumer.disarm();
            }
            Step::ArmProducer(length) => {
                let length = cut(length);
                model.producer_armed = !model.fits(length);
                let armed = producer.arm(|ring| ring.fits(length));
                prop_assert_eq!(armed, Ok(model.producer_armed));
            }
            Step::DisarmProducer => {
                model.producer_armed = false;
                producer.disarm();
            }
        }
        let armed = |flag: &AtomicU32| flag.load(Ordering::Relaxed) != 0;
        prop_assert_eq!(armed(memory.consumer_armed()), model.consumer_armed);
        prop_assert_eq!(armed(memory.producer_armed()), model.producer_armed);
    }
    Ok(())
}

proptest! {
    #[test]
    fn the_ring_does_what_a_deque_does(
        capacity in (7..11_u32).prop_map(|bits| 1 << bits),
        steps in vec(step(), 1..200),
    ) {
        check_steps(capacity, &steps)?;
    }
}

// ---- frames through the ring ----

/// The records that carry `body` as frame `call`, none longer than `max`.
fn records(call: u64, body: &[u8], max: usize) -> VecDeque<(Header, Vec<u8>)> {
    let mut pieces: Vec<&[u8]> = body.chunks(max).collect();
    if pieces.is_empty() {
        pieces.push(&[]);
    }
    let last = pieces.len() - 1;
    let header = |(index, piece): (usize, &&[u8])| Header {
        length: piece.len() as u32,
        kind: Kind::Data,
        flags: if index == 0 { FIRST } else { 0 } | if index == last { LAST } else { 0 },
        call,
        sequence: 0,
        slot: 0,
        total: body.len() as u64,
    };
    pieces
        .iter()
        .enumerate()
        .map(|piece| (header(piece), piece.1.to_vec()))
        .collect()
}

proptest! {
    #[test]
    fn frames_of_several_calls_come_out_whole_in_any_interleaving(
        bodies in vec(vec(any::<u8>(), 0..900), 1..5),
        turns in vec(any::<prop::sample::Index>(), 1..60),
    ) {
        let memory = Heap::new(512);
        let mut producer = Producer::new(memory.clone());
        let mut consumer = Consumer::new(memory);
        let mut assembler = Assembler::new(1000);
        let max = producer.max_body();
        let mut waiting: Vec<_> =
            (0..).zip(&bodies).map(|(call, body)| records(call, body, max)).collect();
        let mut frames = HashMap::new();
        let mut turns = turns.iter().cycle();
        loop {
            waiting.retain(|records| !records.is_empty());
            if waiting.is_empty() {
                break;
            }
            let turn = turns.next().unwrap().index(waiting.len());
            let (header, piece) = waiting[turn].pop_front().unwrap();
            prop_assert_eq!(producer.push(&header, |write| write(&piece)), Ok(Some(false)));
            let record = consumer.peek().unwrap().unwrap();
            if let Some(frame) = assembler.accept(&consumer, &record).unwrap() {
                frames.insert(frame.header.call, frame.body.as_slice().to_vec());
            }
            consumer.release(record);
        }
        for (call, body) in (0..).zip(&bodies) {
            prop_assert_eq!(frames.get(&call), Some(body));
        }
    }
}

// ---- bodies ----

/// Copies a body window by window; `cuts` says where they end.
fn copied(gather: &Gather<'_>, cuts: &[prop::sample::Index]) -> Vec<u8> {
    let mut ends: Vec<_> = cuts
        .iter()
        .map(|cut| cut.index(gather.total() + 1))
        .collect();
    ends.push(gather.total());
    ends.sort_unstable();
    let (mut body, mut at) = (Vec::new(), 0);
    for end in ends {
        gather.copy(at..end, &mut |piece| body.extend_from_slice(piece));
        assert_eq!(
            body.len(),
            end,
            "a window has another length than asked for"
        );
        at = end;
    }
    body
}

proptest! {
    #[test]
    fn a_body_comes_back_as_its_parts_however_it_is_cut(
        parts in vec(vec(any::<u8>(), 0..300), 0..8),
        cuts in vec(any::<prop::sample::Index>(), 0..10),
    ) {
        let slices: Vec<&[u8]> = parts.iter().map(Vec::as_slice).collect();
        let body = copied(&Gather::new(&slices).unwrap(), &cuts);
        let ranges = parse(&body).unwrap();
        prop_assert_eq!(ranges.len(), parts.len());
        for (index, (range, part)) in ranges.into_iter().zip(&parts).enumerate() {
            prop_assert!(index == 0 || range.start % PART_ALIGN == 0, "part {} at {}", index, range.start);
            prop_assert_eq!(&body[range], part.as_slice());
        }
    }

    #[test]
    fn any_bytes_are_a_body_with_its_parts_inside_or_no_body(body in vec(any::<u8>(), 0..200)) {
        check_parse(&body)?;
    }

    /// Closer to a body than random bytes ever come.
    #[test]
    fn any_part_table_is_sound_or_refused(
        count in 0..12_u32,
        lengths in vec(prop_oneof![0..200_u64, any::<u64>(), Just(u64::MAX)], 0..8),
        rest in 0..600_usize,
    ) {
        let mut body = [count.to_le_bytes(), [0; 4]].concat();
        body.extend(lengths.iter().flat_map(|length| length.to_le_bytes()));
        body.resize(body.len() + rest, 7);
        check_parse(&body)?;
    }
}

fn check_parse(body: &[u8]) -> Result<(), TestCaseError> {
    let mut end = 0;
    for (index, part) in parse(body).unwrap_or_default().into_iter().enumerate() {
        prop_assert!(part.start >= end && part.start <= part.end && part.end <= body.len());
        prop_assert!(index == 0 || part.start % PART_ALIGN == 0);
        end = part.end;
    }
    Ok(())
}

#[test]
fn a_body_has_no_more_parts_than_allowed() {
    let empty: &[u8] = &[];
    assert!(Gather::new(&[empty; 4096]).is_some());
    assert!(Gather::new(&[empty; 4097]).is_none());
    // Nothing else is wrong with it: with one part less it would do.
    for (count, allowed) in [(4096_u32, true), (4097, false)] {
        let size = (8 + count as usize * 8).next_multiple_of(PART_ALIGN);
        let mut table = vec![0; size];
        table[..4].copy_from_slice(&count.to_le_bytes());
        assert_eq!(parse(&table).is_ok(), allowed);
    }
}

#[test]
fn a_body_is_as_long_as_its_parts() {
    let body = |lengths: [u64; 2], size: usize| {
        let mut body = vec![0; size];
        body[..4].copy_from_slice(&2_u32.to_le_bytes());
        body[8..16].copy_from_slice(&lengths[0].to_le_bytes());
        body[16..24].copy_from_slice(&lengths[1].to_le_bytes());
        body
    };
    assert!(parse(&body([8, 6], 70)).is_ok());
    for size in [24, 63, 64, 69, 71, 128] {
        assert!(parse(&body([8, 6], size)).is_err());
    }
    for length in [u64::MAX, u64::MAX - 24, u64::MAX - 60, 1 << 63] {
        assert!(parse(&body([length, 6], 70)).is_err());
        assert!(parse(&body([8, length], 70)).is_err());
    }
}

// ---- headers and control messages ----

fn kind() -> impl Strategy<Value = Kind> {
    prop::sample::select(vec![
        Kind::Pad,
        Kind::Request,
        Kind::Data,
        Kind::End,
        Kind::Error,
        Kind::Answer,
    ])
}

fn header() -> impl Strategy<Value = Header> {
    let numbers = (any::<u32>(), any::<u64>(), any::<u32>(), any::<u32>());
    (kind(), 0..8_u16, numbers, any::<u64>()).prop_map(
        |(kind, flags, (length, call, sequence, slot), more)| Header {
            length,
            kind,
            flags: if kind == Kind::Request {
                flags
            } else {
                flags & (FIRST | LAST)
            },
            call,
            sequence,
            slot,
            total: u64::from(length).saturating_add(more),
        },
    )
}

fn progress() -> impl Strategy<Value = Progress> {
    any::<[u64; 4]>().prop_map(|[requests, replies, finished, polls]| Progress {
        requests,
        replies,
        finished,
        polls,
    })
}

fn control() -> impl Strategy<Value = Control> {
    prop_oneof![
        Just(Control::Ping),
        progress().prop_map(Control::Pong),
        Just(Control::Shutdown),
        Just(Control::Ack),
    ]
}

proptest! {
    #[test]
    fn a_header_survives_the_wire(header in header()) {
        prop_assert_eq!(Header::from_wire(&header.to_wire()), Ok(header));
    }

    #[test]
    fn any_bytes_are_a_header_or_none(wire in any::<[u8; HEADER]>(), kind in 0..8_u16, flags in 0..16_u16) {
        let mut likely = wire;
        likely[4..6].copy_from_slice(&kind.to_le_bytes());
        likely[6..8].copy_from_slice(&flags.to_le_bytes());
        for wire in [wire, likely] {
            if let Ok(header) = Header::from_wire(&wire) {
                prop_assert_eq!(header.to_wire(), wire);
                prop_assert!(u64::from(header.length) <= header.total);
                prop_assert!(header.flags < 4 || header.flags < 8 && header.kind == Kind::Request);
            }
        }
    }

    #[test]
    fn a_control_message_survives_the_wire(message in control(), nonce in any::<u64>()) {
        prop_assert_eq!(Control::from_wire(&message.to_wire(nonce)), Ok((message, nonce)));
    }

    #[test]
    fn any_datagram_is_a_control_message_or_none(mut datagram in vec(any::<u8>(), 0..2 * SIZE), kind in 0..8_u8) {
        let _ = Control::from_wire(&datagram);
        datagram.resize(SIZE, 0);
        datagram[..8].copy_from_slice(&[kind, 0, 0, 0, 0, 0, 0, 0]);
        let decoded = Control::from_wire(&datagram);
        prop_assert_eq!(decoded.is_ok(), (1..=4).contains(&kind));
        datagram.push(0);
        prop_assert_eq!(Control::from_wire(&datagram), Err(Violation::Control));
    }
}

// ---- a peer that scribbles ----

/// Random enough, and the same in every run.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }

    /// A position that may be right, is nearly right, or is nothing of the kind.
    fn position(&mut self, capacity: usize) -> u64 {
        match self.below(4) {
            0 => self.next(),
            1 => self.below(2 * capacity) as u64,
            _ => (self.below(2 * capacity / ALIGN) * ALIGN) as u64,
        }
    }

    /// A header that gets past the first checks more often than not.
    fn header(&mut self, capacity: usize) -> [u8; HEADER] {
        let length = self.below(capacity / 4) as u32;
        let kinds = [Kind::Pad, Kind::Request, Kind::Data, Kind::Data, Kind::End];
        let header = Header {
            length,
            kind: kinds[self.below(kinds.len())],
            flags: self.below(4) as u16,
            call: self.below(3) as u64,
            sequence: 0,
            slot: 0,
            total: u64::from(length) + [0, 0, 64, 1 << 40][self.below(4)],
        };
        header.to_wire()
    }
}

/// Writes to one word, header or byte of the ring.
fn scribble(memory: &Heap, noise: &mut Noise) {
    let capacity = memory.capacity();
    match noise.below(6) {
        0 => memory
            .tail()
            .store(noise.position(capacity), Ordering::Release),
        1 => memory
            .head()
            .store(noise.position(capacity), Ordering::Release),
        2 => memory
            .consumer_armed()
            .store(noise.next() as u32, Ordering::Relaxed),
        3 => memory
            .producer_armed()
            .store(noise.next() as u32, Ordering::Relaxed),
        4 => {
            let offset = noise.below(capacity / ALIGN) * ALIGN;
            let wire = noise.header(capacity);
            // SAFETY: a header fits at any multiple of its size.
            unsafe { memory.write(offset, &wire) };
        }
        _ => {
            let byte = noise.next() as u8;
            // SAFETY: one byte inside the ring.
            unsafe { memory.write(noise.below(capacity), &[byte]) };
        }
    }
}

/// Reads what is there until the first violation; returns how many frames came out.
fn read_on(memory: &Heap, mut budget: usize) -> (usize, Option<Violation>) {
    let mut consumer = Consumer::new(memory.clone());
    let mut assembler = Assembler::new(1 << 20);
    let mut frames = 0;
    let mut read = || -> Result<(), Violation> {
        while budget > 0 {
            budget -= 1;
            consumer.is_ready();
            if consumer.arm()? {
                consumer.disarm();
            }
            let Some(record) = consumer.peek()? else {
                continue;
            };
            if let Some(frame) = assembler.accept(&consumer, &record)? {
                assert_eq!(frame.body.len(), frame.body.as_slice().len());
                let _ = parse(frame.body.as_slice());
                frames += 1;
            }
            consumer.release(record);
        }
        Ok(())
    };
    let violation = read().err();
    (frames, violation)
}

/// Writes until the first violation; returns how many records went in.
fn write_on(memory: &Heap, budget: usize, noise: &mut Noise) -> (usize, Option<Violation>) {
    let mut producer = Producer::new(memory.clone());
    let mut pushed = 0;
    for sequence in 0..budget {
        let length = noise.below(producer.max_body() + 1);
        let bytes = vec![1; length];
        let header = data_header(sequence as u32, length);
        let armed = producer.arm(|ring| ring.fits(length));
        match armed.and_then(|_| producer.push(&header, |write| write(&bytes))) {
            Ok(space) => pushed += usize::from(space.is_some()),
            Err(violation) => return (pushed, Some(violation)),
        }
    }
    (pushed, None)
}

/// Runs `attempt` often, with two threads scribbling over the ring it is given.
fn with_scribblers(mut attempt: impl FnMut(&Heap, &mut Noise)) {
    for capacity in [128, 1024, 4096] {
        let memory = Heap::new(capacity);
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for seed in [0x9e37_79b9_7f4a_7c15, 0xd1b5_4a32_d192_ed03] {
                let (memory, stop) = (&memory, &stop);
                scope.spawn(move || {
                    let mut noise = Noise(seed);
                    while !stop.load(Ordering::Relaxed) {
                        scribble(memory, &mut noise);
                    }
                });
            }
            // Also when the attempt panics, or the scope would wait for the scribblers for ever.
            let _stopper = Stopper(&stop);
            let mut noise = Noise(capacity as u64);
            for _ in 0..5000 {
                attempt(&memory, &mut noise);
            }
        });
    }
}

struct Stopper<'a>(&'a AtomicBool);

impl Drop for Stopper<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn a_reader_takes_some_scribbles_and_refuses_others() {
    let (mut frames, mut violations) = (0, Vec::new());
    let mut noise = Noise(1);
    for capacity in [128, 1024, 4096] {
        let memory = Heap::new(capacity);
        for _ in 0..5000 {
            for _ in 0..20 {
                scribble(&memory, &mut noise);
            }
            let (read, violation) = read_on(&memory, 200);
            frames += read;
            violations.extend(violation.filter(|violation| !violations.contains(violation)));
        }
    }
    assert!(frames > 0, "the scribbles never got past the checks");
    assert!(violations.len() > 2, "only {violations:?}");
}

/// What is read depends on the scheduler; that nothing else is does not.
#[test]
fn a_reader_survives_a_peer_that_scribbles_meanwhile() {
    with_scribblers(|memory, _| {
        read_on(memory, 200);
    });
}

#[test]
fn a_writer_survives_a_peer_that_scribbles_meanwhile() {
    with_scribblers(|memory, noise| {
        write_on(memory, 50, noise);
    });
}
