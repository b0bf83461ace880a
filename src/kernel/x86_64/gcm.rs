//! AES-GCM across messages, written once for every width of register.
//!
//! A tier's file says what a register `V` is, how many 128-bit lanes it has (`LANES`), and gives the handful of
//! operations named below; [`gcm_kernel`] writes the kernel over them. So the tiers differ in instructions and in
//! nothing else. Source: SP 800-38D; for GHASH on carry-less multiplication, S. Gueron and M. Kounavis, "Intel
//! Carry-Less Multiplication Instruction and its Usage for Computing the GCM Mode".
//!
//! # Lanes
//! Lane *l* of a *subgroup* is its message *l*; a *pass* works on several subgroups at once, whose instructions have
//! nothing to wait for from each other:
//!
//! ```text
//!             lane 0     lane 1     lane 2     lane 3        one register (vaes512)
//! column 0    J0 of m0   J0 of m1   J0 of m2   J0 of m3      becomes the tags' mask
//! column 1    CTR 2      CTR 2      CTR 2      CTR 2         key stream of block 0
//! column 2    CTR 3      CTR 3      CTR 3      CTR 3         key stream of block 1
//! ```
//! A subgroup is always `LANES` messages that lie side by side; where the count is no multiple of `LANES`, the last
//! subgroup begins earlier and does some messages a second time, which writes the same bytes to the same places. That
//! costs less than lanes that a mask leaves out, and needs no second form of any load or store.
//!
//! [`super::short`] has the passes of data keys, whose columns all fit in registers, [`super::long`] those of all other
//! messages, and [`super::aads`] what AADs of unequal lengths need in either.
//!
//! # GHASH
//! A lane's blocks (AAD, ciphertext, lengths) are byte-reversed and multiplied by falling powers of H, and the products
//! are summed: up to `POWERS` blocks share one reduction, so a short message has one in all. Powers are kept times x,
//! so that products of reflected bits need no shift. A lane with fewer AAD blocks than another gets zero blocks in
//! front, where the hash is still zero and stays so.
//!
//! # Public and secret
//! Branches and addresses depend on lengths, counts and places alone. Tags are compared without branches; the verdicts
//! are public.

/// Writes the kernel of one tier. In scope at the call: the register `V`, `LANES`, and whether short passes `OVERLAP`.
/// In the call: the tier's features, then the operations on registers.
macro_rules! gcm_kernel {
    (
        $features:literal;
        $(
            fn $name:ident $(<const $constant:ident: i32>)?
            ($($argument:ident: $type:ty),*) -> $result:ty $body:block
        )*
    ) => {
        $(
            #[target_feature(enable = $features)]
            #[inline]
            fn $name $(<const $constant: i32>)? ($($argument: $type),*) -> $result $body
        )*

        use super::{
            super::ahead::{AHEAD, Stream},
            Context, KeyRef, POWERS, ROUND_KEYS, Schedule,
            block::{
                block_at, counter_block, from_u128, length_block, load, load_tail,
                store, store_head, tail_places,
            },
            job::{Job, Pass, Passes, Start},
        };

        /// Seals (or opens) every message of `job`, under one key. At least `LANES` messages.
        #[target_feature(enable = $features)]
        pub(super) fn run_one(key: &Context, job: &mut Job<'_>) {
            match job.short_blocks() {
                Some(blocks) => run_short::<true, 1>(blocks, |_| [key], job),
                None => run_long::<1>(|_| [key], job),
            }
        }

        /// As [`run_one`], with a key for each message.
        #[target_feature(enable = $features)]
        pub(super) fn run_each(keys: &[KeyRef<'_>], job: &mut Job<'_>) {
            let keys = |start: Start<LANES>| start.of(keys).map(KeyRef::wide);
            match job.short_blocks() {
                Some(blocks) => run_short::<false, LANES>(blocks, keys, job),
                None => run_long::<LANES>(keys, job),
            }
        }

        /// The encrypted J0 and the key stream of each IV, under one key.
        #[target_feature(enable = $features)]
        pub(super) fn key_streams(key: &Context, ivs: &[Iv; AHEAD], streams: &mut [Stream; AHEAD]) {
            const COLUMNS: usize = size_of::<Stream>() / 16;
            // Two subgroups, whose columns fit in eight registers.
            let pairs = streams.as_chunks_mut::<{ 2 * LANES }>().0;
            for (ivs, streams) in ivs.as_chunks::<{ 2 * LANES }>().0.iter().zip(pairs) {
                let mut blocks = [[zero(); COLUMNS]; 2];
                for (blocks, ivs) in blocks.iter_mut().zip(ivs.as_chunks().0) {
                    let iv = load_ivs(ivs);
                    for (s, block) in blocks.iter_mut().enumerate() {
                        *block = xor(iv, broadcast(counter_block(s + 1)));
                    }
                }
                encrypt::<10, _, _, _, _, _>(&[[key]], &mut blocks);
                for (blocks, streams) in blocks.iter().zip(streams.as_chunks_mut::<LANES>().0) {
                    for (s, block) in blocks.iter().enumerate() {
                        for (stream, lane) in streams.iter_mut().zip(to_lanes(*block)) {
                            store(&mut stream[s], lane);
                        }
                    }
                }
            }
        }

        /// A sum of products that is not reduced yet.
        #[derive(Clone, Copy)]
        struct Product {
            low: V,
            middle: V,
            high: V,
        }

        /// The tags of a subgroup: written behind the ciphertexts, or compared.
        ///
        /// `SITE`, `ALIKE`, `L` and `S` make an instance for each place that calls this: a function with one caller is
        /// sure to be inlined, which no attribute can ask for where there are target features, and a call would put
        /// all registers on the stack.
        #[target_feature(enable = $features)]
        #[inline]
        fn finish<const SITE: usize, const ALIKE: bool, const L: usize, const S: usize>(
            tags: V,
            start: Start<LANES>,
            job: &mut Job<'_>,
        ) {
            let len = job.len();
            if job.opens() {
                // SAFETY: an input has a tag behind its `len` bytes.
                let given = unsafe { load_lanes(job.inputs(start), len) };
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
            fold(fold(product.low, product.middle), product.high)
        }

        /// Half of a reduction: `low`, times a power of x, on `high`.
        #[target_feature(enable = $features)]
        #[inline]
        fn fold(low: V, high: V) -> V {
            let polynomial = broadcast(from_u128(0xc200_0000_0000_0000 << 64 | 1));
            xor(xor(high, swap_halves(low)), clmul::<0x01>(polynomial, low))
        }

        #[target_feature(enable = $features)]
        #[inline]
        fn reverse_bytes(block: V) -> V {
            shuffle(block, broadcast(from_u128(0x0001_0203_0405_0607_0809_0a0b_0c0d_0e0f)))
        }

        /// AES of every block under the key of its lane, in place. `keys` holds the keys of each subgroup's lanes, or
        /// of one subgroup for all (`G` = 1). (For `SITE`, see [`finish`].)
        #[target_feature(enable = $features)]
        #[inline]
        fn encrypt<
            const SITE: usize,
            K: AsRef<Schedule>,
            const G: usize,
            const L: usize,
            const I: usize,
            const S: usize,
        >(
            keys: &[[&K; L]; G],
            blocks: &mut [[V; S]; I],
        ) {
            for round in begin_rounds::<SITE, _, _, _, _, _>(keys, blocks)..ROUND_KEYS - 1 {
                middle_round(keys, blocks, round);
            }
            last_round(keys, blocks);
        }

        /// What comes before the first round that all lanes have. Returns that round.
        #[target_feature(enable = $features)]
        #[inline]
        fn begin_rounds<
            const SITE: usize,
            K: AsRef<Schedule>,
            const G: usize,
            const L: usize,
            const I: usize,
            const S: usize,
        >(
            keys: &[[&K; L]; G],
            blocks: &mut [[V; S]; I],
        ) -> usize {
            let first = usize::from(keys[0][0].as_ref().first);
            let mut mixed = false;
            for lanes in keys {
                for key in lanes {
                    mixed |= usize::from(key.as_ref().first) != first;
                }
            }
            if mixed {
                *blocks = begin_mixed(keys, *blocks);
                return Schedule::FIRST_MAX + 1;
            }
            for g in 0..I {
                let key = round_key(&keys[if G == 1 { 0 } else { g }], first);
                for s in 0..S {
                    blocks[g][s] = xor(blocks[g][s], key);
                }
            }
            first + 1
        }

        #[target_feature(enable = $features)]
        #[inline]
        fn middle_round<
            K: AsRef<Schedule>,
            const G: usize,
            const L: usize,
            const I: usize,
            const S: usize,
        >(
            keys: &[[&K; L]; G],
            blocks: &mut [[V; S]; I],
            round: usize,
        ) {
            for g in 0..I {
                let key = round_key(&keys[if G == 1 { 0 } else { g }], round);
                for s in 0..S {
                    blocks[g][s] = aesenc(blocks[g][s], key);
                }
            }
        }

        #[target_feature(enable = $features)]
        #[inline]
        fn last_round<
            K: AsRef<Schedule>,
            const G: usize,
            const L: usize,
            const I: usize,
            const S: usize,
        >(
            keys: &[[&K; L]; G],
            blocks: &mut [[V; S]; I],
        ) {
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
        /// a shorter key lacks are the first ones, and its lanes sit them out.
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
            mut blocks: [[V; S]; I],
        ) -> [[V; S]; I] {
            for g in 0..I {
                let keys = &keys[if G == 1 { 0 } else { g }];
                for round in 0..=Schedule::FIRST_MAX {
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
            blocks
        }

        super::short::short_kernel!($features);
        super::long::long_kernel!($features);
        super::aads::aads_kernel!($features);
    };
}

pub(super) use gcm_kernel;
