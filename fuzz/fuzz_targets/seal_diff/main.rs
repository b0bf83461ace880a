//! Compares `seal_many` and `open_many` of one tier with AWS-LC: batches of any count, lengths, keys and places, some
//! messages forged.
//!
//! Keys reach the kernels in several ways: set up one by one, together, or derived; one for all or one for each
//! message. Every way that fits the batch is taken, and each must give the oracle's bytes, so they also agree.
//!
//! `shape.rs` is the input, `batch.rs` what follows from it, `oracle.rs` AWS-LC.

#![no_main]

mod batch;
mod oracle;
mod shape;

use std::sync::LazyLock;

use batch::{Batch, Slice, TAG_LEN};
use keymill::{
    Tier,
    kernels::{Key, KeySet, Place, Root, Selection, open_many, seal_many},
};
use libfuzzer_sys::fuzz_target;
use shape::Shape;

static TIER: LazyLock<Tier> = LazyLock::new(|| Tier::detect().expect("KEYMILL_TIER names a tier"));

fuzz_target!(
    init: eprintln!("seal_diff: tier {}", *TIER),
    |shape: Shape| check(&shape)
);

fn check(shape: &Shape) {
    let batch = Batch::new(shape);
    let keys: Vec<Key> =
        batch.materials.iter().map(|key| Key::new(*TIER, key).expect("memory")).collect();
    let sets = key_sets(&batch);

    let owners = || batch.messages.iter().map(|message| message.key);
    check_both(shape, &batch, "Key, each", &Selection::each(owners().map(|key| &keys[key])));
    if let Some(key) = batch.one_key {
        check_both(shape, &batch, "Key, for all", &keys[key].for_all());
    }
    for (name, set) in &sets {
        check_both(shape, &batch, &format!("{name}, each"), &set.each(owners()));
        if let Some(key) = batch.one_key {
            check_both(shape, &batch, &format!("{name}, for all"), &set.for_all(key));
        }
    }
}

/// The keys of `batch` set up together, in every way in which they can be.
fn key_sets(batch: &Batch) -> Vec<(&'static str, KeySet)> {
    let mut sets = Vec::new();
    let materials: Result<Vec<[u8; 32]>, _> =
        batch.materials.iter().map(|key| key.as_slice().try_into()).collect();
    if let Ok(materials) = materials {
        sets.push(("KeySet::set_up", KeySet::set_up(*TIER, &materials)));
    }
    if let Some((root, salts)) = &batch.derivation {
        let root = Root::new(*TIER, root).expect("memory");
        sets.push(("KeySet::derive", KeySet::derive(&root, salts)));
    }
    sets
}

fn check_both(shape: &Shape, batch: &Batch, way: &str, keys: &Selection<'_>) {
    check_seal(shape, batch, way, keys);
    check_open(shape, batch, way, keys);
}

fn check_seal(shape: &Shape, batch: &Batch, way: &str, keys: &Selection<'_>) {
    let &Shape { len, offset, after, lead, .. } = shape;
    let stride = offset + len + TAG_LEN + after;
    let ivs: Vec<_> = batch.messages.iter().map(|message| message.iv).collect();
    let aads: Vec<&[u8]> = batch.messages.iter().map(|message| &message.aad[..]).collect();
    let mut out = Slice::filled(lead, ivs.len() * stride, FILLER);
    let place = Place { stride, offset };
    seal_many(keys, &ivs, &aads, len, &batch.plaintexts, &mut out, place);

    let filler = vec![FILLER; offset.max(after)];
    for (i, (place, message)) in out.chunks_exact(stride).zip(&batch.messages).enumerate() {
        let (before, rest) = place.split_at(offset);
        let (sealed, behind) = rest.split_at(len + TAG_LEN);
        assert_same(sealed, &message.sealed, || format!("sealed message {i}, {way}"));
        let untouched = before == &filler[..offset] && behind == &filler[..after];
        assert!(untouched, "written outside the place of message {i}, {way}");
    }
}

fn check_open(shape: &Shape, batch: &Batch, way: &str, keys: &Selection<'_>) {
    let &Shape { len, lead, .. } = shape;
    let shown = || batch.messages.iter().map(|message| &message.shown);
    let ivs: Vec<_> = shown().map(|shown| shown.iv).collect();
    let aads: Vec<&[u8]> = shown().map(|shown| &shown.aad[..]).collect();
    let sealed: Vec<&[u8]> = shown().map(|shown| &shown.sealed[..]).collect();
    let mut out = Slice::filled(lead, ivs.len() * len, FILLER);
    // The contrary of what is expected, so that a verdict left unwritten shows.
    let mut verdicts: Vec<bool> = shown().map(|shown| !shown.valid).collect();
    open_many(keys, &ivs, &aads, &sealed, len, &mut out, &mut verdicts);

    let zeros = vec![0; len];
    for (i, (verdict, shown)) in verdicts.iter().zip(shown()).enumerate() {
        assert_eq!(*verdict, shown.valid, "verdict of message {i}, {way}");
        let part = i * len..(i + 1) * len;
        let expected = if shown.valid { &batch.plaintexts[part.clone()] } else { &zeros };
        assert_same(&out[part], expected, || format!("opened message {i}, {way}"));
    }
}

/// Whole slices first: libFuzzer traces every comparison in a loop, which took half of the time.
fn assert_same(got: &[u8], expected: &[u8], what: impl FnOnce() -> String) {
    if got != expected {
        let byte = got.iter().zip(expected).position(|(got, expected)| got != expected);
        panic!("{} differs from byte {byte:?} on", what());
    }
}

/// What output memory holds before a call.
const FILLER: u8 = 0xa5;
