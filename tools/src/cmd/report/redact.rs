//! What must not leave the machine: secrets, who the user is, and names of files.
//!
//! Two ways, since neither is enough alone: what is known to be secret here (values of the environment) is taken out wherever it stands,
//! and what looks like a secret is taken out whoever it belongs to. Too much is taken out rather than too little.

use std::path::Path;

use regex::{Captures, Regex};
use serde_json::Value;

/// Stands for what was taken out.
const GONE: &str = "<redacted>";

/// Words in the names of variables and keys whose values are secret.
const SECRET_WORDS: &str = "secret|token|passw|passphrase|credential|api_?key|access_?key|private|auth|cookie|signature|session_?key|bearer|sas";

/// Takes out what must not leave.
pub struct Redactor {
    /// Text that is gone wherever it stands, longest first, with what stands in its place.
    known: Vec<(String, String)>,
    /// The same for whole words.
    words: Vec<(Regex, String)>,
    patterns: Vec<(Regex, &'static str)>,
    names: Option<Names>,
}

/// Names of files, and where logs have them.
struct Names {
    known: Vec<String>,
    quoted: Regex,
}

/// Patterns are constants, tested below.
fn pattern(text: &str) -> Option<Regex> {
    Regex::new(text).ok()
}

impl Redactor {
    /// Of this user and this machine.
    pub fn here() -> Self {
        let home = std::env::var_os("HOME").and_then(|home| home.into_string().ok());
        let user = ["USER", "LOGNAME"].iter().find_map(|name| std::env::var(name).ok());
        let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        let environment = std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
        Self::new(environment, home.as_deref(), user.as_deref(), host.trim())
    }

    fn new(
        environment: impl Iterator<Item = (String, String)>,
        home: Option<&str>,
        user: Option<&str>,
        host: &str,
    ) -> Self {
        let secret = pattern(&format!("(?i){SECRET_WORDS}"));
        let mut known: Vec<(String, String)> = environment
            .filter(|(name, value)| {
                value.len() >= 6 && secret.as_ref().is_some_and(|secret| secret.is_match(name))
            })
            // Switches and paths of files (SSH_AUTH_SOCK) are no secrets, and would tear holes into everything.
            .filter(|(_, value)| !Path::new(value).is_absolute())
            .map(|(_, value)| (value, GONE.to_owned()))
            .collect();
        if let Some(home) = home.filter(|home| home.len() > 1 && Path::new(home).is_absolute()) {
            known.push((home.trim_end_matches('/').to_owned(), "~".to_owned()));
        }
        known.sort_by_key(|(text, _)| std::cmp::Reverse(text.len()));
        let mut words = Vec::new();
        let mut word = |text: &str, instead: &str| {
            if text.len() > 2 && text != "root" && text != "localhost" {
                words.extend(
                    pattern(&format!(r"\b{}\b", regex::escape(text))).map(|it| (it, instead.to_owned())),
                );
            }
        };
        let named = home.and_then(|home| home.strip_prefix("/home/"));
        user.into_iter().chain(named).for_each(|user| word(user, "<user>"));
        word(host, "<host>");
        Self { known, words, patterns: patterns(), names: None }
    }

    /// From here on names of files go, too: these, and whatever stands between quotes in a log.
    pub fn hide_names(&mut self, mut known: Vec<String>) {
        known.sort_by_key(|name| std::cmp::Reverse(name.len()));
        known.dedup();
        if let Some(quoted) = pattern(r#"`[^`\n]*`|"(?:[^"\\\n]|\\.)*""#) {
            self.names = Some(Names { known, quoted });
        }
    }

    /// A text.
    pub fn text(&self, text: &str) -> String {
        let mut text = text.to_owned();
        for (known, instead) in &self.known {
            text = text.replace(known, instead);
        }
        for (pattern, instead) in &self.patterns {
            text = pattern.replace_all(&text, *instead).into_owned();
        }
        if let Some(pattern) = pattern(r"[A-Za-z0-9+/_=-]{32,}") {
            text = pattern.replace_all(&text, |found: &Captures| unless_random(&found[0])).into_owned();
        }
        for (word, instead) in &self.words {
            text = word.replace_all(&text, instead.as_str()).into_owned();
        }
        text
    }

    /// Lines of a log, which may name files.
    pub fn log(&self, text: &str) -> String {
        let text = self.text(text);
        let Some(names) = &self.names else { return text };
        let mut text = names.quoted.replace_all(&text, "`<name>`").into_owned();
        for name in &names.known {
            // Shorter ones are parts of ordinary words.
            if name.len() >= 4 {
                text = text.replace(name.as_str(), "<name>");
            }
        }
        text
    }

    /// Every text in a document.
    pub fn value(&self, value: &mut Value) {
        match value {
            Value::String(text) => *text = self.text(text),
            Value::Array(values) => values.iter_mut().for_each(|value| self.value(value)),
            Value::Object(values) => values.values_mut().for_each(|value| self.value(value)),
            _ => {}
        }
    }
}

fn patterns() -> Vec<(Regex, &'static str)> {
    let rows: [(&str, &'static str); 13] = [
        // Other users' homes; this one's is `~` by now.
        (r#"/home/[^/\s"'`:,;]+"#, "/home/<user>"),
        // Whole private keys.
        (r"(?s)-----BEGIN [A-Z0-9 ]*PRIVATE KEY-----.*?(?:-----END [A-Z0-9 ]*PRIVATE KEY-----|\z)", GONE),
        // scheme://user:password@host; what is before the last @ of the authority.
        (r"([A-Za-z][A-Za-z0-9+.-]*://)[^/?#\s]*@", "${1}<redacted>@"),
        // user:password@host without a scheme, as proxies are given.
        (r#"[^\s:/@"'`=]+:[^\s:/@"'`]+@([A-Za-z0-9.-]+)"#, "<redacted>@${1}"),
        // Passwords may be several words.
        (r#"(?i)((?:password|passwd|passphrase)\s*[=:]\s*)[^\s"',;][^\n"',;]*"#, "${1}<redacted>"),
        // --token VALUE
        (
            r"(?i)(--[a-z-]*(?:secret|token|passw|passphrase|credential|api-?key|access-?key)[a-z-]*\s+)[^\s-]*[A-Za-z]\S*",
            "${1}<redacted>",
        ),
        // Signed requests have everything in their query.
        (r#"([A-Za-z][A-Za-z0-9+.-]*://[^\s?#"'`]*)\?[^\s"'`]*"#, "${1}?<redacted>"),
        (r"(?i)\b(bearer|basic|negotiate)\s+[A-Za-z0-9._~+/=-]{6,}", "${1} <redacted>"),
        (r"\b(?:AKIA|ASIA|AGPA|AROA|AIDA)[A-Z0-9]{12,}\b", GONE),
        (
            r"\b(?:hf|ghp|gho|ghu|ghs|ghr|glpat|github_pat|xox[a-z]|sk|pk|rk|npm|pypi)[_-][A-Za-z0-9_-]{12,}",
            GONE,
        ),
        (r"\bAIza[A-Za-z0-9_-]{30,}", GONE),
        (r"\beyJ[A-Za-z0-9_-]{6,}\.[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]*)?", GONE),
        (r"\bya29\.[A-Za-z0-9_-]+", GONE),
    ];
    let mut all: Vec<(Regex, &'static str)> =
        rows.into_iter().filter_map(|(text, instead)| Some((pattern(text)?, instead))).collect();
    // key = "value", key: value, key=value, "key": "value". A value between quotes goes as a whole, another up to the next blank.
    let assigned = format!(
        r#"(?i)([A-Za-z0-9_.-]*(?:{SECRET_WORDS})[A-Za-z0-9_.-]*["']?\s*[=:]\s*)(?:"(?:[^"\\\n]|\\.)*"|'[^'\n]*'|[^\s,;"']+)"#
    );
    all.extend(pattern(&assigned).map(|it| (it, "${1}<redacted>")));
    all
}

/// Keys are random letters of both cases with digits; ids in lower-case hexadecimal, words and paths are not.
fn unless_random(text: &str) -> String {
    let is_mixed = |text: &str| {
        text.bytes().any(|c| c.is_ascii_uppercase())
            && text.bytes().any(|c| c.is_ascii_lowercase())
            && text.bytes().any(|c| c.is_ascii_digit())
    };
    // The name of a daemon's log is long and mixed, too, but of short words.
    let is_key = |part: &str| {
        let longest = part.split(['-', '_']).map(str::len).max().unwrap_or(0);
        part.len() >= 32 && longest >= 20 && is_mixed(part)
    };
    // A path is judged by its parts, unless it is as long as a secret key of AWS and does not start as a path does.
    if text.len() == 40 && !text.starts_with('/') && is_mixed(text) {
        return GONE.to_owned();
    }
    let parts = text.split('/').map(|part| if is_key(part) { GONE } else { part });
    parts.collect::<Vec<_>>().join("/")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn redactor() -> Redactor {
        let environment = [
            ("AWS_SECRET_ACCESS_KEY", "Zm9v/YmFyYmF6cXV4"),
            ("HF_TOKEN", "plain-words-token"),
            ("SSH_AUTH_SOCK", "/run/user/1000/ssh"),
            ("EDITOR", "an-editor"),
        ];
        let environment = environment.into_iter().map(|(name, value)| (name.to_owned(), value.to_owned()));
        Redactor::new(environment, Some("/home/alice"), Some("alice"), "build-7")
    }

    #[test]
    fn every_pattern_is_one() {
        assert_eq!(patterns().len(), 14);
    }

    #[test]
    fn secrets_are_taken_out() {
        let redactor = redactor();
        for (text, wanted) in [
            ("got Zm9v/YmFyYmF6cXV4 here", "got <redacted> here"),
            ("x plain-words-token y", "x <redacted> y"),
            ("an-editor /run/user/1000/ssh", "an-editor /run/user/1000/ssh"),
            ("https://bob:p4ss@w@host/a?b=c&sig=d e", "https://<redacted>@host/a?<redacted> e"),
            ("s3://bucket/key", "s3://bucket/key"),
            ("Authorization: Bearer abc.def-ghi", "Authorization: <redacted> <redacted>"),
            ("curl -H 'bearer abcdefgh'", "curl -H 'bearer <redacted>'"),
            ("id AKIAIOSFODNN7EXAMPLE,", "id <redacted>,"),
            ("is wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY.", "is <redacted>."),
            ("hf_abcdefghijklmnopqrst", "<redacted>"),
            ("password = \"a b c\" # x", "password = <redacted> # x"),
            ("{\"api_key\": \"a\\\"b\", \"n\": 1}", "{\"api_key\": <redacted>, \"n\": 1}"),
            ("proxy bob:hunter2@proxy.example:3128/", "proxy <redacted>@proxy.example:3128/"),
            ("password: correct horse battery; next", "password: <redacted>; next"),
            ("run --api-token abc --force", "run --api-token <redacted> --force"),
            ("my_token=abc; next", "my_token=<redacted>; next"),
            ("-----BEGIN RSA PRIVATE KEY-----\nabc\n-----END RSA PRIVATE KEY-----\nx", "<redacted>\nx"),
        ] {
            assert_eq!(redactor.text(text), wanted, "{text}");
        }
    }

    #[test]
    fn what_helps_stays() {
        let redactor = redactor();
        for text in [
            "pool 3f2c9a54-8e0e-4b7e-9c51-0f4f4dbd2b1a at /mnt/nvme0/pool",
            "commit 0123456789abcdef0123456789abcdef01234567",
            "nvme nvme0: 8/0/0 default/read/poll queues",
            "write to bob@example: 12:30:01 at nvtier@models.service",
            "vllm serve --max-tokens 100",
            "generation 7, 12 GiB of 64GiB",
            "/run/nvtier/var-tmp-nvtier-test-0-run-27329-tests-t-gSwcjt-mnt-0123456789abcdef.log",
            "/mnt/Data1/Models/SomeLongDirectoryName2/AnotherOne/pool",
        ] {
            assert_eq!(redactor.text(text), text);
        }
    }

    #[test]
    fn who_it_is_is_taken_out() {
        let redactor = redactor();
        assert_eq!(redactor.text("/home/alice/m of alice on build-7"), "~/m of <user> on <host>");
        assert_eq!(redactor.text("malice /home/bob/x: y"), "malice /home/<user>/x: y");
    }

    #[test]
    fn names_go_from_logs_only_where_that_is_asked_for() {
        let mut redactor = redactor();
        let line = "WARN chunk 3 of `m/x` path=\"a \\\"b\" models/big.gguf failed";
        assert_eq!(redactor.log(line), line);
        redactor.hide_names(vec!["models/big.gguf".into(), "big.gguf".into(), "m".into()]);
        assert_eq!(redactor.log(line), "WARN chunk 3 of `<name>` path=`<name>` <name> failed");
    }
}
