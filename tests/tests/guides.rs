//! The commands of README and docs/guides are run as they stand there, or at least parsed.
//!
//! A comment before a code block of a shell, of Python, Rust, TOML or YAML says which:
//!
//! ```text
//! <!-- run -->                                     the blocks of a page, in order, in one folder
//! <!-- run, but for lines with: WORD | WORD -->    a line that has one of these is left out
//! <!-- not run: why -->
//! ```
//!
//! Whatever is run or not, each `nvtier ...` in a shell block has to parse, and flags and commands named in the text have to exist.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use nvtier_tests::{Mounted, nvtier_path, pattern, run, scratch};

/// A fenced block.
#[derive(Debug)]
struct Block {
    page: String,
    line: usize,
    language: String,
    marker: String,
    text: String,
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// README and all guides: name and text.
fn pages() -> Vec<(String, String)> {
    let mut names = vec!["README.md".to_owned()];
    let guides = fs::read_dir(root().join("docs/guides")).unwrap().flatten();
    names.extend(guides.map(|entry| format!("docs/guides/{}", entry.file_name().to_str().unwrap())));
    names.sort();
    names.into_iter().map(|name| (name.clone(), fs::read_to_string(root().join(&name)).unwrap())).collect()
}

fn blocks(page: &str, text: &str) -> Vec<Block> {
    let mut found = Vec::new();
    let mut before = "";
    let mut lines = text.lines().enumerate();
    while let Some((number, line)) = lines.next() {
        if let Some(language) = line.strip_prefix("```") {
            let inside: Vec<&str> =
                lines.by_ref().map(|(_, line)| line).take_while(|line| *line != "```").collect();
            let marker =
                before.strip_prefix("<!-- ").and_then(|rest| rest.strip_suffix(" -->")).unwrap_or("");
            found.push(Block {
                page: page.to_owned(),
                line: number + 1,
                language: language.to_owned(),
                marker: marker.to_owned(),
                text: inside.join("\n"),
            });
        }
        before = line;
    }
    found
}

impl Block {
    fn at(&self) -> String {
        format!("{}:{}", self.page, self.line)
    }

    /// The lines to run; `None`: not to be run.
    fn to_run(&self) -> Option<String> {
        let rest = self.marker.strip_prefix("run")?;
        let without: Vec<&str> = rest
            .strip_prefix(", but for lines with: ")
            .map(|words| words.split(" | ").collect())
            .unwrap_or_default();
        for word in &without {
            assert!(self.text.contains(word), "{}: no line has {word:?}", self.at());
        }
        let lines = self.text.lines().filter(|line| !without.iter().any(|word| line.contains(word)));
        Some(lines.collect::<Vec<_>>().join("\n"))
    }
}

#[test]
fn every_block_says_whether_it_is_run() {
    for (page, text) in pages() {
        for block in blocks(&page, &text) {
            if block.language.is_empty() {
                continue; // what a command printed, a diagram
            }
            let marker = &block.marker;
            let fine = marker == "run"
                || marker.starts_with("run, but for lines with: ")
                || marker.strip_prefix("not run: ").is_some_and(|why| why.len() > 10);
            assert!(
                fine,
                "{}: the block of {} has no marker (tests/tests/guides.rs): {marker:?}",
                block.at(),
                block.language
            );
        }
        let indented = text.lines().zip(text.lines().skip(1)).find(|(above, line)| {
            above.is_empty() && (line.starts_with("    nvtier") || line.starts_with("    cargo"))
        });
        assert!(indented.is_none(), "{page}: commands go into fenced blocks: {indented:?}");
    }
}

/// Words of a line as a shell makes them, up to a comment; parts of `a && b`, `a; b` and `a | b` apart.
fn commands(text: &str) -> Vec<Vec<String>> {
    let mut all = vec![Vec::new()];
    let mut word: Option<String> = None;
    let mut quote = None;
    let joined = text.replace("\\\n", " ");
    let mut chars = joined.chars().peekable();
    while let Some(c) = chars.next() {
        match (quote, c) {
            (Some(end), c) if c == end => quote = None,
            (Some(_), c) => word.get_or_insert_default().push(c),
            (None, '\'' | '"') => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            (None, '#') if word.is_none() => while chars.next_if(|c| *c != '\n').is_some() {},
            // `a|b` in a text stands for a choice.
            (None, '|') if word.is_some() => word.get_or_insert_default().push(c),
            (None, ' ' | '\n' | ';' | '|' | '&' | '>') => {
                all.last_mut().unwrap().extend(word.take());
                if c != ' ' {
                    all.push(Vec::new());
                }
            }
            (None, c) => word.get_or_insert_default().push(c),
        }
    }
    all.last_mut().unwrap().extend(word);
    all.retain(|words| !words.is_empty());
    all
}

/// What the command says to these arguments, without doing anything: `--help` ends the parsing where it is met.
fn parsed(words: &[String]) -> (bool, String) {
    let mut args: Vec<&str> = words.iter().map(String::as_str).collect();
    let end = args.iter().position(|word| *word == "--").unwrap_or(args.len());
    args.insert(end, "--help");
    let ran = run(Command::new(nvtier_path()).args(&args));
    assert!(!ran.stderr.contains("panicked"), "{words:?}: {ran:#?}");
    (ran.code == 0, ran.stderr)
}

#[test]
fn every_command_in_a_block_parses() {
    let mut count = 0;
    for (page, text) in pages() {
        for block in blocks(&page, &text).iter().filter(|block| block.language == "sh") {
            for words in commands(&block.text) {
                // Also behind variables, and behind `docker run ... IMAGE`.
                let Some(at) = words.iter().position(|word| word == "nvtier") else { continue };
                let ours = at == 0 || words[at - 1].contains('=') || words[at - 1] == "IMAGE";
                if !ours {
                    continue;
                }
                let (fine, said) = parsed(&words[at + 1..]);
                assert!(fine, "{}: {words:?}\n{said}", block.at());
                count += 1;
            }
        }
    }
    assert!(count > 60, "only {count} commands were found");
}

#[test]
fn commands_and_flags_in_the_text_exist() {
    let mut count = 0;
    for (page, text) in pages() {
        // Code spans: every second piece between backticks, blocks left out.
        let outside: Vec<&str> = text.split("```").step_by(2).collect();
        for span in outside.join(" ").split('`').skip(1).step_by(2) {
            let span = span.replace('\n', " ");
            let Some(rest) = span.strip_prefix("nvtier ") else { continue };
            if rest.contains("COMMAND") {
                continue; // a word for any
            }
            for words in commands(rest) {
                let (_, said) = parsed(&words);
                let unknown =
                    said.contains("unexpected argument") || said.contains("unrecognized subcommand");
                assert!(!unknown, "{page}: `{span}`\n{said}");
                count += 1;
            }
        }
    }
    assert!(count > 60, "only {count} commands were found");
}

/// Of the model that readers are taken to have: a llama with two layers.
const CONFIG: &str = r#"{"model_type":"llama","architectures":["LlamaForCausalLM"],"hidden_size":64,"intermediate_size":128,"num_hidden_layers":2,"num_attention_heads":4,"num_key_value_heads":2,"vocab_size":1024,"max_position_embeddings":2048,"torch_dtype":"bfloat16","tie_word_embeddings":false}"#;

/// A safetensors file with the tensors that [`CONFIG`] describes.
fn safetensors() -> Vec<u8> {
    let mut shapes = vec![
        ("model.embed_tokens.weight".to_owned(), vec![1024, 64]),
        ("model.norm.weight".to_owned(), vec![64]),
        ("lm_head.weight".to_owned(), vec![1024, 64]),
    ];
    for layer in 0..2 {
        let mut add = |name: &str, shape: &[usize]| {
            shapes.push((format!("model.layers.{layer}.{name}.weight"), shape.to_vec()))
        };
        add("input_layernorm", &[64]);
        add("post_attention_layernorm", &[64]);
        add("self_attn.q_proj", &[64, 64]);
        add("self_attn.k_proj", &[32, 64]);
        add("self_attn.v_proj", &[32, 64]);
        add("self_attn.o_proj", &[64, 64]);
        add("mlp.gate_proj", &[128, 64]);
        add("mlp.up_proj", &[128, 64]);
        add("mlp.down_proj", &[64, 128]);
    }
    let mut header = serde_json::Map::new();
    let mut end = 0;
    for (name, shape) in shapes {
        let start = end;
        end += 2 * shape.iter().product::<usize>();
        header.insert(
            name,
            serde_json::json!({ "dtype": "BF16", "shape": shape, "data_offsets": [start, end] }),
        );
    }
    let header = serde_json::Value::Object(header).to_string();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.extend(pattern(1, end));
    file
}

/// A GGUF file (version 3) with one tensor of F32.
fn gguf(values: usize) -> Vec<u8> {
    let mut file = b"GGUF".to_vec();
    file.extend(3u32.to_le_bytes());
    file.extend(1u64.to_le_bytes());
    file.extend(0u64.to_le_bytes());
    file.extend(1u64.to_le_bytes());
    file.push(b'w');
    file.extend(1u32.to_le_bytes());
    file.extend((values as u64).to_le_bytes());
    file.extend(0u32.to_le_bytes());
    file.extend(0u64.to_le_bytes());
    file.resize(file.len().next_multiple_of(32), 0);
    file.extend(pattern(2, values * 4));
    file
}

/// What the guides' readers are taken to have: a home with a snapshot, drives below /mnt, a bucket, a checkpoint.
fn reader() -> tempfile::TempDir {
    let folder = scratch();
    let at = |path: &str| folder.path().join(path);
    for snapshot in
        ["home/.cache/huggingface/hub/models--ORG--MODEL/snapshots/REV", "home/models/m", "work/checkpoint"]
    {
        fs::create_dir_all(at(snapshot)).unwrap();
        fs::write(at(snapshot).join("config.json"), CONFIG).unwrap();
        fs::write(at(snapshot).join("model.safetensors"), safetensors()).unwrap();
    }
    for directory in ["mnt/nvme0", "mnt/nvme", "bucket", "tmp"] {
        fs::create_dir_all(at(directory)).unwrap();
    }
    fs::write(at("bucket/model.gguf"), gguf(2 << 20)).unwrap();
    folder
}

#[test]
fn the_blocks_that_can_be_run_are_run() {
    let mut count = 0;
    for (page, text) in pages() {
        let all = blocks(&page, &text);
        let runnable: Vec<(&Block, String)> =
            all.iter().filter_map(|block| Some((block, block.to_run()?))).collect();
        if runnable.is_empty() {
            continue;
        }
        let folder = reader();
        let base = folder.path().to_str().unwrap().to_owned();
        // Unmounts what a page, or a failure, leaves mounted.
        let _mounted =
            Mounted::over(folder.path().join("mnt/nvme0/pool"), folder.path().join("mnt/models"), folder);
        for (block, text) in runnable {
            count += 1;
            if block.language == "toml" {
                configuration(block, &text, &base);
                continue;
            }
            assert_eq!(block.language, "sh", "{}: nobody knows how to run that", block.at());
            let text = text
                .replace("/mnt/", &format!("{base}/mnt/"))
                .replace("s3://bucket/", &format!("{base}/bucket/"));
            // Doctor's code 8 is a verdict on this machine, not on the guide.
            let script = format!(
                "set -euo pipefail\nnvtier() {{ local code=0; '{}' \"$@\" || code=$?; [ $code = 8 ] || return $code; }}\n{text}\n",
                nvtier_path().display()
            );
            let mut command = Command::new("bash");
            command.args(["-c", &script]).current_dir(Path::new(&base).join("work"));
            command.env("HOME", format!("{base}/home")).env("XDG_RUNTIME_DIR", format!("{base}/tmp"));
            for variable in
                ["XDG_CONFIG_HOME", "XDG_STATE_HOME", "XDG_CACHE_HOME", "NVTIER_POOL", "NVTIER_CONFIG"]
            {
                command.env_remove(variable);
            }
            let ran = run(&mut command);
            assert_eq!(ran.code, 0, "{} does not do what it says\n{text}\n{ran:#?}", block.at());
        }
    }
    assert!(count >= 8, "only {count} blocks were run");
}

/// A configuration file is one that the command takes.
fn configuration(block: &Block, text: &str, base: &str) {
    let file = Path::new(base).join("config.toml");
    fs::write(&file, text).unwrap();
    let ran =
        run(Command::new(nvtier_path()).args(["ls", "--pool", "/nonexistent"]).env("NVTIER_CONFIG", &file));
    assert_eq!(ran.code, 3, "{}: {ran:#?}", block.at());
}

#[test]
fn the_shell_words_are_a_shells() {
    let text = "A=1 nvtier a 'b c' \\\n  --d \"e;f\" # no\nnvtier g && x; y | z > f";
    let words: Vec<String> = commands(text).iter().map(|words| words.join("_")).collect();
    assert_eq!(words, ["A=1_nvtier_a_b c_--d_e;f", "nvtier_g", "x", "y", "z", "f"]);
}

/// Troubleshooting has a line for every exit code and every kind that the sources have.
#[test]
fn every_code_and_kind_is_explained() {
    let page = fs::read_to_string(root().join("docs/guides/troubleshooting.md")).unwrap();
    let read = |path: &str| fs::read_to_string(root().join(path)).unwrap();
    let failure = read("tools/src/failure.rs");
    let codes: Vec<&str> = failure
        .lines()
        .filter_map(|line| line.trim().strip_prefix("pub const ")?.split_once("u8 = ")?.1.strip_suffix(';'))
        .collect();
    assert!(codes.len() >= 9, "{codes:?}");
    for code in codes {
        assert!(page.contains(&format!("| {code} |")), "exit code {code} is not in the page");
    }
    let mut kinds = Vec::new();
    for path in ["engine/src/error.rs", "nvme/src/error.rs", "gpudirect/src/error.rs", "fuse-fs/src/error.rs"]
    {
        let text = read(path);
        let body = text.split_once("pub enum ErrorKind {").unwrap().1.split_once("\n}").unwrap().0;
        let names = body
            .lines()
            .filter_map(|line| line.trim().strip_suffix(','))
            .filter(|name| name.chars().all(char::is_alphanumeric));
        kinds.extend(names.map(str::to_owned));
    }
    let mut folders = vec![root().join("tools/src")];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap().flatten() {
            let path = entry.path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let text = fs::read_to_string(&path).unwrap();
            for call in text.split("::new(").skip(1) {
                // `code::BUSY, "Busy"`: the second argument.
                let Some((code, rest)) = call.split_once(", \"").or_else(|| call.split_once(",\n")) else {
                    continue;
                };
                if code.trim().starts_with("code::") || code.trim().starts_with("crate::failure::code::") {
                    let kind = rest.trim().trim_start_matches('"').split('"').next().unwrap_or("");
                    if kind.chars().all(char::is_alphanumeric) {
                        kinds.push(kind.to_owned());
                    }
                }
            }
        }
    }
    kinds.retain(|kind| !kind.is_empty() && kind != "Engine"); // it stands for the pool's own kinds
    assert!(kinds.len() > 60, "{kinds:?}");
    for kind in kinds {
        assert!(page.contains(&format!("`{kind}`")), "the kind {kind} is not in the page");
    }
}
