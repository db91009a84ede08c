#![no_main]
libfuzzer_sys::fuzz_target!(init: nvtier_fuzz::count_panics(), |input: &[u8]| nvtier_fuzz::fuzz("kv_store", input));
