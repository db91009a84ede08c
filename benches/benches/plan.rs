//! What `nvtier plan` says of loading a model and restoring a KV cache, beside what loading and restoring take here.
//!
//!     cargo build --release && cargo bench -p nvtier-benches --bench plan -- [--dir DIR] [--device cpu|cuda:0] [--layers N] [--rounds N] [--measure-mib MIB]
//!
//! Each round measures ceilings (`nvtier doctor --measure`), asks for a plan of a checkpoint with the shape of Llama 3.2 1B (random bytes in bf16),
//! loads it cold from a pool to a device (`nvtier load --device D`), and restores the keys and values of as many tokens as the plan speaks of, from a
//! KV store, cold, 32 blocks of 2 MiB at a time, to the host. All of it is in turns, because rates of a shared machine drift. Two figures of a load: its own
//! time, and that of the whole command. Needs root, which empties the page cache. `NVTIER_BIN` names the command (default: target/release/nvtier).

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use engine::kv::{Get, Key, Put, Store, StoreOptions, Stored, View};
use engine::{FormatOptions, OpenOptions, Pool};
use nvme::{Arena, ArenaOptions, Buffer, SimRng};
use serde_json::{Value, json};

const BLOCK: usize = 2 << 20;
const BATCH: usize = 32;
const CONTEXT: u64 = 32_768;
const HIDDEN: u64 = 2048;
const INNER: u64 = 8192;
const VOCABULARY: u64 = 128_256;
const HEADS: u64 = 32;
const KV_HEADS: u64 = 8;
const HEAD: u64 = 64;

struct Args {
    dir: PathBuf,
    device: String,
    layers: u64,
    rounds: usize,
    measure_mib: u64,
}

fn args() -> Args {
    let mut args =
        Args { dir: "/var/tmp".into(), device: "cpu".into(), layers: 16, rounds: 5, measure_mib: 1024 };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut value = || words.next().expect("a value");
        match word.as_str() {
            "--dir" => args.dir = value().into(),
            "--device" => args.device = value(),
            "--layers" => args.layers = value().parse().expect("a number"),
            "--rounds" => args.rounds = value().parse().expect("a number"),
            "--measure-mib" => args.measure_mib = value().parse().expect("a number"),
            // What cargo adds.
            "--bench" => {}
            other => panic!("{other}: see the top of benches/benches/plan.rs"),
        }
    }
    args
}

/// The command, with what it remembers below the scratch folder.
struct Nvtier {
    program: PathBuf,
    state: PathBuf,
}

impl Nvtier {
    fn run(&self, words: &[&str], paths: &[&Path]) -> (Value, f64) {
        let mut command = Command::new(&self.program);
        command.args(words).args(paths).args(["--json", "--progress", "none"]);
        command.env("XDG_STATE_HOME", &self.state).env("XDG_CACHE_HOME", &self.state);
        let start = Instant::now();
        let output = command.output().expect("nvtier runs");
        let seconds = start.elapsed().as_secs_f64();
        assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
        (serde_json::from_slice(&output.stdout).unwrap_or(Value::Null), seconds)
    }
}

/// A folder with config.json and model.safetensors.
fn checkpoint(folder: &Path, layers: u64) {
    fs::create_dir(folder).expect("a folder");
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16", "tie_word_embeddings": true,
        "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": layers, "vocab_size": VOCABULARY,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD, "max_position_embeddings": 131_072,
    });
    fs::write(folder.join("config.json"), config.to_string()).expect("a configuration");
    let mut tensors: Vec<(String, Vec<u64>)> =
        vec![("model.embed_tokens.weight".into(), vec![VOCABULARY, HIDDEN])];
    for layer in 0..layers {
        let mut add = |name: &str, shape: &[u64]| {
            tensors.push((format!("model.layers.{layer}.{name}.weight"), shape.to_vec()));
        };
        add("self_attn.q_proj", &[HEADS * HEAD, HIDDEN]);
        add("self_attn.k_proj", &[KV_HEADS * HEAD, HIDDEN]);
        add("self_attn.v_proj", &[KV_HEADS * HEAD, HIDDEN]);
        add("self_attn.o_proj", &[HIDDEN, HEADS * HEAD]);
        add("mlp.gate_proj", &[INNER, HIDDEN]);
        add("mlp.up_proj", &[INNER, HIDDEN]);
        add("mlp.down_proj", &[HIDDEN, INNER]);
        add("input_layernorm", &[HIDDEN]);
        add("post_attention_layernorm", &[HIDDEN]);
    }
    tensors.push(("model.norm.weight".into(), vec![HIDDEN]));
    let mut header = serde_json::Map::new();
    let mut at = 0;
    for (name, shape) in tensors {
        let end = at + 2 * shape.iter().product::<u64>();
        header.insert(name, json!({ "dtype": "BF16", "shape": shape, "data_offsets": [at, end] }));
        at = end;
    }
    let mut text = Value::Object(header).to_string();
    // Data begins at a multiple of 8.
    text.push_str(&" ".repeat(text.len().next_multiple_of(8) - text.len()));
    let mut file = File::create(folder.join("model.safetensors")).expect("a file");
    file.write_all(&(text.len() as u64).to_le_bytes())
        .and_then(|()| file.write_all(text.as_bytes()))
        .expect("a header");
    let mut rng = SimRng::new(1);
    let mut bytes = vec![0; 4 << 20];
    while at > 0 {
        let part = bytes.len().min(at as usize);
        bytes.chunks_exact_mut(8).for_each(|word| word.copy_from_slice(&rng.next_u64().to_le_bytes()));
        file.write_all(&bytes[..part]).expect("data");
        at -= part as u64;
    }
    file.sync_all().expect("data");
}

fn key(n: u64) -> Key {
    let mut rng = SimRng::new(n);
    let bytes: Vec<u8> = (0..4).flat_map(|_| rng.next_u64().to_le_bytes()).collect();
    Key::new(&bytes).expect("32 bytes")
}

/// Opens the store and does something in it; the pool is free again afterwards.
fn in_store<T>(pool: &Path, run: impl FnOnce(&Store, &View, &Arena) -> T) -> T {
    let pool = Pool::open(pool, &OpenOptions { ram_bytes: 0, ..OpenOptions::default() }).expect("the pool");
    let store = Store::open(&pool, StoreOptions::default()).expect("a store");
    let view = store.view(b"bench", BLOCK as u32, "").expect("a view");
    let options = ArenaOptions { prefault: true, ..ArenaOptions::default() };
    let arena = Arena::new(2 * BATCH * BLOCK, options).expect("memory");
    let done = run(&store, &view, &arena);
    drop(view);
    store.close().expect("closed");
    pool.close().expect("closed");
    done
}

fn buffers(arena: &Arena) -> Vec<Buffer> {
    (0..BATCH).map(|_| arena.alloc(BLOCK).expect("room")).collect()
}

fn fill(pool: &Path, blocks: u64) {
    in_store(pool, |store, view, arena| {
        let mut lane = store.lane(Some(arena)).expect("a lane");
        let mut spare = buffers(arena);
        let mut rng = SimRng::new(2);
        for first in (0..blocks).step_by(BATCH) {
            let numbers = first..(first + BATCH as u64).min(blocks);
            let mut puts = Vec::new();
            for n in numbers {
                let mut buffer = spare.pop().expect("a buffer");
                buffer
                    .chunks_exact_mut(8)
                    .for_each(|word| word.copy_from_slice(&rng.next_u64().to_le_bytes()));
                puts.push(Put { key: key(n), buffer, start: 0 });
            }
            for done in lane.put(view, puts).expect("puts") {
                assert!(matches!(done.result, Stored::New), "{:?}", done.result);
                spare.extend(done.buffer);
            }
        }
        store.flush().expect("a flush");
    });
}

/// Seconds from the first get to the last block, with an open store.
fn restore(pool: &Path, blocks: u64) -> f64 {
    in_store(pool, |store, view, arena| {
        let mut lane = store.lane(Some(arena)).expect("a lane");
        let mut spare = buffers(arena);
        let start = Instant::now();
        let mut next = 0;
        loop {
            let gets = (next..blocks)
                .zip(spare.drain(..))
                .map(|(n, buffer)| (n, Get { key: key(n), buffer, start: 0 }));
            let gets: Vec<(u64, Get)> = gets.collect();
            next += gets.len() as u64;
            lane.begin_gets(view, gets).expect("gets");
            let Some((_, done)) = lane.next_get().expect("gets") else { break };
            assert!(done.result.is_ok(), "{:?}", done.result);
            spare.extend(done.buffer);
        }
        start.elapsed().as_secs_f64()
    })
}

fn cold() {
    rustix::fs::sync();
    fs::write("/proc/sys/vm/drop_caches", "3").expect("root empties the page cache");
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}

fn main() {
    let args = args();
    let scratch = tempfile::Builder::new()
        .prefix("nvtier-test-plan-bench-")
        .tempdir_in(&args.dir)
        .expect("a directory");
    let program = std::env::var_os("NVTIER_BIN").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/release/nvtier"),
        PathBuf::from,
    );
    let nvtier = Nvtier { program, state: scratch.path().join("state") };
    let (model, pool) = (scratch.path().join("model"), scratch.path().join("pool"));
    checkpoint(&model, args.layers);
    Pool::format(&pool, &FormatOptions::default()).expect("a pool");
    let file = model.join("model.safetensors");
    let bytes = file.metadata().expect("a file").len();
    nvtier.run(&["import", "--pool"], &[&pool, &file, Path::new("model.safetensors")]);
    fs::remove_file(&file).expect("removed");
    // The plan needs the configuration alone.
    let session = args.layers * 2 * KV_HEADS * HEAD * 2 * CONTEXT;
    let blocks = session / BLOCK as u64;
    fill(&pool, blocks);
    println!(
        "checkpoint of {:.2} GB, KV cache of {CONTEXT} tokens: {:.2} GB in {blocks} blocks; {} rounds in turns below {}",
        bytes as f64 / 1e9,
        session as f64 / 1e9,
        args.rounds,
        args.dir.display()
    );
    let mut ratios = [Vec::new(), Vec::new(), Vec::new()];
    let measure_bytes = format!("{}MiB", args.measure_mib);
    let context = CONTEXT.to_string();
    for round in 0..args.rounds {
        let (ceilings, _) =
            nvtier.run(&["doctor", "--measure", "--measure-bytes", &measure_bytes], &[scratch.path()]);
        let mut words = vec!["plan", "--context", &context, "--path"];
        if args.device == "cpu" {
            words.splice(1..1, ["--gpu", "none"]);
        }
        let (plan, _) = nvtier.run(&words, &[scratch.path(), &model]);
        let seconds = |value: &Value| value["seconds"].as_f64().expect("a time");
        let planned_load = seconds(&plan["infer"]["load"]);
        let planned_restore = seconds(&plan["infer"]["first_token"]["load"]);
        cold();
        let words = ["load", "--device", &args.device, "model.safetensors", "--pool"];
        let (report, command_seconds) = nvtier.run(&words, &[&pool]);
        let load = seconds(&report["load"]);
        cold();
        let restored = restore(&pool, blocks);
        for (list, ratio) in ratios.iter_mut().zip([
            planned_load / load,
            planned_load / command_seconds,
            planned_restore / restored,
        ]) {
            list.push(ratio);
        }
        let rate =
            |name: &str| ceilings[name].as_f64().map_or("-".into(), |rate| format!("{:.2}", rate / 1e9));
        println!(
            "round {round}: ceilings, GB/s: drive {}, pool {}, memory {} (fresh {}) | load: planned {planned_load:.3} s, took {load:.3} s ({command_seconds:.3} s with its command) | restore: planned {planned_restore:.3} s, took {restored:.3} s",
            rate("drive_read"),
            rate("pool_read"),
            rate("memory_copy"),
            rate("memory_fresh"),
        );
    }
    for (what, list) in ["load", "load, whole command", "restore"].into_iter().zip(&ratios) {
        let (low, high) =
            list.iter().fold((f64::INFINITY, 0.0f64), |(l, h), value| (l.min(*value), h.max(*value)));
        println!("{what}: planned over measured, median {:.3} ({low:.3}..{high:.3})", median(list));
    }
}
