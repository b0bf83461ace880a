//! Batches on the wire: every item authorised by itself, one engine call for all that are good, results in order.
//!
//! The response is written straight from the columns of the engine's result. Nothing is allocated per item but what the
//! request's own texts need.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::{
    api::generating,
    encode::{self, DataKeyFields, DecryptedFields, Fields, ResultFields, Sink},
    metrics::OK,
    proto::DecryptRequest,
    refusal::Refusal,
    work::{Asks, Done, Generate, Tally, decrypting, is_key_name, reading},
};
use crate::{
    batch::result::{DataKeyBatch, DataKeyRef, DecryptedBatch, DecryptedRef},
    clients::Client,
    engine::Engine,
    error::Error,
    keys::{KeyId, KeyVersionId},
    limits::AUDIT_KEYS_ASKED_MAX,
    request_id::RequestId,
};

/// Makes a data key for every item.
pub(super) fn generate(
    engine: &Engine,
    client: &Client,
    advance: bool,
    items: &[(Generate, String)],
) -> Result<Done, Refusal> {
    let Sorted { good, refused } = sort(items, Generate::check);
    let mut batch = DataKeyBatch::new();
    engine.generate_batch_as(client, &mut batch, generating(advance), &good)?;
    let ids = Ids { batch: engine.request_id()?, items: engine.request_id()? };
    Ok(Response { batch: &batch, ids, refused, items, advance }.done())
}

/// Decrypts every item.
pub(super) fn decrypt(
    engine: &Engine,
    client: &Client,
    advance: bool,
    items: &[(DecryptRequest, String)],
) -> Result<Done, Refusal> {
    let Sorted { good, refused } = sort(items, decrypting);
    let batch = engine.decrypt_batch_as(client, &good, reading(advance))?;
    let ids = Ids { batch: engine.request_id()?, items: engine.request_id()? };
    Ok(Response { batch: &batch, ids, refused, items, advance }.done())
}

/// Items that are good, for the engine, and those that are not, each with its index.
struct Sorted<Q> {
    good: Vec<Q>,
    refused: Vec<(usize, Refusal)>,
}

/// Sorts items by what `check` says of them.
fn sort<'a, I, Q>(
    items: &'a [(I, String)],
    check: impl Fn(&'a I) -> Result<Q, Refusal>,
) -> Sorted<Q> {
    let mut sorted = Sorted { good: Vec::with_capacity(items.len()), refused: Vec::new() };
    for (index, (item, _)) in items.iter().enumerate() {
        match check(item) {
            Ok(request) => sorted.good.push(request),
            Err(refusal) => sorted.refused.push((index, refusal)),
        }
    }
    sorted
}

/// The id of the batch, and the one that those of its items count up from.
struct Ids {
    batch: RequestId,
    items: RequestId,
}

/// The results of a batch in the engine's words.
trait Results {
    /// A result that is there.
    type Made<'a>
    where
        Self: 'a;

    fn get(&self, index: usize) -> Result<Self::Made<'_>, &Error>;

    fn version(made: &Self::Made<'_>) -> KeyVersionId;

    /// Passes the single operation's response to `sink`, as the result of an item.
    fn write(made: &Self::Made<'_>, names: &Names<'_>, reference: &str, sink: &mut impl Sink);
}

/// What a response says in texts.
struct Names<'a> {
    key_id: &'a str,
    request_id: &'a str,
    /// Of the Advance operation; empty otherwise.
    key_version_id: &'a str,
}

impl Results for DataKeyBatch {
    type Made<'a> = DataKeyRef<'a>;

    fn get(&self, index: usize) -> Result<DataKeyRef<'_>, &Error> {
        self.get(index)
    }

    fn version(made: &DataKeyRef<'_>) -> KeyVersionId {
        made.key_version_id()
    }

    #[inline]
    fn write(made: &DataKeyRef<'_>, names: &Names<'_>, reference: &str, sink: &mut impl Sink) {
        let response = DataKeyFields {
            key_id: names.key_id,
            iv: made.iv(),
            plaintext: made.plaintext().unwrap_or_default(),
            ciphertext_blob: made.ciphertext_blob(),
            request_id: names.request_id,
            algorithm: made.algorithm(),
            key_version_id: names.key_version_id,
        };
        let result: Result<_, NoFields> = Ok(response);
        sink.message(1, &ResultFields { result, reference });
    }
}

impl Results for DecryptedBatch {
    type Made<'a> = DecryptedRef<'a>;

    fn get(&self, index: usize) -> Result<DecryptedRef<'_>, &Error> {
        self.get(index)
    }

    fn version(made: &DecryptedRef<'_>) -> KeyVersionId {
        made.key_version_id()
    }

    #[inline]
    fn write(made: &DecryptedRef<'_>, names: &Names<'_>, reference: &str, sink: &mut impl Sink) {
        let response = DecryptedFields {
            key_id: names.key_id,
            plaintext: made.plaintext(),
            request_id: names.request_id,
            algorithm: made.algorithm(),
            key_version_id: names.key_version_id,
        };
        let result: Result<_, NoFields> = Ok(response);
        sink.message(1, &ResultFields { result, reference });
    }
}

/// The response to a batch.
struct Response<'a, B, I> {
    batch: &'a B,
    ids: Ids,
    /// What the engine has not seen, sorted by index.
    refused: Vec<(usize, Refusal)>,
    items: &'a [(I, String)],
    advance: bool,
}

impl<B: Results, I: Asks> Response<'_, B, I> {
    /// What became of each item, in order, with its index: the engine's result, or why the engine has not seen it.
    fn outcomes(&self) -> impl Iterator<Item = (usize, Result<B::Made<'_>, Refused<'_>>)> {
        let mut unseen = self.refused.iter().peekable();
        let mut seen = 0;
        (0..self.items.len()).map(move |index| {
            if let Some((_, refusal)) = unseen.next_if(|(refused, _)| *refused == index) {
                return (index, Err(Refused::Unseen(refusal)));
            }
            seen += 1;
            (index, self.batch.get(seen - 1).map_err(Refused::ByEngine))
        })
    }

    fn done(self) -> Done {
        let (body, tally) = (encode::body(&self), self.tally());
        Done { body, request_id: self.ids.batch, version: None, tally }
    }

    fn tally(&self) -> Tally {
        let mut codes: BTreeMap<&'static str, u64> = BTreeMap::new();
        let mut keys: HashMap<KeyId, u64> = HashMap::new();
        // Items of one key mostly follow each other.
        let mut run: Option<(KeyId, u64)> = None;
        let mut made_count = 0;
        let mut asked = BTreeSet::new();
        for (index, outcome) in self.outcomes() {
            match outcome {
                Ok(made) => {
                    made_count += 1;
                    let key = B::version(&made).key_id();
                    match &mut run {
                        Some((of_run, count)) if *of_run == key => *count += 1,
                        _ => {
                            if let Some((key, count)) = run.replace((key, 1)) {
                                *keys.entry(key).or_default() += count;
                            }
                        }
                    }
                }
                Err(refused) => {
                    *codes.entry(refused.code()).or_default() += 1;
                    let name = self.items[index].0.asked();
                    if asked.len() < AUDIT_KEYS_ASKED_MAX
                        && let Some(name) = name.filter(|name| is_key_name(name))
                        && !asked.contains(name)
                    {
                        asked.insert(name.to_owned());
                    }
                }
            }
        }
        if let Some((key, count)) = run {
            *keys.entry(key).or_default() += count;
        }
        if made_count > 0 {
            codes.insert(OK, made_count);
        }
        Tally { keys: keys.into_iter().collect(), codes: codes.into_iter().collect(), asked }
    }
}

impl<B: Results, I: Asks> Fields for Response<'_, B, I> {
    fn each<S: Sink>(&self, sink: &mut S) {
        for (index, outcome) in self.outcomes() {
            let mut text = RequestId::TEXT;
            let request_id = match S::COUNTS {
                // All are as long.
                true => std::str::from_utf8(&text).expect("ASCII"),
                false => self.ids.items.item(index).encode(&mut text),
            };
            let reference = &self.items[index].1;
            match outcome {
                Ok(made) => {
                    let version = B::version(&made);
                    let key_id = version.key_id();
                    let key_version_id = if self.advance { version.as_str() } else { "" };
                    let names = Names { key_id: key_id.as_str(), request_id, key_version_id };
                    B::write(&made, &names, reference, sink);
                }
                Err(refused) => {
                    let refusal = refused.refusal();
                    let error = refusal.fields(request_id);
                    let result: Result<NoFields, _> = Err(error);
                    sink.message(1, &ResultFields { result, reference });
                }
            }
        }
        let mut text = RequestId::TEXT;
        sink.bytes(2, self.ids.batch.encode(&mut text).as_bytes());
    }
}

/// Of a refused item.
enum Refused<'a> {
    Unseen(&'a Refusal),
    ByEngine(&'a Error),
}

impl Refused<'_> {
    fn code(&self) -> &'static str {
        match self {
            Self::Unseen(refusal) => refusal.code,
            Self::ByEngine(error) => error.code(),
        }
    }

    fn refusal(&self) -> Refusal {
        match self {
            Self::Unseen(refusal) => (*refusal).clone(),
            Self::ByEngine(error) => Refusal::from(*error),
        }
    }
}

/// A message that is not there.
struct NoFields;

impl Fields for NoFields {
    fn each<S: Sink>(&self, _: &mut S) {}
}
