//! Goal: `keymill client` makes clients whose key files every SDK reads, changes them, and leaves nothing half done.
//!
//! Method: transcripts, as in `cli.rs`. Key files are opened with the crate that wrote them, read as DER, and, where it
//! is installed, with OpenSSL; a signature of their key is checked with the public key in the store.
#![cfg(all(feature = "cli", feature = "server"))]

use std::{
    env, fs,
    io::Write,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use aws_lc_rs::{
    rand::SystemRandom,
    signature::{RSA_PKCS1_2048_8192_SHA256, RSA_PKCS1_SHA256, RsaKeyPair, UnparsedPublicKey},
};
use p12_keystore::Pkcs12Archive;
use serde_json::{Value, json};

/// A scratch directory with a key store in `home`.
struct Scratch(tempfile::TempDir);

/// How a run ended.
#[derive(Debug)]
struct Ran {
    code: Option<i32>,
    out: String,
    err: String,
}

impl Scratch {
    /// With a store and a key `alias/app`.
    fn new() -> Self {
        let scratch = Self(tempfile::tempdir().unwrap());
        scratch.run("init").done();
        scratch.run("key create --alias alias/app").done();
        scratch
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A command line; words are parted by spaces, and `\_` is a space in a word.
    fn command(&self, args: &str) -> Command {
        let args = args.split_whitespace().map(|word| word.replace("\\_", " "));
        let mut command = Command::new(env!("CARGO_BIN_EXE_keymill"));
        command
            .args(args)
            .current_dir(self.0.path())
            .env("KEYMILL_HOME", self.path("home"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    fn run(&self, args: &str) -> Ran {
        Ran::of(self.command(args).spawn().unwrap())
    }

    fn json(&self, args: &str) -> Value {
        serde_json::from_str(&self.run(args).done()).unwrap()
    }

    /// Names in the scratch directory besides the home.
    fn files(&self) -> Vec<String> {
        let entries = fs::read_dir(self.0.path()).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<_> = names.filter(|name| name != "home").collect();
        names.sort();
        names
    }

    fn mode(&self, name: &str) -> u32 {
        fs::metadata(self.path(name)).unwrap().permissions().mode() & 0o777
    }

    /// The id and the PKCS#12 in a key file.
    fn key_file(&self, name: &str) -> (String, Vec<u8>) {
        let document: Value = serde_json::from_slice(&fs::read(self.path(name)).unwrap()).unwrap();
        assert_eq!(document.as_object().unwrap().len(), 2);
        let container = document["PrivateKeyData"].as_str().unwrap();
        let container = base64_simd::STANDARD.decode_to_vec(container).unwrap();
        (document["KeyId"].as_str().unwrap().to_owned(), container)
    }

    fn password(&self, name: &str) -> String {
        let text = fs::read_to_string(self.path(name)).unwrap();
        text.strip_suffix('\n').unwrap_or(&text).to_owned()
    }
}

impl Ran {
    fn of(child: Child) -> Self {
        let output = child.wait_with_output().unwrap();
        Self {
            code: output.status.code(),
            out: String::from_utf8(output.stdout).unwrap(),
            err: String::from_utf8(output.stderr).unwrap(),
        }
    }

    /// Checks exit code 0, and returns standard output.
    #[track_caller]
    fn done(self) -> String {
        assert_eq!(self.code, Some(0), "{self:?}");
        self.out
    }

    /// Checks exit code, message and hint.
    #[track_caller]
    fn ended(self, code: i32, message: &str) {
        assert_eq!((self.code, self.out.as_str()), (Some(code), ""), "{self:?}");
        assert!(self.err.contains(message), "{message}: {self:?}");
        assert!(self.err.starts_with("keymill: ") && self.err.contains("\nhint: "), "{self:?}");
        assert!(!self.err.contains("panicked"), "{self:?}");
    }
}

const CREATE: &str = "client create --name backup --out c.json --password-file c.password \
                      --keys alias/* --allow generate,decrypt";

#[test]
fn the_life_of_a_client() {
    let scratch = Scratch::new();
    assert!(
        scratch.run("client list").done().starts_with("No clients yet. `keymill client create`")
    );
    assert_eq!(scratch.run("client list --json").done(), "[]\n");

    let ran = scratch.run(CREATE);
    assert_eq!(ran.err, "");
    let (id, _) = scratch.key_file("c.json");
    let said = ran.done();
    for part in [&*id, "\"backup\"", "\"c.json\"", "cannot be made again", "\"c.password\""] {
        assert!(said.contains(part), "{part}: {said}");
    }
    assert!(said.contains("made just now") && !said.contains(&scratch.password("c.password")));
    assert_eq!(scratch.files(), ["c.json", "c.password"]);
    assert_eq!((scratch.mode("c.json"), scratch.mode("c.password")), (0o600, 0o600));
    assert_eq!(scratch.password("c.password").len(), 24);

    let shown = scratch.json(&format!("client show {id} --json"));
    for (name, value) in [
        ("ClientId", json!(id)),
        ("Name", json!("backup")),
        ("ClientState", json!("Enabled")),
        ("Permissions", json!(["generate", "decrypt"])),
        ("KeyPatterns", json!(["alias/*"])),
    ] {
        assert_eq!(shown[name], value, "{name}");
    }
    assert!(shown["CreationDate"].as_str().unwrap().ends_with('Z'));
    assert_eq!(scratch.json("client list --json"), json!([shown]));
    for out in ["client list".to_owned(), format!("client show {id}")] {
        let out = scratch.run(&out).done();
        for part in [&*id, "backup", "Enabled", "generate,decrypt", "alias/*"] {
            assert!(out.contains(part), "{part}: {out}");
        }
    }

    let set =
        format!("client set {id} --name re\\_store --keys alias/app key-* --allow all --json");
    let changed = scratch.json(&set);
    assert_eq!(changed["Name"], "re store");
    assert_eq!(changed["KeyPatterns"], json!(["alias/app", "key-*"]));
    assert_eq!(changed["Permissions"], json!(["generate", "decrypt", "encrypt", "random"]));
    assert_eq!(changed["PublicKey"], shown["PublicKey"]);
    let changed = scratch.json(&format!("client set {id} --allow random --json"));
    assert_eq!(
        (&changed["Name"], &changed["Permissions"]),
        (&json!("re store"), &json!(["random"]))
    );

    assert!(scratch.run(&format!("client disable {id}")).done().contains("Disabled"));
    assert!(scratch.run("client list").done().contains("Disabled"));
    assert!(scratch.run(&format!("client enable {id}")).done().contains("Enabled"));
    assert!(scratch.run(&format!("client delete {id}")).done().contains(&id));
    for command in ["show", "disable", "enable", "delete", "set --allow all"] {
        let ran = scratch.run(&format!("client {command} {id}"));
        assert!(ran.err.contains("keymill client list"), "{ran:?}");
        ran.ended(1, "does not exist in our records");
    }
    assert_eq!(scratch.run("client list --json").done(), "[]\n");
}

#[test]
fn patterns_do_not_swallow_what_stands_behind_them() {
    let scratch = Scratch::new();
    scratch.run(CREATE).done();
    let (id, _) = scratch.key_file("c.json");
    for (args, patterns) in [
        (format!("client set --keys alias/app {id} --json"), json!(["alias/app"])),
        (format!("client set --keys alias/a alias/b {id} --json"), json!(["alias/a", "alias/b"])),
        (format!("client set --json --keys alias/a,key-* {id}"), json!(["alias/a", "key-*"])),
        (
            format!("client set {id} --keys alias/c --keys alias/d --json"),
            json!(["alias/c", "alias/d"]),
        ),
        (format!("client set --keys alias/e --json {id}"), json!(["alias/e"])),
    ] {
        assert_eq!(scratch.json(&args)["KeyPatterns"], patterns, "{args}");
    }
    scratch.run("client set --keys alias/app").ended(1, "no client is named");
    scratch.run(&format!("client set --keys {id}")).ended(1, "no client is named");
    scratch.run("client set --name x").ended(1, "CLIENT");
    scratch.run(&format!("client set {id} --keys alias/a,,alias/b")).ended(1, "is empty");
    scratch.run(&format!("client set {id}")).ended(1, "--keys");
}

#[test]
fn client_files_are_told_apart_by_what_they_are() {
    let scratch = Scratch::new();
    fs::write(scratch.path("password"), "one-of-my-own-1\n").unwrap();
    fs::hard_link(scratch.path("password"), scratch.path("hard")).unwrap();
    std::os::unix::fs::symlink("new", scratch.path("to-new")).unwrap();
    std::os::unix::fs::symlink("home/root.key", scratch.path("to-root")).unwrap();
    let create = |out: &str, password: &str| {
        format!(
            "client create --name a --keys * --allow all --out {out} --password-file {password}"
        )
    };
    scratch.run(&create("hard", "password")).ended(1, "are both");
    scratch.run(&create("new", "to-new")).ended(1, "are both");
    scratch.run(&create("NEW", "new")).ended(1, "are both");
    scratch.run(&create("c.json", "to-root")).ended(1, "is part of the key store");
    scratch.run(&create("c.json", "none/password")).ended(2, "none/password");
    scratch.run(&create("none/c.json", "password")).ended(2, "none/c.json");
    scratch.run(&create("c.json", "to-new")).ended(1, "exists already");
    let mut command = scratch.command(&create("c.json", "password"));
    command.stdout(fs::File::options().append(true).open(scratch.path("hard")).unwrap());
    Ran::of(command.spawn().unwrap()).ended(1, "are the same file");
    assert_eq!(fs::read(scratch.path("password")).unwrap(), b"one-of-my-own-1\n");
    assert_eq!(scratch.files(), ["hard", "password", "to-new", "to-root"]);
    // A password that comes from another program.
    let mut command = scratch.command(&create("c.json", "/dev/stdin"));
    let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"one-of-my-own-1\n").unwrap();
    Ran::of(child).done();
    scratch.key_file("c.json");
}

/// The tags, lengths and contents of the DER elements in `der`.
fn elements(mut der: &[u8]) -> Vec<(u8, &[u8])> {
    let mut found = Vec::new();
    while let [tag, first, rest @ ..] = der {
        let (len, rest) = match first {
            0x82 => (usize::from(rest[0]) << 8 | usize::from(rest[1]), &rest[2..]),
            0x81 => (usize::from(rest[0]), &rest[1..]),
            short => (usize::from(*short), rest),
        };
        found.push((*tag, &rest[..len]));
        der = &rest[len..];
    }
    found
}

fn contains(bytes: &[u8], part: &[u8]) -> bool {
    bytes.windows(part.len()).any(|window| window == part)
}

/// RFC 7292, appendix C, and PKCS #7: the identifiers by which a container tells what is in it.
const PBE_SHA1_3DES: &[u8] = b"\x06\x0a\x2a\x86\x48\x86\xf7\x0d\x01\x0c\x01\x03";
const SHROUDED_KEY_BAG: &[u8] = b"\x06\x0b\x2a\x86\x48\x86\xf7\x0d\x01\x0c\x0a\x01\x02";
const DATA: &[u8] = b"\x2a\x86\x48\x86\xf7\x0d\x01\x07\x01";
const ENCRYPTED_DATA: &[u8] = b"\x2a\x86\x48\x86\xf7\x0d\x01\x07\x06";
const SHA1: &[u8] = b"\x06\x05\x2b\x0e\x03\x02\x1a";

#[test]
fn a_key_file_is_what_the_oldest_sdk_reads() {
    let scratch = Scratch::new();
    scratch.run(CREATE).done();
    let (id, container) = scratch.key_file("c.json");
    let password = scratch.password("c.password");

    // PFX: version, content, MAC. The content is a SEQUENCE of two, in an OCTET STRING in a context tag.
    let pfx = elements(elements(&container)[0].1);
    let (content, mac) = (elements(pfx[1].1), pfx[2].1);
    assert!(contains(mac, SHA1));
    let safes = elements(elements(elements(content[1].1)[0].1)[0].1);
    assert_eq!(safes.len(), 2);
    let kinds: Vec<_> = safes.iter().map(|(_, safe)| elements(safe)[0].1).collect();
    assert_eq!(kinds, [ENCRYPTED_DATA, DATA]);
    assert!(contains(safes[0].1, PBE_SHA1_3DES) && !contains(safes[0].1, SHROUDED_KEY_BAG));
    assert!(contains(safes[1].1, PBE_SHA1_3DES) && contains(safes[1].1, SHROUDED_KEY_BAG));
    let utf16: Vec<u8> = id.encode_utf16().flat_map(u16::to_be_bytes).collect();
    assert!(contains(safes[1].1, &utf16), "the key has the name of the client");

    let archive = Pkcs12Archive::from_pkcs12(&container, &password).unwrap();
    assert!(Pkcs12Archive::from_pkcs12(&container, "wrong-password-1").is_err());
    let ([key], [certificate]) = (&archive.keys[..], &archive.certs[..]) else {
        panic!("{archive:?}");
    };
    assert_eq!(key.friendly_name.as_deref(), Some(&*id));
    let same = key.local_key_id.as_ref().map(AsRef::as_ref) == certificate.local_key_id.as_deref();
    assert!(same && certificate.local_key_id.is_some());
    assert!(certificate.friendly_name.is_some());
    assert_eq!(certificate.cert.subject(), format!("CN={id}"));
    assert_eq!(certificate.cert.issuer(), certificate.cert.subject());

    // The store has the public half, and the certificate carries the same.
    let pair = RsaKeyPair::from_pkcs8(key.key.as_der()).unwrap();
    assert_eq!(pair.public_modulus_len(), 256);
    let shown = scratch.json(&format!("client show {id} --json"));
    let public = shown["PublicKey"].as_str().unwrap();
    let public = base64_simd::STANDARD.decode_to_vec(public).unwrap();
    assert!(contains(certificate.cert.as_der(), &public));
    let mut signature = [0; 256];
    pair.sign(&RSA_PKCS1_SHA256, &SystemRandom::new(), b"request", &mut signature).unwrap();
    let public = UnparsedPublicKey::new(&RSA_PKCS1_2048_8192_SHA256, &public);
    public.verify(b"request", &signature).unwrap();
    public.verify(b"another", &signature).unwrap_err();
}

/// Whether a program is there to be run.
fn is_installed(program: &str) -> bool {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path).any(|directory| directory.join(program).is_file())
}

#[test]
fn openssl_reads_a_key_file() {
    if !is_installed("openssl") {
        return;
    }
    let scratch = Scratch::new();
    scratch.run(CREATE).done();
    let (id, container) = scratch.key_file("c.json");
    fs::write(scratch.path("c.p12"), container).unwrap();
    let open = |legacy: &[&str]| {
        let mut command = Command::new("openssl");
        command.current_dir(scratch.0.path()).stdin(Stdio::null());
        command.args(["pkcs12", "-in", "c.p12", "-passin", "file:c.password", "-nodes", "-info"]);
        command.args(legacy).output().unwrap()
    };
    // Versions before 3 read the old algorithms without being asked, and do not know the option.
    let mut opened = open(&["-legacy"]);
    if !opened.status.success() {
        opened = open(&[]);
    }
    assert!(opened.status.success(), "{opened:?}");
    let out = String::from_utf8(opened.stdout).unwrap();
    let place = |what: &str| out.find(what).unwrap_or_else(|| panic!("{what}: {out}"));
    assert!(place("BEGIN CERTIFICATE") < place("PRIVATE KEY-----"), "certificate first");
    assert!(out.matches(&format!("friendlyName: {id}")).count() >= 1, "{out}");
    assert!(out.contains(&id[5..]));
    let told = String::from_utf8(opened.stderr).unwrap();
    assert_eq!(told.matches("pbeWithSHA1And3-KeyTripleDES-CBC").count(), 2, "{told}");
    assert!(told.to_lowercase().contains("mac: sha1"), "{told}");
}

#[test]
fn mistakes_in_the_arguments_are_told_and_leave_nothing() {
    let scratch = Scratch::new();
    let with = |change: &str| {
        // The last value of a single option is refused if it is given twice, so options are replaced.
        let (option, value) = change.split_once(' ').unwrap();
        let mut args: Vec<_> = CREATE.split_whitespace().map(str::to_owned).collect();
        let at = args.iter().position(|arg| arg == option).unwrap();
        args.splice(at..at + 2, (value != "-").then(|| format!("{option}={value}")));
        scratch.run(&args.join(" "))
    };
    let long = "x".repeat(65);
    let key_in_home = scratch.path("home/root.key");
    let log_in_home = scratch.path("home/keys.db-wal");
    for (change, part) in [
        ("--name -", "--name"),
        ("--out -", "--out"),
        ("--password-file -", "--password-file"),
        ("--keys -", "--keys"),
        ("--allow -", "--allow"),
        ("--name ", "Name has 0 characters"),
        (&format!("--name {long}"), "Name has 65 characters"),
        ("--name a\u{7}", "control characters"),
        ("--keys ", "is empty"),
        ("--keys alias/é", "printable ASCII"),
        ("--keys alias/a\\_b", "without spaces"),
        (&format!("--keys {}", "x".repeat(256)), "longer than 255"),
        ("--allow sign", "\"sign\" is none of generate, decrypt, encrypt, random, all"),
        ("--allow ", "\"\" is none of"),
        ("--allow generate,", "\"\" is none of"),
        ("--allow *", "\"*\" is none of"),
        ("--out .", "names no file"),
        ("--out ..", "names no file"),
        ("--out new/", "names no file"),
        ("--out home", "exists already"),
        ("--out ./c.password", "are both"),
        (&format!("--out {}", key_in_home.display()), "key store"),
        (&format!("--password-file {}", key_in_home.display()), "key store"),
        (&format!("--password-file {}", log_in_home.display()), "key store"),
    ] {
        with(change).ended(1, part);
        assert_eq!(scratch.files(), [""; 0], "{change}");
    }
    for (change, part) in [
        ("--out absent/c.json", "absent/c.json"),
        ("--password-file absent/c", "absent/c"),
        ("--password-file home", "home"),
    ] {
        with(change).ended(2, part);
        assert_eq!(scratch.files(), [""; 0], "{change}");
    }
    for option in ["--out", "--password-file"] {
        let args = CREATE.split_whitespace().collect::<Vec<_>>().join(" ");
        let name = if option == "--out" { "c.json" } else { "c.password" };
        let args = args.replace(&format!("{option} {name}"), &format!("{option}=-"));
        scratch.run(&args).ended(1, "has to be a file");
    }
    let many = (0..65).map(|n| format!("k{n}")).collect::<Vec<_>>().join(" ");
    let args = CREATE.replace("alias/*", &many);
    scratch.run(&args).ended(1, "65 key patterns");
    assert_eq!(scratch.run("client list --json").done(), "[]\n");
    assert_eq!(scratch.files(), [""; 0]);

    for (args, part) in [
        ("client show", "<CLIENT>"),
        ("client show backup", "\"backup\" is no client id"),
        ("client delete KAAP.0A1B2C3D-0000-4FFF-8000-00000000000F", "lower-case"),
        ("client set KAAP.0a1b2c3d-0000-4fff-8000-00000000000f", "--allow"),
        ("client set KAAP.0a1b2c3d-0000-4fff-8000-00000000000f --allow x", "\"x\" is none of"),
        ("client set KAAP.0a1b2c3d-0000-4fff-8000-00000000000f --name x", "records"),
        ("client rotate", "rotate"),
    ] {
        scratch.run(args).ended(1, part);
    }
    for command in ["client", "client create", "client set", "client list", "client delete"] {
        assert!(scratch.run(&format!("{command} --help")).done().contains("keymill client"));
    }
    let nowhere = Scratch(tempfile::tempdir().unwrap());
    nowhere.run(CREATE).ended(2, "there is no key store");
    assert_eq!(nowhere.files(), [""; 0]);
}

#[test]
fn a_password_that_is_there_is_used_and_never_changed() {
    let scratch = Scratch::new();
    let write = |content: &[u8]| {
        fs::write(scratch.path("c.password"), content).unwrap();
        fs::set_permissions(scratch.path("c.password"), PermissionsExt::from_mode(0o600)).unwrap();
    };
    for (content, why) in [
        (&b""[..], "shorter than 8"),
        (b"\n", "shorter than 8"),
        (b"abcde-1\n", "shorter than 8"),
        (b"abcdefgh\n", "one kind"),
        (b"secret 123\n", "neither digits"),
        (b"secret-123\n\n", "neither digits"),
        (b"\xff\xfe\xfd\xfc1234", "neither digits"),
        (&[b'a'; 65], "longer than 64"),
        (&[b'a'; 5000], "longer than 64"),
    ] {
        write(content);
        let ran = scratch.run(CREATE);
        assert!(
            ran.err.contains("at least two kinds: digits, letters, and ~!@#$%^&*?_-"),
            "{ran:?}"
        );
        assert!(!ran.err.contains("secret"), "{ran:?}");
        ran.ended(1, why);
        assert_eq!(fs::read(scratch.path("c.password")).unwrap(), content);
        assert_eq!(scratch.files(), ["c.password"]);
    }
    for content in [&b"secret-123"[..], b"secret-123\n", b"secret-123\r\n"] {
        write(content);
        let ran = scratch.run(CREATE);
        assert!(ran.out.contains("as it was") && !ran.out.contains("secret"), "{ran:?}");
        assert_eq!(ran.err, "");
        ran.done();
        assert_eq!(fs::read(scratch.path("c.password")).unwrap(), content);
        let (_, container) = scratch.key_file("c.json");
        Pkcs12Archive::from_pkcs12(&container, "secret-123").unwrap();
        fs::remove_file(scratch.path("c.json")).unwrap();
    }
    fs::set_permissions(scratch.path("c.password"), PermissionsExt::from_mode(0o644)).unwrap();
    let ran = scratch.run(CREATE);
    assert!(ran.err.contains("warning") && ran.err.contains("chmod 600"), "{ran:?}");
    ran.done();
}

#[test]
fn a_failure_leaves_neither_client_nor_file() {
    let scratch = Scratch::new();
    scratch.run(CREATE).done();
    let before = fs::read(scratch.path("c.json")).unwrap();
    scratch.run(&CREATE.replace("c.password", "d.password")).ended(1, "never overwritten");
    std::os::unix::fs::symlink("nothing", scratch.path("link")).unwrap();
    scratch.run(&CREATE.replace("c.json", "link")).ended(1, "never overwritten");
    assert_eq!(fs::read(scratch.path("c.json")).unwrap(), before);
    // The store refuses: what was made for the client goes again.
    let refused = CREATE.replace("backup", &"x".repeat(65)).replace(" c.", " e.");
    scratch.run(&refused).ended(1, "65 characters");
    // A file system that takes no file.
    if Path::new("/proc/self").exists() {
        scratch.run(&CREATE.replace("c.json", "/proc/c.json")).ended(2, "/proc/c.json");
        let args = CREATE.replace("c.json", "f.json").replace("c.password", "/proc/f.password");
        scratch.run(&args).ended(2, "/proc/f.password");
    }
    assert_eq!(scratch.files(), ["c.json", "c.password", "link"]);
    assert_eq!(scratch.json("client list --json").as_array().unwrap().len(), 1);
}

/// What happens between the first look at the place and the end comes too late or in time; neither leaves a half.
#[test]
fn whoever_comes_in_between_finds_both_or_neither() {
    let scratch = Scratch::new();
    let mut refused = [0; 2];
    let mut made = 0;
    while refused.contains(&0) && made < 40 {
        let which = usize::from(refused[0] > 0);
        let child = scratch.command(CREATE).spawn().unwrap();
        while scratch.files().is_empty() {
            std::thread::yield_now();
        }
        let ran = if which == 0 {
            let theirs = fs::File::create_new(scratch.path("c.json"));
            theirs.and_then(|mut file| file.write_all(b"theirs")).ok();
            Ran::of(child)
        } else {
            let kill = Command::new("kill").args(["-TERM", &child.id().to_string()]).status();
            kill.unwrap();
            Ran::of(child)
        };
        if ran.code == Some(0) {
            let (id, _) = scratch.key_file("c.json");
            assert_eq!(scratch.files(), ["c.json", "c.password"]);
            scratch.run(&format!("client delete {id}")).done();
            fs::remove_file(scratch.path("c.password")).unwrap();
            made += 1;
        } else if which == 0 {
            ran.ended(1, "never overwritten");
            assert_eq!(fs::read(scratch.path("c.json")).unwrap(), b"theirs");
            assert_eq!(scratch.files(), ["c.json"]);
            refused[0] += 1;
        } else {
            ran.ended(2, "interrupted");
            assert_eq!(scratch.files(), [""; 0]);
            refused[1] += 1;
        }
        let _ = fs::remove_file(scratch.path("c.json"));
        assert_eq!(scratch.run("client list --json").done(), "[]\n");
    }
    assert!(!refused.contains(&0), "never in time: {refused:?}");
}

#[test]
fn patterns_that_fit_no_key_are_warned_of() {
    let scratch = Scratch::new();
    let ran = scratch.run(&CREATE.replace("alias/*", "alias/ap? Cargo.toml"));
    assert!(ran.err.contains("warning") && ran.err.contains("\"Cargo.toml\""), "{ran:?}");
    assert!(!ran.err.contains("ap?"), "{ran:?}");
    ran.done();
    let (id, _) = scratch.key_file("c.json");
    let ran = scratch.run(&format!("client set {id} --keys alias/late"));
    assert!(ran.err.contains("alias/late"), "{ran:?}");
    ran.done();
    scratch.run("alias create alias/late alias/app").done();
    assert_eq!(scratch.run(&format!("client set {id} --keys alias/late")).err, "");
}
