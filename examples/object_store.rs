//! A small object store with one data key per object.
//!
//! ```text
//! cargo run --release --example object_store -- FOLDER [STORE]
//! ```
//!
//! STORE is `target/object-store` unless named; objects of an earlier run are replaced. Takes a folder, asks the
//! engine **once** for one key per file, with the object's path as AAD, encrypts each file with its key, and writes
//! the wrapped key beside it. Then it restores the folder through one `decrypt_batch` and compares every byte. What
//! lies in the store is useless without the engine's root key, and a wrapped key that is moved to another path does
//! not open.
//!
//! A store whose KEK rotates would use `advance_generate_data_key_batch` and `advance_decrypt_batch`: the same calls,
//! with a blob that holds IV and key version itself.

use std::{
    error::Error,
    fs,
    path::{Path, PathBuf},
};

use keymill::{
    CreateKey, DecryptRequest, Engine, GenerateDataKeyRequest, RootKey,
    limits::{IV_LEN, KEY_ID_LEN},
};
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const KEK: &str = "alias/objects";

/// The AEAD of one object. Its key seals this one object and nothing else, so that the nonce may be zero.
fn object_cipher(data_key: &[u8]) -> Result<(LessSafeKey, Nonce)> {
    let key = UnboundKey::new(&AES_256_GCM, data_key).map_err(|_| "a data key of 32 bytes")?;
    Ok((LessSafeKey::new(key), Nonce::assume_unique_for_key([0; IV_LEN])))
}

/// Encrypts every file under `folder` into `store`. Returns how many there were.
pub(crate) fn put(engine: &Engine, folder: &Path, store: &Path) -> Result<usize> {
    let paths = files_below(folder)?;
    let names: Vec<_> =
        paths.iter().map(|path| object_name(folder, path)).collect::<Result<_>>()?;
    let requests: Vec<_> = names
        .iter()
        .map(|name| GenerateDataKeyRequest::new(KEK, 32).aad(name.as_bytes()))
        .collect();
    let batch = engine.generate_data_key_batch(&requests)?;
    for ((path, name), made) in paths.iter().zip(&names).zip(batch.iter()) {
        let made = made.map_err(keymill::Error::from)?;
        let (cipher, nonce) = object_cipher(made.plaintext().ok_or("asked for with plaintext")?)?;
        let mut object = fs::read(path)?;
        cipher
            .seal_in_place_append_tag(nonce, Aad::from(name.as_bytes()), &mut object)
            .map_err(|_| "the object is too large")?;
        let place = store.join(name);
        fs::create_dir_all(place.parent().ok_or("an object has a parent")?)?;
        fs::write(with_suffix(&place, ".object"), object)?;
        let key_id = made.key_id();
        let wrapped = [key_id.as_str().as_bytes(), made.iv(), made.ciphertext_blob()].concat();
        fs::write(with_suffix(&place, ".key"), wrapped)?;
    }
    Ok(paths.len())
}

/// Decrypts every object of `store` into `folder`. Returns how many there were.
pub(crate) fn get(engine: &Engine, store: &Path, folder: &Path) -> Result<usize> {
    let mut objects = Vec::new();
    for path in files_below(store)? {
        let Some(place) = path.to_str().and_then(|path| path.strip_suffix(".key")) else {
            continue;
        };
        let (name, wrapped) = (object_name(store, Path::new(place))?, fs::read(&path)?);
        if wrapped.len() < KEY_ID_LEN + IV_LEN {
            return Err(format!("{name}: the wrapped key is cut").into());
        }
        objects.push((name, PathBuf::from(place), wrapped));
    }
    let requests: Vec<_> = (objects.iter())
        .map(|(name, _, wrapped)| {
            let (key_id, rest) = wrapped.split_at(KEY_ID_LEN);
            let (iv, blob) = rest.split_at(IV_LEN);
            let key_id = std::str::from_utf8(key_id).unwrap_or_default();
            DecryptRequest::new(blob).key_id(key_id).iv(iv).aad(name.as_bytes())
        })
        .collect();
    let batch = engine.decrypt_batch(&requests)?;
    for ((name, place, _), opened) in objects.iter().zip(batch.iter()) {
        let opened = opened.map_err(|error| format!("{name}: {error}"))?;
        let (cipher, nonce) = object_cipher(opened.plaintext())?;
        let mut object = fs::read(with_suffix(place, ".object"))?;
        let plain = cipher
            .open_in_place(nonce, Aad::from(name.as_bytes()), &mut object)
            .map_err(|_| format!("{name}: the object was changed"))?;
        let target = folder.join(name);
        fs::create_dir_all(target.parent().ok_or("an object has a parent")?)?;
        fs::write(target, plain)?;
    }
    Ok(objects.len())
}

/// Compares every byte below two folders. Returns how many files and bytes they have.
pub(crate) fn compare(one: &Path, other: &Path) -> Result<(usize, usize)> {
    let (ours, theirs) = (files_below(one)?, files_below(other)?);
    let mut bytes = 0;
    for (a, b) in ours.iter().zip(&theirs) {
        let content = fs::read(a)?;
        if object_name(one, a)? != object_name(other, b)? || content != fs::read(b)? {
            return Err(format!("{} and {} differ", a.display(), b.display()).into());
        }
        bytes += content.len();
    }
    if ours.len() != theirs.len() {
        return Err(format!("{} files and {} files", ours.len(), theirs.len()).into());
    }
    Ok((ours.len(), bytes))
}

/// Opens the engine whose keys lie in `home`, or makes it with its root key and its KEK.
pub(crate) fn open_engine(home: &Path) -> Result<Engine> {
    fs::create_dir_all(home)?;
    let (store, root) = (home.join("keys.db"), home.join("root.key"));
    if store.exists() {
        return Ok(Engine::open(store, &RootKey::from_file(&root)?)?);
    }
    let engine = Engine::create(store, &RootKey::create_file(&root)?)?;
    engine.create_key(&CreateKey { alias: Some(KEK.into()), ..CreateKey::default() })?;
    Ok(engine)
}

fn files_below(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder)? {
            let entry = entry?;
            let kind = entry.file_type()?;
            if kind.is_dir() {
                folders.push(entry.path());
            } else if kind.is_file() {
                files.push(entry.path());
            }
        }
    }
    files.sort_unstable();
    Ok(files)
}

fn object_name(folder: &Path, path: &Path) -> Result<String> {
    let name = path.strip_prefix(folder)?.to_str().ok_or("object names are UTF-8")?;
    Ok(name.to_owned())
}

fn with_suffix(place: &Path, suffix: &str) -> PathBuf {
    let mut name = place.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

fn main() -> Result<()> {
    let arguments: Vec<_> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let (folder, store) = match &arguments[..] {
        [folder] => (folder.clone(), PathBuf::from("target/object-store")),
        [folder, store] => (folder.clone(), store.clone()),
        _ => return Err("usage: object_store FOLDER [STORE]".into()),
    };
    if !folder.is_dir() {
        return Err(format!("{} is no folder", folder.display()).into());
    }
    let (objects, restored) = (store.join("objects"), store.join("restored"));
    for old in [&objects, &restored] {
        if old.exists() {
            fs::remove_dir_all(old)?;
        }
    }
    let engine = open_engine(&store.join("keys"))?;
    let stored = put(&engine, &folder, &objects)?;
    let opened = get(&engine, &objects, &restored)?;
    let (files, bytes) = compare(&folder, &restored)?;
    println!(
        "stored {stored} objects, opened {opened}; {files} files, {bytes} bytes compared equal"
    );
    println!("they lie in {}", store.display());
    Ok(())
}
