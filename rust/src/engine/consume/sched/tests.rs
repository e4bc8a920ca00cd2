use super::*;
use crate::engine::consume::outcomes::Outcomes;
use crate::engine::consume::task::Outcome;

const TRIP: Duration = Duration::from_millis(1);

fn kind(name: &str, is_async: bool, workers: usize, timeout: Option<Duration>) -> Kind {
    Kind { name: name.into(), is_async, workers, timeout, result_ttl: None }
}

fn sched(kinds: Vec<Kind>, concurrency: usize) -> Sched {
    Sched::new(kinds, concurrency, 1_000, 1 << 20)
}

fn chunk(kind: usize, track: i16, ids: std::ops::Range<i64>) -> Arc<Chunk> {
    let mut chunk = Chunk::new(0, 1, kind, Arc::from("default"), track, 0, 3);
    for id in ids {
        chunk.push(id, 0, b'j', b"{}");
    }
    Arc::new(chunk)
}

fn drain(slot: &Slot) -> Vec<i64> {
    let mut ids = Vec::new();
    while let Next::Run(task) = slot.begin(Moment::now(), || true) {
        ids.push(task.id());
        slot.finish(Moment::now(), Outcome::Completed);
    }
    ids
}

/// Begins the next task of a batch; there is one.
fn begin(slot: &Slot, now: Moment) -> Task {
    match slot.begin(now, || true) {
        Next::Run(task) => task,
        next => panic!("{next:?}"),
    }
}

/// Takes what was handed over.
fn ids(outcomes: &Outcomes) -> Vec<i64> {
    outcomes.take(usize::MAX).iter().map(|e| e.holder.id).collect()
}

/// Begins a run, which is there.
fn begin_run(sched: &mut Sched, run: u64, now: Moment) {
    assert!(matches!(sched.begin_run(run, now, || true), Begun::Run));
}

/// The runs that the loop is to start.
fn starts(messages: &[Message]) -> Vec<u64> {
    messages.iter().filter_map(|m| if let Message::Start(run, _) = m { Some(*run) } else { None }).collect()
}

/// Teaches `sched` that a task of `kind` takes `us`.
fn teach(sched: &mut Sched, kind: usize, us: u64) {
    for _ in 0..50 {
        sched.learn(kind, 1, Duration::from_micros(us));
    }
}

#[test]
fn a_type_of_unknown_speed_is_claimed_for_the_free_slots_alone() {
    let sched = sched(vec![kind("a", false, 8, None)], 8);
    let wants = sched.wants(TRIP);
    assert_eq!(wants.types, [Want { kind: 0, tasks: 8, slow: true }]);
}

#[test]
fn a_fast_type_is_prefetched_and_a_slow_one_at_its_cap_is_not_claimed() {
    let mut sched = sched(vec![kind("fast", false, 8, None), kind("slow", false, 2, None)], 8);
    teach(&mut sched, 0, 10);
    teach(&mut sched, 1, 500_000);
    assert!(sched.push(&chunk(1, 0, 0..2)));
    let wants = sched.wants(TRIP);
    assert_eq!(wants.types.len(), 1, "the slow type has what it can run: {wants:?}");
    assert_eq!((wants.types[0].kind, wants.types[0].slow), (0, false));
    assert!(wants.types[0].tasks > 500, "rate times two round trips and 5 ms: {wants:?}");
}

#[test]
fn tasks_that_end_out_of_order_are_claimed_few_at_a_time() {
    let mut sched = sched(vec![kind("a", false, 32, None)], 32);
    teach(&mut sched, 0, 2_000);
    assert_eq!(sched.wants(TRIP).types[0].tasks, SCATTERED_IDS);
}

#[test]
fn payload_and_prefetch_bound_what_is_wanted() {
    let mut sched = Sched::new(vec![kind("a", false, 4, None)], 4, 10, 1 << 20);
    teach(&mut sched, 0, 1);
    assert!(sched.push(&chunk(0, 0, 0..10)));
    assert!(sched.wants(TRIP).types.is_empty());
}

#[test]
fn a_batch_follows_the_handlers_speed_and_leaves_other_threads_their_share() {
    let mut sched = sched(vec![kind("a", false, 8, None)], 8);
    let (one, two) = (sched.join_thread(), sched.join_thread());
    assert!(sched.push(&chunk(0, 0, 0..100)));
    assert_eq!(sched.take(&one, None, true), Take::Batch(0));
    assert_eq!(drain(&one), [0], "unknown speed: one at a time");
    teach(&mut sched, 0, 10);
    assert_eq!(sched.take(&one, Some((0, 1, Duration::from_micros(10))), true), Take::Batch(0));
    assert_eq!(drain(&one).len(), 32);
    assert_eq!(sched.take(&one, Some((0, 32, Duration::from_micros(320))), true), Take::Batch(0));
    assert_eq!(drain(&one).len(), 32);
    // 35 are left for two threads.
    assert_eq!(sched.take(&two, None, true), Take::Batch(0));
    assert_eq!(drain(&two).len(), 18);
}

#[test]
fn an_idle_thread_steals_what_another_has_not_started() {
    let mut sched = sched(vec![kind("a", false, 8, None)], 8);
    teach(&mut sched, 0, 10);
    let one = sched.join_thread();
    assert!(sched.push(&chunk(0, 0, 0..10)));
    assert_eq!(sched.take(&one, None, true), Take::Batch(0));
    let first = begin(&one, Moment::now());
    let two = sched.join_thread();
    assert_eq!(sched.take(&two, None, true), Take::Batch(0));
    let stolen = drain(&two);
    one.finish(Moment::now(), Outcome::Completed);
    let mut all = drain(&one);
    all.push(first.id());
    all.extend(&stolen);
    all.sort_unstable();
    assert_eq!(all, (0..10).collect::<Vec<_>>());
    assert!(!stolen.is_empty());
}

#[test]
fn workers_and_concurrency_are_never_exceeded() {
    let mut sched = sched(vec![kind("a", false, 1, None), kind("b", true, 2, None)], 2);
    let (one, two) = (sched.join_thread(), sched.join_thread());
    assert!(sched.push(&chunk(0, 0, 0..5)));
    assert_eq!(sched.take(&one, None, true), Take::Batch(0));
    assert_eq!(sched.take(&two, None, true), Take::Empty, "its one worker is busy");
    assert!(sched.push(&chunk(1, 0, 10..15)));
    let started = sched.receive(10, true);
    assert_eq!(started.len(), 1, "two run in all");
    assert_eq!(sched.running(), 2);
}

#[test]
fn nothing_starts_that_may_be_anothers_by_now() {
    let mut sched = sched(vec![kind("a", false, 4, None), kind("b", true, 4, None)], 4);
    let one = sched.join_thread();
    assert!(sched.push(&chunk(0, 0, 0..5)));
    assert!(sched.push(&chunk(1, 0, 10..12)));
    assert_eq!(sched.take(&one, None, false), Take::Empty);
    assert!(sched.receive(10, false).is_empty());
    assert!(sched.disarm(), "the loop is woken again once contact is back");
    assert_eq!(sched.receive(10, true).len(), 2);
}

#[test]
fn careful_tasks_find_their_slots_reserved() {
    let mut sched = sched(vec![kind("a", false, 4, None)], 4);
    let one = sched.join_thread();
    assert!(sched.push(&chunk(0, 0, 0..1)));
    assert_eq!(sched.reserve(0, 100), 3, "one waits already");
    sched.release(3);
    assert_eq!(sched.take(&one, None, true), Take::Batch(0));
    assert_eq!(sched.reserve(0, 100), 3);
    let two = sched.join_thread();
    assert!(sched.push(&chunk(0, 0, 5..6)));
    sched.release(3);
    assert_eq!(sched.take(&two, None, true), Take::Batch(0));
}

#[test]
fn a_task_that_runs_alone_waits_for_quiet_and_keeps_it() {
    let mut sched = sched(vec![kind("a", false, 4, None)], 4);
    let (one, two) = (sched.join_thread(), sched.join_thread());
    assert!(sched.push(&chunk(0, 0, 0..1)));
    assert_eq!(sched.take(&one, None, true), Take::Batch(0));
    assert!(!sched.hold_for_alone(), "something runs");
    assert_eq!(drain(&one), [0]);
    assert_eq!(sched.take(&one, Some((0, 1, TRIP)), true), Take::Empty);
    assert!(sched.hold_for_alone());
    assert!(sched.push(&chunk(0, 3, 7..8)));
    assert!(sched.push(&chunk(0, 0, 8..9)));
    assert_eq!(sched.take(&one, None, true), Take::Batch(0));
    assert_eq!(sched.take(&two, None, true), Take::Empty);
    assert!(sched.is_busy_alone());
    assert_eq!(drain(&one), [7]);
    assert_eq!(sched.take(&one, Some((0, 1, TRIP)), true), Take::Empty);
    assert!(!sched.is_busy_alone());
    sched.release_alone();
    assert_eq!(sched.take(&one, None, true), Take::Batch(0));
    assert_eq!(drain(&one), [8]);
}

/// A handler runs, a careful task found no slot beside it, and then another waits to run alone.
fn careful_and_alone(workers: usize, concurrency: usize) {
    let mut sched = sched(vec![kind("a", false, workers, None)], concurrency);
    let one = sched.join_thread();
    assert!(sched.push(&chunk(0, 0, 0..1)));
    assert_eq!(sched.take(&one, None, true), Take::Batch(0));
    assert_eq!(sched.reserve(0, concurrency), 0);
    assert!(!sched.hold_for_alone());
    assert_eq!(drain(&one), [0]);
    assert_eq!(sched.take(&one, Some((0, 1, TRIP)), true), Take::Empty);
    assert!(sched.hold_for_alone());
    assert!(sched.push(&chunk(0, 3, 7..8)));
    assert_eq!(sched.take(&one, None, true), Take::Batch(0), "no slot is kept from it");
    assert_eq!(drain(&one), [7]);
    assert_eq!(sched.take(&one, Some((0, 1, TRIP)), true), Take::Empty);
    assert!(!sched.is_busy_alone());
    sched.release_alone();
    assert_eq!(sched.reserve(0, concurrency), workers.min(concurrency), "and the careful task's turn comes");
}

#[test]
fn a_task_that_runs_alone_is_not_kept_out_by_a_slot_saved_for_a_careful_one() {
    careful_and_alone(1, 1);
    careful_and_alone(1, 8);
}

#[test]
fn a_slot_saved_while_a_task_waits_to_run_alone_is_given_up_at_once() {
    let mut sched = sched(vec![kind("a", false, 1, None)], 1);
    let one = sched.join_thread();
    assert!(sched.push(&chunk(0, 0, 0..1)));
    assert_eq!(sched.take(&one, None, true), Take::Batch(0));
    assert_eq!(sched.reserve(0, 1), 0);
    assert_eq!(drain(&one), [0]);
    assert_eq!(sched.take(&one, Some((0, 1, TRIP)), true), Take::Empty);
    assert!(sched.hold_for_alone());
    assert!(sched.push(&chunk(0, 3, 7..8)));
    assert_eq!(sched.take(&one, None, true), Take::Batch(0), "it was saved before the hold began");
}

#[test]
fn an_attempt_that_ran_out_of_time_frees_its_place_and_its_result_does_not_count() {
    let limit = Some(Duration::from_millis(10));
    let mut sched = sched(vec![kind("a", false, 1, limit), kind("b", true, 1, limit)], 2);
    let one = sched.join_thread();
    teach(&mut sched, 0, 10);
    assert!(sched.push(&chunk(0, 0, 0..3)));
    assert!(sched.push(&chunk(1, 0, 10..11)));
    let begun = Moment::now();
    assert_eq!(sched.take(&one, None, true), Take::Batch(0));
    begin(&one, begun);
    one.finish(begun, Outcome::Completed);
    begin(&one, begun);
    let outcomes = Outcomes::default();
    let [run] = starts(&sched.receive(10, true))[..] else { panic!("one async task") };
    begin_run(&mut sched, run, begun);
    assert!(sched.expire(begun, &outcomes).is_empty());
    let expired = sched.expire(begun + Duration::from_millis(11), &outcomes);
    assert_eq!(expired.iter().map(|e| e.task.id()).collect::<Vec<_>>(), [1, 10]);
    assert_eq!(ids(&outcomes), [0], "what its thread had done before");
    assert_eq!(sched.running(), 0);
    one.finish(begun, Outcome::Completed);
    one.hand_over(&outcomes);
    assert!(outcomes.is_empty(), "the late result of the thread");
    assert!(sched.finish_run(run, begun).is_none(), "the late result of the coroutine");
    assert!(matches!(sched.receive(10, true)[..], [Message::Cancel(r, _)] if r == run));
    assert_eq!(sched.take(&one, Some((0, 1, TRIP)), true), Take::Leave);
    let two = sched.join_thread();
    assert_eq!(sched.take(&two, None, true), Take::Batch(0), "the next one finds the place free");
}

#[test]
fn a_task_has_its_own_time_before_its_types() {
    let ms = Duration::from_millis;
    let mut sched = sched(vec![kind("a", false, 3, Some(ms(10))), kind("b", true, 3, None)], 6);
    assert!(sched.has_timeouts());
    for (kind, first) in [(0, 0), (1, 10)] {
        let mut chunk = Chunk::new(0, 1, kind, Arc::from("default"), 0, 0, 3);
        for (id, stored) in [(first, "{\"timeout\":0.005}\n{}"), (first + 1, "{\"timeout\":0.02}\n{}")] {
            chunk.push(id, 0, b'J', stored.as_bytes());
        }
        chunk.push(first + 2, 0, b'j', b"{}");
        assert!(sched.push(&Arc::new(chunk)));
    }
    let begun = Moment::now();
    for _ in 0..3 {
        let slot = sched.join_thread();
        assert_eq!(sched.take(&slot, None, true), Take::Batch(0));
        begin(&slot, begun);
    }
    for run in starts(&sched.receive(10, true)) {
        begin_run(&mut sched, run, begun);
    }
    let mut late = |after| {
        let expired = sched.expire(begun + ms(after), &Outcomes::default());
        let mut ids: Vec<_> = expired.iter().map(|e| (e.task.id(), e.timeout)).collect();
        ids.sort_unstable();
        ids
    };
    assert_eq!(late(4), []);
    assert_eq!(late(6), [(0, ms(5)), (10, ms(5))]);
    assert_eq!(late(11), [(2, ms(10))]);
    assert_eq!(late(1_000), [(1, ms(20)), (11, ms(20))]);
}

#[test]
fn what_has_a_time_of_its_own_is_looked_after() {
    let mut sched = sched(vec![kind("a", false, 3, None)], 3);
    for (format, stored, has_timeouts) in [
        (b'j', "{}", false),
        (b'J', "{\"retry\":{\"constant\":5}}\n{}", false),
        (b'B', "{\"timeout\":5}\n{}", true),
        (b'j', "{}", true),
    ] {
        let mut chunk = Chunk::new(0, 1, 0, Arc::from("default"), 0, 0, 3);
        chunk.push(1, 0, format, stored.as_bytes());
        let chunk = Arc::new(chunk);
        assert!(sched.push(&chunk));
        assert_eq!(sched.has_timeouts(), has_timeouts);
        let task = Task { chunk, at: 0 };
        assert_eq!((task.payload(), task.is_json()), (&b"{}"[..], format != b'B'), "without its line");
    }
}

#[test]
fn at_a_stop_all_that_has_not_started_is_handed_out_once() {
    let mut sched = sched(vec![kind("a", false, 8, None), kind("b", true, 1, None)], 8);
    teach(&mut sched, 0, 10);
    let one = sched.join_thread();
    assert!(sched.push(&chunk(0, 0, 0..50)));
    assert!(sched.push(&chunk(1, 0, 100..105)));
    assert_eq!(sched.take(&one, None, true), Take::Batch(0));
    let first = begin(&one, Moment::now()).id();
    sched.stop();
    let mut ids: Vec<i64> = sched.take_unstarted().iter().map(Task::id).collect();
    ids.push(first);
    ids.sort_unstable();
    assert_eq!(ids, (0..50).chain(100..105).collect::<Vec<_>>());
    assert!(!sched.push(&chunk(0, 0, 200..201)), "and what a claim under way brings is given back");
    assert_eq!(sched.running(), 1);
}

/// Two types whose backlogs never end share `concurrency` slots for a hundred rounds; answers how often each started.
fn share(first_async: bool, second_async: bool, concurrency: usize) -> [usize; 2] {
    let mut sched = sched(vec![kind("a", first_async, 64, None), kind("b", second_async, 64, None)], concurrency);
    let slots: Vec<_> = (0..concurrency).map(|_| sched.join_thread()).collect();
    assert!(sched.push(&chunk(0, 0, 0..400)));
    assert!(sched.push(&chunk(1, 0, 1000..1400)));
    let mut started = [0; 2];
    let mut last: Vec<Option<usize>> = vec![None; concurrency];
    let mut runs: Vec<u64> = Vec::new();
    for _ in 0..100 {
        for (slot, last) in slots.iter().zip(&mut last) {
            drain(slot);
            let ended = last.take().map(|kind| (kind, 1, Duration::from_secs(1)));
            if let Take::Batch(kind) = sched.take(slot, ended, true) {
                started[kind] += 1;
                *last = Some(kind);
            }
            sched.feed();
        }
        for message in sched.receive(100, true) {
            if let Message::Start(run, task) = message {
                started[task.chunk.kind] += 1;
                begin_run(&mut sched, run, Moment::now());
                runs.push(run);
            }
        }
        if !runs.is_empty() {
            assert!(sched.finish_run(runs.remove(0), Moment::now()).is_some());
        }
    }
    started
}

#[test]
fn no_type_is_kept_out_by_anothers_backlog() {
    for (first, second) in [(false, false), (true, true), (true, false), (false, true)] {
        for concurrency in [1, 4] {
            let started = share(first, second, concurrency);
            assert!(started.iter().all(|&n| n > 10), "async {first} {second}, {concurrency} slots: {started:?}");
        }
    }
}

#[test]
fn a_type_of_which_nothing_is_here_is_asked_for_though_every_slot_is_taken() {
    let mut sched = sched(vec![kind("a", false, 2, None), kind("b", false, 2, None)], 2);
    teach(&mut sched, 0, 500_000);
    let (one, two) = (sched.join_thread(), sched.join_thread());
    assert!(sched.push(&chunk(0, 0, 0..10)));
    assert_eq!(sched.take(&one, None, true), Take::Batch(0));
    assert_eq!(sched.take(&two, None, true), Take::Batch(0));
    assert!(sched.wants(TRIP).types.contains(&Want { kind: 1, tasks: 1, slow: true }));
}

#[test]
fn careful_tasks_get_the_next_slots_of_a_worker_whose_backlog_fills_them_all() {
    let mut sched = sched(vec![kind("a", false, 4, None)], 4);
    teach(&mut sched, 0, 20_000);
    let slots: Vec<_> = (0..4).map(|_| sched.join_thread()).collect();
    assert!(sched.push(&chunk(0, 0, 0..60)));
    for slot in &slots {
        assert_eq!(sched.take(slot, None, true), Take::Batch(0));
    }
    assert_eq!(sched.reserve(0, 100), 0);
    let ended = Some((0, 1, Duration::from_millis(20)));
    drain(&slots[0]);
    assert_eq!(sched.take(&slots[0], ended, true), Take::Empty, "kept for them");
    drain(&slots[1]);
    assert_eq!(sched.take(&slots[1], ended, true), Take::Batch(0), "a quarter is enough");
    assert_eq!(sched.reserve(0, 100), 1);
    assert!(sched.push(&chunk(0, 2, 500..501)));
    sched.release(1);
    assert_eq!(sched.take(&slots[0], None, true), Take::Batch(0));
    assert_eq!(drain(&slots[0]), [500]);
    assert_eq!(sched.reserve(0, 100), 0);
    assert_eq!(sched.take(&slots[0], ended, true), Take::Empty);
    sched.release_saved();
    assert_eq!(sched.take(&slots[0], None, true), Take::Batch(0));
}

#[test]
fn careful_tasks_of_a_type_at_its_own_cap_get_its_next_slot_and_no_others() {
    let mut sched = sched(vec![kind("capped", false, 1, None), kind("b", false, 4, None)], 4);
    teach(&mut sched, 0, 20_000);
    let slots: Vec<_> = (0..2).map(|_| sched.join_thread()).collect();
    assert!(sched.push(&chunk(0, 0, 0..5)));
    assert_eq!(sched.take(&slots[0], None, true), Take::Batch(0));
    assert!(sched.push(&chunk(1, 0, 100..102)));
    assert_eq!(sched.take(&slots[1], None, true), Take::Batch(1));
    assert_eq!(sched.reserve(0, 100), 0);
    let ended = |kind| Some((kind, 1, Duration::from_millis(20)));
    drain(&slots[1]);
    assert_eq!(sched.take(&slots[1], ended(1), true), Take::Batch(1), "its end makes no room for the capped one");
    drain(&slots[1]);
    drain(&slots[0]);
    assert_eq!(sched.take(&slots[0], ended(0), true), Take::Empty);
    assert_eq!(sched.reserve(0, 100), 1);
}

#[test]
fn what_ended_before_a_handler_that_hangs_is_handed_over_once_and_by_others() {
    let mut sched = sched(vec![kind("a", false, 4, None)], 4);
    teach(&mut sched, 0, 10);
    let one = sched.join_thread();
    let outcomes = Outcomes::default();
    assert!(sched.push(&chunk(0, 0, 0..4)));
    assert_eq!(sched.take(&one, None, true), Take::Batch(0));
    for _ in 0..2 {
        begin(&one, Moment::now());
        one.finish(Moment::now(), Outcome::Completed);
    }
    begin(&one, Moment::now());
    assert!(outcomes.is_empty());
    sched.hand_over(&outcomes);
    assert_eq!(ids(&outcomes), [0, 1]);
    one.finish(Moment::now(), Outcome::Completed);
    one.hand_over(&outcomes);
    sched.hand_over(&outcomes);
    assert_eq!(ids(&outcomes), [2]);
}

#[test]
fn each_start_of_a_batch_asks_for_itself_and_the_rest_is_handed_back() {
    let mut sched = sched(vec![kind("a", false, 4, None), kind("b", true, 4, None)], 8);
    teach(&mut sched, 0, 10);
    let one = sched.join_thread();
    assert!(sched.push(&chunk(0, 0, 0..20)));
    assert_eq!(sched.take(&one, None, true), Take::Batch(0));
    assert_eq!(begin(&one, Moment::now()).id(), 0);
    one.finish(Moment::now(), Outcome::Completed);
    // It stood still here, past the deadline.
    let Next::Late(late) = one.begin(Moment::now(), || false) else { panic!("it starts something") };
    assert_eq!(late.iter().map(Task::id).collect::<Vec<_>>(), (1..20).collect::<Vec<_>>());
    assert!(matches!(one.begin(Moment::now(), || true), Next::Done));

    assert!(sched.push(&chunk(1, 0, 100..104)));
    let runs = starts(&sched.receive(256, true));
    assert_eq!(runs.len(), 4);
    begin_run(&mut sched, runs[0], Moment::now());
    let Begun::Late(late) = sched.begin_run(runs[1], Moment::now(), || false) else { panic!("it starts something") };
    assert_eq!(late.id(), 101);
    assert_eq!(sched.running(), 1 + 3, "a batch that is not ended, the run, and those that are fetched");
    assert!(sched.finish_run(runs[1], Moment::now()).is_none());
}

#[test]
fn what_the_loop_fetched_and_did_not_come_to_is_not_running_and_is_taken_away_by_a_death() {
    let mut sched = sched(vec![kind("b", true, 4, None)], 4);
    assert!(sched.push(&chunk(0, 0, 0..3)));
    let runs = starts(&sched.receive(256, true));
    begin_run(&mut sched, runs[0], Moment::now());
    assert_eq!(sched.running_holders().iter().map(|h| h.id).collect::<Vec<_>>(), [0]);
    let mut taken: Vec<i64> = sched.take_unstarted().iter().map(Task::id).collect();
    taken.sort_unstable();
    assert_eq!(taken, [1, 2]);
    // A new registration makes starts possible again; these are others' by now.
    assert!(matches!(sched.begin_run(runs[1], Moment::now(), || true), Begun::Gone));
    assert_eq!(sched.running(), 1);
}

#[test]
fn a_type_goes_to_its_own_handler_else_to_the_longest_prefix() {
    let kinds: Vec<Kind> = ["a:*", "a:b:*", "a:b:c", "*"].into_iter().map(|name| kind(name, false, 1, None)).collect();
    let found = |name| kind_of(&kinds, name);
    assert_eq!(
        [found("a:b:c"), found("a:b:cd"), found("a:x"), found("a:"), found("b")],
        [Some(2), Some(1), Some(0), Some(0), Some(3)]
    );
    assert_eq!(kind_of(&kinds[..3], "a"), None);
}
