//! Takes the input for a ring that a hostile worker has written, and reads it to the end.
//!
//! | bytes | meaning |
//! |---|---|
//! | 0 | capacity: 128 times a power of two up to 8 |
//! | 1 | how many positions follow, at most 8 |
//! | 2.. | the positions that the worker publishes in turn, two bytes each, in units of 16 bytes |
//! | then | the ring's data, from its start |

#![no_main]

use std::cell::{Cell, UnsafeCell};
use std::rc::Rc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use inferpool_transport::ring::{Consumer, Memory};
use inferpool_transport::{Assembler, Violation, body};
use libfuzzer_sys::fuzz_target;

/// Bytes of the largest frame, so that several fragments make one.
const LIMIT: usize = 4096;

struct Hostile {
    tail: AtomicU64,
    head: AtomicU64,
    flags: [AtomicU32; 2],
    data: UnsafeCell<Box<[u8]>>,
    /// Bytes read so far, header and body of every record once.
    read: Cell<usize>,
}

#[derive(Clone)]
struct Shared(Rc<Hostile>);

// SAFETY: reads and writes are checked against the data's bounds, in every build.
unsafe impl Memory for Shared {
    fn tail(&self) -> &AtomicU64 {
        &self.0.tail
    }

    fn head(&self) -> &AtomicU64 {
        &self.0.head
    }

    fn consumer_armed(&self) -> &AtomicU32 {
        &self.0.flags[0]
    }

    fn producer_armed(&self) -> &AtomicU32 {
        &self.0.flags[1]
    }

    fn capacity(&self) -> usize {
        // SAFETY: one thread, and no reference outlives a method.
        unsafe { (&*self.0.data.get()).len() }
    }

    unsafe fn write(&self, _: usize, _: &[u8]) {
        unreachable!("a reader does not write");
    }

    unsafe fn read(&self, offset: usize, target: *mut u8, length: usize) {
        // SAFETY: one thread; the index checks the span, the caller vouches for the target.
        unsafe {
            let source = &(&*self.0.data.get())[offset..offset + length];
            target.copy_from_nonoverlapping(source.as_ptr(), length);
        }
        self.0.read.set(self.0.read.get() + length);
    }
}

fn read_all(consumer: &mut Consumer<Shared>, assembler: &mut Assembler) -> Result<(), Violation> {
    while let Some(record) = consumer.peek()? {
        if let Some(frame) = assembler.accept(consumer, &record)? {
            let bytes = frame.body.as_slice();
            assert!(bytes.len() <= LIMIT);
            let mut end = 0;
            for part in body::parse(bytes).unwrap_or_default() {
                assert!(end <= part.start && part.start <= part.end && part.end <= bytes.len());
                end = part.end;
            }
        }
        consumer.release(record);
    }
    Ok(())
}

fuzz_target!(|input: &[u8]| {
    let [shape, count, rest @ ..] = input else {
        return;
    };
    let capacity = 128 << (shape % 4);
    let (positions, bytes) = rest.split_at(rest.len().min(usize::from(count % 9) * 2));
    let mut data = vec![0; capacity];
    let length = bytes.len().min(capacity);
    data[..length].copy_from_slice(&bytes[..length]);
    let memory = Shared(Rc::new(Hostile {
        tail: AtomicU64::new(0),
        head: AtomicU64::new(0),
        flags: [AtomicU32::new(0), AtomicU32::new(1)],
        data: UnsafeCell::new(data.into_boxed_slice()),
        read: Cell::new(0),
    }));
    let mut consumer = Consumer::new(memory.clone());
    let mut assembler = Assembler::new(LIMIT);
    for position in positions.as_chunks::<2>().0 {
        let tail = u64::from(u16::from_le_bytes(*position)) * 16;
        memory.tail().store(tail, Ordering::Release);
        if consumer.arm().is_err() || read_all(&mut consumer, &mut assembler).is_err() {
            break;
        }
        let head = memory.head().load(Ordering::Relaxed);
        assert!(head <= tail && tail - head <= capacity as u64);
        assert!(memory.0.read.get() as u64 <= tail);
    }
});
