//! Changes bytes in the ways that hurt parsers: flipped bits, cuts, lengths that lie, pieces that come twice or belong
//! elsewhere, numbers with too many digits.

/// A sequence of changes that follows from a seed.
pub struct Mutator(u64);

/// What lengths and counts lie with.
const LIES: [u64; 12] =
    [0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFF_FFFF, 0xFFFF_FFFF, 0x7FFF_FFFF_FFFF_FFFF, u64::MAX];
/// Specimens grow to this, not further.
const BYTES_MAX: usize = 96 << 10;

impl Mutator {
    pub fn new(seed: u64, name: &str) -> Mutator {
        // Each parser has its own, so that one more of them changes nothing for the others.
        let hash = blake3::hash(format!("{seed} {name}").as_bytes());
        Mutator(u64::from_le_bytes(hash.as_bytes()[..8].try_into().unwrap()) | 1)
    }

    /// `xorshift64*` (Vigna, "An experimental exploration of Marsaglia's xorshift generators, scrambled").
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit.max(1) as u64) as usize
    }

    /// One of the specimens with one to six changes.
    pub fn change(&mut self, specimens: &[Vec<u8>]) -> Vec<u8> {
        let chosen = self.below(specimens.len());
        let mut bytes = specimens[chosen].clone();
        for _ in 0..1 + self.below(6) {
            self.change_once(&mut bytes, specimens);
        }
        bytes.truncate(BYTES_MAX);
        bytes
    }

    fn change_once(&mut self, bytes: &mut Vec<u8>, specimens: &[Vec<u8>]) {
        if bytes.is_empty() {
            bytes.extend_from_slice(&self.next().to_le_bytes());
        }
        let at = self.place(bytes.len());
        match self.below(11) {
            0 | 1 => bytes[at] ^= 1 << self.below(8),
            2 => bytes[at] = self.next() as u8,
            3 | 4 => self.lie(bytes, at),
            5 => bytes.truncate(at),
            6 => {
                let end = (at + 1 + self.below(64)).min(bytes.len());
                bytes.drain(at..end);
            }
            7 => {
                let end = (at + 1 + self.below(300)).min(bytes.len());
                let piece = bytes[at..end].to_vec();
                let to = self.place(bytes.len());
                bytes.splice(to..to, piece);
            }
            8 => {
                let other = &specimens[self.below(specimens.len())];
                let from = self.below(other.len());
                let piece = other[from..].iter().take(1 + self.below(2000)).copied().collect::<Vec<u8>>();
                let end = (at + self.below(piece.len() + 1)).min(bytes.len());
                bytes.splice(at..end, piece);
            }
            9 => self.change_number(bytes, at),
            _ => {
                let signs = b"\0\r\n\t\"'\\,:;-=*$#{}[]()/.%\xFF\x80";
                bytes.insert(at, signs[self.below(signs.len())]);
            }
        }
    }

    /// Often near the start, where lengths and magics are.
    fn place(&mut self, length: usize) -> usize {
        match self.below(3) {
            0 => self.below(length.min(64)),
            _ => self.below(length),
        }
    }

    /// A field of one to eight bytes says something else about a length; also about the true one, and one more or less.
    fn lie(&mut self, bytes: &mut [u8], at: usize) {
        let width = [1, 2, 3, 4, 8][self.below(5)];
        let value = match self.below(4) {
            0 => (bytes.len() as u64).wrapping_add(self.next() % 3).wrapping_sub(1),
            1 => self.next() >> self.below(64),
            _ => LIES[self.below(LIES.len())],
        };
        let (little, big) = (value.to_le_bytes(), value.to_be_bytes());
        let field = if self.below(3) == 0 { &big[8 - width..] } else { &little[..width] };
        let width = width.min(bytes.len() - at);
        bytes[at..at + width].copy_from_slice(&field[..width]);
    }

    /// The next decimal number becomes another one, perhaps with very many digits.
    fn change_number(&mut self, bytes: &mut Vec<u8>, at: usize) {
        let Some(from) = bytes[at..].iter().position(u8::is_ascii_digit).map(|offset| at + offset) else { return };
        let digits = bytes[from..].iter().take_while(|byte| byte.is_ascii_digit()).count();
        let number = match self.below(5) {
            0 => "9".repeat(1 + self.below(40)),
            1 => format!("-{}", self.next()),
            2 => LIES[self.below(LIES.len())].to_string(),
            3 => String::new(),
            _ => (self.next() >> self.below(64)).to_string(),
        };
        bytes.splice(from..from + digits, number.into_bytes());
    }
}
