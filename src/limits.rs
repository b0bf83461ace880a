//! Every length, count and cap of the engine, with const assertions between them.
//!
//! Nothing else in the crate states a limit as a number. Sources are named where a number is not ours.

use std::time::Duration;

/// Fewest bytes of a data key.
pub const NUMBER_OF_BYTES_MIN: usize = 1;
/// Most bytes of a data key (the KMS's `NumberOfBytes`).
pub const NUMBER_OF_BYTES_MAX: usize = 1024;
/// Fewest bytes of a text to encrypt.
pub const PLAINTEXT_LEN_MIN: usize = 1;
/// Most bytes of a text to encrypt: what a request of the KMS can carry.
pub const PLAINTEXT_LEN_MAX: usize = 3 << 20;
/// Longest text that shares a salt with others. From here on a salt of its own costs little beside the text, and the
/// blocks under one salt stay as few as data keys make them.
pub const SHARED_SALT_LEN_MAX: usize = NUMBER_OF_BYTES_MAX;
/// Fewest random bytes of one call.
pub const GENERATE_RANDOM_LEN_MIN: usize = 1;
/// Most random bytes of one call (the KMS's `GenerateRandom`).
pub const GENERATE_RANDOM_LEN_MAX: usize = 64;
/// Most bytes of additional authenticated data (the KMS's `Aad`).
pub const AAD_LEN_MAX: usize = 8192;

/// Bytes of a GCM IV (SP 800-38D section 5.2.1.1).
pub const IV_LEN: usize = 12;
/// Bytes of a GCM tag.
pub const TAG_LEN: usize = 16;
/// Bytes of the salt of the `Derived` scheme: the first half of an XAES-256-GCM nonce.
pub const SALT_LEN: usize = 12;

/// Characters of a key id: `key-` and 21 of `[a-z0-9]`.
pub const KEY_ID_LEN: usize = 25;
/// Characters of a key version id: the key id, `-`, and 10 of `[a-z0-9]`.
pub const KEY_VERSION_ID_LEN: usize = 36;
/// Most characters of an alias, `alias/` included.
pub const ALIAS_LEN_MAX: usize = 255;
/// Most bytes of a key's description.
pub const DESCRIPTION_LEN_MAX: usize = 8192;

/// Bytes before the key version id in a self-describing blob.
pub const BLOB_MAGIC_LEN: usize = 3;
/// Bytes before the wrapped part of a self-describing blob: magic, key version id, IV.
pub const BLOB_HEAD_LEN: usize = BLOB_MAGIC_LEN + KEY_VERSION_ID_LEN + IV_LEN;
/// Most bytes of a data key's blob: self-describing, `Derived`, the longest data key.
pub const BLOB_LEN_MAX: usize = BLOB_HEAD_LEN + SALT_LEN + NUMBER_OF_BYTES_MAX + TAG_LEN;

/// Most items of one batch call.
pub const BATCH_ITEMS_MAX: usize = 1 << 20;
/// Most bytes of data keys, IVs and blobs together that one batch call returns.
pub const BATCH_OUTPUT_MAX: usize = 1 << 30;

/// Most items of a chunk. A chunk's DEKs, IVs, AADs and blobs should stay in the L2 cache.
pub const CHUNK_ITEMS_MAX: usize = 1024;
/// Most bytes of DEKs, IVs, AADs and blobs of a chunk (a chunk holds at least one item all the same).
pub const CHUNK_BYTES_MAX: usize = 256 << 10;
/// A run of a `Derived` version shorter than this uses the version's wrapping state and spares itself the set-up of a
/// key of its own, which costs more than sealing a message. Chosen, not measured.
pub const SHORT_RUN: usize = 32;
/// A batch of fewer items runs on the caller's thread (threshold: PERF.md, "The engine", `batch` with 2 threads).
pub const FAN_OUT_ITEMS_MIN: usize = 8192;
/// Messages that go to the kernel in one call: their AADs and keys lie on the stack meanwhile.
pub const BLOCK_ITEMS: usize = 256;
/// A batch of fewer items takes its seed from the thread's pool, a larger one from the operating system.
pub const OS_SEED_ITEMS_MIN: usize = 256;

/// Most data keys of a window of a stream.
pub const STREAM_WINDOW_ITEMS: usize = 16_384;
/// Most bytes of a window of a stream: data keys, IVs and blobs, roughly.
pub const STREAM_WINDOW_BYTES: usize = 4 << 20;
/// Windows of a stream that wait to be read. One more is being made, and one is with the reader.
pub const STREAM_WINDOWS_AHEAD: usize = 2;

/// Wraps under one AES-GCM key with random IVs (SP 800-38D section 8.3): the bound of a `Direct` version.
pub const WRAPS_PER_VERSION_MAX: u64 = 1 << 32;
/// Wraps after which a `Direct` key with rotation gets a new primary version.
pub const WRAPS_BEFORE_ROTATION: u64 = 1 << 31;
/// Most wraps that one lease takes from the store beyond what the call itself needs.
pub const LEASE_MAX: u64 = 1 << 20;
/// Size of a version's first lease beyond need; each further one doubles.
pub const LEASE_FIRST: u64 = 64;

/// Most wraps of one wrapping state, that is of one salt.
pub const STATE_WRAPS_MAX: u64 = 1 << 20;
/// Longest life of a wrapping state.
pub const STATE_AGE_MAX: Duration = Duration::from_secs(1);
/// Wrapping states that a version keeps: so many threads use one version without getting into each other's way.
pub const STATE_SLOTS: usize = 16;

/// Batches whose memory waits in an engine for the next ones.
pub const RECYCLED_BATCHES_MAX: usize = 16;
/// Bytes that wait there unless the engine's builder says otherwise: a million results of 32-byte data keys.
pub const RECYCLED_BYTES_DEFAULT: usize = 128 << 20;
/// Memory from this size on asks for huge pages: twice their size on x86-64.
pub const HUGE_PAGES_MIN: usize = 4 << 20;

/// A per-thread pool is reseeded from the operating system after this many bytes.
pub const POOL_BYTES_MAX: u64 = 1 << 20;
/// A per-thread pool is reseeded from the operating system after this time.
pub const POOL_AGE_MAX: Duration = Duration::from_secs(1);

/// Most keys that a pool of pre-generated keys holds.
pub const KEY_POOL_CAPACITY_MAX: usize = 1 << 20;
/// Keys that such a pool holds unless its configuration says otherwise.
pub const KEY_POOL_CAPACITY_DEFAULT: usize = 1024;
/// The age at which its keys expire unless its configuration says otherwise.
pub const KEY_POOL_AGE_DEFAULT: Duration = Duration::from_secs(300);
/// Keys that it makes in one batch.
pub const KEY_POOL_BATCH_ITEMS: usize = 1024;
/// Most keys that a thread takes out of such a pool's queue at once.
pub const KEY_POOL_MAGAZINE_ITEMS: usize = 64;
/// How often it looks for keys that have expired, and for changes of its KEK.
pub const KEY_POOL_TICK: Duration = Duration::from_millis(200);
/// Longest time between two attempts to refill it.
pub const KEY_POOL_BACKOFF_MAX: Duration = Duration::from_secs(10);

/// Shortest time between asking for a key's deletion and its execution, in days.
pub const DELETION_DAYS_MIN: u32 = 7;
/// Longest time between asking for a key's deletion and its execution, in days.
pub const DELETION_DAYS_MAX: u32 = 366;
/// Shortest rotation period.
pub const ROTATION_PERIOD_MIN: Duration = Duration::from_secs(7 * 86_400);
/// Longest rotation period.
pub const ROTATION_PERIOD_MAX: Duration = Duration::from_secs(365 * 86_400);

/// Most bytes of the body of a single KMS operation: the KMS's 3 MB.
pub const SERVER_BODY_LEN_MAX: usize = 3 << 20;
/// Most items of a batch on the wire.
pub const SERVER_BATCH_ITEMS_MAX: usize = 65_536;
/// Most bytes of the body of a batch unless the server's configuration says otherwise.
pub const SERVER_BATCH_BODY_LEN_DEFAULT: usize = 64 << 20;
/// Bytes of bodies and of responses not yet sent that a server holds, roughly. More is answered 429.
pub const SERVER_BYTES_HELD_MAX: u64 = 1 << 30;
/// Data keys that a server works on at once unless its configuration says otherwise.
pub const SERVER_KEYS_IN_PROGRESS_DEFAULT: u64 = 1 << 18;
/// How long a client counts as one that others share with, since it last asked for keys.
pub const SERVER_CLIENT_ACTIVE_TIME: Duration = Duration::from_secs(10);
/// How long room is kept for a client whose batch was too large for its share: some times `Retry-After`.
pub const SERVER_TURN_TIME: Duration = Duration::from_secs(3);
/// Most seconds of keys that a client may owe under a limit of keys a second. A batch of more is refused: whoever waits
/// longer for an answer has given up.
pub const SERVER_DEBT_TIME: Duration = Duration::from_secs(60);
/// Items of a batch that are refused and together count as one key.
pub const SERVER_REFUSED_ITEMS_PER_KEY: u64 = 16;
/// How often the log tells of a disabled client that still sends requests.
pub const SERVER_DISABLED_TOLD_TIME: Duration = Duration::from_secs(60);
/// Keys that a record of the audit log names as asked for and refused, at most.
pub const AUDIT_KEYS_ASKED_MAX: usize = 16;
/// Connections that a server holds at once unless its configuration says otherwise.
pub const SERVER_CONNECTIONS_DEFAULT: usize = 4096;
/// A body up to this size is worked on by a thread that serves connections, a longer one elsewhere.
pub const SERVER_LIGHT_BODY_LEN_MAX: usize = 16 << 10;
/// Connections without an authenticated request that one address may have when places run out, as a part of all places,
/// unless the server's configuration says otherwise: so eight strangers can fill a server, and one cannot.
pub const SERVER_SOURCE_PART: usize = 8;
/// Fewest such connections, whatever the part.
pub const SERVER_SOURCE_CONNECTIONS_MIN: usize = 16;
/// Bits of an IPv6 address that tell one source from another: a subscriber has a network of this length.
pub const SERVER_SOURCE_IPV6_BITS: u32 = 64;
/// Time after which a connection that has done its work may be ended when places run out.
pub const SERVER_SPARE_IDLE_TIME: Duration = Duration::from_secs(1);
/// Connections at once of those who watch the server.
pub const SERVER_WATCHERS_MAX: usize = 64;
/// File descriptors that a server keeps free for the audit log and its rotation, TLS files, the key store and its
/// companions, and whatever the system's resolver and allocator open.
pub const SERVER_SPARE_FILES: usize = 24;
/// File descriptors of a thread that serves connections: an epoll, an event, a pair of sockets.
pub const SERVER_FILES_PER_THREAD: usize = 4;
/// Time in which a new connection has to come to its first whole head, its TLS handshake included, unless the server's
/// configuration says otherwise. Four round trips and the loss of a packet fit.
pub const SERVER_HEAD_TIME_DEFAULT: Duration = Duration::from_secs(5);
/// Time in which a new connection has to come to its first authenticated request.
pub const SERVER_FIRST_REQUEST_TIME: Duration = Duration::from_secs(20);
/// Time that every body has to arrive, ...
pub const SERVER_TRANSFER_TIME: Duration = Duration::from_secs(30);
/// ... and a further second for so many bytes.
pub const SERVER_TRANSFER_BYTES_PER_SECOND: usize = 128 << 10;
/// Time after which a connection ends if nothing of an answer has left it, unless the server's configuration says
/// otherwise. A receiver that reads slowly lets TCP go on in steps of 64 KiB or so, which this leaves time for.
pub const SERVER_STALL_TIME_DEFAULT: Duration = Duration::from_secs(10);
/// A client that reads has to take so many bytes a second, ...
pub const SERVER_ANSWER_BYTES_PER_SECOND: u64 = 16 << 10;
/// ... over so long.
pub const SERVER_ANSWER_WINDOW: Duration = Duration::from_secs(30);
/// Bytes of an answer that HTTP/2 is given at once: a frame of the usual size, after which it is somebody else's turn.
pub const SERVER_ANSWER_PIECE_LEN: usize = 16 << 10;
/// Time for what is left of a body whose request is refused, before the answer.
pub const SERVER_DISCARD_TIME: Duration = Duration::from_secs(5);
/// Most bytes of it that are read after the answer, ...
pub const SERVER_DISCARD_LATE_LEN_MAX: usize = 256 << 20;
/// ... and the time for them. A client that still sends then had time to read its answer.
pub const SERVER_DISCARD_LATE_TIME: Duration = Duration::from_secs(30);
/// Time without a byte after which a connection of HTTP/1 that lingers is closed, whether the client ended it or not.
pub const SERVER_LINGER_TIME: Duration = Duration::from_secs(2);
/// Failures of one kind that are logged each second; the rest is counted.
pub const SERVER_FAILURES_LOGGED_PER_SECOND: u32 = 10;
/// Time before the expiry of a TLS certificate from which on it is warned about, once a day.
pub const TLS_EXPIRY_WARNING: Duration = Duration::from_secs(14 * 86_400);
/// Most bytes of a TLS file.
pub const TLS_FILE_LEN_MAX: usize = 1 << 20;
/// Most difference between the date of a request and the server's clock (the KMS's 15 minutes).
pub const CLOCK_SKEW_MAX: Duration = Duration::from_secs(15 * 60);
/// Most bytes of a signature: that of RSA-8192.
pub const SIGNATURE_LEN_MAX: usize = 1024;
/// Records of the audit log that are reserved, queued or not yet on disk.
pub const AUDIT_QUEUE_MAX: usize = 65_536;
/// Refusals before authentication that are recorded each second.
pub const AUDIT_REFUSALS_PER_SECOND: u32 = 100;
/// How often the audit log is brought to the disk.
pub const AUDIT_SYNC_INTERVAL: Duration = Duration::from_millis(500);
/// How long a server that starts waits for the lock of its audit log: another one that ends may still hold it.
pub const AUDIT_LOCK_TIME: Duration = Duration::from_secs(3);
/// How long the reader of an audit log that is a stream may read nothing before key operations are refused.
pub const AUDIT_STREAM_TIME: Duration = Duration::from_secs(1);
/// How long a server that ends tries to write the last records.
pub const AUDIT_END_TIME: Duration = Duration::from_secs(5);
/// Characters of a client id: `KAAP.` and a UUID.
pub const CLIENT_ID_LEN: usize = 41;
/// Most characters of a client's name.
pub const CLIENT_NAME_CHARS_MAX: usize = 64;
/// Most bytes of a client's public key; an RSA key of 2048 bits has 294.
pub const CLIENT_PUBLIC_KEY_LEN_MAX: usize = 1024;
/// Most key patterns of a client. Every request of a client is held against them.
pub const CLIENT_KEY_PATTERNS_MAX: usize = 64;
/// Most characters of a key pattern.
pub const KEY_PATTERN_LEN_MAX: usize = 255;

/// Bytes of a root key.
pub const ROOT_KEY_LEN: usize = 32;
/// How often an engine asks its store whether another process changed it.
pub const WATCH_INTERVAL: Duration = Duration::from_millis(400);
/// How long an engine goes on with what it last read of a store that cannot be read, unless its builder says otherwise.
/// Whoever is disabled meanwhile is served until then; a restart of what the store lies on should take less.
pub const STALE_MAX_DEFAULT: Duration = Duration::from_secs(60);
/// A look at the store that has not ended after this time has failed. Beyond ten seconds SQLite gives up by itself.
pub const LOOK_TIME_MAX: Duration = Duration::from_secs(5);
/// How often an engine says again that its store cannot be read.
pub const LOOK_LOG_INTERVAL: Duration = Duration::from_secs(30);
/// How often an engine without background threads tries to start them.
pub const WATCHER_RETRY_INTERVAL: Duration = Duration::from_secs(1);
/// How far the clocks of machines that share a store may differ: zones that were mistaken for each other, mostly.
pub const CLOCK_SLACK: Duration = Duration::from_secs(86_400);
/// A wall clock that moves by more than this, beside what has passed by the steady one, was set.
pub const CLOCK_JUMP_MAX: Duration = Duration::from_secs(60);
/// How long wall clock and steady clock have to agree before an engine deletes a key by itself. A clock that is wrong
/// after a start is put right within minutes, and within a day somebody reads the warning.
pub const DELETION_OBSERVATION: Duration = Duration::from_secs(86_400);
/// A deletion that is overdue by more than this, the longest time that one can be planned ahead, is put down to the
/// clock: whoever runs due work by hand has to say that it is right.
pub const DELETION_OVERDUE_MAX: Duration = Duration::from_secs(DELETION_DAYS_MAX as u64 * 86_400);
/// Events of due work that wait to be taken from an engine.
pub const DUE_EVENTS_MAX: usize = 65_536;
/// How often an engine executes due rotations and deletions.
pub const RUN_DUE_INTERVAL: Duration = Duration::from_secs(60);

const _: () = assert!(KEY_VERSION_ID_LEN == KEY_ID_LEN + 1 + 10);
const _: () = assert!(BLOB_HEAD_LEN == 51);
// A pattern can spell any name of a key.
const _: () = assert!(KEY_PATTERN_LEN_MAX >= ALIAS_LEN_MAX && ALIAS_LEN_MAX > KEY_ID_LEN);
const _: () = assert!(WRAPS_BEFORE_ROTATION < WRAPS_PER_VERSION_MAX);
// A lease counter keeps 40 bits of remaining wraps (keys/budget.rs).
const _: () = assert!(BATCH_ITEMS_MAX as u64 + LEASE_MAX < 1 << 40);
// Slots of a batch are 32-bit, with the highest value kept for "refused".
const _: () = assert!(BATCH_ITEMS_MAX < u32::MAX as usize);
// Everything that an operation wraps can be unwrapped, and its length fits 32 bits (batch/resolve.rs).
const _: () = assert!(NUMBER_OF_BYTES_MAX <= PLAINTEXT_LEN_MAX && PLAINTEXT_LEN_MAX <= 1 << 31);
const _: () = assert!(PLAINTEXT_LEN_MAX < BATCH_OUTPUT_MAX);
// An item's index shares a word of 32 bits with a flag (batch/resolve.rs).
const _: () = assert!(BATCH_ITEMS_MAX < 1 << 31);
// One item always fits a batch, and one chunk's IVs never wrap around to their start.
const _: () = assert!(NUMBER_OF_BYTES_MAX + IV_LEN + BLOB_LEN_MAX < BATCH_OUTPUT_MAX);
const _: () = assert!(SHORT_RUN <= CHUNK_ITEMS_MAX && OS_SEED_ITEMS_MIN <= FAN_OUT_ITEMS_MIN);
// A change by another process must be seen within a second.
const _: () = assert!(WATCH_INTERVAL.as_millis() < 1000);
