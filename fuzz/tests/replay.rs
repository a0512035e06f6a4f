//! Every input that was kept, and some of chance, on any compiler: the short form of the fuzzer.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use sse_channel_fuzz::TARGETS;

/// Inputs of chance for each target; `FUZZ_RUNS` says how many.
const RUNS: u64 = 2000;

/// Of targets that do more, one input for so many of the others: the store writes files, and each of
/// its inputs is thousands of others; connections are sockets.
const SLOWER: [(&str, u64); 2] = [("connections", 4), ("store", 20)];

/// Numbers that are the same each time: xorshift.
struct Chance(u64);

impl Chance {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// Bytes of chance, or what was kept with some of it changed.
    fn input(&mut self, kept: &[Vec<u8>]) -> Vec<u8> {
        let at = usize::try_from(self.next()).unwrap_or(0).checked_rem(kept.len());
        let mut input = match at {
            Some(at) if self.next() % 4 > 0 => kept[at].clone(),
            _ => (0..self.next() % 600).map(|_| self.next().to_le_bytes()[0]).collect(),
        };
        for _ in 0..self.next() % 5 {
            let Some(at) = usize::try_from(self.next()).unwrap_or(0).checked_rem(input.len())
            else {
                break;
            };
            match self.next() % 3 {
                0 => input[at] = self.next().to_le_bytes()[0],
                1 => input.truncate(at),
                _ => input.insert(at, self.next().to_le_bytes()[0]),
            }
        }
        input
    }
}

/// One input is one line.
fn bytes_of(line: &str) -> Vec<u8> {
    let digit = |byte: u8| char::from(byte).to_digit(16).expect("hexadecimal digits");
    let byte = |pair: &[u8]| u8::try_from(16 * digit(pair[0]) + digit(pair[1])).unwrap_or(0);
    line.as_bytes().chunks_exact(2).map(byte).collect()
}

#[test]
fn what_was_kept_and_what_comes_by_chance_does_no_harm() {
    let runs = std::env::var("FUZZ_RUNS").ok().and_then(|runs| runs.parse().ok()).unwrap_or(RUNS);
    for (name, target) in TARGETS {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(name);
        let path = path.with_extension("hex");
        let lines = fs::read_to_string(&path).expect("each target has inputs that were kept");
        let kept: Vec<Vec<u8>> = lines.split('\n').map(bytes_of).collect();
        let slower = SLOWER.iter().find(|(its, _)| *its == name).map_or(1, |(_, times)| *times);
        let runs = runs.div_ceil(slower);
        let mut chance = Chance(0x5eed_0000 + runs);
        let by_chance = (0..runs).map(|_| chance.input(&kept)).collect::<Vec<_>>();
        for input in kept.iter().chain(&by_chance) {
            let done = catch_unwind(AssertUnwindSafe(|| target(input)));
            assert!(done.is_ok(), "{name} fails with {input:02x?}");
        }
        println!("{name}: {} kept and {runs} by chance", kept.len());
    }
}
