//! Goal: `generate --count` streams, and answers every key all the same when the stream breaks off.
//!
//! Method: holds the output back by not reading it, changes the key meanwhile, and reads the rest.
#![cfg(feature = "cli")]

use std::{
    io::{BufRead, BufReader},
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use serde_json::Value;

#[test]
fn a_key_that_is_disabled_meanwhile_refuses_the_rest() {
    const COUNT: usize = 300_000;
    let home = tempfile::tempdir().unwrap();
    let command = |args: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_keymill"));
        command.args(args.split_whitespace()).env("KEYMILL_HOME", home.path().join("home"));
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    };
    assert!(command("init").status().unwrap().success());
    assert!(command("key create --alias alias/app").status().unwrap().success());

    let args = format!("generate --key alias/app --count {COUNT}");
    let mut child = command(&args).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let code = |line: &str| {
        let row: Value = serde_json::from_str(line).unwrap();
        row["Error"]["Code"].as_str().unwrap_or("").to_owned()
    };
    assert_eq!(code(&lines.next().unwrap().unwrap()), "");
    assert!(command("key disable alias/app").status().unwrap().success());
    // Another process's change is seen within a second.
    thread::sleep(Duration::from_secs(1));
    let codes: Vec<String> = lines.map(|line| code(&line.unwrap())).collect();
    assert_eq!(codes.len(), COUNT - 1);
    let made = codes.iter().take_while(|code| code.is_empty()).count();
    assert!(0 < made && made < COUNT - 1, "{made}");
    assert!(codes[made..].iter().all(|code| code == "Rejected.Disabled"));
    let output = child.wait_with_output().unwrap();
    let err = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{err}");
    let expected =
        format!("{} of {COUNT} data keys were refused; number {}", COUNT - 1 - made, made + 2);
    assert!(err.contains(&expected), "{expected}: {err}");
}
