//! Messages and AADs of any lengths.
//!
//! # Shape
//! A pass goes through its messages in strips of up to eight columns: first the AES rounds of all columns of all
//! subgroups, then for each subgroup the ciphertexts and one reduction. A message of more than seven blocks has enough
//! columns to hide the latencies alone; shorter ones go four subgroups at a time.

/// Writes the part of [`super::gcm::gcm_kernel`] for messages of any lengths.
macro_rules! long_kernel {
    ($features:literal) => {
        /// Seals or opens messages of any lengths.
        #[target_feature(enable = $features)]
        #[inline(never)]
        fn run_long<'a, const L: usize>(
            keys: impl Fn(Start<LANES>) -> [&'a Context; L],
            job: &mut Job<'_>,
        ) {
            let mut passes = Passes::new(job.count());
            // Long messages have enough columns to fill the pipeline with one subgroup.
            let most = if job.columns() > 8 { 1 } else { 4 };
            while let Some(pass) = passes.next(most) {
                match pass {
                    Pass::One(starts) => long_pass::<L, 1>(&starts.map(&keys), starts, job),
                    Pass::Two(starts) => long_pass::<L, 2>(&starts.map(&keys), starts, job),
                    Pass::Four(starts) => long_pass::<L, 4>(&starts.map(&keys), starts, job),
                }
            }
        }

        /// One pass over messages of any lengths.
        #[target_feature(enable = $features)]
        #[inline]
        fn long_pass<const L: usize, const I: usize>(
            keys: &[[&Context; L]; I],
            starts: [Start<LANES>; I],
            job: &mut Job<'_>,
        ) {
            let columns = job.columns();
            let aad_len = match job.aad_len() {
                Some(aad_len) => aad_len,
                None => {
                    // A loop: the iterator's `max` is a call, which no register survives.
                    let mut longest = 0;
                    for start in starts {
                        for aad in job.aads(start) {
                            if aad.len() > longest {
                                longest = aad.len();
                            }
                        }
                    }
                    longest
                }
            };
            let mut strip = Strip {
                keys,
                starts,
                ivs: [zero(); I],
                column: 0,
                aad_blocks: aad_len.div_ceil(16),
            };
            for g in 0..I {
                strip.ivs[g] = load_ivs(job.ivs(starts[g]));
            }
            let mut states = [State { hash: zero(), mask: zero() }; I];
            while strip.column < columns {
                strip.column += match (I, columns - strip.column) {
                    (1, 5..) => run_strip::<L, I, 8>(&strip, &mut states, job),
                    (1 | 2, _) => run_strip::<L, I, 4>(&strip, &mut states, job),
                    (_, 1) => run_strip::<L, I, 1>(&strip, &mut states, job),
                    (_, 2) => run_strip::<L, I, 2>(&strip, &mut states, job),
                    _ => run_strip::<L, I, 3>(&strip, &mut states, job),
                };
            }
        }

        /// Some columns of all subgroups of a pass.
        struct Strip<'a, const L: usize, const I: usize> {
            keys: &'a [[&'a Context; L]; I],
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
        fn run_strip<const L: usize, const I: usize, const S: usize>(
            strip: &Strip<'_, L, I>,
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
            encrypt::<0, _, _, _, _, _>(strip.keys, &mut streams);
            for g in 0..I {
                let (keys, start) = (&strip.keys[g], strip.starts[g]);
                let State { hash, mask } = &mut states[g];
                // Column c has block c - 1.
                if column > 0 && (column + S - 1) * 16 <= job.len() {
                    let at = (column - 1) * 16;
                    *hash = advance_whole::<L, S>(keys, start, at, &streams[g], *hash, job);
                    if at + S * 16 == job.len() {
                        let tags = end(keys, start, *hash, *mask, job);
                        finish::<4, false, L, I>(tags, start, job);
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
                *hash = advance::<L>(keys, start, at, streams, *hash, job);
                if at + streams.len() * 16 >= job.len() {
                    finish::<5, false, L, I>(end(keys, start, *hash, *mask, job), start, job);
                }
            }
            S
        }

        /// `S` whole blocks of each message of a subgroup, with one reduction.
        #[target_feature(enable = $features)]
        #[inline]
        fn advance_whole<const L: usize, const S: usize>(
            keys: &[&Context; L],
            start: Start<LANES>,
            at: usize,
            streams: &[V; S],
            hash: V,
            job: &mut Job<'_>,
        ) -> V {
            const { assert!(S <= POWERS) };
            let (inputs, outputs) = (job.inputs::<LANES>(start), job.outputs(start));
            let mut product = None;
            for s in 0..S {
                // SAFETY: an input has `len` bytes, at least `at` and S blocks.
                let input = unsafe { load_lanes(inputs, at + s * 16) };
                let output = xor(input, streams[s]);
                // SAFETY: so has an output.
                unsafe { store_lanes(outputs, at + s * 16, output) };
                let mut block = reverse_bytes(if job.opens() { input } else { output });
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
        fn advance<const L: usize>(
            keys: &[&Context; L],
            start: Start<LANES>,
            mut at: usize,
            streams: &[V],
            hash: V,
            job: &mut Job<'_>,
        ) -> V {
            let len = job.len();
            let blocks = (len - at).div_ceil(16).min(streams.len());
            let (inputs, outputs) = (job.inputs::<LANES>(start), job.outputs(start));
            let mut hash = Hash::new(hash, blocks);
            for stream in &streams[..blocks] {
                let block = if at + 16 <= len {
                    // SAFETY: an input has `len` bytes.
                    let input = unsafe { load_lanes(inputs, at) };
                    let output = xor(input, *stream);
                    // SAFETY: an output has `len` bytes.
                    unsafe { store_lanes(outputs, at, output) };
                    if job.opens() { input } else { output }
                } else {
                    crypt_partial(*stream, start, at, job)
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
                Self {
                    before,
                    product: Product { low: zero(), middle: zero(), high: zero() },
                    left,
                }
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
        fn crypt_partial(stream: V, start: Start<LANES>, at: usize, job: &mut Job<'_>) -> V {
            let len = job.len();
            let (inputs, outputs) = (job.inputs::<LANES>(start), job.outputs(start));
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
            if job.opens() { input } else { output }
        }
    };
}

pub(super) use long_kernel;
