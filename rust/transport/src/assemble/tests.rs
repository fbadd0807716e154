use super::*;
use crate::body::PART_ALIGN;
use crate::ring::Producer;
use crate::segment::{RingMemory, Segment};

const LIMIT: usize = 1000;

impl Body {
    /// A body that has all its bytes.
    pub(crate) fn of(bytes: &[u8]) -> Self {
        let mut body = Self::with_length(bytes.len()).unwrap();
        // SAFETY: the body was made with this length.
        unsafe {
            body.as_mut_ptr()
                .copy_from_nonoverlapping(bytes.as_ptr(), bytes.len());
        }
        body
    }
}

/// A ring, and the assembler that reads it.
struct Bench {
    producer: Producer<RingMemory>,
    consumer: Consumer<RingMemory>,
    assembler: Assembler,
}

fn bench() -> Bench {
    let (segment, _file) = Segment::create(4096).unwrap();
    Bench {
        producer: Producer::new(segment.replies()),
        consumer: Consumer::new(segment.replies()),
        assembler: Assembler::new(LIMIT),
    }
}

impl Bench {
    /// Passes one record through the ring; `total` is what the record claims.
    fn accept(
        &mut self,
        header: Header,
        flags: u16,
        body: &[u8],
        total: usize,
    ) -> Result<Option<Frame>, Violation> {
        let header = Header {
            length: body.len() as u32,
            flags,
            total: total as u64,
            ..header
        };
        let pushed = self.producer.push(&header, |write| write(body)).unwrap();
        assert!(pushed.is_some(), "the ring is full");
        let record = self.consumer.peek()?.unwrap();
        let frame = self.assembler.accept(&self.consumer, &record)?;
        self.consumer.release(record);
        Ok(frame)
    }

    fn rejects(&mut self, header: Header, flags: u16, body: &[u8], total: usize) -> Violation {
        self.accept(header, flags, body, total)
            .expect_err("a violation")
    }
}

fn header(call: u64) -> Header {
    Header {
        length: 0,
        kind: Kind::Data,
        flags: 0,
        call,
        sequence: 3,
        slot: 5,
        total: 0,
    }
}

fn request(call: u64) -> Header {
    Header {
        kind: Kind::Request,
        sequence: 0,
        ..header(call)
    }
}

#[test]
fn a_record_with_all_of_it_is_a_frame() {
    let frame = bench().accept(header(1), FIRST | LAST, b"whole", 5);
    let frame = frame.unwrap().unwrap();
    assert_eq!(frame.body.as_slice(), b"whole");
    assert_eq!((frame.header.call, frame.header.sequence), (1, 3));
}

#[test]
fn a_frame_may_be_empty() {
    let frame = bench().accept(header(1), FIRST | LAST, b"", 0);
    assert!(frame.unwrap().unwrap().body.is_empty());
}

#[test]
fn fragments_of_several_calls_may_alternate() {
    let mut bench = bench();
    assert!(bench.accept(header(1), FIRST, b"one", 8).unwrap().is_none());
    assert!(bench.accept(header(2), FIRST, b"two", 5).unwrap().is_none());
    assert!(bench.accept(header(1), 0, b"-on", 8).unwrap().is_none());
    let second = bench.accept(header(2), LAST, b"-t", 5).unwrap().unwrap();
    let first = bench.accept(header(1), LAST, b"e!", 8).unwrap().unwrap();
    assert_eq!(first.body.as_slice(), b"one-one!");
    assert_eq!(second.body.as_slice(), b"two-t");
}

#[test]
fn bodies_are_aligned_for_their_parts() {
    let mut bench = bench();
    for length in 1..200 {
        let frame = bench.accept(header(1), FIRST | LAST, &vec![7; length], length);
        let body = frame.unwrap().unwrap().body.settled().unwrap();
        let start = body.as_slice().as_ptr();
        assert!(start.addr().is_multiple_of(PART_ALIGN));
    }
}

#[test]
fn a_frame_may_be_as_large_as_the_limit_and_no_larger() {
    let mut bench = bench();
    assert!(
        bench
            .accept(header(1), FIRST, b"x", LIMIT)
            .unwrap()
            .is_none()
    );
    assert_eq!(
        bench.rejects(header(2), FIRST, b"x", LIMIT + 1),
        Violation::TooLarge
    );
    assert_eq!(
        bench.rejects(header(3), FIRST, b"x", usize::MAX),
        Violation::TooLarge
    );
}

#[test]
fn fragments_must_add_up() {
    let cases: [(&str, u16, &[u8]); 5] = [
        ("more than the total", LAST, b"abcdef"),
        ("the last one comes too early", LAST, b"abc"),
        ("complete, and not the last", 0, b"abcde"),
        ("an empty one in between", 0, b""),
        ("a second beginning", FIRST, b"a"),
    ];
    for (what, flags, body) in cases {
        let mut bench = bench();
        assert!(
            bench
                .accept(header(1), FIRST, b"12345", 10)
                .unwrap()
                .is_none()
        );
        assert_eq!(
            bench.rejects(header(1), flags, body, 10),
            Violation::Fragment,
            "{what}"
        );
    }
}

#[test]
fn a_record_that_is_whole_must_have_its_total() {
    assert_eq!(
        bench().rejects(header(1), FIRST | LAST, b"abc", 4),
        Violation::Fragment
    );
    assert_eq!(
        bench().rejects(header(1), FIRST, b"abc", 3),
        Violation::Fragment
    );
}

#[test]
fn a_continuation_needs_a_beginning() {
    for flags in [0, LAST] {
        assert_eq!(
            bench().rejects(header(1), flags, b"abc", 9),
            Violation::Fragment
        );
    }
}

#[test]
fn a_continuation_must_be_of_the_same_frame() {
    let others = [
        Header {
            kind: Kind::Error,
            ..header(1)
        },
        Header {
            sequence: 4,
            ..header(1)
        },
        Header {
            slot: 6,
            ..header(1)
        },
    ];
    for other in others {
        let mut bench = bench();
        assert!(bench.accept(header(1), FIRST, b"abc", 6).unwrap().is_none());
        assert_eq!(bench.rejects(other, LAST, b"def", 6), Violation::Fragment);
    }
    let mut bench = bench();
    assert!(bench.accept(header(1), FIRST, b"abc", 6).unwrap().is_none());
    assert_eq!(
        bench.rejects(header(1), LAST, b"def", 7),
        Violation::Fragment
    );
}

#[test]
fn the_end_of_a_call_replaces_an_item_that_is_half_out() {
    let end = |kind| Header { kind, ..header(1) };
    let mut bench = bench();
    for kind in [Kind::Error, Kind::End] {
        assert!(bench.accept(header(1), FIRST, b"abc", 9).unwrap().is_none());
        let frame = bench.accept(end(kind), FIRST | LAST, b"why", 3).unwrap();
        assert_eq!(frame.unwrap().body.as_slice(), b"why");
        assert!(bench.assembler.partials.is_empty());
    }
    // In several records too, but only once.
    assert!(bench.accept(header(1), FIRST, b"abc", 9).unwrap().is_none());
    let error = end(Kind::Error);
    assert!(bench.accept(error, FIRST, b"w", 3).unwrap().is_none());
    assert_eq!(bench.rejects(error, FIRST, b"w", 3), Violation::Fragment);
}

#[test]
fn nothing_else_replaces_what_is_half_out() {
    for kind in [Kind::Data, Kind::Answer, Kind::Request] {
        let mut bench = bench();
        assert!(bench.accept(header(1), FIRST, b"abc", 9).unwrap().is_none());
        let other = Header { kind, ..header(1) };
        let violation = bench.rejects(other, FIRST | LAST, b"abc", 3);
        assert_eq!(violation, Violation::Fragment, "{kind:?}");
    }
}

#[test]
fn a_withdrawn_request_comes_out_empty_and_leaves_nothing() {
    let mut bench = bench();
    assert!(
        bench
            .accept(request(1), FIRST, b"abc", 9)
            .unwrap()
            .is_none()
    );
    let frame = bench.accept(request(1), LAST, b"", 0).unwrap().unwrap();
    assert!(frame.body.is_empty());
    assert!(bench.assembler.partials.is_empty());
}

#[test]
fn only_a_request_that_began_can_be_withdrawn() {
    assert_eq!(
        bench().rejects(request(1), LAST, b"", 0),
        Violation::Fragment
    );
    let mut bench = bench();
    assert!(bench.accept(header(1), FIRST, b"abc", 9).unwrap().is_none());
    assert_eq!(bench.rejects(header(1), LAST, b"", 0), Violation::Fragment);
}

#[test]
fn fragments_cover_a_body_once_and_in_order() {
    for total in [0, 1, 95, 96, 97, 192, 1000] {
        let (mut at, mut records) = (0, 0);
        loop {
            let (flags, window) = fragment(total, 96, at);
            assert_eq!(window.start, at);
            assert!(window.len() <= 96 && (!window.is_empty() || total == 0));
            assert_eq!(flags & FIRST != 0, records == 0);
            assert_eq!(flags & LAST != 0, window.end == total);
            (at, records) = (window.end, records + 1);
            if flags & LAST != 0 {
                break;
            }
        }
        assert_eq!(records, total.div_ceil(96).max(1));
    }
}
