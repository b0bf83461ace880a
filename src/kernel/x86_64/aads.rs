//! AADs of unequal lengths, side by side in the lanes of a register.
//!
//! # Shape
//! Blocks are counted from the ends, where those of all lanes meet the same power of H. A lane that has no block left
//! gets zeros: they come before its AAD, where the hash is still zero and stays so.
//!
//! ```text
//!              from_end 2   from_end 1   from_end 0
//! 40 bytes     block 0      block 1      block 2, its last 8 bytes zeros
//! 16 bytes     zeros        zeros        block 0
//! none         zeros        zeros        zeros
//! ```

/// Writes the part of [`super::gcm::gcm_kernel`] for AADs of unequal lengths.
macro_rules! aads_kernel {
    ($features:literal) => {
        /// The AADs of a subgroup.
        struct Ends<'a> {
            aads: &'a [&'a [u8]; LANES],
            /// Blocks of each AAD.
            blocks: [usize; LANES],
            /// Of the AAD that has fewest.
            fewest: usize,
            /// Of the AAD that has most.
            most: usize,
        }

        impl<'a> Ends<'a> {
            #[target_feature(enable = $features)]
            #[inline]
            fn new(aads: &'a [&'a [u8]; LANES]) -> Self {
                let mut blocks = [0; LANES];
                let (mut fewest, mut most) = (usize::MAX, 0);
                // A loop: the iterators' `min` and `max` are calls, which no register survives.
                for l in 0..LANES {
                    blocks[l] = aads[l].len().div_ceil(16);
                    fewest = if blocks[l] < fewest { blocks[l] } else { fewest };
                    most = if blocks[l] > most { blocks[l] } else { most };
                }
                Self { aads, blocks, fewest, most }
            }

            /// The block of each AAD that has `from_end` others behind it, byte-reversed. (For `SITE`, see [`finish`].)
            #[target_feature(enable = $features)]
            #[inline]
            fn blocks<const SITE: usize, const L: usize, const S: usize>(
                &self,
                from_end: usize,
            ) -> V {
                let mut lanes = [from_u128(0); LANES];
                if from_end == 0 {
                    for l in 0..LANES {
                        lanes[l] = load_end(self.aads[l]);
                    }
                } else if from_end < self.fewest {
                    for l in 0..LANES {
                        lanes[l] = self.whole_block(l, from_end);
                    }
                } else {
                    for l in 0..LANES {
                        if from_end < self.blocks[l] {
                            lanes[l] = self.whole_block(l, from_end);
                        }
                    }
                }
                reverse_bytes(from_lanes(lanes))
            }

            /// A block of AAD `l` that is not its last, of more than `from_end` blocks.
            #[target_feature(enable = $features)]
            #[inline]
            fn whole_block(&self, l: usize, from_end: usize) -> __m128i {
                let at = (self.blocks[l] - 1 - from_end) * 16;
                load(block_at(self.aads[l], at))
            }
        }

        /// What the AADs of a subgroup and the lengths add to the hash of messages of `S - 1` blocks. (For `SITE`, see
        /// [`finish`].)
        #[target_feature(enable = $features)]
        #[inline]
        fn hash_unlike_aads<const SITE: usize, const L: usize, const S: usize>(
            keys: &[&Context; L],
            start: Start<LANES>,
            job: &Job<'_>,
        ) -> Product {
            let aads = job.aads(start);
            let mut lengths = [from_u128(0); LANES];
            for l in 0..LANES {
                lengths[l] = length_block(aads[l].len(), (S - 1) * 16);
            }
            let mut sum = multiply(from_lanes(lengths), power(keys, 0));
            let ends = Ends::new(aads);
            let mut most = ends.most;
            if most > POWERS - S {
                most = POWERS - S;
                let before = hash_unlike_early(most, *keys, start, job);
                sum = add(sum, multiply(before, power(keys, POWERS - 1)));
            }
            for from_end in 0..most {
                sum = add(
                    sum,
                    multiply(ends.blocks::<SITE, L, S>(from_end), power(keys, S + from_end)),
                );
            }
            sum
        }

        /// The hash of the blocks of each AAD that have `rest` others behind them, for AADs that have too many to share
        /// one reduction with the messages.
        #[target_feature(enable = $features)]
        #[inline(never)]
        fn hash_unlike_early<const L: usize>(
            rest: usize,
            keys: [&Context; L],
            start: Start<LANES>,
            job: &Job<'_>,
        ) -> V {
            let ends = Ends::new(job.aads(start));
            let mut hash = Hash::new(zero(), ends.most - rest);
            for from_end in (rest..ends.most).rev() {
                absorb(&keys, &mut hash, ends.blocks::<6, L, 0>(from_end));
            }
            total(&hash)
        }

        /// The hash of each AAD, for `aad_blocks` blocks: as many as the AAD of the pass that has most.
        #[target_feature(enable = $features)]
        #[inline(never)]
        fn hash_aads<const L: usize>(
            keys: &[&Context; L],
            start: Start<LANES>,
            aad_blocks: usize,
            job: &Job<'_>,
        ) -> V {
            let ends = Ends::new(job.aads(start));
            let mut hash = Hash::new(zero(), aad_blocks);
            for from_end in (0..aad_blocks).rev() {
                absorb(keys, &mut hash, ends.blocks::<7, L, 0>(from_end));
            }
            total(&hash)
        }
    };
}

pub(super) use aads_kernel;
