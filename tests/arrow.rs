//! Goal: Arrow streams carry what JSON Lines do, are read whoever wrote them, and are refused when anything is wrong.
//!
//! Method: runs the built program and reads its streams with Arrow's own reader; gives it streams made by Arrow's own
//! writer, with other types than ours, cut off at every kind of place, and with bits flipped.
#![cfg(feature = "arrow")]

use std::{
    fs,
    io::Write,
    path::PathBuf,
    process::{Command, Stdio},
    sync::Arc,
    thread,
};

use arrow_array::{
    Array, ArrayRef, BinaryArray, BinaryViewArray, DictionaryArray, FixedSizeBinaryArray,
    LargeBinaryArray, LargeStringArray, NullArray, RecordBatch, StringArray, StringViewArray,
    StructArray, types::Int32Type,
};
use arrow_ipc::{
    MetadataVersion,
    reader::StreamReader,
    writer::{FileWriter, IpcWriteOptions, StreamWriter},
};
use arrow_schema::{DataType, Field, Fields};
use base64_simd::STANDARD;
use serde_json::Value;

/// A scratch directory with a key store that has a key `alias/app`.
struct Scratch(tempfile::TempDir);

struct Ran {
    code: Option<i32>,
    out: Vec<u8>,
    err: String,
}

impl Scratch {
    fn new() -> Self {
        let scratch = Self(tempfile::tempdir().unwrap());
        scratch.run("init", b"").done();
        scratch.run("key create --alias alias/app", b"").done();
        scratch
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn command(&self, args: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_keymill"));
        command.args(args.split_whitespace()).current_dir(self.0.path());
        command.env("KEYMILL_HOME", self.path("home"));
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    fn run(&self, args: &str, input: &[u8]) -> Ran {
        run(&mut self.command(args), input)
    }
}

fn run(command: &mut Command, input: &[u8]) -> Ran {
    let mut child = command.spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_vec();
    let feeder = thread::spawn(move || drop(stdin.write_all(&input)));
    let output = child.wait_with_output().unwrap();
    feeder.join().unwrap();
    let err = String::from_utf8(output.stderr).unwrap();
    assert!(!err.contains("panicked"), "{err}");
    Ran { code: output.status.code(), out: output.stdout, err }
}

impl Ran {
    #[track_caller]
    fn done(self) -> Vec<u8> {
        assert_eq!(self.code, Some(0), "{}", self.err);
        self.out
    }

    #[track_caller]
    fn refused(self, message: &str) -> Vec<u8> {
        assert_eq!(self.code, Some(1), "{}", self.err);
        assert!(self.err.contains(message) && self.err.contains("\nhint: "), "{}", self.err);
        self.out
    }
}

/// All batches, by Arrow's own reader.
fn batches(stream: &[u8]) -> Vec<RecordBatch> {
    StreamReader::try_new(stream, None).unwrap().collect::<Result<_, _>>().unwrap()
}

/// The values of a text or byte column; `None` are nulls.
fn values(batches: &[RecordBatch], name: &str) -> Vec<Option<Vec<u8>>> {
    let of_batch = |batch: &RecordBatch| -> Vec<Option<Vec<u8>>> {
        let column = batch.column_by_name(name).unwrap();
        of_array(column)
    };
    batches.iter().flat_map(of_batch).collect()
}

fn of_array(column: &ArrayRef) -> Vec<Option<Vec<u8>>> {
    let any = column.as_any();
    match any.downcast_ref::<BinaryArray>() {
        Some(bytes) => bytes.iter().map(|value| value.map(<[u8]>::to_vec)).collect(),
        None => {
            let text = any.downcast_ref::<StringArray>().unwrap();
            text.iter().map(|value| value.map(|value| value.into())).collect()
        }
    }
}

fn names(batch: &RecordBatch) -> Vec<(String, DataType)> {
    let fields = batch.schema();
    fields.fields().iter().map(|f| (f.name().clone(), f.data_type().clone())).collect()
}

fn rows(text: &[u8]) -> Vec<Value> {
    let text = std::str::from_utf8(text).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn stream_of(columns: Vec<(&str, ArrayRef)>) -> Vec<u8> {
    let batch = RecordBatch::try_from_iter_with_nullable(
        columns.into_iter().map(|(name, column)| (name, column, true)),
    );
    stream_of_batch(&batch.unwrap())
}

fn stream_of_batch(batch: &RecordBatch) -> Vec<u8> {
    let mut writer = StreamWriter::try_new(Vec::new(), &batch.schema()).unwrap();
    writer.write(batch).unwrap();
    writer.finish().unwrap();
    writer.into_inner().unwrap()
}

#[test]
fn streams_carry_what_lines_do() {
    let scratch = Scratch::new();
    let args = "generate --key alias/app --count 40000 --aad volume-7 --format arrow";
    let stream = scratch.run(args, b"").done();
    let made = batches(&stream);
    let error = DataType::Struct(Fields::from(vec![
        Field::new("Code", DataType::Utf8, true),
        Field::new("Message", DataType::Utf8, true),
    ]));
    let expected = [
        ("KeyId", DataType::Utf8),
        ("KeyVersionId", DataType::Utf8),
        ("Iv", DataType::Binary),
        ("Plaintext", DataType::Binary),
        ("CiphertextBlob", DataType::Binary),
        ("Algorithm", DataType::Utf8),
        ("Aad", DataType::Binary),
        ("RequestId", DataType::Utf8),
        ("Error", error),
    ];
    let expected = expected.map(|(name, kind)| (name.to_owned(), kind));
    assert_eq!(names(&made[0]), expected);
    assert!(made[0].schema().fields().iter().all(|field| field.is_nullable()));
    // A record batch a window.
    assert_eq!(made.iter().map(RecordBatch::num_rows).collect::<Vec<_>>(), [16384, 16384, 7232]);
    assert!(
        made.iter().all(|batch| batch.column_by_name("Error").unwrap().null_count()
            == 40000.min(batch.num_rows()))
    );
    let plaintexts = values(&made, "Plaintext");
    assert!(plaintexts.iter().all(|key| key.as_ref().unwrap().len() == 32));
    assert!(values(&made, "Aad").iter().all(|aad| aad.as_deref() == Some(b"volume-7")));
    let mut ids = values(&made, "RequestId");
    ids.sort();
    ids.dedup();
    assert_eq!(ids.len(), 40000);

    let opened = scratch.run("decrypt --in - --format arrow", &stream).done();
    let opened = batches(&opened);
    let fields: Vec<_> = names(&opened[0]).into_iter().map(|(name, _)| name).collect();
    let all = ["KeyId", "KeyVersionId", "Plaintext", "Algorithm", "RequestId", "Error"];
    assert_eq!(fields, all);
    assert_eq!(values(&opened, "Plaintext"), plaintexts);
    assert_eq!(values(&opened, "KeyVersionId"), values(&made, "KeyVersionId"));

    // And as lines.
    let lines = rows(&scratch.run("decrypt --in -", &stream).done());
    assert_eq!(lines.len(), plaintexts.len());
    for (line, plaintext) in lines.iter().zip(&plaintexts) {
        let expected = STANDARD.encode_to_string(plaintext.as_ref().unwrap());
        assert_eq!(line["Plaintext"], expected);
        assert_eq!(line.as_object().unwrap().len(), 5);
    }
}

#[test]
fn without_plaintext_there_is_no_such_column() {
    let scratch = Scratch::new();
    let args = "generate --key alias/app --count 3 --advance --without-plaintext --bytes 16 \
                --format arrow --out keys.arrow";
    scratch.run(args, b"").done();
    let stream = fs::read(scratch.path("keys.arrow")).unwrap();
    assert!(names(&batches(&stream)[0]).iter().all(|(name, _)| name != "Plaintext"));
    let opened = batches(&scratch.run("decrypt --in keys.arrow --format arrow", b"").done());
    let plaintexts = values(&opened, "Plaintext");
    assert!(plaintexts.iter().all(|key| key.as_ref().unwrap().len() == 16));

    // No keys at all are a stream all the same.
    let none = scratch.run("generate --key alias/app --count 0 --format arrow", b"").done();
    assert_eq!(batches(&none).len(), 0);
    assert_eq!(scratch.run("decrypt --in -", &none).done(), b"");
}

#[test]
fn refused_rows_keep_their_places() {
    let scratch = Scratch::new();
    let input = br#"{"KeyId":"alias/app","NumberOfBytes":32,"Aad":"\/w=="}
{"KeyId":"alias/typo","NumberOfBytes":32}
{
{"KeyId":"alias/app","NumberOfBytes":1}
"#;
    let ran = scratch.run("generate --requests - --format arrow", input);
    let stream = ran.refused("2 of 4 requests were refused");
    let made = batches(&stream);
    let error = made[0].column_by_name("Error").unwrap();
    let error = error.as_any().downcast_ref::<StructArray>().unwrap();
    let nulls: Vec<_> = (0..4).map(|row| error.is_null(row)).collect();
    assert_eq!(nulls, [true, false, false, true]);
    let codes = of_array(error.column_by_name("Code").unwrap());
    let expected = [None, Some("Forbidden.KeyNotFound"), Some("InvalidParameter"), None];
    assert_eq!(codes, expected.map(|code| code.map(|code| code.as_bytes().to_vec())));
    let ids = values(&made, "RequestId");
    assert!(ids.iter().all(Option::is_some));
    for name in ["KeyId", "KeyVersionId", "Iv", "Plaintext", "CiphertextBlob", "Algorithm", "Aad"] {
        let null: Vec<_> = values(&made, name).iter().map(Option::is_none).collect();
        assert_eq!(null, [false, true, true, false], "{name}");
    }

    // Passed on, in either format, from either format.
    let lines = scratch.run("decrypt --in -", &stream).refused("passed on");
    let opened = rows(&lines);
    let messages = of_array(error.column_by_name("Message").unwrap());
    for row in [1, 2] {
        let text = |value: &Option<Vec<u8>>| String::from_utf8(value.clone().unwrap()).unwrap();
        assert_eq!(opened[row]["Error"]["Code"], text(&codes[row]));
        assert_eq!(opened[row]["Error"]["Message"], text(&messages[row]));
        assert_eq!(opened[row]["RequestId"], text(&ids[row]));
    }
    let plaintexts = values(&made, "Plaintext");
    let expected = STANDARD.encode_to_string(plaintexts[0].as_ref().unwrap());
    assert_eq!(opened[0]["Plaintext"], expected);
    let again = scratch.run("decrypt --in - --format arrow", &stream).refused("2 of 4 rows");
    assert_eq!(values(&batches(&again), "Plaintext"), plaintexts);
    let errors = [lines.split(|byte| *byte == b'\n').nth(1).unwrap(), b"{\"Error\":7}"];
    let ran = scratch.run("decrypt --in - --format arrow", &errors.join(&b'\n'));
    let passed_on = batches(&ran.refused("all 2 lines"));
    let error = passed_on[0].column_by_name("Error").unwrap();
    let error = error.as_any().downcast_ref::<StructArray>().unwrap();
    assert_eq!(of_array(error.column_by_name("Code").unwrap()), [codes[1].clone(), None]);
    let expected = [messages[1].clone(), Some(b"7".to_vec())];
    assert_eq!(of_array(error.column_by_name("Message").unwrap()), expected);
    assert_eq!(values(&passed_on, "RequestId"), [ids[1].clone(), None]);
}

#[test]
fn a_key_that_is_unknown_or_a_length_that_is_wrong_refuses_every_row() {
    let scratch = Scratch::new();
    for (args, code) in [
        ("--key alias/typo --count 20000", "Forbidden.KeyNotFound"),
        ("--key alias/app --count 20000 --bytes 1025", "InvalidParameter"),
    ] {
        for format in ["arrow", "jsonl"] {
            let ran = scratch.run(&format!("generate {args} --format {format}"), b"");
            let out = ran.refused("all 20000 data keys were refused");
            let codes: Vec<_> = if format == "jsonl" {
                let code = |row: &Value| row["Error"]["Code"].as_str().unwrap().to_owned();
                rows(&out).iter().map(code).collect()
            } else {
                let of_batch = |batch: &RecordBatch| {
                    let error = batch.column_by_name("Error").unwrap().as_any();
                    let error = error.downcast_ref::<StructArray>().unwrap();
                    of_array(error.column_by_name("Code").unwrap())
                };
                let codes = batches(&out).iter().flat_map(of_batch).collect::<Vec<_>>();
                codes.into_iter().map(|code| String::from_utf8(code.unwrap()).unwrap()).collect()
            };
            assert_eq!(codes, vec![code; 20000], "{args} {format}");
        }
    }
}

#[test]
fn rows_that_are_formatted_in_parallel_keep_their_order() {
    let scratch = Scratch::new();
    let line = |number: u32| match number % 1000 {
        // Answers of very different lengths.
        7 => "{\"KeyId\":\"alias/typo\",\"NumberOfBytes\":32}\n".to_owned(),
        8 => "no JSON\n".to_owned(),
        9 => format!(
            "{{\"KeyId\":\"alias/app\",\"NumberOfBytes\":1024,\"Aad\":\"{}\"}}\n",
            STANDARD.encode_to_string(vec![9; 8000])
        ),
        _ => format!(
            "{{\"KeyId\":\"alias/app\",\"NumberOfBytes\":32,\"Aad\":\"{}\"}}\n",
            STANDARD.encode_to_string(number.to_be_bytes())
        ),
    };
    let input: String = (0..20_000).map(line).collect();
    for threads in ["1", "4"] {
        for format in ["jsonl", "arrow"] {
            let mut command = scratch.command(&format!("generate --requests - --format {format}"));
            command.env("RAYON_NUM_THREADS", threads);
            let out = run(&mut command, input.as_bytes()).refused("40 of 20000 requests");
            let aads: Vec<_> = if format == "jsonl" {
                let decode = |aad: &str| STANDARD.decode_to_vec(aad).unwrap();
                rows(&out).iter().map(|row| row["Aad"].as_str().map(decode)).collect()
            } else {
                values(&batches(&out), "Aad")
            };
            assert_eq!(aads.len(), 20_000);
            for (number, aad) in (0..20_000u32).zip(aads) {
                let expected = match number % 1000 {
                    7 | 8 => None,
                    9 => Some(vec![9; 8000]),
                    _ => Some(number.to_be_bytes().to_vec()),
                };
                assert_eq!(aad, expected, "{threads} {format} {number}");
            }
            let mut command = scratch.command("decrypt --in -");
            command.env("RAYON_NUM_THREADS", threads);
            let opened = rows(&run(&mut command, &out).refused("40 of 20000"));
            let errors = opened.iter().filter(|row| row.get("Error").is_some()).count();
            assert_eq!((opened.len(), errors), (20_000, 40));
        }
    }
}

#[test]
fn streams_of_other_writers() {
    let scratch = Scratch::new();
    let made = scratch.run("generate --key alias/app --count 3 --aad x --format arrow", b"").done();
    let made = &batches(&made)[0];
    let column = |name: &str| of_array(made.column_by_name(name).unwrap());
    let bytes = |name: &str| column(name).into_iter().map(Option::unwrap).collect::<Vec<_>>();
    let text = |name: &str| -> Vec<_> {
        bytes(name).into_iter().map(|text| String::from_utf8(text).unwrap()).collect()
    };
    let fixed = |name: &str| -> ArrayRef {
        Arc::new(FixedSizeBinaryArray::try_from_iter(bytes(name).iter()).unwrap())
    };
    let large: ArrayRef = Arc::new(LargeBinaryArray::from_iter_values(bytes("CiphertextBlob")));
    let key_ids: ArrayRef = Arc::new(LargeStringArray::from(text("KeyId")));
    let none: ArrayRef = Arc::new(NullArray::new(3));
    let good = vec![
        ("RequestId", Arc::clone(&none)),
        ("Aad", fixed("Aad")),
        ("CiphertextBlob", large),
        ("Error", Arc::clone(&none)),
        ("Iv", fixed("Iv")),
        ("KeyId", key_ids),
        ("Algorithm", none),
    ];
    let plaintexts = column("Plaintext");
    let opens = |stream: &[u8]| {
        let opened = scratch.run("decrypt --in - --format arrow", stream).done();
        values(&batches(&opened), "Plaintext")
    };
    // `Error` as a column without a type.
    assert_eq!(opens(&stream_of(good.clone())), plaintexts);
    // A part of a batch, whose offsets do not begin at 0.
    assert_eq!(opens(&stream_of_batch(&made.slice(1, 2))), plaintexts[1..]);
    // Two batches, one of them empty.
    let mut writer = StreamWriter::try_new(Vec::new(), &made.schema()).unwrap();
    writer.write(&made.slice(0, 0)).unwrap();
    writer.write(made).unwrap();
    assert_eq!(opens(&writer.into_inner().unwrap()), plaintexts);

    // What a line without the member would get.
    let blobs: Vec<_> = bytes("CiphertextBlob").into_iter().map(Some).collect();
    let holes: BinaryArray =
        blobs.iter().enumerate().map(|(n, blob)| blob.as_ref().filter(|_| n != 1)).collect();
    let mut columns = good;
    columns[2].1 = Arc::new(holes);
    let ran = scratch.run("decrypt --in -", &stream_of(columns));
    let opened = rows(&ran.refused("1 of 3 rows were refused; number 2"));
    let message = opened[1]["Error"]["Message"].as_str().unwrap();
    assert!(message.contains("Row 2: CiphertextBlob is missing."), "{message}");
    assert!(opened[2].get("Plaintext").is_some());
}

#[test]
fn streams_in_the_forms_of_other_programs() {
    let scratch = Scratch::new();
    let aad = "x".repeat(40);
    let args = format!("generate --key alias/app --count 3 --aad {aad} --format arrow");
    let stream = scratch.run(&args, b"").done();
    let made = &batches(&stream)[0];
    let column = |name: &str| of_array(made.column_by_name(name).unwrap());
    let plaintexts = column("Plaintext");
    let opens = |stream: &[u8]| {
        let opened = scratch.run("decrypt --in - --format arrow", stream).done();
        values(&batches(&opened), "Plaintext")
    };
    // Views, as polars writes them: short values lie in the view, long ones in buffers of their own.
    let bytes = |name: &str| -> ArrayRef { Arc::new(BinaryViewArray::from_iter(column(name))) };
    let text = |name: &str| -> ArrayRef {
        let texts =
            column(name).into_iter().map(|text| text.map(|t| String::from_utf8(t).unwrap()));
        Arc::new(StringViewArray::from_iter(texts))
    };
    // A struct of nulls where a null struct is meant.
    let nulls: ArrayRef = Arc::new(StringViewArray::from(vec![None::<&str>; 3]));
    let members = vec![("Code", Arc::clone(&nulls)), ("Message", nulls)];
    let error: ArrayRef = Arc::new(StructArray::try_from(members).unwrap());
    let viewed = vec![
        ("KeyId", text("KeyId")),
        ("Iv", bytes("Iv")),
        ("CiphertextBlob", bytes("CiphertextBlob")),
        ("Aad", bytes("Aad")),
        ("Algorithm", text("Algorithm")),
        ("Error", error),
    ];
    let viewed = stream_of(viewed);
    assert_eq!(opens(&viewed), plaintexts);
    // A value that lies outside of its buffer: the last 4 bytes of the first view of a blob are its offset.
    let blob = column("CiphertextBlob")[0].clone().unwrap();
    let view = [&[60, 0, 0, 0][..], &blob[..4], &[0; 8]].concat();
    let at =
        viewed.windows(16).position(|bytes| bytes == view).expect("the view of the first blob");
    let mut outside = viewed.clone();
    outside[at + 14] = 0xff;
    scratch.run("decrypt --in -", &outside).refused("outside of its buffers");
    outside[at + 14] = 0;
    outside[at + 8] = 9;
    scratch.run("decrypt --in -", &outside).refused("outside of its buffers");

    // Without marks before messages, as before Arrow 0.15.
    let legacy = IpcWriteOptions::try_new(8, true, MetadataVersion::V4).unwrap();
    let mut writer =
        StreamWriter::try_new_with_options(Vec::new(), &made.schema(), legacy).unwrap();
    writer.write(made).unwrap();
    writer.write(made).unwrap();
    let legacy = writer.into_inner().unwrap();
    assert_ne!(legacy[..4], [0xff; 4]);
    assert_eq!(opens(&legacy), [&plaintexts[..], &plaintexts].concat());
    scratch.run("decrypt --in -", &legacy[..legacy.len() - 4]).refused("cut off");
    scratch.run("generate --requests -", &legacy).refused("an Arrow stream");
    scratch.run("generate --requests -", &stream).refused("an Arrow stream");
}

#[test]
fn streams_that_are_something_else_are_refused() {
    let scratch = Scratch::new();
    let stream = scratch.run("generate --key alias/app --format arrow", b"").done();
    let made = &batches(&stream)[0];
    let blobs = || Arc::clone(made.column_by_name("CiphertextBlob").unwrap());
    let text = || -> ArrayRef { Arc::new(StringArray::from(vec!["x"])) };
    let dictionary: DictionaryArray<Int32Type> = vec!["x"].into_iter().collect();
    let refuse = |stream: &[u8], message: &str| {
        let ran = scratch.run("decrypt --in - --out out", stream);
        ran.refused(message);
        assert!(!scratch.path("out").exists(), "{message}");
    };
    for (columns, message) in [
        (vec![("KeyId", text())], "it has no CiphertextBlob"),
        (vec![("CiphertextBlob", blobs()), ("AAD", blobs())], "column \"AAD\" is unknown"),
        (vec![("CiphertextBlob", blobs()), ("Aad", text())], "column Aad has type Utf8"),
        (vec![("CiphertextBlob", text())], "column CiphertextBlob has type Utf8"),
        (vec![("CiphertextBlob", blobs()), ("Error", text())], "column Error is no struct"),
        (
            vec![("CiphertextBlob", blobs()), ("KeyId", Arc::new(dictionary))],
            "column \"KeyId\" is dictionary-encoded",
        ),
    ] {
        refuse(&stream_of(columns), message);
    }
    let fields = made.schema();
    let twice = Arc::new(arrow_schema::Schema::new(vec![fields.field(4).clone(); 2]));
    let twice = RecordBatch::try_new(twice, vec![blobs(), blobs()]).unwrap();
    refuse(&stream_of_batch(&twice), "column \"CiphertextBlob\" is there twice");

    refuse(&[&stream[..], &stream].concat(), "more bytes follow its end");
    refuse(&stream[..stream.len() - 8], "cut off");
    let huge = |at: usize, bytes: &[u8]| {
        let mut stream = stream.clone();
        stream[at..at + bytes.len()].copy_from_slice(bytes);
        stream
    };
    refuse(&huge(4, &i32::MAX.to_le_bytes()), "declares 2147483647 bytes of metadata");
    refuse(&huge(4, &(-8i32).to_le_bytes()), "declares -8 bytes of metadata");
    let mut file = FileWriter::try_new(Vec::new(), &made.schema()).unwrap();
    file.write(made).unwrap();
    refuse(&file.into_inner().unwrap(), "an Arrow IPC file, and not a stream");

    // Not to people. The end of a terminal that is its own is a terminal too.
    if std::path::Path::new("/dev/ptmx").exists() {
        let ran = scratch.run("generate --key alias/app --format arrow --out /dev/ptmx", b"");
        ran.refused("the output is a terminal");
    }
    scratch.run("generate --key alias/app --format csv", b"").refused("'csv'");
}

#[test]
fn streams_that_were_cut_off_or_changed_are_refused() {
    let scratch = Scratch::new();
    let stream = scratch.run("generate --key alias/app --count 2 --format arrow", b"").done();
    let len = stream.len();
    let heads = 1..48;
    for at in heads.chain((48..len).step_by(97)).chain(len - 9..len) {
        let ran = scratch.run("decrypt --in - --out out", &stream[..at]);
        // Before the mark is complete there is no sign of Arrow: a line that is no text.
        drop(ran.refused(if at < 4 { "is not UTF-8 text" } else { "cut off" }));
        assert_eq!(scratch.path("out").exists(), at < 4, "{at}");
        drop(fs::remove_file(scratch.path("out")));
    }
    for at in (0..len).step_by(61) {
        let mut changed = stream.clone();
        changed[at] ^= 1 << (at % 8);
        let ran = scratch.run("decrypt --in -", &changed);
        assert!(matches!(ran.code, Some(0 | 1)), "{at}: {}", ran.err);
    }
}
