//! Short messages of a few whole blocks: data keys. Their AADs are `ALIKE` if they have one length.
//!
//! # Shape
//! All columns of a pass stay in registers. Where a tier says so (`OVERLAP`), passes of two subgroups overlap: what one
//! has encrypted is hashed while the AES rounds of the next one run. A carry-less multiplication costs the vector units
//! little between AES instructions and much between others, and neither chain of dependencies has to be waited for.
//!
//! ```text
//! pass 1   AES | ciphertexts |
//! pass 2                     | AES, hash 1 | tags 1 | ciphertexts |
//! pass 3                                                          | AES, hash 2 | tags 2 | ciphertexts |
//! ```

/// Writes the part of [`super::gcm::gcm_kernel`] for short messages.
macro_rules! short_kernel {
    ($features:literal) => {
        /// A pass whose ciphertexts are not hashed yet.
        struct Pending<const S: usize> {
            starts: [Start<LANES>; 2],
            /// Of each subgroup the encrypted J0, then the ciphertexts, byte-reversed.
            blocks: [[V; S]; 2],
            /// Of each subgroup what its AADs and lengths add to the hash.
            sums: [Product; 2],
        }

        /// A pass in the midst of its AES rounds.
        struct Rounds<'a, const S: usize> {
            key: &'a Context,
            blocks: [[V; S]; 2],
            next: usize,
        }

        /// The `SITE`s of both subgroups of overlapping passes (see [`finish`]). A pass on its own has its number of
        /// subgroups, four at most.
        const PAIRED: [usize; 2] = [8, 9];

        /// What is the same for all messages of a job of `S - 1` blocks each.
        struct Common {
            /// Of AADs that are alike, as all that follows.
            aad_len: usize,
            /// Brings the last bytes of the AAD, loaded as the end of 16 bytes, to their places, byte-reversed.
            tail_places: V,
            /// The block of lengths, byte-reversed.
            lengths: V,
            /// Its product, where one key serves all.
            ending: Option<Product>,
        }

        /// Seals or opens messages of `blocks` whole blocks (see [`Job::short_blocks`]); `ONE` if one key serves all.
        #[target_feature(enable = $features)]
        #[inline(never)]
        fn run_short<'a, const ONE: bool, const L: usize>(
            blocks: usize,
            keys: impl Fn(Start<LANES>) -> [&'a Context; L],
            job: &mut Job<'_>,
        ) {
            match (blocks, job.aad_len().is_some()) {
                (1, true) => run_blocks::<true, ONE, L, 2>(keys, job),
                (1, false) => run_blocks::<false, ONE, L, 2>(keys, job),
                (2, true) => run_blocks::<true, ONE, L, 3>(keys, job),
                (2, false) => run_blocks::<false, ONE, L, 3>(keys, job),
                (4, true) => run_blocks::<true, ONE, L, 5>(keys, job),
                (4, false) => run_blocks::<false, ONE, L, 5>(keys, job),
                _ => unreachable!("not short"),
            }
        }

        /// Messages of `S - 1` blocks; `ALIKE` if their AADs have one length.
        ///
        /// Passes overlap for one key only: keys for each lane are loads and shuffles enough to fill the AES rounds.
        #[target_feature(enable = $features)]
        #[inline]
        fn run_blocks<'a, const ALIKE: bool, const ONE: bool, const L: usize, const S: usize>(
            keys: impl Fn(Start<LANES>) -> [&'a Context; L],
            job: &mut Job<'_>,
        ) {
            let mut passes = Passes::new(job.count());
            let common = Common::new::<ALIKE, ONE, L, S>(&keys(Start::FIRST), job);
            if OVERLAP && ONE {
                let key = keys(Start::FIRST)[0];
                let mut pending: Option<Pending<S>> = None;
                loop {
                    let starts = passes.next_two();
                    let mut rounds = match starts {
                        Some(starts) => Rounds::<S>::begin::<ALIKE>(key, starts, job),
                        None => Rounds::none(key),
                    };
                    if let Some(pending) = pending.take() {
                        pending.hash::<ALIKE, 0, { PAIRED[0] }>(&mut rounds, job);
                        pending.hash::<ALIKE, 1, { PAIRED[1] }>(&mut rounds, job);
                    }
                    let Some(starts) = starts else { break };
                    rounds.finish();
                    pending = Some(rounds.crypt::<ALIKE>(&common, starts, job));
                }
            }
            // As many columns as fit in 16 registers, or nearly so.
            while let Some(pass) = passes.next(if S > 3 { 2 } else { 4 }) {
                match (pass, ONE) {
                    (Pass::One(starts), _) => {
                        short_pass::<ALIKE, L, 1, 1, S>(&common, &starts.map(&keys), starts, job);
                    }
                    (Pass::Two(starts), true) => {
                        short_pass::<ALIKE, L, 1, 2, S>(&common, &[keys(starts[0])], starts, job);
                    }
                    (Pass::Two(starts), false) => {
                        short_pass::<ALIKE, L, 2, 2, S>(&common, &starts.map(&keys), starts, job);
                    }
                    (Pass::Four(starts), true) => {
                        short_pass::<ALIKE, L, 1, 4, S>(&common, &[keys(starts[0])], starts, job);
                    }
                    (Pass::Four(starts), false) => {
                        short_pass::<ALIKE, L, 4, 4, S>(&common, &starts.map(&keys), starts, job);
                    }
                }
            }
        }

        impl Common {
            #[target_feature(enable = $features)]
            #[inline]
            fn new<const ALIKE: bool, const ONE: bool, const L: usize, const S: usize>(
                keys: &[&Context; L],
                job: &Job<'_>,
            ) -> Self {
                let aad_len = job.aad_len().unwrap_or_default();
                let lengths = broadcast(length_block(aad_len, (S - 1) * 16));
                let ending =
                    if ALIKE && ONE { Some(multiply(lengths, power(keys, 0))) } else { None };
                Self { aad_len, tail_places: broadcast(tail_places(aad_len % 16)), lengths, ending }
            }
        }

        /// Block `index` of the AAD of each message of a subgroup, padded with zeros, byte-reversed.
        #[target_feature(enable = $features)]
        #[inline]
        fn aad_blocks(
            aad_len: usize,
            tail_places: V,
            index: usize,
            start: Start<LANES>,
            job: &Job<'_>,
        ) -> V {
            let (aads, at) = (job.aads(start), index * 16);
            if at + 16 <= aad_len {
                // SAFETY: every AAD has `aad_len` bytes.
                return reverse_bytes(unsafe { load_lanes(aads.map(<[u8]>::as_ptr), at) });
            }
            if aad_len < 16 {
                return tiny_aads(aads);
            }
            // SAFETY: as above.
            let ends = unsafe { load_lanes(aads.map(<[u8]>::as_ptr), aad_len - 16) };
            shuffle(ends, tail_places)
        }

        /// AADs of less than a block, as [`aad_blocks`] gives them.
        #[target_feature(enable = $features)]
        #[inline(never)]
        fn tiny_aads(aads: &[&[u8]; LANES]) -> V {
            reverse_bytes(from_lanes(aads.map(load_tail)))
        }

        impl<'a, const S: usize> Rounds<'a, S> {
            #[target_feature(enable = $features)]
            #[inline]
            fn begin<const ALIKE: bool>(
                key: &'a Context,
                starts: [Start<LANES>; 2],
                job: &Job<'_>,
            ) -> Self {
                let mut blocks = counters(starts, job);
                // For each place an instance, as of `finish`.
                let next = match ALIKE {
                    true => begin_rounds::<3, _, _, _, _, _>(&[[key]], &mut blocks),
                    false => begin_rounds::<4, _, _, _, _, _>(&[[key]], &mut blocks),
                };
                Self { key, blocks, next }
            }

            /// No pass: there is nothing left to do.
            #[target_feature(enable = $features)]
            #[inline]
            fn none(key: &'a Context) -> Self {
                Self { key, blocks: [[zero(); S]; 2], next: ROUND_KEYS }
            }

            /// One more round, if there is one left before the last.
            #[target_feature(enable = $features)]
            #[inline]
            fn advance(&mut self) {
                if self.next < ROUND_KEYS - 1 {
                    middle_round(&[[self.key]], &mut self.blocks, self.next);
                    self.next += 1;
                }
            }

            #[target_feature(enable = $features)]
            #[inline]
            fn finish(&mut self) {
                for round in self.next..ROUND_KEYS - 1 {
                    middle_round(&[[self.key]], &mut self.blocks, round);
                }
                last_round(&[[self.key]], &mut self.blocks);
            }

            /// Takes the key stream to the messages.
            #[target_feature(enable = $features)]
            #[inline]
            fn crypt<const ALIKE: bool>(
                &self,
                common: &Common,
                starts: [Start<LANES>; 2],
                job: &mut Job<'_>,
            ) -> Pending<S> {
                let mut blocks = self.blocks;
                for g in 0..2 {
                    let (inputs, outputs) = (job.inputs(starts[g]), job.outputs(starts[g]));
                    for s in 1..S {
                        // SAFETY: an input has `len` bytes, which are S - 1 blocks.
                        let input = unsafe { load_lanes(inputs, (s - 1) * 16) };
                        let output = xor(input, blocks[g][s]);
                        // SAFETY: so has an output.
                        unsafe { store_lanes(outputs, (s - 1) * 16, output) };
                        blocks[g][s] = reverse_bytes(if job.opens() { input } else { output });
                    }
                }
                let sums = [
                    hash_short_aads::<{ PAIRED[0] }, ALIKE, 1, S>(
                        common,
                        &[self.key],
                        starts[0],
                        job,
                    ),
                    hash_short_aads::<{ PAIRED[1] }, ALIKE, 1, S>(
                        common,
                        &[self.key],
                        starts[1],
                        job,
                    ),
                ];
                Pending { starts, blocks, sums }
            }
        }

        impl<const S: usize> Pending<S> {
            /// Computes the tags of subgroup `G`, and writes or compares them, while `rounds` go on.
            #[target_feature(enable = $features)]
            #[inline]
            fn hash<const ALIKE: bool, const G: usize, const SITE: usize>(
                &self,
                rounds: &mut Rounds<'_, S>,
                job: &mut Job<'_>,
            ) {
                let mut sum = self.sums[G];
                for s in 1..S {
                    rounds.advance();
                    sum = add(sum, multiply(self.blocks[G][s], power(&[rounds.key], S - s)));
                }
                rounds.advance();
                let middle = fold(sum.low, sum.middle);
                rounds.advance();
                let hash = fold(middle, sum.high);
                rounds.advance();
                let tags = xor(reverse_bytes(hash), self.blocks[G][0]);
                finish::<SITE, ALIKE, 1, S>(tags, self.starts[G], job);
            }
        }

        /// A pass on its own, of `I` subgroups.
        #[target_feature(enable = $features)]
        #[inline]
        fn short_pass<
            const ALIKE: bool,
            const L: usize,
            const G: usize,
            const I: usize,
            const S: usize,
        >(
            common: &Common,
            keys: &[[&Context; L]; G],
            starts: [Start<LANES>; I],
            job: &mut Job<'_>,
        ) {
            if L > 2 {
                // The contexts of all lanes are more cache lines than the core looks ahead for. (In narrower tiers it
                // keeps up, and hints cost more than they bring.)
                keys.iter().flatten().for_each(|key| key.prefetch());
            }
            let mut streams = counters::<I, S>(starts, job);
            if ALIKE {
                encrypt::<1, _, _, _, _, _>(keys, &mut streams);
            } else {
                encrypt::<2, _, _, _, _, _>(keys, &mut streams);
            }
            for g in 0..I {
                let keys = &keys[if G == 1 { 0 } else { g }];
                let mut sum = hash_short_aads::<I, ALIKE, L, S>(common, keys, starts[g], job);
                let (inputs, outputs) = (job.inputs(starts[g]), job.outputs(starts[g]));
                for s in 1..S {
                    // SAFETY: an input has `len` bytes, which are S - 1 blocks.
                    let input = unsafe { load_lanes(inputs, (s - 1) * 16) };
                    let output = xor(input, streams[g][s]);
                    // SAFETY: so has an output.
                    unsafe { store_lanes(outputs, (s - 1) * 16, output) };
                    let hashed = reverse_bytes(if job.opens() { input } else { output });
                    sum = add(sum, multiply(hashed, power(keys, S - s)));
                }
                let tags = xor(reverse_bytes(reduce(sum)), streams[g][0]);
                finish::<I, ALIKE, L, S>(tags, starts[g], job);
            }
        }

        /// J0 and the counter blocks of messages of `S - 1` blocks.
        #[target_feature(enable = $features)]
        #[inline]
        fn counters<const I: usize, const S: usize>(
            starts: [Start<LANES>; I],
            job: &Job<'_>,
        ) -> [[V; S]; I] {
            let mut blocks = [[zero(); S]; I];
            for g in 0..I {
                let iv = load_ivs(job.ivs(starts[g]));
                for s in 0..S {
                    // Column 0 is J0, whose counter is 1.
                    blocks[g][s] = xor(iv, broadcast(counter_block(s + 1)));
                }
            }
            blocks
        }

        /// What the AADs and lengths add to the hash of each message. (For `SITE`, see [`finish`].)
        #[target_feature(enable = $features)]
        #[inline]
        fn hash_short_aads<const SITE: usize, const ALIKE: bool, const L: usize, const S: usize>(
            common: &Common,
            keys: &[&Context; L],
            start: Start<LANES>,
            job: &Job<'_>,
        ) -> Product {
            if !ALIKE {
                return hash_unlike_aads::<SITE, L, S>(keys, start, job);
            }
            let mut sum = match common.ending {
                Some(ending) => ending,
                None => multiply(common.lengths, power(keys, 0)),
            };
            let (aad_len, tail_places) = (common.aad_len, common.tail_places);
            let blocks = aad_len.div_ceil(16);
            let (mut next, mut before) = (0, zero());
            if blocks > POWERS - S {
                (next, before) = hash_early::<L, S>(aad_len, tail_places, *keys, start, job);
            }
            while next < blocks {
                let block = xor(aad_blocks(aad_len, tail_places, next, start, job), before);
                sum = add(sum, multiply(block, power(keys, blocks - next + S - 1)));
                before = zero();
                next += 1;
            }
            sum
        }

        /// Hashes the first blocks of AADs that have too many to share one reduction with the messages. Returns how
        /// many, and the hashes.
        #[target_feature(enable = $features)]
        #[inline(never)]
        fn hash_early<const L: usize, const S: usize>(
            aad_len: usize,
            tail_places: V,
            keys: [&Context; L],
            start: Start<LANES>,
            job: &Job<'_>,
        ) -> (usize, V) {
            let blocks = aad_len.div_ceil(16);
            let (mut next, mut before) = (0, zero());
            while blocks - next > POWERS - S {
                let some = POWERS.min(blocks - next - 1);
                let mut sum = Product { low: zero(), middle: zero(), high: zero() };
                for index in 0..some {
                    let block = aad_blocks(aad_len, tail_places, next + index, start, job);
                    sum = add(sum, multiply(xor(block, before), power(&keys, some - 1 - index)));
                    before = zero();
                }
                before = reduce(sum);
                next += some;
            }
            (next, before)
        }
    };
}

pub(super) use short_kernel;
