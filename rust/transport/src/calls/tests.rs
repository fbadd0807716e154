use super::*;
use crate::buffer::Body;
use crate::platform;

/// Cost of a frame with an empty body.
const EMPTY: u64 = 128;

/// A book of calls and somebody who reads the ring for it.
struct Bench {
    calls: Calls,
    reader: Arc<Notifier>,
}

fn bench() -> Bench {
    Bench {
        calls: Calls::new(),
        reader: Notifier::for_loop().unwrap(),
    }
}

fn is_rung(notifier: &Arc<Notifier>) -> bool {
    let now = Some(std::time::Instant::now());
    let [rung] = platform::wait([Some(notifier.source())], now, None).unwrap();
    rung
}

fn frame((call, slot): (u64, u32), kind: Kind, sequence: u32, bytes: usize) -> Frame {
    let header = Header {
        length: bytes as u32,
        kind,
        flags: FIRST | LAST,
        call,
        sequence,
        slot,
        total: bytes as u64,
    };
    Frame {
        header,
        body: Body::of(&vec![0; bytes]),
    }
}

impl Bench {
    /// A call whose request is with the worker.
    fn sent(&mut self) -> (u64, u32) {
        let opened = self.calls.open().unwrap().expect("a free slot");
        self.calls.mark_sent(opened.0);
        opened
    }

    /// A frame as it comes off the ring.
    fn receive(&mut self, frame: Frame) -> Result<(), Violation> {
        self.calls.admit(&frame.header)?;
        self.calls.deliver(frame, Some(&self.reader))
    }

    fn receives(&mut self, of: (u64, u32), kind: Kind, sequence: u32) {
        self.receive(frame(of, kind, sequence, 0)).unwrap();
    }

    fn rejects(&mut self, of: (u64, u32), kind: Kind, sequence: u32) -> Violation {
        self.receive(frame(of, kind, sequence, 0))
            .expect_err("a violation")
    }

    fn take_data(&mut self, call: u64) -> (u32, Option<SlotUpdate>) {
        match self.calls.take(call) {
            Some((Event::Data(frame), update)) => (frame.header.sequence, update),
            other => panic!("no data but {other:?}"),
        }
    }

    fn take_outcome(&mut self, call: u64) -> Outcome {
        match self.calls.take(call) {
            Some((Event::Done(outcome), None)) => outcome,
            other => panic!("no outcome but {other:?}"),
        }
    }

    /// Opens calls until there is no slot left.
    fn fill(&mut self) -> Vec<(u64, u32)> {
        let calls = (0..SLOTS).map(|_| self.sent()).collect();
        assert!(!self.calls.has_free_slot());
        assert!(self.calls.open().unwrap().is_none());
        calls
    }
}

#[test]
fn an_answer_is_its_frames_in_order_and_then_one_outcome() {
    let mut bench = bench();
    let call = bench.sent();
    assert!(bench.calls.take(call.0).is_none());
    bench.receives(call, Kind::Data, 0);
    bench.receives(call, Kind::Data, 1);
    bench.receives(call, Kind::End, 2);
    assert_eq!(bench.take_data(call.0).0, 0);
    assert_eq!(bench.take_data(call.0).0, 1);
    assert!(matches!(bench.take_outcome(call.0), Outcome::Ended));
    assert!(bench.calls.table.is_empty());
}

#[test]
fn an_answer_in_one_frame_is_its_item_and_its_end() {
    let mut bench = bench();
    let call = bench.sent();
    bench.receive(frame(call, Kind::Answer, 0, 17)).unwrap();
    assert!(bench.calls.is_decided(call.0) && bench.calls.undecided().is_empty());
    assert_eq!(bench.take_data(call.0).0, 0);
    assert!(matches!(bench.take_outcome(call.0), Outcome::Ended));
    assert!(bench.calls.table.is_empty());
    assert_eq!(bench.rejects(call, Kind::Answer, 1), Violation::UnknownCall);
}

#[test]
fn only_an_answer_of_one_item_is_taken_whole() {
    let mut bench = bench();
    let call = bench.sent();
    assert!(bench.calls.take_answer(call.0).is_none());
    bench.receives(call, Kind::Data, 0);
    assert!(bench.calls.take_answer(call.0).is_none());
    bench.receives(call, Kind::End, 1);
    assert!(bench.calls.take_answer(call.0).is_some());
    assert!(bench.calls.table.is_empty() && bench.calls.take_answer(call.0).is_none());

    let [empty, long, failed, late] = [(); 4].map(|()| bench.sent());
    bench.receives(empty, Kind::End, 0);
    bench.receives(long, Kind::Data, 0);
    bench.receives(long, Kind::Answer, 1);
    bench.receives(failed, Kind::Data, 0);
    bench.receives(failed, Kind::Error, 1);
    bench.calls.cancel(late.0);
    bench.receives(late, Kind::Answer, 0);
    for call in [empty, long, failed, late] {
        assert!(bench.calls.take_answer(call.0).is_none());
    }
    assert_eq!(bench.calls.dropped_late, 1);
    assert!(matches!(bench.take_outcome(late.0), Outcome::Cancelled));
    assert_eq!(bench.calls.free_slots.len(), SLOTS as usize);
}

#[test]
fn a_failure_carries_its_frame() {
    let mut bench = bench();
    let call = bench.sent();
    bench.receive(frame(call, Kind::Error, 0, 17)).unwrap();
    match bench.take_outcome(call.0) {
        Outcome::Failed(frame) => assert_eq!(frame.body.len(), 17),
        other => panic!("{other:?}"),
    }
}

#[test]
fn calls_have_ids_above_zero_and_slots_of_their_own() {
    let mut bench = bench();
    let calls = bench.fill();
    let ids: std::collections::HashSet<_> = calls.iter().map(|call| call.0).collect();
    let slots: std::collections::HashSet<_> = calls.iter().map(|call| call.1).collect();
    assert!(
        !ids.contains(&0),
        "an untouched slot says that call 0 is cancelled"
    );
    assert_eq!((ids.len(), slots.len()), (256, 256));
    assert!(slots.iter().all(|&slot| slot < SLOTS));
}

#[test]
fn a_slot_is_free_again_only_after_the_workers_last_frame() {
    let mut bench = bench();
    let calls = bench.fill();
    let call = calls[100];
    bench.calls.cancel(call.0);
    assert!(matches!(bench.take_outcome(call.0), Outcome::Cancelled));
    bench.receives(call, Kind::Data, 0);
    assert!(
        !bench.calls.has_free_slot(),
        "the worker still knows the call"
    );
    bench.receives(call, Kind::End, 1);
    let (id, slot) = bench.calls.open().unwrap().unwrap();
    assert_eq!(slot, call.1);
    assert_ne!(id, call.0);
}

#[test]
fn a_slot_is_free_before_the_outcome_was_taken() {
    let mut bench = bench();
    let call = bench.fill()[0];
    bench.receives(call, Kind::End, 0);
    assert!(bench.calls.has_free_slot());
    assert!(matches!(bench.take_outcome(call.0), Outcome::Ended));
}

#[test]
fn a_call_that_was_never_sent_gives_its_slot_back_at_once() {
    let mut bench = bench();
    let waiter = Notifier::for_loop().unwrap();
    let (call, _) = bench.calls.open().unwrap().unwrap();
    for _ in 1..SLOTS {
        bench.sent();
    }
    bench.calls.add_space_waiter(&waiter);
    assert!(!bench.calls.has_free_slot());
    assert!(
        bench.calls.cancel(call).is_none(),
        "the worker need not know"
    );
    assert!(bench.calls.has_free_slot());
    assert_eq!(waiter.take_ready(), [Notifier::SPACE]);
    assert!(
        !bench.calls.is_undecided(call),
        "and can't be sent any more"
    );
}

#[test]
fn what_arrives_after_a_cancellation_is_dropped_and_counted() {
    let mut bench = bench();
    let (call, slot) = bench.sent();
    bench.receives((call, slot), Kind::Data, 0);
    let update = bench.calls.cancel(call);
    assert_eq!(update, Some(SlotUpdate::Cancelled { slot, call }));
    bench.receives((call, slot), Kind::Data, 1);
    assert!(matches!(bench.take_outcome(call), Outcome::Cancelled));
    bench.receives((call, slot), Kind::Data, 2);
    bench.receives((call, slot), Kind::Error, 3);
    assert_eq!(bench.calls.dropped_late, 3);
    assert!(bench.calls.table.is_empty());
}

#[test]
fn a_cancellation_never_replaces_an_outcome() {
    let mut bench = bench();
    let call = bench.sent();
    bench.receives(call, Kind::Data, 0);
    bench.receives(call, Kind::End, 1);
    assert!(bench.calls.cancel(call.0).is_none());
    assert_eq!(bench.take_data(call.0).0, 0);
    assert!(matches!(bench.take_outcome(call.0), Outcome::Ended));
    assert!(bench.calls.cancel(call.0).is_none());
    assert!(bench.calls.table.is_empty());
}

#[test]
fn an_outcome_never_replaces_a_cancellation() {
    let mut bench = bench();
    let call = bench.sent();
    bench.calls.cancel(call.0);
    bench.receives(call, Kind::End, 0);
    assert!(bench.calls.cancel(call.0).is_none());
    assert!(matches!(bench.take_outcome(call.0), Outcome::Cancelled));
    assert!(bench.calls.table.is_empty());
}

#[test]
fn whoever_asks_after_the_end_was_taken_is_not_left_waiting() {
    let mut bench = bench();
    let call = bench.sent();
    bench.calls.cancel(call.0);
    for the_worker_has_it in [true, false] {
        assert!(matches!(bench.take_outcome(call.0), Outcome::Cancelled));
        assert!(matches!(bench.take_outcome(call.0), Outcome::Cancelled));
        if the_worker_has_it {
            bench.receives(call, Kind::End, 0);
        }
    }
}

#[test]
fn an_abandoned_call_is_forgotten_once_the_worker_is_done() {
    let mut bench = bench();
    let call = bench.sent();
    bench.receives(call, Kind::Data, 0);
    assert!(bench.calls.abandon(call.0).is_some(), "the worker is told");
    assert!(!bench.calls.table.is_empty());
    bench.receives(call, Kind::End, 1);
    assert!(bench.calls.table.is_empty());
    assert_eq!(bench.rejects(call, Kind::End, 2), Violation::UnknownCall);
}

#[test]
fn frames_for_no_call_of_ours_are_violations() {
    let mut bench = bench();
    let (call, slot) = bench.sent();
    let (unsent, unsent_slot) = bench.calls.open().unwrap().unwrap();
    let question = bench.calls.open_control().unwrap();
    let strangers = [
        ("never made", (9999, slot)),
        ("another's slot", (call, unsent_slot)),
        ("not sent yet", (unsent, unsent_slot)),
        ("a control question", (question, 0)),
    ];
    for (what, stranger) in strangers {
        assert_eq!(
            bench.rejects(stranger, Kind::Data, 0),
            Violation::UnknownCall,
            "{what}"
        );
    }
    bench.receives((call, slot), Kind::End, 0);
    assert_eq!(
        bench.rejects((call, slot), Kind::End, 1),
        Violation::UnknownCall,
        "ended"
    );
}

#[test]
fn frames_of_a_call_count_up() {
    let mut bench = bench();
    let call = bench.sent();
    assert_eq!(bench.rejects(call, Kind::Data, 1), Violation::Sequence);
    bench.receives(call, Kind::Data, 0);
    assert_eq!(bench.rejects(call, Kind::Data, 0), Violation::Sequence);
    assert_eq!(bench.rejects(call, Kind::End, 2), Violation::Sequence);
    bench.calls.cancel(call.0);
    assert_eq!(bench.rejects(call, Kind::Data, 2), Violation::Sequence);
    bench.receives(call, Kind::End, 1);
}

#[test]
fn a_worker_sends_no_requests() {
    let mut bench = bench();
    let call = bench.sent();
    for kind in [Kind::Request, Kind::Pad] {
        assert_eq!(bench.rejects(call, kind, 0), Violation::Kind);
    }
}

#[test]
fn a_worker_that_runs_past_the_window_is_caught() {
    let mut bench = bench();
    let call = bench.sent();
    let half = (WINDOW / 2) as usize;
    for sequence in 0..2 {
        bench
            .receive(frame(call, Kind::Data, sequence, half))
            .unwrap();
    }
    assert_eq!(bench.rejects(call, Kind::Data, 2), Violation::Window);
    let (_, update) = bench.take_data(call.0);
    let bytes = half as u64 + EMPTY;
    assert_eq!(
        update,
        Some(SlotUpdate::Consumed {
            slot: call.1,
            bytes
        })
    );
    bench.receives(call, Kind::Data, 2);
}

#[test]
fn the_last_frame_needs_no_window() {
    let mut bench = bench();
    let call = bench.sent();
    bench
        .receive(frame(call, Kind::Data, 0, WINDOW as usize))
        .unwrap();
    assert_eq!(bench.rejects(call, Kind::Data, 1), Violation::Window);
    bench.receives(call, Kind::End, 1);
}

#[test]
fn a_frame_begun_within_the_window_may_end_outside() {
    let mut bench = bench();
    let call = bench.sent();
    bench
        .receive(frame(call, Kind::Data, 0, WINDOW as usize))
        .unwrap();
    let mut rest = frame(call, Kind::Data, 1, 10).header;
    rest.flags = LAST;
    assert_eq!(bench.calls.admit(&rest), Ok(()));
}

#[test]
fn consumed_bytes_add_up_over_an_answer() {
    let mut bench = bench();
    let call = bench.sent();
    let size = 150_000;
    for sequence in 0..4 {
        bench
            .receive(frame(call, Kind::Data, sequence, size))
            .unwrap();
    }
    let cost = EMPTY + size as u64;
    for bytes in [None, Some(2 * cost), None, Some(4 * cost)] {
        let slot = call.1;
        let update = bytes.map(|bytes| SlotUpdate::Consumed { slot, bytes });
        assert_eq!(bench.take_data(call.0).1, update);
    }
}

#[test]
fn late_frames_use_up_the_window_too() {
    let mut bench = bench();
    let call = bench.sent();
    bench.calls.cancel(call.0);
    bench
        .receive(frame(call, Kind::Data, 0, WINDOW as usize))
        .unwrap();
    let more = frame(call, Kind::Data, 1, 0);
    assert_eq!(bench.calls.admit(&more.header), Err(Violation::Window));
}

#[test]
fn a_question_has_one_answer() {
    let mut bench = bench();
    let me = Notifier::for_loop().unwrap();
    let nonce = bench.calls.open_control().unwrap();
    let given_up = bench.calls.open_control().unwrap();
    bench.calls.abandon(given_up);
    for nonce in [nonce, given_up] {
        let answer = bench.calls.answer(nonce, Outcome::Acknowledged, Some(&me));
        assert_eq!(answer, Ok(()));
        let again = bench.calls.answer(nonce, Outcome::Acknowledged, Some(&me));
        assert_eq!(again, Err(Violation::Control));
    }
    assert!(matches!(
        bench.calls.take(nonce),
        Some((Event::Done(Outcome::Acknowledged), None))
    ));
}

#[test]
fn questions_without_answers_do_not_pile_up() {
    let mut bench = bench();
    for _ in 0..MAX_QUESTIONS {
        let nonce = bench.calls.open_control().unwrap();
        bench.calls.abandon(nonce);
    }
    assert!(matches!(bench.calls.open_control(), Err(Error::QueueFull)));
}

#[test]
fn frames_are_taken_together_up_to_one_that_is_not_wanted() {
    let mut bench = bench();
    let call = bench.sent();
    for (sequence, size) in (0..).zip([1, 2, 50, 3]) {
        bench
            .receive(frame(call, Kind::Data, sequence, size))
            .unwrap();
    }
    let small = |frame: &Frame| frame.body.len() < 10;
    let lengths = |frames: Vec<Frame>| frames.iter().map(|f| f.body.len()).collect::<Vec<_>>();
    assert_eq!(lengths(bench.calls.take_frames(call.0, 1, small).0), [1]);
    assert_eq!(lengths(bench.calls.take_frames(call.0, 9, small).0), [2]);
    assert!(bench.calls.take_frames(call.0, 9, small).0.is_empty());
    assert!(bench.calls.take_frames(call.0 + 1, 9, small).0.is_empty());
}

#[test]
fn after_the_last_frame_a_slot_is_not_written_for_the_call() {
    let mut bench = bench();
    let call = bench.sent();
    bench.receives(call, Kind::Data, 0);
    bench.receives(call, Kind::End, 1);
    let (next, slot) = bench.calls.open().unwrap().unwrap();
    assert_eq!(slot, call.1);
    assert_eq!(bench.take_data(call.0).1, None);
    assert!(bench.calls.abandon(call.0).is_none());
    assert!(bench.calls.is_undecided(next));
}

#[test]
fn the_end_of_the_channel_loses_what_has_no_outcome() {
    let mut bench = bench();
    let (ended, pending, cancelled) = (bench.sent(), bench.sent(), bench.sent());
    let question = bench.calls.open_control().unwrap();
    bench.receives(ended, Kind::End, 0);
    bench.receives(pending, Kind::Data, 0);
    bench.calls.cancel(cancelled.0);
    bench.calls.finish(End::PeerDied);
    bench.calls.finish(End::Closed);
    assert!(matches!(bench.take_outcome(ended.0), Outcome::Ended));
    assert_eq!(bench.take_data(pending.0).0, 0, "what arrived stays");
    for lost in [pending.0, question] {
        let outcome = bench.take_outcome(lost);
        assert!(matches!(outcome, Outcome::Lost(End::PeerDied)));
    }
    assert!(matches!(
        bench.take_outcome(cancelled.0),
        Outcome::Cancelled
    ));
    assert!(bench.calls.table.is_empty());
    assert!(matches!(bench.calls.open(), Err(Error::PeerDied)));
    assert!(matches!(bench.calls.open_control(), Err(Error::PeerDied)));
}

#[test]
fn in_flight_are_the_requests_without_an_outcome() {
    let mut bench = bench();
    let (first, second) = (bench.sent(), bench.sent());
    bench.calls.open_control().unwrap();
    let mut undecided = bench.calls.undecided();
    undecided.sort_unstable();
    assert_eq!(undecided, [first.0, second.0]);
    bench.calls.cancel(first.0);
    bench.receives(second, Kind::End, 0);
    assert!(bench.calls.undecided().is_empty());
    assert!(matches!(bench.take_outcome(first.0), Outcome::Cancelled));
    assert!(
        !bench.calls.is_undecided(first.0),
        "though the worker has it"
    );
    assert!(bench.calls.undecided().is_empty());
}

#[test]
fn an_answer_goes_to_its_question() {
    let mut bench = bench();
    let question = bench.calls.open_control().unwrap();
    let me = Arc::clone(&bench.reader);
    bench
        .calls
        .answer(question, Outcome::Acknowledged, Some(&me))
        .unwrap();
    assert!(matches!(
        bench.take_outcome(question),
        Outcome::Acknowledged
    ));
    assert!(bench.calls.table.is_empty());
}

#[test]
fn an_answer_to_a_question_given_up_is_dropped() {
    let mut bench = bench();
    let me = Arc::clone(&bench.reader);
    let (cancelled, abandoned) = (
        bench.calls.open_control().unwrap(),
        bench.calls.open_control().unwrap(),
    );
    bench.calls.cancel(cancelled);
    bench.calls.abandon(abandoned);
    for question in [cancelled, abandoned] {
        let answered = bench
            .calls
            .answer(question, Outcome::Acknowledged, Some(&me));
        assert_eq!(answered, Ok(()));
    }
    assert!(matches!(bench.take_outcome(cancelled), Outcome::Cancelled));
}

#[test]
fn an_answer_without_a_question_is_a_violation() {
    let mut bench = bench();
    let me = Arc::clone(&bench.reader);
    let call = bench.sent();
    for stranger in [call.0, call.0 + 1, u64::MAX] {
        let answered = bench
            .calls
            .answer(stranger, Outcome::Acknowledged, Some(&me));
        assert_eq!(answered, Err(Violation::Control));
    }
}

#[test]
fn a_waiter_is_told_of_frames_and_of_the_end() {
    let mut bench = bench();
    let call = bench.sent();
    let waiter = Notifier::for_loop().unwrap();
    bench.calls.set_waiter(call.0, Some(&waiter));
    assert!(!is_rung(&waiter));
    bench.receives(call, Kind::Data, 0);
    assert!(is_rung(&waiter));
    assert_eq!(waiter.take_ready(), [call.0]);
    bench.receives(call, Kind::End, 1);
    bench.calls.finish(End::Closed);
    assert_eq!(waiter.take_ready(), [call.0]);
    waiter.drain();
    assert!(!is_rung(&waiter));
}

#[test]
fn whoever_reads_the_ring_is_not_rung_for_itself() {
    let mut bench = bench();
    let call = bench.sent();
    let reader = Arc::clone(&bench.reader);
    bench.calls.set_waiter(call.0, Some(&reader));
    bench.receives(call, Kind::Data, 0);
    assert!(!is_rung(&reader));
    assert_eq!(reader.take_ready(), [call.0]);
}

#[test]
fn a_leader_that_leaves_wakes_somebody_else() {
    let mut bench = bench();
    let (first, second) = (bench.sent(), bench.sent());
    let (leaving, staying) = (
        Notifier::for_loop().unwrap(),
        Notifier::of_thread().unwrap(),
    );
    bench.calls.set_waiter(first.0, Some(&leaving));
    assert!(!bench.calls.has_other_waiter(Some(&leaving)));
    bench.calls.set_waiter(second.0, Some(&staying));
    assert!(bench.calls.has_other_waiter(Some(&leaving)));
    bench.calls.wake_successor(Some(&leaving));
    assert!(is_rung(&staying) && !is_rung(&leaving));
}

#[test]
fn who_waits_for_space_is_told_once_when_a_call_ends() {
    let mut bench = bench();
    let call = bench.fill()[7];
    let waiter = Notifier::for_loop().unwrap();
    bench.calls.add_space_waiter(&waiter);
    bench.calls.add_space_waiter(&waiter);
    bench.receives(call, Kind::End, 0);
    assert_eq!(waiter.take_ready(), [Notifier::SPACE]);
    bench.calls.add_space_waiter(&waiter);
    bench.calls.remove_space_waiter(&waiter);
    bench.calls.notify_space_waiters();
    assert!(waiter.take_ready().is_empty());
}
