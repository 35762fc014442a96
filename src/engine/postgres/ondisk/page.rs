//! Checksums of data pages.
//!
//! The sum is 32 interleaved FNV-1a hashes over the page with its checksum field taken as zero, folded, mixed with the
//! block number and brought to 16 bits (`src/include/storage/checksum_impl.h`). The block number counts within the
//! relation's fork, across its 1 GiB files: see `relation_files::RelationFile::first_block`.
//!
//! A page that is read while the server writes it can be torn. That is not damage: its last change lies in the log
//! that the backup needs anyway. So who checks a live file reads a bad page again, and lets one pass whose LSN is not
//! older than the start of the backup (`src/backend/backup/basebackup.c`, verify_page_checksum).

use super::bytes::{u16_at, u32_at};
use crate::model::position::Lsn;

/// Offsets in the page header (`src/include/storage/bufpage.h`, PageHeaderData). The LSN is two halves, high first.
mod offset {
    pub const LSN_HIGH: usize = 0;
    pub const LSN_LOW: usize = 4;
    pub const CHECKSUM: usize = 8;
    pub const FLAGS: usize = 10;
    pub const LOWER: usize = 12;
    pub const UPPER: usize = 14;
    pub const SPECIAL: usize = 16;
    pub const HEADER_END: usize = 24;
}

const VALID_FLAGS: u16 = 0x0007;
const LANES: usize = 32;
const LANE_ROW_BYTES: usize = LANES * 4;
const PRIME: u32 = 16_777_619;

/// Where each lane begins.
const LANE_SEEDS: [u32; LANES] = [
    0x5B1F_36E9,
    0xB852_5960,
    0x02AB_50AA,
    0x1DE6_6D2A,
    0x79FF_467A,
    0x9BB9_F8A3,
    0x217E_7CD2,
    0x83E1_3D2C,
    0xF8D4_474F,
    0xE39E_B970,
    0x42C6_AE16,
    0x9932_16FA,
    0x7B09_3B5D,
    0x98DA_FF3C,
    0xF718_902A,
    0x0B1C_9CDB,
    0xE58F_764B,
    0x1876_36BC,
    0x5D7B_3BB1,
    0xE73D_E7DE,
    0x92BE_C979,
    0xCCA6_C0B2,
    0x304A_0979,
    0x85AA_43D4,
    0x7831_25BB,
    0x6CA8_EAA2,
    0xE407_EAC6,
    0x4B5C_FC3E,
    0x9FBF_8C76,
    0x15CA_20BE,
    0xF2CA_9FD3,
    0x959B_D756,
];

/// What a page looks like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PageVerdict {
    /// All zeros: the relation was extended, and nothing was written there yet. Legal anywhere.
    New,
    /// The checksum is right and the header possible.
    Sound {
        lsn: Lsn,
    },
    WrongChecksum {
        lsn: Lsn,
        stored: u16,
        computed: u16,
    },
    /// The header says what no server writes.
    BadHeader {
        lsn: Lsn,
    },
    /// Not a whole page: the length is not a power of two from 1 to 32 KiB.
    NotAPage,
}

impl PageVerdict {
    /// Whether there is nothing to object to.
    pub fn is_good(self) -> bool {
        matches!(self, PageVerdict::New | PageVerdict::Sound { .. })
    }

    /// Whether a bad page may be one that the server was just writing: its LSN is not older than the start of the
    /// backup, so that the log of the backup repairs it.
    pub fn is_repaired_by_log_from(self, backup_start: Lsn) -> bool {
        match self {
            PageVerdict::WrongChecksum { lsn, .. } | PageVerdict::BadHeader { lsn } => lsn >= backup_start,
            PageVerdict::New | PageVerdict::Sound { .. } | PageVerdict::NotAPage => false,
        }
    }
}

/// Judges one page of a cluster with data checksums, as the server does when it reads it
/// (`src/backend/storage/page/bufpage.c`, PageIsVerified). `block` is the whole page.
pub fn verify_block(block: &[u8], block_number: u32) -> PageVerdict {
    let Some(header) = Header::read(block) else { return PageVerdict::NotAPage };
    // A page without an upper bound is new, and then it must be all zeros.
    if header.upper == 0 {
        return if is_zero(block) { PageVerdict::New } else { PageVerdict::BadHeader { lsn: header.lsn } };
    }
    let computed = checksum(block, block_number);
    if computed != header.checksum {
        return PageVerdict::WrongChecksum { lsn: header.lsn, stored: header.checksum, computed };
    }
    if header.is_possible(block.len()) {
        PageVerdict::Sound { lsn: header.lsn }
    } else {
        PageVerdict::BadHeader { lsn: header.lsn }
    }
}

/// The LSN of the last change of a page; `None` if the page is too short to have one.
pub fn page_lsn(block: &[u8]) -> Option<Lsn> {
    Some(Lsn(u64::from(u32_at(block, offset::LSN_HIGH)?) << 32 | u64::from(u32_at(block, offset::LSN_LOW)?)))
}

struct Header {
    lsn: Lsn,
    checksum: u16,
    flags: u16,
    lower: u16,
    upper: u16,
    special: u16,
}

impl Header {
    fn read(block: &[u8]) -> Option<Header> {
        if !block.len().is_power_of_two() || !(1 << 10..=1 << 15).contains(&block.len()) {
            return None;
        }
        Some(Header {
            lsn: page_lsn(block)?,
            checksum: u16_at(block, offset::CHECKSUM)?,
            flags: u16_at(block, offset::FLAGS)?,
            lower: u16_at(block, offset::LOWER)?,
            upper: u16_at(block, offset::UPPER)?,
            special: u16_at(block, offset::SPECIAL)?,
        })
    }

    fn is_possible(&self, page_bytes: usize) -> bool {
        self.flags & !VALID_FLAGS == 0
            && usize::from(self.lower) >= offset::HEADER_END
            && self.lower <= self.upper
            && self.upper <= self.special
            && usize::from(self.special) <= page_bytes
            && self.special.is_multiple_of(8)
    }
}

/// The checksum that belongs on a page that is not new.
fn checksum(block: &[u8], block_number: u32) -> u16 {
    let mut lanes = LANE_SEEDS;
    let (first, rest) = block.split_at(LANE_ROW_BYTES.min(block.len()));
    let mut first_row = [0u8; LANE_ROW_BYTES];
    first_row[..first.len()].copy_from_slice(first);
    first_row[offset::CHECKSUM..offset::CHECKSUM + 2].fill(0);
    mix_row(&mut lanes, &first_row);
    for row in rest.as_chunks::<LANE_ROW_BYTES>().0 {
        mix_row(&mut lanes, row);
    }
    for _ in 0..2 {
        mix_row(&mut lanes, &[0; LANE_ROW_BYTES]);
    }
    let folded = lanes.iter().fold(0, |sum, lane| sum ^ lane) ^ block_number;
    // The remainder plus one lies in 1..=65535.
    (folded % 65_535 + 1) as u16
}

/// One step of every lane. A plain loop over two arrays, which the compiler turns into vector instructions.
fn mix_row(lanes: &mut [u32; LANES], row: &[u8; LANE_ROW_BYTES]) {
    for (lane, value) in lanes.iter_mut().zip(row.as_chunks::<4>().0) {
        let mixed = *lane ^ u32::from_le_bytes(*value);
        *lane = mixed.wrapping_mul(PRIME) ^ (mixed >> 17);
    }
}

fn is_zero(bytes: &[u8]) -> bool {
    bytes.iter().all(|byte| *byte == 0)
}

#[cfg(test)]
mod tests {
    use super::super::fixtures;
    use super::*;
    use proptest::prelude::*;

    const PAGE: usize = 8192;

    fn page() -> Vec<u8> {
        fixtures::v15().relation()[..PAGE].to_vec()
    }

    #[test]
    fn pages_that_a_server_wrote_are_sound() {
        for fixture in fixtures::all() {
            let relation = fixture.relation();
            let pages = relation.chunks(PAGE).zip(0u32..);
            assert!(relation.len() >= PAGE);
            for (block, number) in pages {
                let verdict = verify_block(block, number);
                assert!(matches!(verdict, PageVerdict::Sound { lsn } if lsn > Lsn(0x0090_0000)), "{verdict:?}");
                // The same page at another place, as after a mix-up of files.
                assert!(!verify_block(block, number + 131_072).is_good());
            }
        }
    }

    #[test]
    fn a_new_page_is_good_and_one_that_is_only_half_new_is_not() {
        let mut block = vec![0; PAGE];
        assert_eq!(verify_block(&block, 7), PageVerdict::New);
        block[5000] = 1;
        assert_eq!(verify_block(&block, 7), PageVerdict::BadHeader { lsn: Lsn(0) });
    }

    #[test]
    fn an_impossible_header_under_a_right_checksum_is_bad() {
        let mut block = page();
        block[offset::LOWER..offset::LOWER + 2].copy_from_slice(&9000u16.to_le_bytes());
        let sum = checksum(&block, 0);
        block[offset::CHECKSUM..offset::CHECKSUM + 2].copy_from_slice(&sum.to_le_bytes());
        assert!(matches!(verify_block(&block, 0), PageVerdict::BadHeader { .. }));
    }

    #[test]
    fn a_bad_page_is_forgiven_only_if_the_log_of_the_backup_holds_its_change() {
        let mut block = page();
        let lsn = page_lsn(&block).unwrap();
        block[6000] ^= 1;
        let verdict = verify_block(&block, 0);
        assert!(!verdict.is_good());
        assert!(verdict.is_repaired_by_log_from(lsn));
        assert!(!verdict.is_repaired_by_log_from(Lsn(lsn.0 + 1)));
    }

    #[test]
    fn a_piece_of_a_page_is_not_a_page() {
        for length in [0, 1, 24, 512, 1000, 8191, 65_536] {
            assert_eq!(verify_block(&vec![1; length], 0), PageVerdict::NotAPage, "{length}");
        }
    }

    proptest! {
        #[test]
        fn a_flipped_bit_is_seen(at in 0usize..PAGE, bit in 0u8..8) {
            let mut block = page();
            block[at] ^= 1 << bit;
            prop_assert!(!verify_block(&block, 0).is_good());
        }
    }
}
