//! `keymill generate`: data keys, many for one key or one for each line of a request file.

use std::path::{Path, PathBuf};

use base64_simd::STANDARD;
use clap::ArgGroup;
use keymill::{DataKeyBatch, Engine, GenerateDataKeyRequest};

use crate::{
    failure::Result,
    home::Home,
    interrupt,
    lines::{Lines, WINDOW_LINES_MAX},
    output::Output,
    progress::Total,
    records::{self, Parsed, Request},
    stream::Stream,
    warnings,
};

#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
#[command(group(ArgGroup::new("source").args(["key", "requests"]).required(true)))]
pub(crate) struct Args {
    /// The key to wrap under: an id or an alias
    #[arg(long, value_name = "KEY")]
    key: Option<String>,

    /// How many data keys; 0 makes none
    #[arg(long, value_name = "N", default_value_t = 1, allow_negative_numbers = true,
          value_parser = count)]
    count: u64,

    /// Bytes of each data key, 1 to 1024
    // The range is the engine's to judge.
    #[arg(long, value_name = "N", default_value_t = 32, allow_negative_numbers = true,
          value_parser = number_of_bytes)]
    bytes: u32,

    /// Additional authenticated data: this text's UTF-8 bytes; decryption needs the same
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    aad: String,

    /// Make the key store and the key if they are missing; the key has to be an alias
    #[arg(long)]
    create: bool,

    /// Read requests from a file of JSON Lines; `-` is standard input
    #[arg(long, value_name = "FILE", conflicts_with_all = ["count", "bytes", "aad", "create"])]
    requests: Option<PathBuf>,

    /// Wrap under the newest key version, into blobs that describe themselves
    #[arg(long)]
    advance: bool,

    /// Leave the plaintext keys out: wrapped keys for later
    #[arg(long)]
    without_plaintext: bool,

    /// Write to this file, mode 0600, which appears when it is complete and replaces one that is
    /// there; `-` is standard output
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

const EXAMPLES: &str = r#"Examples:
  keymill generate --key alias/app --count 10 --create
  keymill generate --key alias/app --count 1000000 --aad volume-7 --out keys.jsonl
  keymill generate --requests requests.jsonl --advance --without-plaintext --out wrapped.jsonl
  make-requests | keymill generate --requests - | use-keys

A request is one line, its Aad in base64 and optional:
  {"KeyId":"alias/app","NumberOfBytes":32,"Aad":"dm9sdW1lLTc="}

Its result is one line in the same place, its byte fields in base64:
  {"KeyId":"key-...","KeyVersionId":"key-...","Iv":"...","Plaintext":"...","CiphertextBlob":"...",
   "Algorithm":"AES_GCM","Aad":"dm9sdW1lLTc=","RequestId":"..."}

A refused line gets {"Error":{"Code":"...","Message":"..."},"RequestId":"..."} in its place; the
others are made all the same, and the exit code is 1."#;

fn count(text: &str) -> std::result::Result<u64, String> {
    text.parse().map_err(|_| format!("it is an integer from 0 to {}, in digits alone", u64::MAX))
}

fn number_of_bytes(text: &str) -> std::result::Result<u32, String> {
    text.parse()
        .map_err(|_| "InvalidParameter: NumberOfBytes is an integer from 1 to 1024".to_owned())
}

/// One of the four operations.
#[derive(Clone, Copy)]
struct Operation {
    advance: bool,
    without_plaintext: bool,
}

impl Operation {
    fn run(
        self,
        engine: &Engine,
        requests: &[GenerateDataKeyRequest<'_>],
    ) -> keymill::Result<DataKeyBatch> {
        match (self.advance, self.without_plaintext) {
            (false, false) => engine.generate_data_key_batch(requests),
            (false, true) => engine.generate_data_key_without_plaintext_batch(requests),
            (true, false) => engine.advance_generate_data_key_batch(requests),
            (true, true) => engine.advance_generate_data_key_without_plaintext_batch(requests),
        }
    }
}

pub(crate) fn run(home: &Home, args: &Args) -> Result<()> {
    interrupt::install()?;
    let operation = Operation { advance: args.advance, without_plaintext: args.without_plaintext };
    let out = args.out.as_deref();
    home.spare(out)?;
    let engine = match &args.key {
        Some(key) if args.create => home.open_or_create(key)?,
        _ => home.open()?,
    };
    let done = match (&args.requests, &args.key) {
        (Some(requests), _) => answer_lines(&engine, operation, requests, out),
        (None, Some(key)) => {
            let request = GenerateDataKeyRequest::new(key, args.bytes).aad(args.aad.as_bytes());
            repeat(&engine, operation, request, args.count, out)
        }
        // Clap asks for one of them.
        (None, None) => Ok(()),
    };
    if engine.initial_version_uses() > 0 {
        // The library has warned, in its own words.
        warnings::warn("here, --advance wraps under the newest version and follows the rotation");
    }
    done
}

/// Makes `count` data keys for the same request.
fn repeat(
    engine: &Engine,
    operation: Operation,
    request: GenerateDataKeyRequest<'_>,
    count: u64,
    out: Option<&Path>,
) -> Result<()> {
    let aad = STANDARD.encode_to_string(request.aad);
    let mut stream = Stream::new(Output::open(out)?, Total::Keys(count));
    let window = usize::try_from(count).unwrap_or(usize::MAX).min(WINDOW_LINES_MAX);
    let requests = vec![request; window];
    let mut made = 0;
    while made < count {
        interrupt::check()?;
        let len = usize::try_from(count - made).unwrap_or(usize::MAX).min(window);
        let batch = operation.run(engine, &requests[..len])?;
        for (index, key) in batch.iter().enumerate() {
            match key {
                Ok(key) => {
                    stream.rows.data_key(&key, &aad)?;
                    stream.made();
                }
                Err(error) => {
                    stream.refused(made + index as u64 + 1, error, batch.request_id(index))?;
                }
            }
        }
        stream.rows.flush()?;
        made += len as u64;
        stream.progress.inc(len as u64);
    }
    stream.finish("data keys")
}

/// Makes a data key for each line of a request file.
fn answer_lines(
    engine: &Engine,
    operation: Operation,
    requests: &Path,
    out: Option<&Path>,
) -> Result<()> {
    let (mut lines, total) = Lines::open(requests)?;
    let mut stream = Stream::new(Output::open(out)?, total);
    let mut arena = Vec::new();
    while let Some(window) = lines.next_window()? {
        interrupt::check()?;
        arena.clear();
        let first = window.first_number;
        let parsed: Vec<Parsed<Request<'_>>> = (first..)
            .zip(window.iter())
            .map(|(number, line)| records::request(line, number, &mut arena))
            .collect();
        answer_window(engine, operation, first, &parsed, &arena, &mut stream)?;
        stream.progress.inc(window.bytes_read);
    }
    stream.finish("requests")
}

fn answer_window(
    engine: &Engine,
    operation: Operation,
    first: u64,
    parsed: &[Parsed<Request<'_>>],
    arena: &[u8],
    stream: &mut Stream,
) -> Result<()> {
    let requests: Vec<_> = parsed
        .iter()
        .flatten()
        .map(|request| {
            GenerateDataKeyRequest::new(&request.key_id, request.number_of_bytes)
                .aad(&arena[request.aad.clone()])
        })
        .collect();
    let batch = operation.run(engine, &requests)?;
    let mut index = 0;
    for (number, line) in (first..).zip(parsed) {
        match line {
            Ok(request) => {
                match batch.get(index) {
                    Ok(key) => {
                        stream.rows.data_key(&key, &request.aad_text)?;
                        stream.made();
                    }
                    Err(error) => stream.refused(number, error, batch.request_id(index))?,
                }
                index += 1;
            }
            Err(why) => stream.malformed(number, why)?,
        }
    }
    stream.rows.flush()
}
