//! Forks: a child may use its parent's store, both keep counting the same budgets, and nobody hangs.
//!
//! Children answer through a socket; a child that hangs is ended by its own alarm, which fails the test.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::helpers::*;
use crate::{
    error::ErrorKind,
    store::{KeyStore, SqliteStore},
};

/// Every call once, and some leases. Returns the wraps leased.
fn use_store(store: &SqliteStore, version: &crate::keys::KeyVersionId) -> u64 {
    let mut wraps = 0;
    for need in 1..=4 {
        wraps += lease(store, version, need).wraps;
    }
    store.give_back(version, 2).unwrap();
    let new = direct();
    store.create(&new).unwrap();
    let image = store.load().unwrap();
    assert!(image.keys.iter().any(|key| key.record.id == new.record.id));
    store.change(&new.record.id, &mut |_| Ok(crate::store::KeyChange::Delete)).unwrap();
    store.changes().unwrap();
    wraps - 2
}

/// Ends the busy threads, also when the test fails.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn children_of_a_busy_parent_share_the_budget_with_it() {
    let (scratch, store) = Scratch::new();
    let second = scratch.open().unwrap();
    let key = direct();
    let version = key.version.id;
    store.create(&key).unwrap();
    let (stop, total) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for store in [&store, &store, &second] {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    total.fetch_add(lease(store, &version, 1).wraps, Ordering::Relaxed);
                }
            });
        }
        let _stop = Stop(&stop);
        for round in 0..6 {
            let child = Child::run(Birth::Fork, || {
                let own = use_store(&store, &version) + use_store(&second, &version);
                // A child of a child, while this one has connections of its own.
                let grandchild = Child::run(Birth::Fork, || use_store(&store, &version));
                own + use_store(&store, &version) + grandchild.join()
            });
            // The parent goes on at once, with the child beside it.
            let own = if round % 2 == 0 { use_store(&store, &version) } else { 0 };
            total.fetch_add(own + child.join(), Ordering::Relaxed);
        }
    });
    assert_eq!(lease(&store, &version, 0).spent, total.into_inner());
    assert_eq!(store.load().unwrap().keys.len(), 1);
}

/// A child drops the store, which was the parent's; the parent's goes on.
#[test]
fn a_child_may_drop_what_it_inherited() {
    let (_scratch, store) = Scratch::new();
    let key = direct();
    store.create(&key).unwrap();
    let mut store = Some(store);
    let child = Child::run(Birth::Fork, || {
        drop(store.take());
        0
    });
    assert_eq!(child.join(), 0);
    lease(store.as_ref().unwrap(), &key.version.id, 1);
}

#[test]
fn no_connection_is_open_in_a_child_until_it_makes_one() {
    let (scratch, store) = Scratch::new();
    store.create(&direct()).unwrap();
    let count = move || {
        let is_ours = |entry: std::io::Result<std::fs::DirEntry>| {
            let target = entry.and_then(|entry| std::fs::read_link(entry.path()));
            target.is_ok_and(|target| target.starts_with(scratch.home.path()))
        };
        std::fs::read_dir("/proc/self/fd")
            .unwrap()
            .filter_map(|entry| is_ours(entry).then_some(()))
            .count()
    };
    assert!(count() > 0);
    let child = Child::run(Birth::Fork, || {
        let before = count() as u64;
        store.load().unwrap();
        assert!(count() > 0);
        before
    });
    assert_eq!(child.join(), 0);
    store.load().unwrap();
}

/// The cases of a raw clone run in a child, since only a process with one thread can survive one.
#[test]
fn a_raw_clone_refuses_an_inherited_connection_and_takes_a_closed_one() {
    let (scratch, store) = Scratch::new();
    let key = direct();
    let version = key.version.id;
    store.create(&key).unwrap();
    let child = Child::run(Birth::Fork, || {
        // No connection of ours is open now: the clone may open one.
        let clone = Child::run(Birth::RawClone, || lease(&store, &version, 1).wraps);
        assert_eq!(clone.join(), 1);

        assert_eq!(lease(&store, &version, 1).wraps, 1);
        let clone = Child::run(Birth::RawClone, || {
            let error = store.changes().unwrap_err();
            assert_eq!(error.kind(), ErrorKind::StoreUnavailable);
            assert!(error.message().contains("cloned without"), "{error}");
            assert_eq!(kind(store.load()), ErrorKind::StoreUnavailable);
            assert_eq!(kind(scratch.open()), ErrorKind::StoreUnavailable);
            // Neither does its own fork wake the dead, nor is there anything to drop.
            let child = Child::run(Birth::Fork, || {
                assert_eq!(kind(store.load()), ErrorKind::StoreUnavailable);
                1
            });
            child.join()
        });
        assert_eq!(clone.join(), 1);
        lease(&store, &version, 1).wraps
    });
    assert_eq!(child.join(), 1);
    assert_eq!(lease(&store, &version, 0).spent, 3);
}

#[test]
fn a_store_that_was_replaced_meanwhile_is_not_taken_for_the_old_one() {
    let (scratch, store) = Scratch::new();
    store.create(&direct()).unwrap();
    let other = Scratch::new();
    drop(other.1);
    // Closes the connection, as every fork does.
    Child::run(Birth::Fork, || 0).join();
    std::fs::rename(&other.0.path, &scratch.path).unwrap();
    for suffix in ["-wal", "-shm"] {
        std::fs::remove_file(super::super::place::with_suffix(&scratch.path, suffix)).unwrap();
    }
    let error = store.load().err().unwrap();
    assert_eq!(error.kind(), ErrorKind::StoreUnavailable);
    assert!(error.message().contains("another store"), "{error}");
    std::fs::remove_file(&scratch.path).unwrap();
    assert_eq!(kind(store.load()), ErrorKind::StoreMissing);
}
