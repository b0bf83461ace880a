//! `keymill decrypt`: unwraps the data keys in a file that `generate` wrote, by `advance_decrypt`.

use std::{borrow::Cow, path::PathBuf};

use keymill::{DecryptRequest, Engine, ErrorKind};

use crate::{
    failure::{Result, hint},
    home::Home,
    identity::Named,
    interrupt,
    lines::Lines,
    output::Output,
    records::{self, Outcome, Parsed},
    rows::{Fields, Format, PassedOn, Row},
    stream::Stream,
};

#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// The file that `generate` wrote, in either format; `-` is standard input
    #[arg(long = "in", value_name = "FILE")]
    input: PathBuf,

    /// Write JSON Lines, or an Arrow IPC stream
    #[arg(long, value_enum, default_value_t = Format::Jsonl)]
    format: Format,

    /// Write to this file, mode 0600, which appears when it is complete and replaces one that is
    /// there; `-` is standard output (`keymill generate --help` says what is no plain file)
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

const EXAMPLES: &str = r#"Examples:
  keymill decrypt --in keys.jsonl --out plain.jsonl
  keymill decrypt --in keys.arrow --format arrow --out plain.arrow
  fetch-wrapped | keymill decrypt --in - | use-keys

A line needs CiphertextBlob and, if it was made with AAD, Aad; unless it was made by
`generate --advance` it needs KeyId and Iv too. Plaintext and RequestId are ignored.

Its result is one line in the same place:
  {"KeyId":"key-...","KeyVersionId":"key-...","Plaintext":"...","Algorithm":"AES_GCM",
   "RequestId":"..."}

A member that is null is absent, and an Error of nulls is none. No other members are allowed.

A line that does not open gets an Error line in its place, Error lines are passed on, and the exit
code is 1 if there is any.

An Arrow IPC stream has rows for lines and columns for members; Iv, CiphertextBlob and Aad are
Binary, LargeBinary, BinaryView or FixedSizeBinary, the others Utf8, LargeUtf8 or Utf8View; buffers
are not compressed."#;

pub(crate) fn run(home: &Home, args: &Args) -> Result<()> {
    interrupt::install()?;
    let (input, output) =
        (Named::input("--in", &args.input), Named::output("--out", args.out.as_deref()));
    home.spare(&output)?;
    output.spares(&input, "whose wrapped keys would be lost")?;
    let (lines, total) = Lines::open("--in", &args.input)?;
    let output = Output::open(args.out.as_deref())?;
    let engine = home.open()?;
    let stream = Stream::new(args.format, Fields::Opened, output, total)?;
    decrypt(&engine, lines, stream)
}

#[cfg(not(feature = "arrow"))]
fn decrypt(engine: &Engine, mut lines: Lines, stream: Stream) -> Result<()> {
    lines.must_be_lines()?;
    decrypt_lines(engine, lines, stream)
}

/// Decrypts either format: no JSON begins as an Arrow stream does.
#[cfg(feature = "arrow")]
fn decrypt(engine: &Engine, mut lines: Lines, mut stream: Stream) -> Result<()> {
    use crate::{arrow::read::ArrowReader, forms::Form, lines::WINDOW_LINES_MAX};

    if lines.form()? != Form::Arrow {
        return decrypt_lines(engine, lines, stream);
    }
    let mut reader = ArrowReader::new(lines)?;
    while let Some(batch) = reader.next_batch()? {
        for rows in batch.windows(WINDOW_LINES_MAX) {
            interrupt::check()?;
            let first = batch.first_number + rows.start as u64;
            let items: Vec<_> = rows.map(|row| batch.item(row)).collect();
            decrypt_window(engine, first, &items, &mut stream)?;
        }
        stream.progress.inc(batch.bytes_read);
    }
    stream.finish("rows")
}

fn decrypt_lines(engine: &Engine, mut lines: Lines, mut stream: Stream) -> Result<()> {
    let mut arena = Vec::new();
    while let Some(window) = lines.next_window()? {
        interrupt::check()?;
        arena.clear();
        let first = window.first_number;
        let parsed: Vec<Parsed<Outcome<'_>>> = (first..)
            .zip(window.iter())
            .map(|(number, line)| records::outcome(line, number, &mut arena))
            .collect();
        let items: Vec<_> = parsed.iter().map(|line| item(line, &arena)).collect();
        decrypt_window(engine, first, &items, &mut stream)?;
        stream.progress.inc(window.bytes_read);
    }
    stream.finish("lines")
}

/// One line or row of the input.
pub(crate) enum Item<'a> {
    Request(DecryptRequest<'a>),
    /// An `Error` line.
    Line(&'a [u8]),
    /// An `Error` row of another format.
    #[cfg_attr(not(feature = "arrow"), expect(dead_code, reason = "there is no other format"))]
    Row(PassedOn<'a>),
    /// Neither, and why.
    Malformed(Cow<'a, str>),
}

impl<'a> Item<'a> {
    fn request(&self) -> Option<DecryptRequest<'a>> {
        match self {
            Self::Request(request) => Some(*request),
            _ => None,
        }
    }
}

fn decrypt_window(
    engine: &Engine,
    first: u64,
    items: &[Item<'_>],
    stream: &mut Stream,
) -> Result<()> {
    let requests: Vec<_> = items.iter().filter_map(Item::request).collect();
    let batch = engine.advance_decrypt_batch(&requests)?;
    let mut answers = batch.iter().enumerate();
    let mut rows = Vec::with_capacity(items.len());
    for (number, item) in (first..).zip(items) {
        rows.push(match item {
            Item::Request(_) => match answers.next().expect("an answer for each request") {
                (_, Ok(key)) => stream.made(Row::Opened(key)),
                (index, Err(error)) => {
                    let (id, hint) = (batch.request_id(index), decrypt_hint(error.kind()));
                    stream.refused_with(number, error, id, hint)
                }
            },
            Item::Line(line) => {
                let row = stream.rows.of_line(line);
                stream.passed_on(number, row)
            }
            Item::Row(row) => stream.passed_on(number, Row::PassedOn(row.clone())),
            Item::Malformed(why) => stream.malformed(number, why)?,
        });
    }
    stream.rows.write(&rows)
}

/// What to do next about a line that does not open: a new key never helps.
fn decrypt_hint(kind: ErrorKind) -> &'static str {
    match kind {
        ErrorKind::KeyNotFound => {
            "the key was deleted, or is in another key store: name the one that made these lines \
             with --home DIR or KEYMILL_HOME; `keymill key list` shows the keys of this one"
        }
        kind => hint(kind),
    }
}

/// A line as the engine or the output needs it.
fn item<'a>(line: &'a Parsed<Outcome<'_>>, arena: &'a [u8]) -> Item<'a> {
    match line {
        Ok(Outcome::Key { key_id, iv, blob, algorithm, aad }) => {
            let mut request = DecryptRequest::new(&arena[blob.clone()]);
            request.key_id = key_id.as_deref();
            request.iv = iv.clone().map(|iv| &arena[iv]);
            request.aad = &arena[aad.clone()];
            request.algorithm = algorithm.as_deref();
            Item::Request(request)
        }
        Ok(Outcome::Refused(line)) => Item::Line(line),
        Err(why) => Item::Malformed(why.into()),
    }
}
