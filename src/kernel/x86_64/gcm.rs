//! AES-GCM across messages, written once for every width of register.
//!
//! A tier's file says what a register `V` is, how many 128-bit lanes it has (`LANES`), and gives the handful of
//! operations named below; [`gcm_kernel`] writes the kernel over them. So the tiers differ in instructions and in
//! nothing else. Source: SP 800-38D; for GHASH on carry-less multiplication, S. Gueron and M. Kounavis, "Intel
//! Carry-Less Multiplication Instruction and its Usage for Computing the GCM Mode".
//!
//! # Lanes
//! Lane *l* of a *subgroup* is its message *l*; a *pass* works on `I` subgroups at once, whose instructions have nothing
//! to wait for from each other:
//!
//! ```text
//!             lane 0     lane 1     lane 2     lane 3        one register (vaes512)
//! column 0    J0 of m0   J0 of m1   J0 of m2   J0 of m3      becomes the tags' mask
//! column 1    CTR 2      CTR 2      CTR 2      CTR 2         key stream of block 0
//! column 2    CTR 3      CTR 3      CTR 3      CTR 3         key stream of block 1
//! ```
//! Up to `STRIP` columns of all subgroups go through the AES rounds together. A subgroup is always `LANES` messages that
//! lie side by side; where the count is no multiple of `LANES`, the last subgroup begins earlier and does some
//! messages a second time, which writes the same bytes to the same places.
//!
//! # GHASH
//! A lane's blocks (AAD, ciphertext, lengths) are byte-reversed and multiplied by falling powers of H, and the products
//! are summed: up to `POWERS` blocks share one reduction, so a short message has one in all. Powers are kept times x, so
//! that products of reflected bits need no shift. A lane with fewer AAD blocks than another gets zero blocks in front,
//! where the hash is still zero and stays so.
//!
//! # Public and secret
//! Branches and addresses depend on lengths, counts and places alone. Tags are compared without branches; the verdicts
//! are public.

/// Writes the kernel of one tier. In scope at the call: the register `V` and `LANES`. In the call: the tier's features,
/// then the operations on registers.
macro_rules! gcm_kernel {
    (
        $features:literal;
        $(fn $name:ident $(<const $constant:ident: i32>)? ($($argument:ident: $type:ty),*) -> $result:ty $body:block)*
    ) => {
        $(
            #[target_feature(enable = $features)]
            #[inline]
            fn $name $(<const $constant: i32>)? ($($argument: $type),*) -> $result $body
        )*

        use super::{
            Context, KeyRef, POWERS, ROUND_KEYS, Schedule,
            block::{
                aad_block, block_at, counter_block, from_u128, length_block, load, load_tail,
                store, store_head,
            },
            job::{Job, Pass, Passes, Start},
        };

        /// Seals (or opens) every message of `job`, under one key. At least `LANES` messages.
        #[target_feature(enable = $features)]
        pub(super) fn run_one<const OPEN: bool>(key: &Context, job: &mut Job<'_>) {
            let keys = [[key]];
            let mut passes = Passes::new(job.count());
            if let Some(aad_blocks) = job.short_aad_blocks(POWERS) {
                // The product of the block of lengths, the same for all messages.
                let lengths = broadcast(length_block(aad_blocks * 16, job.len()));
                let ending = multiply(lengths, power(&keys[0], 0));
                let short = Short { keys: &keys, ending: Some(&ending), aad_blocks };
                match job.columns() {
                    2 => while let Some(pass) = passes.next(4) {
                        match pass {
                            Pass::One(starts) => short_pass::<OPEN, 1, 1, 1, 2>(&short, starts, job),
                            Pass::Two(starts) => short_pass::<OPEN, 1, 1, 2, 2>(&short, starts, job),
                            Pass::Four(starts) => short_pass::<OPEN, 1, 1, 4, 2>(&short, starts, job),
                        }
                    },
                    3 => while let Some(pass) = passes.next(4) {
                        match pass {
                            Pass::One(starts) => short_pass::<OPEN, 1, 1, 1, 3>(&short, starts, job),
                            Pass::Two(starts) => short_pass::<OPEN, 1, 1, 2, 3>(&short, starts, job),
                            Pass::Four(starts) => short_pass::<OPEN, 1, 1, 4, 3>(&short, starts, job),
                        }
                    },
                    5 => while let Some(pass) = passes.next(2) {
                        match pass {
                            Pass::One(starts) => short_pass::<OPEN, 1, 1, 1, 5>(&short, starts, job),
                            Pass::Two(starts) => short_pass::<OPEN, 1, 1, 2, 5>(&short, starts, job),
                            Pass::Four(_) => {}
                        }
                    },
                    _ => {}
                }
            }
            while let Some(pass) = passes.next(subgroups_of(job)) {
                match pass {
                    Pass::One(starts) => long_pass::<OPEN, 1, 1, 1>(&keys, starts, job),
                    Pass::Two(starts) => long_pass::<OPEN, 1, 1, 2>(&keys, starts, job),
                    Pass::Four(starts) => long_pass::<OPEN, 1, 1, 4>(&keys, starts, job),
                }
            }
        }

        /// As [`run_one`], with a key for each message.
        #[target_feature(enable = $features)]
        pub(super) fn run_each<const OPEN: bool>(keys: &[KeyRef<'_>], job: &mut Job<'_>) {
            let of = |start: Start<LANES>| start.of(keys).map(KeyRef::wide);
            let mut passes = Passes::new(job.count());
            if let Some(aad_blocks) = job.short_aad_blocks(POWERS)
                && job.columns() == 3
            {
                while let Some(pass) = passes.next(4) {
                    match pass {
                        Pass::One(starts) => {
                            let short = Short { keys: &starts.map(of), ending: None, aad_blocks };
                            short_pass::<OPEN, 1, LANES, 1, 3>(&short, starts, job);
                        }
                        Pass::Two(starts) => {
                            let short = Short { keys: &starts.map(of), ending: None, aad_blocks };
                            short_pass::<OPEN, 2, LANES, 2, 3>(&short, starts, job);
                        }
                        Pass::Four(starts) => {
                            let short = Short { keys: &starts.map(of), ending: None, aad_blocks };
                            short_pass::<OPEN, 4, LANES, 4, 3>(&short, starts, job);
                        }
                    }
                }
            }
            while let Some(pass) = passes.next(subgroups_of(job)) {
                match pass {
                    Pass::One(starts) => {
                        long_pass::<OPEN, 1, LANES, 1>(&starts.map(of), starts, job);
                    }
                    Pass::Two(starts) => {
                        long_pass::<OPEN, 2, LANES, 2>(&starts.map(of), starts, job);
                    }
                    Pass::Four(starts) => {
                        long_pass::<OPEN, 4, LANES, 4>(&starts.map(of), starts, job);
                    }
                }
            }
        }

        /// Subgroups of a pass over messages of any lengths: long messages have enough columns to fill the pipeline
        /// with one.
        #[inline]
        fn subgroups_of(job: &Job<'_>) -> usize {
            if job.columns() > 8 { 1 } else { 4 }
        }

        /// A sum of products that is not reduced yet.
        #[derive(Clone, Copy)]
        struct Product {
            low: V,
            middle: V,
            high: V,
        }

        /// The keys of each lane, or one for all (`G` = `L` = 1), of messages that are short and alike.
        struct Short<'a, const G: usize, const L: usize> {
            keys: &'a [[&'a Context; L]; G],
            /// The product of the block of lengths, where one key serves all.
            ending: Option<&'a Product>,
            aad_blocks: usize,
        }

        /// One pass over messages of `S - 1` whole blocks, with one reduction for each.
        #[target_feature(enable = $features)]
        #[inline]
        fn short_pass<
            const OPEN: bool,
            const G: usize,
            const L: usize,
            const I: usize,
            const S: usize,
        >(
            short: &Short<'_, G, L>,
            starts: [Start<LANES>; I],
            job: &mut Job<'_>,
        ) {
            let &Short { keys, ending, aad_blocks } = short;
            let mut streams = [[zero(); S]; I];
            for g in 0..I {
                let iv = load_ivs(job.ivs(starts[g]));
                for s in 0..S {
                    // Column 0 is J0, whose counter is 1.
                    streams[g][s] = xor(iv, broadcast(counter_block(s + 1)));
                }
            }
            encrypt(keys, &mut streams);
            for g in 0..I {
                let (keys, start) = (&keys[if G == 1 { 0 } else { g }], starts[g]);
                let mut hash = match ending {
                    Some(ending) => *ending,
                    None => {
                        let lengths = broadcast(length_block(aad_blocks * 16, (S - 1) * 16));
                        multiply(lengths, power(keys, 0))
                    }
                };
                let aads = job.aads(start).map(<[u8]>::as_ptr);
                for block in 0..aad_blocks {
                    // SAFETY: every AAD has `aad_blocks` blocks.
                    let aad = unsafe { load_lanes(aads, block * 16) };
                    let power = power(keys, aad_blocks - block + S - 1);
                    hash = add(hash, multiply(reverse_bytes(aad), power));
                }
                let (inputs, outputs) = (job.inputs::<OPEN, LANES>(start), job.outputs(start));
                for s in 1..S {
                    // SAFETY: an input has `len` bytes, which are S - 1 blocks.
                    let input = unsafe { load_lanes(inputs, (s - 1) * 16) };
                    let output = xor(input, streams[g][s]);
                    // SAFETY: so has an output.
                    unsafe { store_lanes(outputs, (s - 1) * 16, output) };
                    let hashed = reverse_bytes(if OPEN { input } else { output });
                    hash = add(hash, multiply(hashed, power(keys, S - s)));
                }
                finish::<OPEN>(xor(reverse_bytes(reduce(hash)), streams[g][0]), start, job);
            }
        }

        /// One pass over messages of any lengths.
        #[target_feature(enable = $features)]
        #[inline]
        fn long_pass<const OPEN: bool, const G: usize, const L: usize, const I: usize>(
            keys: &[[&Context; L]; G],
            starts: [Start<LANES>; I],
            job: &mut Job<'_>,
        ) {
            let columns = job.columns();
            let aad_len = match job.aad_len() {
                Some(aad_len) => aad_len,
                None => {
                    let aads = starts.map(|start| job.aads(start).map(<[u8]>::len));
                    aads.into_iter().flatten().max().unwrap_or(0)
                }
            };
            let mut strip = Strip { keys, starts, ivs: [zero(); I], column: 0, aad_blocks: aad_len.div_ceil(16) };
            for g in 0..I {
                strip.ivs[g] = load_ivs(job.ivs(starts[g]));
            }
            let mut states = [State { hash: zero(), mask: zero() }; I];
            while strip.column < columns {
                strip.column += match (I, columns - strip.column) {
                    (1, 5..) => run_strip::<OPEN, G, L, I, 8>(&strip, &mut states, job),
                    (1 | 2, _) => run_strip::<OPEN, G, L, I, 4>(&strip, &mut states, job),
                    (_, 1) => run_strip::<OPEN, G, L, I, 1>(&strip, &mut states, job),
                    (_, 2) => run_strip::<OPEN, G, L, I, 2>(&strip, &mut states, job),
                    _ => run_strip::<OPEN, G, L, I, 3>(&strip, &mut states, job),
                };
            }
        }

        /// Some columns of all subgroups of a pass.
        struct Strip<'a, const G: usize, const L: usize, const I: usize> {
            keys: &'a [[&'a Context; L]; G],
            starts: [Start<LANES>; I],
            /// IVs, with zeros for the counter.
            ivs: [V; I],
            /// The first column.
            column: usize,
            /// Of the message of the pass that has most.
            aad_blocks: usize,
        }

        /// What a subgroup takes from strip to strip.
        #[derive(Clone, Copy)]
        struct State {
            /// The hash so far.
            hash: V,
            /// The encrypted J0.
            mask: V,
        }

        /// Up to `S` columns. Returns `S`.
        #[target_feature(enable = $features)]
        #[inline]
        fn run_strip<
            const OPEN: bool,
            const G: usize,
            const L: usize,
            const I: usize,
            const S: usize,
        >(
            strip: &Strip<'_, G, L, I>,
            states: &mut [State; I],
            job: &mut Job<'_>,
        ) -> usize {
            let column = strip.column;
            let mut streams = [[zero(); S]; I];
            for s in 0..S {
                let counter = broadcast(counter_block(column + s + 1));
                for g in 0..I {
                    streams[g][s] = xor(strip.ivs[g], counter);
                }
            }
            encrypt(strip.keys, &mut streams);
            for g in 0..I {
                let (keys, start) = (&strip.keys[if G == 1 { 0 } else { g }], strip.starts[g]);
                let State { hash, mask } = &mut states[g];
                // Column c has block c - 1.
                if column > 0 && (column + S - 1) * 16 <= job.len() {
                    let at = (column - 1) * 16;
                    *hash = advance_whole::<OPEN, L, S>(keys, start, at, &streams[g], *hash, job);
                    if at + S * 16 == job.len() {
                        let tags = end(keys, start, *hash, *mask, job);
                        finish::<OPEN>(tags, start, job);
                    }
                    continue;
                }
                let mut streams = &streams[g][..];
                if column == 0 {
                    *mask = streams[0];
                    streams = &streams[1..];
                    *hash = hash_aads(keys, start, strip.aad_blocks, job);
                }
                let at = column.saturating_sub(1) * 16;
                *hash = advance::<OPEN, L>(keys, start, at, streams, *hash, job);
                if at + streams.len() * 16 >= job.len() {
                    finish::<OPEN>(end(keys, start, *hash, *mask, job), start, job);
                }
            }
            S
        }

        /// The hash of each AAD. A lane with fewer blocks than another gets zero blocks in front.
        #[target_feature(enable = $features)]
        #[inline(never)]
        fn hash_aads<const L: usize>(
            keys: &[&Context; L],
            start: Start<LANES>,
            aad_blocks: usize,
            job: &Job<'_>,
        ) -> V {
            let aads = job.aads(start);
            let missing = aads.map(|aad| aad_blocks - aad.len().div_ceil(16));
            let whole = aads.iter().all(|aad| aad.len() == aad_blocks * 16);
            let places = aads.map(<[u8]>::as_ptr);
            let mut hash = Hash::new(zero(), aad_blocks);
            for index in 0..aad_blocks {
                let block = if whole {
                    // SAFETY: every AAD has `aad_blocks` whole blocks.
                    unsafe { load_lanes(places, index * 16) }
                } else {
                    let mut lanes = [from_u128(0); LANES];
                    for l in 0..LANES {
                        if index >= missing[l] {
                            lanes[l] = aad_block(aads[l], index - missing[l]);
                        }
                    }
                    from_lanes(lanes)
                };
                absorb(keys, &mut hash, reverse_bytes(block));
            }
            total(&hash)
        }

        /// `S` whole blocks of each message of a subgroup, with one reduction.
        #[target_feature(enable = $features)]
        #[inline]
        fn advance_whole<const OPEN: bool, const L: usize, const S: usize>(
            keys: &[&Context; L],
            start: Start<LANES>,
            at: usize,
            streams: &[V; S],
            hash: V,
            job: &mut Job<'_>,
        ) -> V {
            const { assert!(S <= POWERS) };
            let (inputs, outputs) = (job.inputs::<OPEN, LANES>(start), job.outputs(start));
            let mut product = None;
            for s in 0..S {
                // SAFETY: an input has `len` bytes, at least `at` and S blocks.
                let input = unsafe { load_lanes(inputs, at + s * 16) };
                let output = xor(input, streams[s]);
                // SAFETY: so has an output.
                unsafe { store_lanes(outputs, at + s * 16, output) };
                let mut block = reverse_bytes(if OPEN { input } else { output });
                if s == 0 {
                    block = xor(block, hash);
                }
                let more = multiply(block, power(keys, S - 1 - s));
                product = Some(match product {
                    Some(sum) => add(sum, more),
                    None => more,
                });
            }
            match product {
                Some(product) => reduce(product),
                None => hash,
            }
        }

        /// What is left of each message of a subgroup, but no more than `streams` serve. Returns the hash.
        #[target_feature(enable = $features)]
        #[inline(never)]
        fn advance<const OPEN: bool, const L: usize>(
            keys: &[&Context; L],
            start: Start<LANES>,
            mut at: usize,
            streams: &[V],
            hash: V,
            job: &mut Job<'_>,
        ) -> V {
            let len = job.len();
            let blocks = (len - at).div_ceil(16).min(streams.len());
            let (inputs, outputs) = (job.inputs::<OPEN, LANES>(start), job.outputs(start));
            let mut hash = Hash::new(hash, blocks);
            for stream in &streams[..blocks] {
                let block = if at + 16 <= len {
                    // SAFETY: an input has `len` bytes.
                    let input = unsafe { load_lanes(inputs, at) };
                    let output = xor(input, *stream);
                    // SAFETY: an output has `len` bytes.
                    unsafe { store_lanes(outputs, at, output) };
                    if OPEN { input } else { output }
                } else {
                    crypt_partial::<OPEN>(*stream, start, at, job)
                };
                absorb(keys, &mut hash, reverse_bytes(block));
                at += 16;
            }
            total(&hash)
        }

        /// The tags: the block of lengths is hashed, and the encrypted J0 added.
        #[target_feature(enable = $features)]
        #[inline]
        fn end<const L: usize>(
            keys: &[&Context; L],
            start: Start<LANES>,
            hash: V,
            mask: V,
            job: &Job<'_>,
        ) -> V {
            let lengths = job.aads(start).map(|aad| length_block(aad.len(), job.len()));
            let last = xor(from_lanes(lengths), hash);
            xor(reverse_bytes(reduce(multiply(last, power(keys, 0)))), mask)
        }

        /// The hash of each lane in the midst of some blocks.
        struct Hash {
            /// What comes before them; zero from the first block on.
            before: V,
            product: Product,
            /// Blocks until the next reduction: the power of H for the next block.
            left: usize,
        }

        impl Hash {
            /// For `blocks` blocks that come after `before`. The last of them is to meet the first power.
            #[target_feature(enable = $features)]
            #[inline]
            fn new(before: V, blocks: usize) -> Self {
                let left = if blocks == 0 { 0 } else { (blocks - 1) % POWERS + 1 };
                Self { before, product: Product { low: zero(), middle: zero(), high: zero() }, left }
            }
        }

        /// Adds one block of each message, byte-reversed.
        #[target_feature(enable = $features)]
        #[inline]
        fn absorb<const L: usize>(keys: &[&Context; L], hash: &mut Hash, block: V) {
            if hash.left == 0 {
                *hash = Hash::new(reduce(hash.product), POWERS);
            }
            hash.left -= 1;
            let block = xor(block, hash.before);
            hash.before = zero();
            hash.product = add(hash.product, multiply(block, power(keys, hash.left)));
        }

        /// The hash after all blocks.
        #[target_feature(enable = $features)]
        #[inline]
        fn total(hash: &Hash) -> V {
            // `before` is left where there was no block.
            xor(reduce(hash.product), hash.before)
        }

        /// The last bytes of each message, fewer than sixteen. Returns the ciphertexts, padded with zeros.
        #[target_feature(enable = $features)]
        #[inline(never)]
        fn crypt_partial<const OPEN: bool>(
            stream: V,
            start: Start<LANES>,
            at: usize,
            job: &mut Job<'_>,
        ) -> V {
            let len = job.len();
            let (inputs, outputs) = (job.inputs::<OPEN, LANES>(start), job.outputs(start));
            let mut lanes = [from_u128(0); LANES];
            for l in 0..LANES {
                // SAFETY: an input has `len` bytes.
                lanes[l] = load_tail(unsafe { std::slice::from_raw_parts(inputs[l], len) });
            }
            let input = from_lanes(lanes);
            let kept = broadcast(from_u128((1 << (8 * (len - at))) - 1));
            let output = and(xor(input, stream), kept);
            let lanes = to_lanes(output);
            for l in 0..LANES {
                // SAFETY: an output has `len` bytes, and nothing else refers to them.
                let place = unsafe { std::slice::from_raw_parts_mut(outputs[l].add(at), len - at) };
                store_head(place, lanes[l]);
            }
            if OPEN { input } else { output }
        }

        /// The tags of a subgroup: written behind the ciphertexts, or compared.
        #[target_feature(enable = $features)]
        #[inline]
        fn finish<const OPEN: bool>(tags: V, start: Start<LANES>, job: &mut Job<'_>) {
            let len = job.len();
            if OPEN {
                // SAFETY: an input has a tag behind its `len` bytes.
                let given = unsafe { load_lanes(job.inputs::<OPEN, LANES>(start), len) };
                let differences = to_lanes(xor(tags, given));
                let mut good = [false; LANES];
                for l in 0..LANES {
                    let same = _mm_cmpeq_epi8(differences[l], _mm_setzero_si128());
                    good[l] = _mm_movemask_epi8(same) == 0xffff;
                }
                job.judge(start, good);
            } else {
                // SAFETY: an output has room for a tag behind its `len` bytes.
                unsafe { store_lanes(job.outputs(start), len, tags) };
            }
        }

        /// Sixteen bytes from each of `places`, `at` bytes in.
        ///
        /// # Safety
        /// Each place is good for reading `at + 16` bytes.
        #[target_feature(enable = $features)]
        #[inline]
        unsafe fn load_lanes(places: [*const u8; LANES], at: usize) -> V {
            let mut lanes = [from_u128(0); LANES];
            for l in 0..LANES {
                // SAFETY: the caller's promise; the load needs no alignment.
                lanes[l] = unsafe { _mm_loadu_si128(places[l].add(at).cast()) };
            }
            from_lanes(lanes)
        }

        /// Sixteen bytes to each of `places`, `at` bytes in.
        ///
        /// # Safety
        /// Each place is good for writing `at + 16` bytes.
        #[target_feature(enable = $features)]
        #[inline]
        unsafe fn store_lanes(places: [*mut u8; LANES], at: usize, value: V) {
            let lanes = to_lanes(value);
            for l in 0..LANES {
                // SAFETY: the caller's promise; the store needs no alignment.
                unsafe { _mm_storeu_si128(places[l].add(at).cast(), lanes[l]) };
            }
        }

        #[target_feature(enable = $features)]
        #[inline]
        fn multiply(a: V, b: V) -> Product {
            Product {
                low: clmul::<0x00>(a, b),
                middle: xor(clmul::<0x01>(a, b), clmul::<0x10>(a, b)),
                high: clmul::<0x11>(a, b),
            }
        }

        #[target_feature(enable = $features)]
        #[inline]
        fn add(a: Product, b: Product) -> Product {
            Product {
                low: xor(a.low, b.low),
                middle: xor(a.middle, b.middle),
                high: xor(a.high, b.high),
            }
        }

        /// A product modulo x^128 + x^7 + x^2 + x + 1, in reflected bits: the low half is folded up twice.
        #[target_feature(enable = $features)]
        #[inline]
        fn reduce(product: Product) -> V {
            let polynomial = broadcast(from_u128(0xc200_0000_0000_0000 << 64 | 1));
            let folded = clmul::<0x01>(polynomial, product.low);
            let middle = xor(xor(product.middle, swap_halves(product.low)), folded);
            let folded = clmul::<0x01>(polynomial, middle);
            xor(xor(product.high, swap_halves(middle)), folded)
        }

        #[target_feature(enable = $features)]
        #[inline]
        fn reverse_bytes(block: V) -> V {
            shuffle(block, broadcast(from_u128(0x0001_0203_0405_0607_0809_0a0b_0c0d_0e0f)))
        }

        /// AES of every block under the key of its lane, in place. `keys` as for [`pass`].
        #[target_feature(enable = $features)]
        #[inline]
        fn encrypt<
            K: AsRef<Schedule>,
            const G: usize,
            const L: usize,
            const I: usize,
            const S: usize,
        >(
            keys: &[[&K; L]; G],
            blocks: &mut [[V; S]; I],
        ) {
            let mut first = usize::from(keys[0][0].as_ref().first);
            let mut mixed = false;
            for lanes in keys {
                for key in lanes {
                    mixed |= usize::from(key.as_ref().first) != first;
                }
            }
            if mixed {
                first = begin_mixed(keys, blocks);
            } else {
                for g in 0..I {
                    let key = round_key(&keys[if G == 1 { 0 } else { g }], first);
                    for s in 0..S {
                        blocks[g][s] = xor(blocks[g][s], key);
                    }
                }
            }
            for round in first + 1..ROUND_KEYS - 1 {
                for g in 0..I {
                    let key = round_key(&keys[if G == 1 { 0 } else { g }], round);
                    for s in 0..S {
                        blocks[g][s] = aesenc(blocks[g][s], key);
                    }
                }
            }
            for g in 0..I {
                let key = round_key(&keys[if G == 1 { 0 } else { g }], ROUND_KEYS - 1);
                for s in 0..S {
                    blocks[g][s] = aesenclast(blocks[g][s], key);
                }
            }
        }

        #[target_feature(enable = $features)]
        #[inline]
        fn round_key<K: AsRef<Schedule>, const L: usize>(keys: &[&K; L], round: usize) -> V {
            if L == LANES {
                let mut lanes = [from_u128(0); LANES];
                for l in 0..LANES {
                    lanes[l] = load(&keys[l].as_ref().keys[round]);
                }
                from_lanes(lanes)
            } else {
                broadcast(load(&keys[0].as_ref().keys[round]))
            }
        }

        #[target_feature(enable = $features)]
        #[inline]
        fn power<const L: usize>(keys: &[&Context; L], power: usize) -> V {
            if L == LANES {
                let mut lanes = [from_u128(0); LANES];
                for l in 0..LANES {
                    lanes[l] = load(&keys[l].powers[power]);
                }
                from_lanes(lanes)
            } else {
                broadcast(load(&keys[0].powers[power]))
            }
        }

        /// The first rounds where keys of several lengths share a register: schedules end together, so the rounds that
        /// a shorter key lacks are the first ones, and its lanes sit them out. Returns the last round done.
        #[target_feature(enable = $features)]
        #[cold]
        #[inline(never)]
        fn begin_mixed<
            K: AsRef<Schedule>,
            const G: usize,
            const L: usize,
            const I: usize,
            const S: usize,
        >(
            keys: &[[&K; L]; G],
            blocks: &mut [[V; S]; I],
        ) -> usize {
            const LAST: usize = Schedule::FIRST_MAX;
            for g in 0..I {
                let keys = &keys[if G == 1 { 0 } else { g }];
                for round in 0..=LAST {
                    let (mut begins, mut goes_on) = ([from_u128(0); LANES], [from_u128(0); LANES]);
                    for l in 0..LANES {
                        let key = keys[if L == 1 { 0 } else { l }].as_ref();
                        let first = usize::from(key.first);
                        if round == first {
                            begins[l] = load(&key.keys[round]);
                        }
                        goes_on[l] = from_u128(if round > first { u128::MAX } else { 0 });
                    }
                    let (begins, goes_on) = (from_lanes(begins), from_lanes(goes_on));
                    let key = round_key(keys, round);
                    for block in &mut blocks[g] {
                        let change = xor(*block, aesenc(*block, key));
                        *block = xor(xor(*block, begins), and(change, goes_on));
                    }
                }
            }
            LAST
        }
    };
}

pub(super) use gcm_kernel;
