//! Random values that need no seed and no state.

/// 64 random bits, for jitter and for names that must not collide.
pub fn random_u64() -> u64 {
    uuid::Uuid::new_v4().as_u64_pair().1
}
