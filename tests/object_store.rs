//! Runs the object store example on the project's own sources, and on a store that was tampered with.

#[path = "../examples/object_store.rs"]
#[expect(dead_code, reason = "its main function")]
mod object_store;

use std::{fs, path::Path};

#[test]
fn the_sources_survive_the_store() {
    let home = tempfile::tempdir().unwrap();
    let (store, restored) = (home.path().join("objects"), home.path().join("restored"));
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let engine = object_store::open_engine(&home.path().join("keys")).unwrap();
    let stored = object_store::put(&engine, &sources, &store).unwrap();
    drop(engine);

    // Another process would do the same: open the engine again, restore, compare.
    let engine = object_store::open_engine(&home.path().join("keys")).unwrap();
    assert_eq!(object_store::get(&engine, &store, &restored).unwrap(), stored);
    let (files, bytes) = object_store::compare(&sources, &restored).unwrap();
    assert_eq!(files, stored);
    assert!(bytes > 100_000);
}

#[test]
fn a_key_moved_to_another_object_does_not_open() {
    let home = tempfile::tempdir().unwrap();
    let (files, store) = (home.path().join("files"), home.path().join("objects"));
    fs::create_dir_all(&files).unwrap();
    fs::write(files.join("a"), b"one").unwrap();
    fs::write(files.join("b"), b"two").unwrap();
    let engine = object_store::open_engine(&home.path().join("keys")).unwrap();
    object_store::put(&engine, &files, &store).unwrap();
    fs::copy(store.join("a.key"), store.join("b.key")).unwrap();
    let error = object_store::get(&engine, &store, &home.path().join("restored")).unwrap_err();
    assert!(error.to_string().contains("InternalFailure"), "{error}");
}
