//! `nvtier report`: what is in it, and above all what is not.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use nvtier_tests::{Kind, Mounted, Ran, nvtier_path, run, scratch};

/// What must never be in a bundle, with where it is planted.
const SECRETS: [&str; 9] = [
    "AKIAQ3EGRZZ7PLANTED1",
    "pL4nted/SecretKey+of40characters/AAAA9zz",
    "planted-session-token-0001",
    "planted-bearer-token-0002",
    "planted-url-password",
    "planted-url-user",
    "hf_PlantedTokenOfHuggingFace0003",
    "planted config password",
    "planted-signature-0004",
];

struct Planted {
    folder: tempfile::TempDir,
}

impl Planted {
    fn new() -> Planted {
        let folder = scratch();
        let home = folder.path().join("home/plantedname");
        fs::create_dir_all(home.join(".config/nvtier")).unwrap();
        fs::create_dir_all(folder.path().join("run")).unwrap();
        // Comments too: people park things there.
        let config = "pool = '/nonexistent/pool'\n# https://planted-url-user:planted-url-password@host.example/x?sig=planted-signature-0004\n# Authorization: Bearer planted-bearer-token-0002\n# password = \"planted config password\"\n# AKIAQ3EGRZZ7PLANTED1 pL4nted/SecretKey+of40characters/AAAA9zz\n[mount]\nram = '64MiB'\n";
        fs::write(home.join(".config/nvtier/config.toml"), config).unwrap();
        Planted { folder }
    }

    fn command(&self, args: &[&str]) -> Command {
        let home = self.folder.path().join("home/plantedname");
        let mut command = Command::new(nvtier_path());
        command.arg("report").args(args).current_dir(self.folder.path());
        command
            .env("HOME", &home)
            .env("USER", "plantedname")
            .env_remove("LOGNAME")
            .env_remove("XDG_CONFIG_HOME")
            .env_remove("NVTIER_CONFIG")
            .env_remove("NVTIER_POOL")
            .env("XDG_RUNTIME_DIR", self.folder.path().join("run"))
            .env("AWS_ACCESS_KEY_ID", "AKIAQ3EGRZZ7PLANTED1")
            .env("AWS_SECRET_ACCESS_KEY", "pL4nted/SecretKey+of40characters/AAAA9zz")
            .env("AWS_SESSION_TOKEN", "planted-session-token-0001")
            .env("HF_TOKEN", "hf_PlantedTokenOfHuggingFace0003")
            .env("MY_BEARER", "planted-bearer-token-0002")
            .env("AWS_ENDPOINT_URL", "https://planted-url-user:planted-url-password@minio.example:9000/")
            .env("HTTPS_PROXY", "http://planted-url-user:planted-url-password@proxy.example:3128")
            .env("NVTIER_LOG", "info");
        command
    }

    fn run(&self, args: &[&str]) -> Ran {
        run(&mut self.command(args))
    }
}

#[track_caller]
fn has_none(text: &str, words: &[&str]) {
    for word in words {
        let found = text.lines().find(|line| line.contains(word));
        assert!(found.is_none(), "{word} is in the report: {found:?}");
    }
}

#[test]
fn no_secret_and_no_user_is_in_it() {
    let planted = Planted::new();
    // A daemon's log that says too much.
    let log = planted.folder.path().join("run/nvtier/mnt-x.log");
    fs::create_dir_all(log.parent().unwrap()).unwrap();
    fs::set_permissions(log.parent().unwrap(), fs::Permissions::from_mode(0o700)).unwrap();
    let lines = [
        "INFO get https://planted-url-user:planted-url-password@host.example/f?X-Amz-Signature=planted-signature-0004",
        "WARN header authorization: Bearer planted-bearer-token-0002",
        "WARN secret_access_key=pL4nted/SecretKey+of40characters/AAAA9zz token: planted-session-token-0001",
        "ERROR read `models/hidden-name.gguf` path=\"other/hidden-name.bin\" of /home/elsewhere, plantedname's",
        "INFO this line helps",
    ];
    fs::write(&log, lines.join("\n")).unwrap();
    let ran = planted.run(&["-o", "r.json"]).ok();
    let file = planted.folder.path().join("r.json");
    let text = fs::read_to_string(&file).unwrap();
    has_none(&text, &SECRETS);
    has_none(&text, &["plantedname", "hidden-name"]);
    has_none(&ran.stdout, &SECRETS);
    // And with names: still no secret.
    planted.run(&["--names", "-o", "names.json"]).ok();
    let with_names = fs::read_to_string(planted.folder.path().join("names.json")).unwrap();
    has_none(&with_names, &SECRETS);
    has_none(&with_names, &["plantedname"]);
    assert!(with_names.contains("models/hidden-name.gguf"), "{with_names}");

    // What helps is there.
    let report: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(report["version"]["version"], env!("CARGO_PKG_VERSION"));
    assert!(report["doctor"]["findings"].as_array().unwrap().len() > 10);
    assert_eq!(report["environment"]["NVTIER_LOG"], "info");
    assert_eq!(report["environment"]["AWS_ENDPOINT_URL"], "https://<redacted>@minio.example:9000/");
    assert!(report["environment"].get("HF_TOKEN").is_none() && report["environment"].get("HOME").is_none());
    let config = report["configuration"]["text"].to_string();
    assert!(config.contains("ram = '64MiB'") && config.contains("host.example"), "{config}");
    assert!(report["logs"].to_string().contains("this line helps"), "{:#}", report["logs"]);
    assert!(
        report["pools"][0]["unavailable"].as_str().unwrap().contains("/nonexistent/pool"),
        "{:#}",
        report["pools"]
    );
    assert!(report["kernel"].is_array() || report["kernel"]["unavailable"].is_string());
    assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);

    planted.run(&["-o", "r.json"]).refused(1, &["r.json", "exists"]);
    planted.run(&["-o", "no/such/folder/r.json"]).refused(3, &["no/such/folder"]);
    let printed = planted.run(&["-o", "-"]).ok();
    has_none(&printed.stdout, &SECRETS);
    assert_eq!(printed.json()["report"], 1);
}

#[test]
fn a_mounted_pool_is_in_it_without_its_names() {
    let mounted = Mounted::new(Kind::Directory, &[]);
    fs::create_dir(mounted.point.join("hidden-directory")).unwrap();
    fs::write(mounted.point.join("hidden-directory/hidden-file.gguf"), "x").unwrap();
    let planted = Planted::new();
    let pool = mounted.pool.to_str().unwrap();
    planted.run(&["--pool", pool, "-o", "r.json"]).ok();
    let read = |name: &str| fs::read_to_string(planted.folder.path().join(name)).unwrap();
    let text = read("r.json");
    has_none(&text, &["hidden-directory", "hidden-file"]);
    let report: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(report["pools"][0]["stat"]["regions"], 1, "{:#}", report["pools"]);
    assert!(report["pools"][0]["owner_pid"].is_u64());
    planted.run(&["--pool", pool, "--names", "-o", "names.json"]).ok();
    assert!(read("names.json").contains("hidden-directory/hidden-file.gguf"));
    mounted.finish();
}

#[test]
fn a_broken_configuration_is_told_and_reported() {
    let planted = Planted::new();
    let config = planted.folder.path().join("home/plantedname/.config/nvtier/config.toml");
    fs::write(&config, "pool = 3 # password=planted-url-password\n").unwrap();
    let ran = planted.run(&["-o", "-"]).ok();
    has_none(&ran.stdout, &SECRETS);
    let report = ran.json();
    assert!(report["configuration"]["error"].as_str().unwrap().contains("config.toml"), "{report:#}");
    assert!(!Path::new("nvtier-report-0.json").exists());
}
