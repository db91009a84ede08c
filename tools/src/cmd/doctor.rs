//! `nvtier doctor`: what this machine has, needs and lacks.

use std::process::ExitCode;

use doctor::{Finding, Report, Status, System, examine};

use crate::cli::{Doctor, Global};
use crate::failure::{Outcome, code};
use crate::output;

/// Prints it. The exit code is the verdict: what was found is no failure of the command.
pub fn run(global: &Global, args: &Doctor) -> Outcome<ExitCode> {
    if args.measure {
        let found = super::measure::measure(global, &args.path, args.measure_bytes)?;
        if global.json {
            output::json(&found)?;
        } else {
            output::line(&super::measure::text(&found))?;
        }
        return Ok(ExitCode::SUCCESS);
    }
    let report = examine(&System::here(), &args.path);
    if global.json {
        output::json(&report)?;
    } else {
        output::line(&text(&report, args.fix_hints))?;
    }
    Ok(ExitCode::from(match report.verdict {
        Status::CannotRun => code::UNSUPPORTED,
        Status::Degraded => code::DEGRADED,
        Status::Ok | Status::Info | Status::Unknown => 0,
    }))
}

fn word(status: Status) -> &'static str {
    match status {
        Status::Ok => "ok",
        Status::Info => "info",
        Status::Unknown => "unknown",
        Status::Degraded => "WARNING",
        Status::CannotRun => "CANNOT",
    }
}

fn text(report: &Report, fix_hints: bool) -> String {
    let mut lines = Vec::new();
    let mut area = "";
    for finding in &report.findings {
        if finding.area != area {
            area = finding.area;
            lines.push(format!("{}{area}", if lines.is_empty() { "" } else { "\n" }));
        }
        let fine = finding.status <= Status::Unknown && finding.effect.is_empty();
        let needed = match finding.needed.as_str() {
            needed if fine && !needed.is_empty() && needed != finding.item.trim() => {
                format!(" (needed: {needed})")
            }
            _ => String::new(),
        };
        lines.push(format!("  {:<8} {}: {}{needed}", word(finding.status), finding.item, finding.found));
        let more =
            |name: &str, text: &str| (!text.is_empty()).then(|| format!("           {name:<7} {text}"));
        if !fine {
            lines.extend(more("needed", &finding.needed));
            lines.extend(more("effect", &finding.effect));
            lines.extend(more("remedy", &finding.remedy));
        }
        lines.extend(more("root", &finding.root_adds).filter(|_| !report.root));
    }
    lines.push(String::new());
    lines.push(summary(report));
    if fix_hints {
        lines.extend(hints(&report.findings));
    }
    lines.join("\n")
}

fn summary(report: &Report) -> String {
    let count = |status| report.findings.iter().filter(|finding| finding.status == status).count();
    let warnings = count(Status::Degraded);
    let verdict = match report.verdict {
        Status::CannotRun => "nvtier cannot do its main job here".to_owned(),
        Status::Degraded => format!(
            "nvtier runs here; {warnings} of {} findings make it slower or smaller",
            report.findings.len()
        ),
        _ => "nvtier runs here as it should".to_owned(),
    };
    match count(Status::Unknown) {
        0 => verdict,
        unknown => format!("{verdict}; {unknown} could not be seen"),
    }
}

fn hints(findings: &[Finding]) -> Vec<String> {
    let mut lines: Vec<String> = findings
        .iter()
        .filter(|finding| finding.status >= Status::Degraded && !finding.command.is_empty())
        .flat_map(|finding| [format!("\n# {}: {}", finding.item, finding.remedy), finding.command.clone()])
        .collect();
    if lines.is_empty() {
        lines.push("\nNothing here is mended by a command.".to_owned());
    }
    lines
}
