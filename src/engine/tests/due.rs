//! What an engine does by itself, and when it trusts its clock.
//!
//! Method: an engine without threads whose two clocks tests turn, together or apart; what its thread would do is
//! called.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use crate::{
    engine::{DueEventKind, Engine, due::Trust},
    error::ErrorKind,
    keys::RotationPeriod,
    limits::WRAPS_BEFORE_ROTATION,
    request::{CreateKey, EncryptRequest},
    wrap::Scheme,
};

const HOUR: u64 = 3600;
const DAY: u64 = 24 * HOUR;

/// Seconds that have passed, and seconds by which the wall clock was set.
#[derive(Clone)]
struct Clocks(Arc<[AtomicU64; 2]>);

impl Clocks {
    fn pass(&self, seconds: u64) {
        self.0[0].fetch_add(seconds, Ordering::SeqCst);
    }

    fn set_by(&self, seconds: i64) {
        self.0[1].fetch_add(seconds.cast_unsigned(), Ordering::SeqCst);
    }

    fn wall(&self) -> SystemTime {
        let [passed, set] = [0, 1].map(|i| self.0[i].load(Ordering::SeqCst));
        SystemTime::UNIX_EPOCH + Duration::from_secs(passed.wrapping_add(set))
    }
}

fn set_up() -> (Engine, Clocks) {
    let clocks = Clocks(Arc::new([20_000 * DAY, 0].map(AtomicU64::new)));
    let (wall, steady) = (clocks.clone(), clocks.clone());
    let engine = Engine::builder()
        .clock(move || wall.wall())
        .monotonic(move || steady.0[0].load(Ordering::SeqCst) * 1000)
        .initial_spent(WRAPS_BEFORE_ROTATION - 10)
        .deterministic([7; 32])
        .unwrap();
    (engine, clocks)
}

/// What the thread does every minute.
fn tick(engine: &Engine) {
    let shared = engine.shared();
    shared.observe_clocks();
    let observed = shared.observation_left().is_zero();
    shared.run_due_quietly(if observed { Trust::Observed } else { Trust::Rotations });
}

fn create(engine: &Engine, alias: &str, rotates: bool) {
    let alias = Some(alias.to_owned());
    let rotation_period = rotates.then(|| RotationPeriod::parse("7d").unwrap());
    engine.create_key(&CreateKey { alias, rotation_period, ..CreateKey::default() }).unwrap();
}

fn exists(engine: &Engine, alias: &str) -> bool {
    engine.describe_key(alias).is_ok()
}

#[test]
fn a_jump_of_the_clock_deletes_nothing() {
    for days in [8, 100, 360, 3650] {
        let (engine, clocks) = set_up();
        create(&engine, "alias/a", false);
        create(&engine, "alias/r", true);
        engine.schedule_key_deletion("alias/a", 7).unwrap();
        tick(&engine);
        clocks.set_by(days * DAY.cast_signed());
        for _ in 0..23 {
            tick(&engine);
            engine.list_keys().unwrap();
            clocks.pass(HOUR);
        }
        assert!(exists(&engine, "alias/a"), "{days}");
        // What can be undone follows the clock.
        assert_eq!(engine.describe_key("alias/r").unwrap().versions.len(), 2);
        // A clock that is put right again leaves no trace.
        clocks.set_by(-days * DAY.cast_signed());
        for _ in 0..30 {
            tick(&engine);
            clocks.pass(HOUR);
        }
        engine.cancel_key_deletion("alias/a").unwrap();
    }
}

#[test]
fn a_deletion_happens_by_itself_once_the_clocks_have_agreed_for_a_day() {
    let (engine, clocks) = set_up();
    create(&engine, "alias/a", false);
    let id = engine.schedule_key_deletion("alias/a", 7).unwrap().key_id;
    for _ in 0..7 * 24 {
        tick(&engine);
        assert!(exists(&engine, "alias/a"));
        clocks.pass(HOUR);
    }
    // An engine that has seen the date pass.
    tick(&engine);
    assert!(!exists(&engine, "alias/a"));
    let events = engine.take_due_events();
    assert!(matches!(events[..], [ref event] if matches!(event.kind, DueEventKind::Deleted)));
    assert_eq!((events[0].key_id, events[0].due), (id, Some(clocks.wall())));
    assert!(engine.take_due_events().is_empty());
    assert_eq!(engine.due_totals().deletions, 1);

    // One that meets a date that has passed.
    create(&engine, "alias/b", false);
    engine.schedule_key_deletion("alias/b", 7).unwrap();
    clocks.set_by(8 * DAY.cast_signed());
    for _ in 0..24 {
        tick(&engine);
        assert!(exists(&engine, "alias/b"));
        clocks.pass(HOUR);
    }
    tick(&engine);
    assert!(!exists(&engine, "alias/b"));
}

#[test]
fn what_is_in_doubt_is_deleted_only_by_whoever_says_that_the_clock_is_right() {
    let (engine, clocks) = set_up();
    create(&engine, "alias/a", false);
    engine.schedule_key_deletion("alias/a", 7).unwrap();
    clocks.set_by(400 * DAY.cast_signed());
    for _ in 0..100 {
        tick(&engine);
        clocks.pass(HOUR);
    }
    let report = engine.run_due().unwrap();
    assert!(report.deleted.is_empty());
    assert_eq!(report.failed[0].1.kind(), ErrorKind::StateModifiedFailed);
    assert!(report.failed[0].1.message().contains("clock"), "{}", report.failed[0].1);
    assert!(exists(&engine, "alias/a"));
    assert_eq!(engine.run_due_by_this_clock().unwrap().deleted.len(), 1);
    // What is not due is not deleted by that either.
    create(&engine, "alias/b", false);
    engine.schedule_key_deletion("alias/b", 7).unwrap();
    assert!(engine.run_due_by_this_clock().unwrap().deleted.is_empty());
}

#[test]
fn a_key_that_was_dated_by_a_clock_far_ahead_rotates_and_gets_an_honest_date() {
    let (engine, clocks) = set_up();
    clocks.set_by(70 * 365 * DAY.cast_signed());
    create(&engine, "alias/r", true);
    clocks.set_by(-70 * 365 * DAY.cast_signed());
    // What is shown agrees with what is done.
    let shown = engine.describe_key("alias/r").unwrap().next_rotation_date.unwrap();
    assert_eq!(shown, clocks.wall());
    assert_eq!(engine.run_due().unwrap().rotated.len(), 1);
    let key = engine.describe_key("alias/r").unwrap();
    assert_eq!(key.versions.len(), 2);
    assert_eq!(key.next_rotation_date, Some(clocks.wall() + Duration::from_secs(7 * DAY)));
    assert!(engine.run_due().unwrap().rotated.is_empty());
    // By `set_rotation`, too.
    clocks.set_by(70 * 365 * DAY.cast_signed());
    create(&engine, "alias/s", false);
    clocks.set_by(-70 * 365 * DAY.cast_signed());
    let period = Some(RotationPeriod::parse("9d").unwrap());
    let key = engine.set_rotation("alias/s", period).unwrap();
    assert_eq!(key.next_rotation_date, Some(clocks.wall() + Duration::from_secs(9 * DAY)));
    assert_eq!(engine.take_due_events().len(), 2);
}

#[test]
fn a_new_version_after_many_wraps_is_told_like_due_work() {
    let (engine, _) = set_up();
    let (alias, scheme) = (Some("alias/d".to_owned()), Some(Scheme::Direct));
    let rotation_period = Some(RotationPeriod::parse("7d").unwrap());
    engine
        .create_key(&CreateKey { alias, scheme, rotation_period, ..CreateKey::default() })
        .unwrap();
    for _ in 0..12 {
        engine.advance_encrypt(&EncryptRequest::new("alias/d", b"text")).unwrap();
    }
    let versions = engine.describe_key("alias/d").unwrap().versions;
    let events = engine.take_due_events();
    // Each new version counts as spent as the first one here, so there are several.
    assert!(!events.is_empty() && versions.len() == 1 + events.len());
    assert_eq!(events[0].due, None);
    let DueEventKind::Rotated { key_version_id } = events[0].kind else { panic!("{events:?}") };
    assert_eq!(key_version_id, versions[1].key_version_id);
    assert_eq!(engine.due_totals().rotations, events.len() as u64);
}
