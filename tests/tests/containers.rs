//! dist/container/Containerfile and the units of dist/systemd, as far as they can be checked where no image can be fetched: what they name is there.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use nvtier_tests::{nvtier_path, run};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// Instructions and what follows them, lines that go on joined.
fn instructions() -> Vec<(String, String)> {
    let text = fs::read_to_string(root().join("dist/container/Containerfile")).unwrap();
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim_start().starts_with('#')).collect();
    let joined = lines.join("\n").replace("\\\n", " ");
    let split = joined.lines().filter_map(|line| line.trim().split_once(' '));
    split.map(|(word, rest)| (word.to_owned(), rest.trim().to_owned())).collect()
}

/// The words of one that is written as a JSON list.
fn list(of: &str) -> Vec<String> {
    let found = instructions().into_iter().rfind(|(word, _)| word == of);
    let (_, words) = found.unwrap_or_else(|| panic!("no {of}"));
    serde_json::from_str(&words).unwrap_or_else(|error| panic!("{of} {words}: {error}"))
}

fn help(words: &[String]) -> String {
    run(Command::new(nvtier_path()).args(words).arg("--help")).ok().stdout
}

#[test]
fn the_image_runs_commands_that_there_are_as_nobody_in_particular() {
    assert_eq!(list("ENTRYPOINT"), ["nvtier"]);
    // A flag or a command that is not there is an error of parsing.
    help(&list("CMD"));
    let users: Vec<String> =
        instructions().into_iter().filter(|(word, _)| word == "USER").map(|(_, user)| user).collect();
    assert!(users.len() == 1 && !["root", "0"].contains(&users[0].as_str()), "{users:?}");
    let made = instructions().iter().any(|(word, rest)| {
        word == "RUN" && rest.contains(&format!("useradd --uid 10001 --create-home {}", users[0]))
    });
    assert!(made, "nobody makes the user {users:?}");
    for (_, setting) in
        instructions().iter().filter(|(word, rest)| word == "ENV" && rest.starts_with("NVTIER_"))
    {
        let name = setting.split('=').next().unwrap();
        assert!(help(&["info".to_owned()]).contains(name), "no command knows {name}");
    }
}

#[test]
fn the_image_is_made_of_what_the_repository_has() {
    let toolchain = fs::read_to_string(root().join("Cargo.toml")).unwrap();
    let version =
        toolchain.lines().find_map(|line| line.strip_prefix("rust-version = ")).unwrap().trim_matches('"');
    let all = instructions();
    let has = |word: &str, part: &str| all.iter().any(|(name, rest)| name == word && rest.contains(part));
    assert!(
        has("ARG", &format!("RUST=rust:{version}-")),
        "the Rust of the image is not that of Cargo.toml, {version}"
    );
    assert!(has("RUN", "cargo build --release --locked --package nvtier"));
    assert!(root().join("Cargo.lock").is_file(), "--locked needs it");
    for (_, rest) in all.iter().filter(|(word, rest)| word == "COPY" && rest.starts_with("--from=build")) {
        let words: Vec<&str> = rest.split_whitespace().skip(1).collect();
        for source in &words[..words.len() - 1] {
            let inside = source.strip_prefix("/src/").unwrap();
            // What the build makes: named after the program.
            let made = inside == "target/release/nvtier";
            assert!(made || root().join(inside).is_file(), "{inside} is not in the repository");
        }
    }
    let ignored = fs::read_to_string(root().join(".dockerignore")).unwrap();
    for line in ignored.lines().filter(|line| !line.starts_with('#')) {
        let tracked = Command::new("git")
            .arg("-C")
            .arg(root())
            .args(["ls-files", "--"])
            .arg(line.trim_start_matches('/'))
            .output();
        let tracked =
            tracked.map(|ran| String::from_utf8_lossy(&ran.stdout).into_owned()).unwrap_or_default();
        assert!(tracked.is_empty(), "{line} would leave out {tracked}");
    }
}

/// Words of the commands of all units: each is one that `nvtier` takes.
#[test]
fn units_call_the_command_as_it_is() {
    let mut seen = 0;
    for name in ["nvtier@.service", "nvtier-pool.service.in"] {
        let text = fs::read_to_string(root().join("dist/systemd").join(name)).unwrap();
        for line in text.lines().filter(|line| line.starts_with("Exec")) {
            let words =
                line.split_whitespace().skip(1).filter(|word| !word.contains(['$', '@']) && *word != "--");
            help(&words.map(str::to_owned).collect::<Vec<_>>());
            seen += 1;
        }
    }
    assert_eq!(seen, 4);
    let options = fs::read_to_string(root().join("dist/systemd/nvtier@.service")).unwrap();
    let example = options.lines().find_map(|line| line.strip_prefix("#   OPTIONS=")).unwrap();
    help(&[vec!["mount".to_owned()], example.split(' ').map(str::to_owned).collect()].concat());
}
