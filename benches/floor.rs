//! What AES and carry-less multiplication alone take of the CPU: the floor under a kernel's time.
//!
//! A message of 32 bytes with 16 bytes of AAD needs three AES-256 blocks (42 AES instructions on a lane), and the
//! products of three blocks with one reduction (14 carry-less multiplications; the block of lengths is the same for all
//! messages). Each tier runs so many on independent registers, in an even mixture, and nothing else: no loads, stores,
//! counters, sums or byte swaps.
//!
//! ```sh
//! cargo bench --bench floor
//! ```

fn main() {
    #[cfg(target_arch = "x86_64")]
    x86_64::main();
    #[cfg(not(target_arch = "x86_64"))]
    println!("There are kernels for x86-64 alone.");
}

#[cfg(target_arch = "x86_64")]
mod x86_64 {
    #![expect(unsafe_code, reason = "calls functions for features that were detected")]

    use std::{arch::x86_64::*, hint::black_box, time::Instant};

    use keymill::Tier;

    /// Registers of messages in a round.
    const REGISTERS: usize = 2_000;
    const ROUNDS: usize = 201;

    macro_rules! floor {
        ($name:ident, $features:literal, $splat:expr, $aesenc:ident, $clmul:ident) => {
            /// The AES instructions and multiplications (where asked for) of `REGISTERS` registers of messages.
            #[target_feature(enable = $features)]
            fn $name<const AES: bool, const CLMUL: bool>() {
                let (mut blocks, mut products) = black_box(([$splat; 12], [$splat; 4]));
                let key = black_box($splat);
                // Fourteen times twelve and four: what four registers need.
                for _ in 0..14 * REGISTERS / 4 {
                    if AES {
                        for block in &mut blocks {
                            *block = $aesenc(*block, key);
                        }
                    }
                    if CLMUL {
                        for product in &mut products {
                            *product = $clmul::<0x01>(*product, key);
                        }
                    }
                }
                black_box((blocks, products));
            }
        };
    }

    floor!(
        vaes512,
        "aes,avx2,avx512bw,avx512f,avx512vl,pclmulqdq,vaes,vpclmulqdq",
        _mm512_set1_epi64(3),
        _mm512_aesenc_epi128,
        _mm512_clmulepi64_epi128
    );
    floor!(
        vaes256,
        "aes,avx2,pclmulqdq,vaes,vpclmulqdq",
        _mm256_set1_epi64x(3),
        _mm256_aesenc_epi128,
        _mm256_clmulepi64_epi128
    );
    floor!(
        aesni,
        "aes,pclmulqdq,sse4.1,ssse3",
        _mm_set1_epi64x(3),
        _mm_aesenc_si128,
        _mm_clmulepi64_si128
    );

    struct Row {
        tier: Tier,
        lanes: usize,
        /// AES, multiplications, both.
        runs: [fn(); 3],
        /// ns per message, of each run in each round.
        times: [Vec<f64>; 3],
    }

    pub(super) fn main() {
        // `cargo test --benches` runs every bench once, to see that it works.
        let rounds =
            if std::env::args().any(|argument| argument == "--bench") { ROUNDS } else { 1 };
        let mut rows: Vec<Row> = Tier::available().iter().filter_map(|tier| row(*tier)).collect();
        for _ in 0..rounds {
            for Row { lanes, runs, times, .. } in &mut rows {
                for (run, times) in runs.iter().zip(times) {
                    let start = Instant::now();
                    run();
                    let messages = (REGISTERS * *lanes) as f64;
                    times.push(start.elapsed().as_secs_f64() * 1e9 / messages);
                }
            }
        }
        println!("ns per message of 32 bytes, 16 bytes of AAD, one key: median of {rounds} rounds");
        println!("| tier | AES | multiplications | both, mixed |");
        println!("|---|---|---|---|");
        for Row { tier, times, .. } in &mut rows {
            let [aes, clmul, both] = times.each_mut().map(|times| {
                times.sort_by(f64::total_cmp);
                times[times.len() / 2]
            });
            println!("| {tier} | {aes:.2} | {clmul:.2} | {both:.2} |");
        }
    }

    fn row(tier: Tier) -> Option<Row> {
        /// The three runs of one tier. A `Tier` exists only if the CPU has its features.
        macro_rules! runs {
            ($name:ident) => {
                [
                    // SAFETY: the tier's features are those of the function.
                    || unsafe { $name::<true, false>() },
                    // SAFETY: as above.
                    || unsafe { $name::<false, true>() },
                    // SAFETY: as above.
                    || unsafe { $name::<true, true>() },
                ]
            };
        }
        let (lanes, runs): (usize, [fn(); 3]) = match tier.as_str() {
            "vaes512" => (4, runs!(vaes512)),
            "vaes256" => (2, runs!(vaes256)),
            "aesni" => (1, runs!(aesni)),
            _ => return None,
        };
        Some(Row { tier, lanes, runs, times: Default::default() })
    }
}
