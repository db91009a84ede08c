//! Every fuzz target over its committed corpus, the inputs that once broke it, and mutations of both: so that a contributor without a
//! fuzzer, and CI, run the same functions. `cargo xtask fuzz` searches further.

use std::fs;
use std::path::Path;

use nvtier_fuzz::mutate::{Rng, mutate};
use nvtier_fuzz::{TARGETS, Target, execute, seeds, target};

const SEED: u64 = 20_261_125;

fn inputs(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let mut all: Vec<_> = entries
        .map(|entry| {
            let path = entry.expect("an entry").path();
            (path.display().to_string(), fs::read(&path).expect("an input"))
        })
        .collect();
    all.sort();
    all
}

fn run(target: &Target, name: &str, input: &[u8]) {
    let result = std::panic::catch_unwind(|| execute(target, input));
    assert!(result.is_ok(), "{}: {name} breaks a rule (its message is above)", target.name);
}

fn check(name: &str) {
    let target = target(name).expect("a target");
    let mut corpus = inputs(&target.corpus());
    assert!(!corpus.is_empty(), "{name} has no corpus");
    corpus.extend(inputs(&target.regressions()));
    corpus.extend(seeds::seeds(name).into_iter().enumerate().map(|(i, seed)| (format!("seed {i}"), seed)));
    corpus.push(("the empty input".into(), Vec::new()));
    for (name, input) in &corpus {
        run(target, name, input);
    }
    let corpus: Vec<Vec<u8>> = corpus.into_iter().map(|(_, input)| input).collect();
    println!("{name}: {} inputs, {} mutations, seed {SEED}", corpus.len(), target.mutations);
    let mut rng = Rng::new(SEED);
    for round in 0..target.mutations {
        let input = mutate(&mut rng, &corpus, target.max_len);
        run(target, &format!("mutation {round}, {}", hex(&input)), &input);
    }
}

fn hex(input: &[u8]) -> String {
    input.iter().map(|byte| format!("{byte:02x}")).collect()
}

macro_rules! targets {
    ($($name:ident)*) => {
        $(#[test]
        fn $name() {
            check(stringify!($name));
        })*

        #[test]
        fn every_target_is_tested_and_has_a_program() {
            let named: Vec<&str> = TARGETS.iter().map(|target| target.name).collect();
            assert_eq!(named, [$(stringify!($name)),*]);
            for name in named {
                let program = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("libfuzzer/fuzz_targets/{name}.rs"));
                assert!(program.exists(), "{} is missing", program.display());
            }
        }
    };
}

targets! {
    superblock catalog_records layout catalog_image pool safetensors gguf npy names control_frames control_server control_client
    job_file bench_arguments command_line config kernel_tables kv_records kv_store
}
