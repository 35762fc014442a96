//! A fuzz target: hands what the fuzzer makes to the parser that the program is named after.

#![no_main]

mod targets;

use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    static READ: OnceLock<fn(&[u8])> = OnceLock::new();
    let read = READ.get_or_init(|| {
        let name = env!("CARGO_BIN_NAME");
        targets::TARGETS.iter().find(|target| target.name == name).expect("a target of this name").read
    });
    read(bytes);
});
