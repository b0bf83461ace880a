//! Guards the house: which room of `src/` may use which, and how its files are kept.
//!
//! Goal: the one-way order of the rooms holds without anybody watching it. Method: reads every source file as text,
//! finds every path that begins with `crate`, `super` or `self` (in `use` groups and expressions alike, in test
//! modules too), resolves it, and reports every breach of a rule at once, as `file:line: what`. Comments, strings and
//! paths that macros build are not seen.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// The rooms, each using only those before it. `lib.rs` is exempt; `bin` is a crate of its own.
const ROOMS: [&str; 21] = [
    "limits",
    "request_id",
    "error",
    "os",
    "memory",
    "secret",
    "cpu",
    "kernel",
    "rng",
    "wrap",
    "kernels",
    "keys",
    "clients",
    "store",
    "request",
    "batch",
    "engine",
    "pool",
    "ffi",
    "server",
    "bin",
];

/// Rooms that may hold unsafe code.
const UNSAFE_ROOMS: [&str; 3] = ["os", "kernel", "ffi"];

const LINES_MAX: usize = 600;
const COLUMNS_MAX: usize = 100;
/// rustfmt leaves comments alone, and prose is easier to keep in longer lines.
const COMMENT_COLUMNS_MAX: usize = 120;

#[test]
fn the_house_is_in_order() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = Vec::new();
    rust_files(&root.join("src"), &mut files);
    assert!(files.len() > 20, "src/ was not found");
    let mut breaches = Vec::new();
    for file in files {
        let text = fs::read_to_string(&file).expect("source files are UTF-8");
        let name = file.strip_prefix(root).expect("below root").to_str().expect("UTF-8");
        breaches.extend(source_breaches(name, &text));
    }
    let manifest = fs::read_to_string(root.join("Cargo.toml")).expect("beside src/");
    breaches.extend(manifest_breaches(&manifest));
    assert!(breaches.is_empty(), "{} breaches:\n{}", breaches.len(), breaches.join("\n"));
}

fn rust_files(folder: &Path, files: &mut Vec<PathBuf>) {
    let entries = fs::read_dir(folder).expect("a folder");
    let mut paths: Vec<_> = entries.map(|entry| entry.expect("an entry").path()).collect();
    paths.sort();
    for path in paths {
        if path.is_dir() {
            rust_files(&path, files);
        } else if path.extension().is_some_and(|ending| ending == "rs") {
            files.push(path);
        }
    }
}

/// A kernel runs with the features that its token proves, no more and no fewer.
#[test]
fn kernels_enable_what_their_tokens_prove() {
    let read = |name: &str| {
        fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(name)).expect(name)
    };
    let cpu = read("src/cpu.rs");
    let mut checked = 0;
    for (file, token) in [
        ("mod", "AesNi"),
        ("gcm_aesni", "AesNi"),
        ("gcm_vaes256", "Vaes256"),
        ("gcm_vaes512", "Vaes512"),
        ("chacha_avx512", "Vaes512"),
    ] {
        let declared = format!("    {token}: \"");
        let proven = cpu.split_once(&declared).expect(token).1.split('"').next().expect(token);
        let kernel = read(&format!("src/kernel/x86_64/{file}.rs"));
        // What stands between quotes and names AES is a list of features.
        for list in kernel.split('"').skip(1).step_by(2).filter(|text| text.starts_with("aes")) {
            assert_eq!(list, proven, "{file}.rs, and {token} in cpu.rs");
            checked += 1;
        }
    }
    assert!(checked >= 10, "the lists were not found");
    for name in ["gcm", "short", "long", "aads", "set_up", "job", "block"] {
        let shared = read(&format!("src/kernel/x86_64/{name}.rs"));
        assert!(!shared.contains("enable = \""), "{name}.rs takes its features from its caller");
    }
}

// ---- the rules ----

/// Breaches of `text`, the file `name` (`src/...`).
fn source_breaches(name: &str, text: &str) -> Vec<String> {
    let module = module_of(name);
    let tokens = tokens(text);
    let mut breaches = form_breaches(text);
    breaches.extend(escape_breaches(&tokens));
    let room = module.first().map(String::as_str);
    if let Some(room) = room {
        if !ROOMS.contains(&room) {
            breaches.push((1, format!("`{room}` is no room; give it a place in ROOMS")));
        }
        if room != "bin" {
            for (line, path) in paths(&tokens, &module) {
                breaches.extend(edge_breach(room, &path).map(|what| (line, what)));
            }
        }
    }
    // Tests fork and mount, which is unsafe code in any room.
    let of_tests = module.iter().any(|part| part == "tests");
    if !of_tests && !room.is_some_and(|room| UNSAFE_ROOMS.contains(&room)) {
        breaches.extend(unsafe_breaches(&tokens));
    }
    breaches.sort();
    breaches.into_iter().map(|(line, what)| format!("{name}:{line}: {what}")).collect()
}

/// Whether `room` may name `path`, a path from the crate's root.
fn edge_breach(room: &str, path: &[String]) -> Option<String> {
    let place = |name: &str| ROOMS.iter().position(|room| *room == name);
    let Some(first) = path.first() else {
        return Some("names the crate's root, which hides what it uses".into());
    };
    match (place(room), place(first)) {
        (Some(from), Some(to)) if to > from => {
            Some(format!("`{room}` must not use `{}`: {first} comes later", path.join("::")))
        }
        (_, None) => {
            Some(format!("`{}` is in no room; name it where it is defined", path.join("::")))
        }
        _ => None,
    }
}

/// Ways around the path scanner.
fn escape_breaches(tokens: &[Token]) -> Vec<(usize, String)> {
    let spells = |i: usize, words: &[&str]| {
        words.iter().enumerate().all(|(k, word)| text_at(tokens, i + k) == *word)
    };
    let mut breaches = Vec::new();
    for (i, token) in tokens.iter().enumerate() {
        for words in [&["#", "[", "path"][..], &["include", "!"], &["extern", "crate", "self"]] {
            if spells(i, words) {
                let words = words.concat();
                breaches.push((token.line, format!("`{words}` brings in code from elsewhere")));
            }
        }
    }
    breaches
}

fn unsafe_breaches(tokens: &[Token]) -> Vec<(usize, String)> {
    let mut breaches = Vec::new();
    for (i, token) in tokens.iter().enumerate() {
        let refused = i >= 2 && ["deny", "forbid"].contains(&text_at(tokens, i - 2));
        if token.text == "unsafe" || (token.text == "unsafe_code" && !refused) {
            let what = format!("`{}` outside of {}", token.text, UNSAFE_ROOMS.join(", "));
            breaches.push((token.line, what));
        }
    }
    breaches
}

fn form_breaches(text: &str) -> Vec<(usize, String)> {
    let mut breaches = Vec::new();
    if !text.starts_with("//! ") {
        breaches.push((1, "opens without `//!`".into()));
    }
    let count = text.lines().count();
    if count > LINES_MAX {
        breaches.push((count, format!("{count} lines; split at {LINES_MAX}")));
    }
    for (line, number) in text.lines().zip(1..) {
        let is_comment = line.trim_start().starts_with("//");
        let max = if is_comment { COMMENT_COLUMNS_MAX } else { COLUMNS_MAX };
        let columns = line.chars().count();
        if columns > max {
            breaches.push((number, format!("{columns} columns; the most is {max}")));
        }
    }
    breaches
}

/// Every dependency has its reason in a comment above it.
fn manifest_breaches(text: &str) -> Vec<String> {
    let mut breaches = Vec::new();
    let (mut in_table, mut above) = (false, "");
    for (line, number) in text.lines().zip(1..) {
        let mut named = None;
        if let Some(header) = line.strip_prefix('[') {
            let header = header.trim_end_matches(']');
            in_table = header.ends_with("dependencies");
            named = header.split_once("dependencies.").map(|(_, name)| name);
        } else if in_table && line.starts_with(|first: char| first.is_alphanumeric()) {
            named = line.split([' ', '=', '.']).next();
        }
        if let Some(name) = named
            && !above.starts_with("# ")
        {
            breaches.push(format!("Cargo.toml:{number}: no comment says why `{name}` is here"));
        }
        above = line;
    }
    breaches
}

// ---- reading sources ----

/// `src/wrap/blob.rs` is module `wrap::blob`; `src/lib.rs` is the root.
fn module_of(name: &str) -> Vec<String> {
    let inner = name.trim_start_matches("src/").trim_end_matches(".rs");
    let mut module: Vec<String> = inner.split('/').map(String::from).collect();
    if module.last().is_some_and(|last| last == "mod") || inner == "lib" {
        module.pop();
    }
    module
}

#[derive(Debug)]
struct Token {
    text: String,
    line: usize,
}

fn text_at(tokens: &[Token], i: usize) -> &str {
    tokens.get(i).map_or("", |token| token.text.as_str())
}

/// Words, `::`, and single marks; without comments, strings and characters.
fn tokens(text: &str) -> Vec<Token> {
    let chars: Vec<char> = text.chars().collect();
    let at = |i: usize| chars.get(i).copied().unwrap_or('\0');
    let (mut tokens, mut i, mut line) = (Vec::new(), 0, 1);
    while i < chars.len() {
        let start = i;
        let mut token = None;
        match (at(i), at(i + 1)) {
            ('/', '/') => i = find(&chars, i, "\n"),
            ('/', '*') => i = end_of_block_comment(&chars, i),
            ('"', _) => i = end_of_quoted(&chars, i),
            // A lifetime is `'` and a word; a character has its closing mark.
            ('\'', '\\') => i = end_of_quoted(&chars, i),
            ('\'', _) if at(i + 2) == '\'' => i += 3,
            (':', ':') => {
                token = Some("::".to_string());
                i += 2;
            }
            (c, _) if c.is_alphanumeric() || c == '_' => {
                while at(i).is_alphanumeric() || at(i) == '_' {
                    i += 1;
                }
                let word: String = chars[start..i].iter().collect();
                let hashes = (i..).take_while(|k| at(*k) == '#').count();
                if ["r", "br", "cr"].contains(&word.as_str()) && at(i + hashes) == '"' {
                    let end = format!("\"{}", "#".repeat(hashes));
                    i = find(&chars, i + hashes + 1, &end) + end.len();
                } else {
                    token = Some(word);
                }
            }
            (c, _) => {
                token = (!c.is_whitespace()).then(|| c.to_string());
                i += 1;
            }
        }
        tokens.extend(token.map(|text| Token { text, line }));
        i = i.min(chars.len());
        line += chars[start..i].iter().filter(|c| **c == '\n').count();
    }
    tokens
}

/// Where `what` stands at or after `from`, or the end.
fn find(chars: &[char], from: usize, what: &str) -> usize {
    let what: Vec<char> = what.chars().collect();
    (from..chars.len()).find(|i| chars[*i..].starts_with(&what)).unwrap_or(chars.len())
}

fn end_of_quoted(chars: &[char], from: usize) -> usize {
    let mut i = from + 1;
    while i < chars.len() && chars[i] != chars[from] {
        i += if chars[i] == '\\' { 2 } else { 1 };
    }
    i + 1
}

fn end_of_block_comment(chars: &[char], from: usize) -> usize {
    let (mut depth, mut i) = (0, from);
    while i < chars.len() {
        if chars[i..].starts_with(&['/', '*']) {
            (depth, i) = (depth + 1, i + 2);
        } else if chars[i..].starts_with(&['*', '/']) {
            (depth, i) = (depth - 1, i + 2);
            if depth == 0 {
                break;
            }
        } else {
            i += 1;
        }
    }
    i
}

/// Every path that begins with `crate`, `super` or `self`, from the crate's root, and its line. `*` stands for a glob.
fn paths(tokens: &[Token], module: &[String]) -> Vec<(usize, Vec<String>)> {
    let mut found = Vec::new();
    let mut module = module.to_vec();
    // Brace depths at which inline modules opened.
    let (mut depth, mut inline) = (0usize, Vec::new());
    let mut i = 0;
    while i < tokens.len() {
        let next = text_at(tokens, i + 1);
        match tokens[i].text.as_str() {
            "crate" | "super" | "self" if next == "::" => {
                i = path_tree(tokens, i, module.clone(), &mut found);
                continue;
            }
            "crate" if next == "as" => found.push((tokens[i].line, Vec::new())),
            "super" if next == "as" => {
                found.push((tokens[i].line, module[..module.len().saturating_sub(1)].to_vec()));
            }
            "mod" if text_at(tokens, i + 2) == "{" => {
                module.push(next.to_string());
                inline.push(depth);
            }
            "{" => depth += 1,
            "}" => {
                depth = depth.saturating_sub(1);
                if inline.last() == Some(&depth) {
                    inline.pop();
                    module.pop();
                }
            }
            _ => {}
        }
        i += 1;
    }
    found
}

/// Reads the path, or tree of paths, that begins at `i` and continues `prefix`. Returns the index after it.
fn path_tree(
    tokens: &[Token],
    mut i: usize,
    mut prefix: Vec<String>,
    found: &mut Vec<(usize, Vec<String>)>,
) -> usize {
    let line = tokens[i].line;
    loop {
        match text_at(tokens, i) {
            "{" => {
                i += 1;
                while !["}", ""].contains(&text_at(tokens, i)) {
                    i = path_tree(tokens, i, prefix.clone(), found);
                    while ![",", "}", ""].contains(&text_at(tokens, i)) {
                        i += 1;
                    }
                    i += usize::from(text_at(tokens, i) == ",");
                }
                return i + 1;
            }
            "crate" => prefix.clear(),
            "super" => {
                prefix.pop();
            }
            "self" => {}
            segment => prefix.push(segment.to_string()),
        }
        i += 1;
        // `::<` is a type argument of the path that ends here.
        if text_at(tokens, i) != "::" || text_at(tokens, i + 1) == "<" {
            found.push((line, prefix));
            return i;
        }
        i += 1;
    }
}

// ---- the guard itself ----

fn paths_of(name: &str, text: &str) -> Vec<String> {
    let found = paths(&tokens(text), &module_of(name));
    found.into_iter().map(|(line, path)| format!("{line} {}", path.join("::"))).collect()
}

#[test]
fn paths_are_found_in_groups_and_expressions() {
    let text = "use crate::{\n    error::{Error, Result as R}, keys::id,\n    wrap::{self, blob::{cut, head}, *},\n};\n\
        use std::fmt;\nfn f(x: crate::os::Generation) -> Vec<crate::rng::Rng> { crate::secret::Seed::<u8>::new() }\n\
        use {super::blob, crate::limits::IV_LEN};\npub(in crate::store) struct A;\npub(crate) struct B;\n\
        let y = crate::cpu::A as crate::batch::B; m!($crate::pool::x);";
    assert_eq!(
        paths_of("src/wrap/state.rs", text),
        [
            "2 error::Error",
            "2 error::Result",
            "2 keys::id",
            "3 wrap",
            "3 wrap::blob::cut",
            "3 wrap::blob::head",
            "3 wrap::*",
            "6 os::Generation",
            "6 rng::Rng",
            "6 secret::Seed",
            "7 wrap::blob",
            "7 limits::IV_LEN",
            "8 store",
            "10 cpu::A",
            "10 batch::B",
            "10 pool::x",
        ]
    );
}

#[test]
fn super_and_self_are_resolved() {
    let text = "use super::super::keys::id;\nuse self::super::x;\nuse super::{super::engine, y};\nmod tests {\n\
        use super::*;\nuse super::super::super::pool;\nfn f() { if a { b } }\nmod deep { use super::super::z; }\n}\n\
        use super::after;\nuse super as up;\nuse crate as all;\nfn g(self) -> Self { self.x }";
    assert_eq!(
        paths_of("src/wrap/blob.rs", text),
        [
            "1 keys::id",
            "2 wrap::x",
            "3 engine",
            "3 wrap::y",
            "5 wrap::blob::*",
            "6 pool",
            "8 wrap::blob::z",
            "10 wrap::after",
            "11 wrap",
            "12 ",
        ]
    );
    assert_eq!(
        paths_of("src/rng/mod.rs", "use super::keys; use self::pool;"),
        ["1 keys", "1 rng::pool"]
    );
}

#[test]
fn comments_and_strings_hold_no_paths() {
    let text = "//! crate::a\n/* crate::b /* super::c */ crate::d */\nlet s = \"crate::e \\\" crate::f\";\n\
        let r = r#\"crate::g \" super::h\"#; let c = ['\"', '\\'', 'x']; fn l<'a>(x: &'a crate::os::X) {}\n\
        let b = b\"crate::i\"; use crate::os::Y;";
    assert_eq!(paths_of("src/wrap/mod.rs", text), ["4 os::X", "5 os::Y"]);
}

#[test]
fn planted_breaches_are_reported_with_their_lines() {
    let of = |name: &str, text: &str| source_breaches(name, text);
    assert_eq!(
        of("src/keys/id.rs", "//! Fine.\nuse crate::{wrap::Scheme, error::Result};\n"),
        [""; 0]
    );
    let text = "//! Bad.\nuse crate::{\n    error::Result,\n    keys::{self, id},\n};\n\
        mod tests {\n    use super::super::super::engine::Engine;\n}\nuse crate::*;\nuse crate::Error;\n";
    assert_eq!(
        of("src/wrap/blob.rs", text),
        [
            "src/wrap/blob.rs:4: `wrap` must not use `keys::id`: keys comes later",
            "src/wrap/blob.rs:4: `wrap` must not use `keys`: keys comes later",
            "src/wrap/blob.rs:7: `wrap` must not use `engine::Engine`: engine comes later",
            "src/wrap/blob.rs:9: `*` is in no room; name it where it is defined",
            "src/wrap/blob.rs:10: `Error` is in no room; name it where it is defined",
        ]
    );
    let long =
        format!("//! {}\nfn f() {{}}{}\n// {}\n", "x".repeat(117), " ".repeat(92), "é".repeat(117));
    assert_eq!(
        of("src/cellar.rs", &long),
        [
            "src/cellar.rs:1: 121 columns; the most is 120",
            "src/cellar.rs:1: `cellar` is no room; give it a place in ROOMS",
            "src/cellar.rs:2: 101 columns; the most is 100",
        ]
    );
    let text = "fn f() { unsafe { g() } }\n#[expect(unsafe_code)]\n#[path = \"x.rs\"]\nmod x;\ninclude!(\"y.rs\");\n";
    assert_eq!(of("src/os.rs", text).len(), 3);
    assert_eq!(of("src/bin/keymill/main.rs", text).len(), 5);
    assert_eq!(of("src/lib.rs", "//! Root.\n#![deny(unsafe_code)]\nmod os;\n"), [""; 0]);
    assert_eq!(of("src/os.rs", &format!("//! Long.\n{}", "\n".repeat(600))).len(), 1);
}

#[test]
fn a_dependency_without_a_reason_is_reported() {
    let text = "[features]\na = []\n[dependencies]\n# Why.\ngood = \"1\"\nbad = { version = \"1\", features = [\n\
        \"x\",\n] }\n# Why.\n\n[dev-dependencies]\nworse = \"1\"\n# Why.\n[target.'cfg(unix)'.dependencies.fine]\nversion = \"1\"\n\
        [dependencies.awful]\nversion = \"1\"\n";
    assert_eq!(
        manifest_breaches(text),
        [
            "Cargo.toml:6: no comment says why `bad` is here",
            "Cargo.toml:12: no comment says why `worse` is here",
            "Cargo.toml:16: no comment says why `awful` is here",
        ]
    );
}
