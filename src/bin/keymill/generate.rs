//! `keymill generate`: data keys, many for one key or one for each line of a request file.

use std::{ops::Range, path::PathBuf};

use base64_simd::STANDARD;
use clap::ArgGroup;
use keymill::{
    DataKeyBatch, Engine, GenerateDataKeyRequest, Operation, SameAad,
    limits::{AAD_LEN_MAX, NUMBER_OF_BYTES_MAX},
};

use crate::{
    failure::Result,
    home::Home,
    identity::Named,
    interrupt,
    lines::{Lines, WINDOW_LINES_MAX},
    output::Output,
    progress::Total,
    records::{self, Parsed, Request},
    rows::{Fields, Format, Row, Window},
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

    /// Write JSON Lines, or an Arrow IPC stream
    #[arg(long, value_enum, default_value_t = Format::Jsonl)]
    format: Format,

    /// Write to this file, mode 0600, which appears when it is complete and replaces one that is
    /// there; `-` is standard output (see below for what is no plain file)
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

const EXAMPLES: &str = r#"Examples:
  keymill generate --key alias/app --count 10 --create
  keymill generate --key alias/app --count 1000000 --aad volume-7 --out keys.jsonl
  keymill generate --requests requests.jsonl --advance --without-plaintext --out wrapped.jsonl
  make-requests | keymill generate --requests - | use-keys
  keymill generate --key alias/app --count 1000000 --format arrow --out keys.arrow

A request is one line, its Aad in base64 and optional (null is none):
  {"KeyId":"alias/app","NumberOfBytes":32,"Aad":"dm9sdW1lLTc="}

Its result is one line in the same place, its byte fields in base64:
  {"KeyId":"key-...","KeyVersionId":"key-...","Iv":"...","Plaintext":"...","CiphertextBlob":"...",
   "Algorithm":"AES_GCM","Aad":"dm9sdW1lLTc=","RequestId":"..."}

A refused line gets {"Error":{"Code":"...","Message":"..."},"RequestId":"..."} in its place; the
others are made all the same, and the exit code is 1.

--format arrow writes an Arrow IPC stream instead: columns of the same names, bytes as they are, and
a struct Error that is null unless the request was refused.

A file that --out replaces is a new one: mode, owner, ACLs and other hard links of the old one are
not kept. A symbolic link stays and its target is replaced, but no link that somebody else has put
into a directory like /tmp. Pipes, devices and open descriptors (/dev/stdout, /dev/fd/3) are written
as rows come, after what is there; so is a file that is a mount point, which an unfinished run
leaves empty. A FIFO is waited for. No input, and no file of the key store, is ever written over."#;

fn count(text: &str) -> std::result::Result<u64, String> {
    text.parse().map_err(|_| format!("it is an integer from 0 to {}, in digits alone", u64::MAX))
}

fn number_of_bytes(text: &str) -> std::result::Result<u32, String> {
    text.parse()
        .map_err(|_| "InvalidParameter: NumberOfBytes is an integer from 1 to 1024".to_owned())
}

pub(crate) fn run(home: &Home, args: &Args) -> Result<()> {
    interrupt::install()?;
    let output = Named::output("--out", args.out.as_deref());
    home.spare(&output)?;
    let lines = match &args.requests {
        None => None,
        Some(requests) => {
            let input = Named::input("--requests", requests);
            output.spares(&input, "whose requests would be lost")?;
            Some(Lines::open("--requests", requests)?)
        }
    };
    // Before anything is made: that there is no place for the rows should not be told after the work.
    let out = Output::open(args.out.as_deref())?;
    let engine = match &args.key {
        // What the engine will refuse makes no key on the way.
        Some(key) if args.create && args.are_within_limits() => home.open_or_create(key)?,
        _ => home.open()?,
    };
    let done = match (lines, &args.key) {
        (Some((lines, total)), _) => {
            args.stream(out, total).and_then(|stream| answer_lines(&engine, args, lines, stream))
        }
        (None, Some(key)) => args
            .stream(out, Total::Keys(args.count))
            .and_then(|stream| repeat(&engine, args, key, stream)),
        // Clap asks for one of them.
        (None, None) => Ok(()),
    };
    if engine.initial_version_uses() > 0 {
        // The library has warned, in its own words.
        warnings::warn("here, --advance wraps under the newest version and follows the rotation");
    }
    done
}

impl Args {
    /// Whether the engine takes the length and the AAD. It says itself what is wrong with them.
    fn are_within_limits(&self) -> bool {
        let len = usize::try_from(self.bytes).unwrap_or(usize::MAX);
        (1..=NUMBER_OF_BYTES_MAX).contains(&len) && self.aad.len() <= AAD_LEN_MAX
    }

    fn operation(&self) -> Operation {
        match (self.advance, self.without_plaintext) {
            (false, false) => Operation::GenerateDataKey,
            (false, true) => Operation::GenerateDataKeyWithoutPlaintext,
            (true, false) => Operation::AdvanceGenerateDataKey,
            (true, true) => Operation::AdvanceGenerateDataKeyWithoutPlaintext,
        }
    }

    fn stream(&self, out: Output, total: Total) -> Result<Stream> {
        let fields = Fields::Generated { plaintext: !self.without_plaintext };
        Stream::new(self.format, fields, out, total)
    }
}

/// Makes `args.count` data keys for one key.
fn repeat(engine: &Engine, args: &Args, key: &str, stream: Stream) -> Result<()> {
    let (operation, count, aad) = (args.operation(), args.count, args.aad.as_bytes());
    let aad_text = STANDARD.encode_to_string(aad);
    let mut answers = Repeated { stream, aad, aad_text, made: 0 };
    let windows = engine.key(key).and_then(|handle| {
        engine.stream_data_keys(&handle, operation, args.bytes, count, SameAad(aad.to_vec()))
    });
    // A stream is refused as a whole, or ends where its key does not serve any more. Each key that is missing then is
    // answered for itself, below.
    for batch in windows.into_iter().flatten().map_while(keymill::Result::ok) {
        interrupt::check()?;
        answers.write(&batch)?;
    }
    let request = GenerateDataKeyRequest::new(key, args.bytes).aad(aad);
    let mut batch = DataKeyBatch::new();
    let mut requests = Vec::new();
    while answers.made < count {
        interrupt::check()?;
        let missing = usize::try_from(count - answers.made).unwrap_or(usize::MAX);
        requests.resize(missing.min(WINDOW_LINES_MAX), request);
        engine.generate_data_key_batch_into(&mut batch, operation, &requests)?;
        answers.write(&batch)?;
    }
    answers.stream.finish("data keys")
}

/// The answers to one request, over and over.
struct Repeated<'a> {
    stream: Stream,
    aad: &'a [u8],
    aad_text: String,
    made: u64,
}

impl Repeated<'_> {
    fn write(&mut self, batch: &DataKeyBatch) -> Result<()> {
        let Self { stream, aad, aad_text, made } = self;
        let refused = batch.errors();
        stream.made_many((batch.len() - refused.len()) as u64);
        for error in refused {
            let index = error.index().unwrap_or_default();
            stream.refused(*made + index as u64 + 1, error, batch.request_id(index));
        }
        stream.rows.write(&Same { batch, aad, aad_text })?;
        stream.progress.inc(batch.len() as u64);
        *made += batch.len() as u64;
        Ok(())
    }
}

/// A window of data keys with one AAD and one length.
struct Same<'a> {
    batch: &'a DataKeyBatch,
    aad: &'a [u8],
    aad_text: &'a str,
}

impl Same<'_> {
    fn row(&self, index: usize) -> Row<'_> {
        match self.batch.get(index) {
            Ok(key) => Row::Key { key, aad: self.aad, aad_text: self.aad_text },
            Err(error) => Row::of_error(error, self.batch.request_id(index)),
        }
    }
}

impl Window for Same<'_> {
    fn len(&self) -> usize {
        self.batch.len()
    }

    fn each<'s>(&'s self, rows: Range<usize>, mut with: impl FnMut(&Row<'s>)) {
        rows.for_each(|index| with(&self.row(index)));
    }

    /// Rows that were made are all alike.
    fn largest(&self, measure: impl Fn(&Row<'_>) -> usize) -> usize {
        let made = (0..self.batch.len()).find(|index| self.batch.get(*index).is_ok());
        let refused = self.batch.errors().iter().filter_map(keymill::Error::index);
        made.into_iter().chain(refused).map(|index| measure(&self.row(index))).max().unwrap_or(0)
    }
}

/// Makes a data key for each line of a request file.
fn answer_lines(engine: &Engine, args: &Args, mut lines: Lines, mut stream: Stream) -> Result<()> {
    lines.must_be_lines()?;
    let mut arena = Vec::new();
    let mut batch = DataKeyBatch::new();
    while let Some(window) = lines.next_window()? {
        interrupt::check()?;
        arena.clear();
        let first = window.first_number;
        let parsed: Vec<Parsed<Request<'_>>> = (first..)
            .zip(window.iter())
            .map(|(number, line)| records::request(line, number, &mut arena))
            .collect();
        let requests: Vec<_> = parsed
            .iter()
            .flatten()
            .map(|request| {
                GenerateDataKeyRequest::new(&request.key_id, request.number_of_bytes)
                    .aad(&arena[request.aad.clone()])
            })
            .collect();
        engine.generate_data_key_batch_into(&mut batch, args.operation(), &requests)?;
        answer_window(first, &parsed, &arena, &batch, &mut stream)?;
        stream.progress.inc(window.bytes_read);
    }
    stream.finish("requests")
}

/// Writes the row of every line: that of the batch if it was a request.
fn answer_window(
    first: u64,
    parsed: &[Parsed<Request<'_>>],
    arena: &[u8],
    batch: &DataKeyBatch,
    stream: &mut Stream,
) -> Result<()> {
    let mut answers = batch.iter().enumerate();
    let mut rows = Vec::with_capacity(parsed.len());
    for (number, line) in (first..).zip(parsed) {
        rows.push(match line {
            Ok(request) => match answers.next().expect("an answer for each request") {
                (_, Ok(key)) => {
                    let (aad, aad_text) = (&arena[request.aad.clone()], &*request.aad_text);
                    stream.made(Row::Key { key, aad, aad_text })
                }
                (index, Err(error)) => stream.refused(number, error, batch.request_id(index)),
            },
            Err(why) => stream.malformed(number, why)?,
        });
    }
    stream.rows.write(&rows)
}
