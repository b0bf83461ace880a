//! Many keys: batch after batch, every answer read in full, every data key compared with every other.
//!
//! Of each data key 16 bytes are kept to be sorted in the end: two keys of 32 random bytes agree in those only if they
//! agree. One in a thousand is sent to `BatchDecrypt` and has to come back. The keys wrap nothing and end here.

use std::{
    mem,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use keymill::server::proto::{BatchResponse, DecryptRequest, GenerateDataKeyResponse};
use tokio::task::JoinSet;

use super::{
    BATCH_CONNECTIONS,
    process::Process,
    report::{Figure, Rows},
    requests::{BATCH_ITEMS, Generated, Set, Signed, Signing, generated_batch, open_again},
    wire::Connection,
};
use crate::{
    failure::{Failure, Result},
    progress,
};

/// Of so many data keys one is opened again.
const SAMPLE: usize = 1000;
/// The run has so many parts, between which requests are signed again and memory is looked at.
const PARTS: usize = 10;

/// What a task takes with it from part to part.
struct Reader {
    connection: Connection,
    /// The first 16 bytes of each data key.
    heads: Vec<u128>,
    sample: Vec<Generated>,
    opened: usize,
}

/// Makes at least `keys` data keys.
pub(super) async fn measure(
    signing: &Arc<Signing>,
    set: &mut Set,
    keys: usize,
    server: Option<&Process>,
    rows: &mut Rows,
) -> Result<()> {
    let batches = keys.div_ceil(BATCH_ITEMS);
    let mut memory = Vec::new();
    let mut look = || server.map(Process::resident_mib).transpose().map(|mib| memory.push(mib));
    look()?;
    let mut readers = Vec::new();
    for _ in 0..BATCH_CONNECTIONS {
        let connection = signing.target.connect().await?;
        readers.push(Reader { connection, heads: Vec::new(), sample: Vec::new(), opened: 0 });
    }
    let mut took = Duration::ZERO;
    let progress = progress::steps(PARTS as u64, "parts of many");
    for part in 0..PARTS {
        let span = part * batches / PARTS..(part + 1) * batches / PARTS;
        let requests = set.fresh(signing)?;
        let start = Instant::now();
        readers = read(signing, readers, &requests, span).await?;
        took += start.elapsed();
        if part == 0 || part == PARTS - 1 {
            look()?;
        }
        progress.inc(1);
    }
    progress.finish_and_clear();
    let mut heads = Vec::with_capacity(batches * BATCH_ITEMS);
    let mut opened = 0;
    for mut reader in readers {
        reader.open_sample(signing).await?;
        opened += reader.opened;
        heads.append(&mut reader.heads);
    }
    let count = heads.len();
    heads.sort_unstable();
    heads.dedup();
    if count != batches * BATCH_ITEMS || heads.len() != count {
        return Err(Failure::broke(
            format!("of {count} data keys, {} are different", heads.len()),
            "report this as a bug, and use no key of this server",
        ));
    }
    rows.one("many", Figure::Keys, count as f64);
    rows.one("many", Figure::KeysPerSecond, count as f64 / took.as_secs_f64());
    rows.one("many", Figure::Different, heads.len() as f64);
    rows.one("many", Figure::OpenedAgain, opened as f64);
    let figures = [Figure::MemoryAtStart, Figure::MemoryAtTenth, Figure::MemoryAtEnd];
    for (figure, mib) in figures.into_iter().zip(memory) {
        if let Some(mib) = mib {
            rows.one("many", figure, mib);
        }
    }
    Ok(())
}

/// Lets the readers share the batches of `span`.
async fn read(
    signing: &Arc<Signing>,
    readers: Vec<Reader>,
    requests: &Signed,
    span: std::ops::Range<usize>,
) -> Result<Vec<Reader>> {
    let next = Arc::new(AtomicUsize::new(span.start));
    let mut tasks = JoinSet::new();
    for mut reader in readers {
        let (next, requests) = (Arc::clone(&next), Arc::clone(requests));
        let (signing, end) = (Arc::clone(signing), span.end);
        tasks.spawn(async move {
            loop {
                let batch = next.fetch_add(1, Ordering::Relaxed);
                if batch >= end {
                    return Ok::<_, Failure>(reader);
                }
                let index = batch % requests.len();
                let answer = reader.connection.call(&requests[index]).await?.message()?;
                reader.take(answer, index)?;
                if reader.sample.len() >= BATCH_ITEMS {
                    reader.open_sample(&signing).await?;
                }
            }
        });
    }
    let mut readers = Vec::new();
    while let Some(ended) = tasks.join_next().await {
        readers.push(ended.expect("tasks do not panic and are not aborted")?);
    }
    Ok(readers)
}

impl Reader {
    fn take(&mut self, answer: BatchResponse<GenerateDataKeyResponse>, index: usize) -> Result<()> {
        for made in generated_batch(answer, index)? {
            let head = made.plaintext.first_chunk().expect("32 bytes were checked");
            self.heads.push(u128::from_ne_bytes(*head));
            if self.heads.len() % SAMPLE == 1 {
                self.sample.push(copied(&made));
            }
        }
        Ok(())
    }

    async fn open_sample(&mut self, signing: &Signing) -> Result<()> {
        let sample = mem::take(&mut self.sample);
        if !sample.is_empty() {
            open_again(signing, &sample, &mut self.connection).await?;
            self.opened += sample.len();
        }
        Ok(())
    }
}

/// In memory of its own: the rest of the answer is not kept for it.
fn copied(made: &Generated) -> Generated {
    let copy = |bytes: &Bytes| Bytes::copy_from_slice(bytes);
    let DecryptRequest { ciphertext_blob, aad, iv, .. } = &made.decrypt;
    let decrypt = DecryptRequest {
        ciphertext_blob: copy(ciphertext_blob),
        aad: copy(aad),
        iv: copy(iv),
        ..made.decrypt.clone()
    };
    Generated { decrypt, plaintext: copy(&made.plaintext) }
}
