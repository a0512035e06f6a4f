//! Content codings (RFC 9110, section 8.4.1): frames compressed once for all clients.
//!
//! A gzip stream (RFC 1952) is a header, deflate blocks (RFC 1951), and a trailer with a checksum of
//! the text. Here each frame is deflated on its own: its blocks end on a byte's boundary and refer to
//! nothing before them. So any client can be given any blocks in any order, and what it has so far
//! can always be read.
//!
//! The trailer is made for each client. Browsers and curl do without it, but curl, nginx's `gunzip` and
//! Python's `gzip` take a wrong one for an error; and without any, nginx's `gunzip` logs an error and
//! breaks the connection off, and Python's `gzip` raises. The checksum of a client's stream follows from
//! those of its blocks: one multiplication each, and 8 bytes.

use std::sync::Mutex;

use flate2::{Compress, Compression, FlushCompress};

/// What a stream of this coding begins with: deflate, no name, no time, no system.
pub const GZIP_HEADER: [u8; 10] = [0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 255];

/// A final block without text (of fixed codes), which ends the deflate stream.
const FINAL_BLOCK: [u8; 2] = [3, 0];

/// The trade of time for size: more gains a hundredth at the most, in texts of some kilobytes.
const LEVEL: u32 = 6;

/// Shorter text is stored: to deflate it gains nothing, but takes time.
const SHORT: usize = 64;

/// The longest text of a stored block.
const LONGEST_STORED: usize = 0xffff;

/// Bytes in front of a stored block's text.
const STORED_HEAD: usize = 5;

/// CRC-32's polynomial, the lowest power in the highest bit.
const POLYNOMIAL: u32 = 0xedb8_8320;

/// The polynomial 1, in the same order.
const ONE: u32 = 1 << 31;

/// How a response's body is coded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Coding {
    /// As it is.
    Identity,
    /// `gzip`.
    Gzip,
}

/// Length and checksum of some text, for a trailer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sum {
    crc: u32,
    /// Modulo 2^32, as the trailer has it.
    length: u32,
}

impl Sum {
    /// Of this text with `next` behind it.
    pub fn append(&mut self, next: &Part) {
        self.crc = multiply(next.shift, self.crc) ^ next.sum.crc;
        self.length = self.length.wrapping_add(next.sum.length);
    }
}

/// The sum of some text, and what it does to the checksum of what stands before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    sum: Sum,
    /// x to the power of the text's bits, modulo the polynomial.
    shift: u32,
}

impl Default for Part {
    /// No text.
    fn default() -> Part {
        Part { sum: Sum::default(), shift: ONE }
    }
}

impl Part {
    /// Of `text`.
    fn of(text: &[u8]) -> Part {
        let mut shift = ONE;
        let mut power = ONE >> 8;
        let mut left = text.len();
        while left > 0 {
            if left & 1 == 1 {
                shift = multiply(shift, power);
            }
            power = multiply(power, power);
            left >>= 1;
        }
        // Cut to what the trailer has of the length.
        let sum = Sum { crc: crc32fast::hash(text), length: text.len() as u32 };
        Part { sum, shift }
    }

    /// Of this text with `next` behind it.
    pub fn append(&mut self, next: &Part) {
        self.sum.append(next);
        self.shift = multiply(self.shift, next.shift);
    }
}

/// The product of two polynomials over GF(2), modulo CRC-32's.
fn multiply(a: u32, mut b: u32) -> u32 {
    let mut product = 0;
    for bit in (0..32).rev() {
        product ^= b & 0u32.wrapping_sub(a >> bit & 1);
        b = b >> 1 ^ POLYNOMIAL & 0u32.wrapping_sub(b & 1);
    }
    product
}

/// Text as deflate blocks that stand on their own.
#[derive(Debug, PartialEq, Eq)]
pub struct Blocks {
    bytes: Box<[u8]>,
    part: Part,
}

impl Blocks {
    /// Deflates `text`, or stores it where that is no longer.
    pub fn of(text: &[u8]) -> Blocks {
        let bytes = deflated(text).unwrap_or_else(|| stored(text));
        Blocks { bytes: bytes.into_boxed_slice(), part: Part::of(text) }
    }

    /// The bytes of the wire.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The text's sum.
    pub fn part(&self) -> &Part {
        &self.part
    }
}

/// What ends the gzip stream of a text with this sum.
pub fn gzip_end(sum: Sum) -> [u8; 10] {
    let [a, b] = FINAL_BLOCK;
    let [c, d, e, f] = sum.crc.to_le_bytes();
    let [g, h, i, j] = sum.length.to_le_bytes();
    [a, b, c, d, e, f, g, h, i, j]
}

/// `text` deflated up to a byte's boundary; `None` where storing it takes no more.
fn deflated(text: &[u8]) -> Option<Vec<u8>> {
    if text.len() < SHORT {
        return None;
    }
    // What does not fit is longer than it is worth.
    let most = stored_length(text);
    let mut bytes = Vec::with_capacity(most);
    with_compressor(|compressor| {
        compressor.compress_vec(text, &mut bytes, FlushCompress::Sync).ok()?;
        let is_whole =
            compressor.total_in() == text.len() as u64 && bytes.len() < bytes.capacity().min(most);
        is_whole.then_some(())
    })?;
    Some(bytes)
}

fn stored_length(text: &[u8]) -> usize {
    text.len() + STORED_HEAD * text.len().div_ceil(LONGEST_STORED)
}

/// `text` in stored blocks.
fn stored(text: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(stored_length(text));
    for part in text.chunks(LONGEST_STORED) {
        // No more than 16 bits.
        let length = part.len() as u16;
        bytes.push(0);
        bytes.extend_from_slice(&length.to_le_bytes());
        bytes.extend_from_slice(&(!length).to_le_bytes());
        bytes.extend_from_slice(part);
    }
    bytes
}

/// The compressor that nobody uses now: a new one takes 300 KB and longer than most texts do.
static SPARE: Mutex<Option<Compress>> = Mutex::new(None);

fn with_compressor<T>(work: impl FnOnce(&mut Compress) -> T) -> T {
    // Never waited for: two at once have two, and so has a child of a fork that met the lock held.
    let spare = SPARE.try_lock().ok().and_then(|mut spare| spare.take());
    let mut compressor = spare.unwrap_or_else(|| Compress::new(Compression::new(LEVEL), false));
    compressor.reset();
    let result = work(&mut compressor);
    if let Ok(mut spare) = SPARE.try_lock() {
        *spare = Some(compressor);
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;
    use flate2::{Decompress, FlushDecompress, Status};

    /// All that can be read of a gzip stream that may go on, and whether it is at its end.
    fn read(stream: &[u8]) -> (Vec<u8>, bool) {
        assert_eq!(stream[..10], GZIP_HEADER);
        let mut inflate = Decompress::new(false);
        let mut text = Vec::with_capacity(1 << 22);
        let status = inflate.decompress_vec(&stream[10..], &mut text, FlushDecompress::Sync);
        let at_end = matches!(status, Ok(Status::StreamEnd));
        assert!(at_end || status.is_ok() || stream.len() == 10, "{status:?}");
        if at_end {
            let trailer = &stream[10 + inflate.total_in() as usize..];
            let crc = crc32fast::hash(&text).to_le_bytes();
            assert_eq!(trailer, [crc, (text.len() as u32).to_le_bytes()].concat());
        }
        (text, at_end)
    }

    /// Bytes without any order.
    fn noise(length: usize) -> Vec<u8> {
        let mut state = 1u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        };
        (0..length).map(|_| next()).collect()
    }

    fn texts() -> Vec<Vec<u8>> {
        let words = "a frame as they go, with words again and again; ".repeat(100);
        vec![
            crate::frame::HEARTBEAT.to_vec(),
            b"id: 1763881200123-0\ndata: {\"headline\":\"Rain by noon\"}\n\n".to_vec(),
            words.as_bytes().to_vec(),
            noise(1000),
            noise(2 * LONGEST_STORED + 1),
            vec![b'x'; 1 << 20],
        ]
    }

    #[test]
    fn any_blocks_in_any_order_are_a_stream_of_their_texts() {
        let texts = texts();
        let blocks: Vec<Blocks> = texts.iter().map(|text| Blocks::of(text)).collect();
        // Each permutation of each subset that a number's digits name, some twice.
        for order in 0..6usize.pow(4) {
            let order = [order % 6, order / 6 % 6, order / 36 % 6, order / 216];
            if order.contains(&5) && order[0] != 5 {
                continue;
            }
            let mut stream = GZIP_HEADER.to_vec();
            let mut text = Vec::new();
            let mut sum = Sum::default();
            for at in order {
                stream.extend_from_slice(blocks[at].bytes());
                text.extend_from_slice(&texts[at]);
                sum.append(blocks[at].part());
                if order[3] == 0 {
                    // Cut here, it reads so far.
                    assert_eq!(read(&stream), (text.clone(), false));
                }
            }
            stream.extend_from_slice(&gzip_end(sum));
            assert_eq!(read(&stream), (text, true));
        }
    }

    #[test]
    fn what_does_not_shrink_is_stored() {
        assert_eq!(Blocks::of(b": heartbeat\n\n").bytes(), b"\0\x0d\0\xf2\xff: heartbeat\n\n");
        for text in texts() {
            let length = Blocks::of(&text).bytes().len();
            assert!(length <= stored_length(&text));
        }
        let long = noise(2 * LONGEST_STORED + 1);
        assert_eq!(Blocks::of(&long).bytes().len(), long.len() + 3 * STORED_HEAD);
        assert!(Blocks::of(&[b'x'; 1 << 20]).bytes().len() < 2000);
        assert_eq!(Blocks::of(b"").bytes(), b"");
    }

    #[test]
    fn sums_are_those_of_the_whole_however_it_is_parted() {
        let text = noise(5000);
        for cut in [0, 1, 7, 2048, 4999, 5000] {
            let (one, other) = text.split_at(cut);
            let mut sum = Part::of(one).sum;
            sum.append(&Part::of(other));
            assert_eq!(sum, Part::of(&text).sum);
            let mut part = Part::default();
            part.append(&Part::of(one));
            part.append(&Part::of(other));
            assert_eq!(part, Part::of(&text));
        }
        assert_eq!(Part::of(b"123456789").sum.crc, 0xcbf4_3926);
    }

    #[test]
    fn an_empty_stream_has_an_end_too() {
        let stream = [GZIP_HEADER.as_slice(), &gzip_end(Sum::default())].concat();
        assert_eq!(read(&stream), (Vec::new(), true));
    }
}
