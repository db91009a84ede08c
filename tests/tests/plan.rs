//! `nvtier plan`, and `nvtier doctor --measure`, whose figures it uses.

use std::fs;
use std::path::Path;
use std::process::Command;

use nvtier_tests::{Ran, nvtier_path, run, scratch};
use serde_json::{Value, json};

/// `nvtier plan` for a machine that is given, not this one's.
fn plan(words: &[&str]) -> Ran {
    let mut command = Command::new(nvtier_path());
    command.arg("plan").args(words);
    for (option, value) in [("--gpu", "none"), ("--ram", "64GB"), ("--drive", "gen4:2TB")] {
        if !words.contains(&option) {
            command.args([option, value]);
        }
    }
    run(&mut command)
}

fn config() -> Value {
    json!({
        "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 128, "vocab_size": 100, "dtype": "bfloat16",
    })
}

/// The tensors of that configuration, as a safetensors file of zeros.
fn tensors(skip: &str) -> Vec<u8> {
    let mut shapes = vec![
        ("model.embed_tokens.weight".to_owned(), vec![100, 64]),
        ("lm_head.weight".into(), vec![100, 64]),
    ];
    shapes.push(("model.norm.weight".into(), vec![64]));
    for layer in 0..2 {
        for (name, shape) in [
            ("input_layernorm", vec![64]),
            ("post_attention_layernorm", vec![64]),
            ("self_attn.q_proj", vec![64, 64]),
            ("self_attn.k_proj", vec![32, 64]),
            ("self_attn.v_proj", vec![32, 64]),
            ("self_attn.o_proj", vec![64, 64]),
            ("mlp.gate_proj", vec![128, 64]),
            ("mlp.up_proj", vec![128, 64]),
            ("mlp.down_proj", vec![64, 128]),
        ] {
            shapes.push((format!("model.layers.{layer}.{name}.weight"), shape));
        }
    }
    let mut header = serde_json::Map::new();
    let mut at = 0u64;
    for (name, shape) in shapes.into_iter().filter(|(name, _)| skip.is_empty() || !name.contains(skip)) {
        let bytes = 2 * shape.iter().product::<u64>();
        header.insert(name, json!({ "dtype": "BF16", "shape": shape, "data_offsets": [at, at + bytes] }));
        at += bytes;
    }
    let header = Value::Object(header).to_string();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.resize(file.len() + at as usize, 0);
    file
}

const PARAMETERS: u64 = 2 * 6400 + 64 + 2 * (2 * 64 + 2 * 4096 + 2 * 2048 + 3 * 8192);

#[test]
fn a_model_by_name_on_a_machine_that_is_given() {
    let words =
        ["Llama-3.1-8B", "--gpu", "RTX 4090", "--context", "32768", "--batch", "2", "--sessions", "50"];
    let ran = plan(&[&words[..], &["--json"]].concat());
    assert_eq!(ran.code, 0, "{ran:#?}");
    let json = ran.json();
    let model = &json["model"];
    assert_eq!(
        (model["parameters"].as_u64(), model["exactness"].as_str()),
        (Some(8_030_261_248), Some("exact"))
    );
    assert_eq!(model["weights_bytes"], 2 * 8_030_261_248u64);
    assert_eq!(model["kv"]["bytes_per_token"], 131_072);
    assert_eq!(model["kv"]["bytes_per_session"], 32_768u64 * 131_072);
    let needs = &json["needs"];
    assert_eq!(needs["nvme_bytes"], 2 * 8_030_261_248u64 + 50 * 32_768 * 131_072);
    // What is placed is what there is, part by part.
    for part in json["parts"].as_array().unwrap() {
        let tiers = ["vram", "ram", "nvme"].map(|tier| part[tier].as_u64().unwrap());
        assert_eq!(tiers.iter().sum::<u64>(), part["bytes"].as_u64().unwrap(), "{part}");
    }
    let vram: u64 = json["parts"].as_array().unwrap().iter().map(|part| part["vram"].as_u64().unwrap()).sum();
    assert!(vram <= 24_000_000_000 && json["fits"] == true);
    // The best of both is no slower than either.
    let first = &json["infer"]["first_token"];
    let [compute, load] = ["compute", "load"].map(|way| first[way]["seconds"].as_f64().unwrap());
    assert!(first["both_seconds"].as_f64().unwrap() <= compute.min(load) * 1.001, "{first}");
    assert!(json["infer"]["tokens_per_second"].as_f64().unwrap() > 0.0);
    let resident = json["limits"]["context_resident"].as_u64().unwrap();
    assert!(
        (1..32_768).contains(&resident),
        "two such sequences and the weights do not fit 24 GB: {resident}"
    );
    assert!(!json["buy"].as_array().unwrap().is_empty());

    let text = plan(&words).ok().stdout;
    for word in ["8030261248 parameters", "131.1 kB a token", "RTX 4090", "bound by", "what would help"] {
        assert!(text.contains(word), "{word:?} is not in\n{text}");
    }
}

#[test]
fn training_names_what_binds_and_what_it_wears() {
    let words = [
        "Llama-3.1-8B",
        "--task",
        "finetune",
        "--gpu",
        "RTX 4090",
        "--context",
        "2048",
        "--micro-batches",
        "8",
        "--json",
    ];
    let json = plan(&words).json();
    let step = &json["train"];
    assert_eq!(step["trained_parameters"], 8_030_261_248u64);
    assert_eq!(step["time"]["bound"], "drives", "{step}");
    let read = step["read_bytes"].as_f64().unwrap() / 7e9 + step["write_bytes"].as_f64().unwrap() / 5e9;
    assert!((step["time"]["seconds"].as_f64().unwrap() - read).abs() < 0.01, "{step}");
    let steps = json["wear"]["steps"].as_f64().unwrap();
    assert!((steps - 1.2e15 / step["write_bytes"].as_f64().unwrap()).abs() < 1.0, "{json}");
    // Adapters write nothing but what does not fit elsewhere.
    let lora = ["Llama-3.1-8B", "--task", "lora", "--gpu", "RTX 4090", "--precision", "nf4", "--json"];
    let json = plan(&lora).json();
    assert_eq!(
        (json["train"]["write_bytes"].as_u64(), json["fits"].as_bool()),
        (Some(0), Some(true)),
        "{json}"
    );
}

#[test]
fn what_does_not_fit_is_told_by_the_exit_code_too() {
    let words = ["Llama-3.1-405B", "--drive", "gen4:200GB", "--json"];
    let ran = plan(&words);
    assert_eq!(ran.code, 6, "{ran:#?}");
    let json = ran.json();
    assert_eq!(json["fits"], false);
    assert!(json["short_nvme_bytes"].as_u64().unwrap() > 600_000_000_000, "{json}");
    let ran = plan(&["Llama-3.1-405B", "--drive", "gen4:200GB"]);
    assert!(ran.code == 6 && ran.stdout.contains("fits        NO"), "{ran:#?}");
}

#[test]
fn files_are_counted_by_their_headers() {
    let folder = scratch();
    let path = |name: &str| folder.path().join(name);
    fs::create_dir_all(path("m")).unwrap();
    fs::write(path("m/config.json"), config().to_string()).unwrap();
    let of = |path: &Path| plan(&[path.to_str().unwrap(), "--json"]).ok().json()["model"].clone();
    let by_config = of(&path("m/config.json"));
    assert_eq!((by_config["parameters"].as_u64(), by_config["name"].as_str()), (Some(PARAMETERS), Some("m")));
    fs::write(path("m/model.safetensors"), tensors("")).unwrap();
    fs::write(path("m/consolidated.safetensors"), tensors("")).unwrap();
    let snapshot = of(&path("m"));
    assert_eq!(snapshot["stored"]["bytes"], 2 * PARAMETERS, "the same weights twice count once");
    assert_eq!(
        (snapshot["parameters"].as_u64(), snapshot["exactness"].as_str()),
        (Some(PARAMETERS), Some("exact"))
    );
    // Alone, without a configuration.
    fs::write(path("alone.safetensors"), tensors("")).unwrap();
    let alone = of(&path("alone.safetensors"));
    assert_eq!(
        (alone["parameters"].as_u64(), alone["exactness"].as_str()),
        (Some(PARAMETERS), Some("files"))
    );
    assert_eq!(alone["kv"], by_config["kv"]);

    // One file of several is not the model.
    fs::write(path("m/model.safetensors"), tensors("layers.1")).unwrap();
    plan(&[path("m").to_str().unwrap()]).refused(2, &["parameters of the", "all files"]);
}

#[test]
fn bad_input_is_refused_with_a_reason() {
    let folder = scratch();
    let file = |name: &str, bytes: &[u8]| {
        let path = folder.path().join(name);
        fs::write(&path, bytes).unwrap();
        path.to_str().unwrap().to_owned()
    };
    plan(&["Llama-9-1B"]).refused(3, &["no such path", "--list"]);
    plan(&[folder.path().to_str().unwrap()]).refused(2, &["neither a config.json"]);
    plan(&[&file("config.json", b"{")]).refused(2, &["not JSON"]);
    plan(&[&file("empty.safetensors", b"")]).refused(2, &["empty"]);
    plan(&[&file("cut.safetensors", &tensors("")[..500])]).refused(2, &["cut.safetensors"]);
    plan(&[&file("notes.txt", b"hello")]).refused(2, &["neither"]);
    let mut absurd = config();
    absurd["num_hidden_layers"] = json!(1_000_000);
    plan(&[&file("absurd.json", absurd.to_string().as_bytes())]).refused(2, &["layers"]);
    plan(&["phi-4", "--gpu", "Voodoo 2"]).refused(2, &["Voodoo 2", "--list"]);
    plan(&["phi-4", "--precision", "q9"]).refused(2, &["q9", "bf16"]);
    plan(&["phi-4", "--kv-precision", "q9"]).refused(2, &["q9", "fp8"]);
    plan(&["phi-4", "--drive", "gen4"]).refused(2, &["no size"]);
    plan(&["phi-4", "--vram", "24GB"]).refused(2, &["there is none"]);
    plan(&["phi-4", "--context", "0"]).refused(2, &["--context"]);
    plan(&["phi-4", "--hours-per-day", "25"]).refused(2, &["24 hours"]);
    let missing = run(Command::new(nvtier_path()).arg("plan"));
    missing.refused(2, &["MODEL"]);
}

#[test]
fn what_is_measured_is_what_is_planned_with() {
    let folder = scratch();
    let state = folder.path().join("state");
    let place = folder.path().join("drive");
    fs::create_dir(&place).unwrap();
    let nvtier = |words: &[&str]| {
        run(Command::new(nvtier_path()).args(words).arg("--json").env("XDG_STATE_HOME", &state))
    };
    let drive = |ran: &Ran| ran.json()["machine"]["drives"][0].clone();
    let planned = ["plan", "phi-4", "--gpu", "none", "--ram", "1TB", "--path", place.to_str().unwrap()];
    let before = nvtier(&planned);
    assert_eq!(drive(&before)["read"]["origin"], "nominal");
    assert!(before.json()["notes"].to_string().contains("doctor --measure"));

    let measured =
        nvtier(&["doctor", "--measure", "--measure-bytes", "64MiB", place.to_str().unwrap()]).ok().json();
    for rate in ["drive_read", "drive_write", "pool_read", "memory_copy", "memory_fresh"] {
        assert!(measured[rate].as_f64().is_some_and(|rate| rate > 0.0), "{rate}: {measured}");
    }
    assert_eq!(measured["written_bytes"], 2 * (64u64 << 20));
    let mount = measured["mount_read"].as_f64().is_some_and(|rate| rate > 0.0);
    assert!(mount || measured["skipped"].to_string().contains("mount"), "{measured}");
    assert_eq!(fs::read_dir(&place).unwrap().count(), 0, "it left something behind");

    let after = drive(&nvtier(&planned));
    assert_eq!(after["read"]["origin"], "measured");
    let measured = |rate: &str| measured[rate].as_f64().unwrap();
    let saved = measured("drive_read").min(measured("pool_read"));
    assert!((after["read"]["value"].as_f64().unwrap() / saved - 1.0).abs() < 1e-9, "{after} is not {saved}");
    // Without a GPU a plan says how long loading into memory takes: what the slower of drive, engine and memory needs.
    let loaded = nvtier(&planned).json();
    let parts = loaded["parts"].as_array().unwrap();
    let weights: f64 = parts
        .iter()
        .filter(|part| part["name"].as_str().unwrap().starts_with("weights"))
        .map(|part| part["ram"].as_f64().unwrap())
        .sum();
    let copies = loaded["machine"]["ram_copy"]["value"].as_f64().unwrap();
    let wanted = weights / saved.min(copies);
    let load = loaded["infer"]["load"]["seconds"].as_f64().unwrap();
    assert!(weights > 1e9 && (load / wanted - 1.0).abs() < 1e-6, "{load} s is not {wanted} s: {loaded}");
    assert!(loaded["infer"]["first_token"]["load"]["seconds"].as_f64().unwrap() > 0.0, "{loaded}");

    let ran = nvtier(&["doctor", "--measure", "--measure-bytes", "1MiB", place.to_str().unwrap()]);
    ran.refused(2, &["at least 64.0 MiB"]);
    nvtier(&["doctor", "--measure", "/proc"]).refused_somehow(&["/proc"]);
}
