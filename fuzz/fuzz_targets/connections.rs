#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| sse_channel_fuzz::connections(bytes));
