//! Seeded randomness: every draw of a run is a function of the run's seed and of where it is used, so that a resumed run
//! draws what an uninterrupted one would have drawn.

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

/// A seed for one use (`stream`) of `seed` (SplitMix64 finaliser over both).
#[must_use]
pub fn mix(seed: u64, stream: u64) -> u64 {
    let mut z = seed.wrapping_add(stream.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A generator for one use.
#[must_use]
pub fn rng(seed: u64) -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(seed)
}
