//! `keymill decrypt`: unwraps the data keys in a file that `generate` wrote, by `advance_decrypt`.

use std::path::PathBuf;

use keymill::{DecryptRequest, Engine, ErrorKind};

use crate::{
    failure::{Failure, Result, hint},
    home::{Home, place_of},
    interrupt,
    lines::Lines,
    output::Output,
    records::{self, Outcome, Parsed},
    stream::Stream,
};

#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// The file that `generate` wrote; `-` is standard input
    #[arg(long = "in", value_name = "FILE")]
    input: PathBuf,

    /// Write to this file, mode 0600, which appears when it is complete and replaces one that is
    /// there; `-` is standard output
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

const EXAMPLES: &str = r#"Examples:
  keymill decrypt --in keys.jsonl --out plain.jsonl
  fetch-wrapped | keymill decrypt --in - | use-keys

A line needs CiphertextBlob and, if it was made with AAD, Aad; unless it was made by
`generate --advance` it needs KeyId and Iv too. Plaintext and RequestId are ignored.

Its result is one line in the same place:
  {"KeyId":"key-...","KeyVersionId":"key-...","Plaintext":"...","Algorithm":"AES_GCM",
   "RequestId":"..."}

A line that does not open gets an Error line in its place, Error lines are passed on, and the exit
code is 1 if there is any."#;

pub(crate) fn run(home: &Home, args: &Args) -> Result<()> {
    interrupt::install()?;
    home.spare(args.out.as_deref())?;
    let replaces = |out| args.input.is_file() && place_of(out) == place_of(&args.input);
    if args.out.as_deref().is_some_and(replaces) {
        return Err(Failure::refused(
            format!("--out {:?} is the file of --in, whose wrapped keys would be lost", args.input),
            "name another file",
        ));
    }
    let engine = home.open()?;
    let (mut lines, total) = Lines::open(&args.input)?;
    let mut stream = Stream::new(Output::open(args.out.as_deref())?, total);
    let mut arena = Vec::new();
    while let Some(window) = lines.next_window()? {
        interrupt::check()?;
        arena.clear();
        let first = window.first_number;
        let parsed: Vec<Parsed<Outcome<'_>>> = (first..)
            .zip(window.iter())
            .map(|(number, line)| records::outcome(line, number, &mut arena))
            .collect();
        decrypt_window(&engine, first, &parsed, &arena, &mut stream)?;
        stream.progress.inc(window.bytes_read);
    }
    stream.finish("lines")
}

fn decrypt_window(
    engine: &Engine,
    first: u64,
    parsed: &[Parsed<Outcome<'_>>],
    arena: &[u8],
    stream: &mut Stream,
) -> Result<()> {
    let requests: Vec<_> =
        parsed.iter().flatten().filter_map(|outcome| request(outcome, arena)).collect();
    let batch = engine.advance_decrypt_batch(&requests)?;
    let mut index = 0;
    for (number, line) in (first..).zip(parsed) {
        match line {
            Ok(Outcome::Key { .. }) => {
                match batch.get(index) {
                    Ok(key) => {
                        stream.rows.decrypted(&key)?;
                        stream.made();
                    }
                    Err(error) => {
                        let (id, hint) = (batch.request_id(index), decrypt_hint(error.kind()));
                        stream.refused_with(number, error, id, hint)?;
                    }
                }
                index += 1;
            }
            Ok(Outcome::Refused(line)) => stream.passed_on(number, line)?,
            Err(why) => stream.malformed(number, why)?,
        }
    }
    stream.rows.flush()
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

/// The engine's request for a line; `None` for an `Error` line.
fn request<'a>(outcome: &'a Outcome<'_>, arena: &'a [u8]) -> Option<DecryptRequest<'a>> {
    let Outcome::Key { key_id, iv, blob, algorithm, aad } = outcome else { return None };
    let mut request = DecryptRequest::new(&arena[blob.clone()]);
    request.key_id = key_id.as_deref();
    request.iv = iv.clone().map(|iv| &arena[iv]);
    request.aad = &arena[aad.clone()];
    request.algorithm = algorithm.as_deref();
    Some(request)
}
