//! Key set-up across lanes: derivation, key expansion, H and its powers, many keys at once.
//!
//! As in [`super::gcm`], each lane of a register belongs to another key, and a pass works on several registers.
//! Expansion by the last round of AES: on four equal columns ShiftRows does nothing, and what is left is SubWord, in
//! constant time. H is made along the way: each round key is used as soon as it is there.

/// Writes the set-up of one tier, over what [`super::gcm::gcm_kernel`] wrote in the same file.
macro_rules! set_up_kernel {
    ($features:literal) => {
        use super::{BlockKey, BlockPair};

        /// Encrypts each pair of blocks under the key beside it. At least `LANES` pairs.
        #[target_feature(enable = $features)]
        pub(super) fn encrypt_pairs(keys: &[&BlockKey], pairs: &mut [BlockPair]) {
            assert_eq!(keys.len(), pairs.len());
            let mut passes = Passes::new(pairs.len());
            while let Some(pass) = passes.next(4) {
                match pass {
                    Pass::One(starts) => encrypt_pass(keys, pairs, starts),
                    Pass::Two(starts) => encrypt_pass(keys, pairs, starts),
                    Pass::Four(starts) => encrypt_pass(keys, pairs, starts),
                }
            }
        }

        #[target_feature(enable = $features)]
        #[inline]
        fn encrypt_pass<const I: usize>(
            keys: &[&BlockKey],
            pairs: &mut [BlockPair],
            starts: [Start<LANES>; I],
        ) {
            let keys = starts.map(|start| start.of(keys).map(BlockKey::wide));
            let mut blocks = [[zero(); 2]; I];
            for g in 0..I {
                let pairs = starts[g].of(pairs);
                for s in 0..2 {
                    blocks[g][s] = from_lanes(pairs.map(|pair| load(&pair[s])));
                }
            }
            encrypt::<0, _, _, _, _, _>(&keys, &mut blocks);
            for g in 0..I {
                let done = [to_lanes(blocks[g][0]), to_lanes(blocks[g][1])];
                for (l, pair) in starts[g].of_mut(pairs).iter_mut().enumerate() {
                    // A subgroup that begins early takes in pairs that an earlier pass has encrypted: once is enough.
                    // (Within a pass all are read before any is written.)
                    if !starts[g].is_done(l) {
                        store(&mut pair[0], done[0][l]);
                        store(&mut pair[1], done[1][l]);
                    }
                }
            }
        }

        /// Sets up AES-256 keys, one for each context. At least `LANES` keys.
        #[target_feature(enable = $features)]
        pub(super) fn set_up(materials: &[[u8; 32]], contexts: &mut [Context]) {
            assert_eq!(materials.len(), contexts.len());
            let mut passes = Passes::new(materials.len());
            while let Some(pass) = passes.next(4) {
                match pass {
                    Pass::One(starts) => set_up_pass(materials, contexts, starts),
                    Pass::Two(starts) => set_up_pass(materials, contexts, starts),
                    Pass::Four(starts) => set_up_pass(materials, contexts, starts),
                }
            }
        }

        /// FIPS 197 section 5.2, for `I` subgroups of keys at once, and H while the round keys come.
        #[target_feature(enable = $features)]
        #[inline]
        fn set_up_pass<const I: usize>(
            materials: &[[u8; 32]],
            contexts: &mut [Context],
            starts: [Start<LANES>; I],
        ) {
            // Even and odd round keys, and zero on its way to H.
            let (mut even, mut odd, mut h) = ([zero(); I], [zero(); I], [zero(); I]);
            for g in 0..I {
                let materials = starts[g].of(materials);
                even[g] = from_lanes(materials.map(|material| load(block_at(&material, 0))));
                odd[g] = from_lanes(materials.map(|material| load(block_at(&material, 16))));
                h[g] = aesenc(even[g], odd[g]);
                let contexts = starts[g].of_mut(contexts);
                store_round_key(contexts, 0, even[g]);
                store_round_key(contexts, 1, odd[g]);
            }
            let (rotated, word) =
                (broadcast(from_u128(ROTATED_LAST_WORD)), broadcast(from_u128(LAST_WORD)));
            let mut constant = 1;
            for pair in 1..ROUND_KEYS / 2 {
                let with = broadcast(from_u128(constant * EACH_WORD));
                constant <<= 1;
                for g in 0..I {
                    even[g] = next_round_key(even[g], shuffle(odd[g], rotated), with);
                    odd[g] = next_round_key(odd[g], shuffle(even[g], word), zero());
                    h[g] = aesenc(aesenc(h[g], even[g]), odd[g]);
                    let contexts = starts[g].of_mut(contexts);
                    store_round_key(contexts, 2 * pair, even[g]);
                    store_round_key(contexts, 2 * pair + 1, odd[g]);
                }
            }
            let with = broadcast(from_u128(constant * EACH_WORD));
            for g in 0..I {
                even[g] = next_round_key(even[g], shuffle(odd[g], rotated), with);
                h[g] = aesenclast(h[g], even[g]);
                store_round_key(starts[g].of_mut(contexts), ROUND_KEYS - 1, even[g]);
                set_up_powers(h[g], starts[g].of_mut(contexts));
            }
        }

        /// The round key two after `key`. `word` has one word in all columns, so that ShiftRows changes nothing.
        #[target_feature(enable = $features)]
        #[inline]
        fn next_round_key(key: V, word: V, constant: V) -> V {
            let sums = xor(key, shift_left_bytes::<4>(key));
            let sums = xor(sums, shift_left_bytes::<8>(sums));
            xor(sums, aesenclast(word, constant))
        }

        #[target_feature(enable = $features)]
        #[inline]
        fn store_round_key(contexts: &mut [Context; LANES], round: usize, key: V) {
            let lanes = to_lanes(key);
            for l in 0..LANES {
                store(&mut contexts[l].schedule.keys[round], lanes[l]);
            }
        }

        /// The powers of `h`, in the order of GHASH's bits and times x.
        #[target_feature(enable = $features)]
        #[inline]
        fn set_up_powers(h: V, contexts: &mut [Context; LANES]) {
            let mut powers = [double(reverse_bytes(h)); POWERS];
            for k in 1..POWERS {
                // Each from two that have been there for long; of a square the mixed terms cancel out.
                let (a, b) = (powers[k / 2], powers[(k - 1) / 2]);
                let product = if k % 2 == 1 { square(a) } else { multiply(a, b) };
                powers[k] = reduce(product);
            }
            for k in 0..POWERS {
                let lanes = to_lanes(powers[k]);
                for l in 0..LANES {
                    store(&mut contexts[l].powers[k], lanes[l]);
                }
            }
        }

        #[target_feature(enable = $features)]
        #[inline]
        fn square(a: V) -> Product {
            Product { low: clmul::<0x00>(a, a), middle: zero(), high: clmul::<0x11>(a, a) }
        }

        /// A word in every column.
        const EACH_WORD: u128 = 0x0000_0001_0000_0001_0000_0001_0000_0001;

        /// Shuffles that bring the last word into every column, as it is and rotated by a byte (RotWord).
        const LAST_WORD: u128 = 0x0f0e_0d0c_0f0e_0d0c_0f0e_0d0c_0f0e_0d0c;
        const ROTATED_LAST_WORD: u128 = 0x0c0f_0e0d_0c0f_0e0d_0c0f_0e0d_0c0f_0e0d;

        /// Times x, in reflected bits: one place up, and the polynomial where a bit falls out at the top.
        #[target_feature(enable = $features)]
        #[inline]
        fn double(block: V) -> V {
            let polynomial = broadcast(from_u128(0xc200_0000_0000_0000 << 64 | 1));
            let carry = shift_left_bytes::<8>(top_bits(block));
            xor(xor(twice(block), carry), and(spread_sign(block), polynomial))
        }
    };
}

pub(super) use set_up_kernel;
