//! GPUs: on the bus, in the table, and as CUDA sees them.

use std::path::Path;

use super::drive::link;
use crate::{Finding, System, tables};

/// What the table of requirements asks for: 16 GB to fine-tune with a tier of NVMe, 20 GB to infer with an 8B model.
pub(crate) const FINE_TUNE: u64 = 15_500_000_000;
pub(crate) const INFER: u64 = 19_500_000_000;
const GPU: &str = "Ampere or newer; 16 GB to fine-tune, 20 GB to infer with 8B models";

/// A release of the driver that brought something.
struct Release {
    driver: (u32, u32),
    cuda: (u32, u32),
    /// What an older one loses.
    lost: &'static str,
}

const RELEASES: [Release; 2] = [
    Release {
        driver: (470, 42),
        cuda: (11, 4),
        lost: "all of VRAM: functions that nvtier calls are missing",
    },
    Release {
        driver: (570, 26),
        cuda: (12, 8),
        lost: "batched copies (cuMemcpyBatchAsync: small tensors are copied one by one), and cuFile by PCI peer-to-peer",
    },
];

/// What those bring that are newer.
fn lost(is_older: impl Fn(&Release) -> bool) -> Vec<&'static str> {
    RELEASES.iter().filter(|release| is_older(release)).map(|release| release.lost).collect()
}

const DRIVER: &str =
    "470.42 (CUDA 11.4) at least, 570.26 (CUDA 12.8) for all; the published requirements name 580";

const NVIDIA: &str = "0x10de";
const AMD: &str = "0x1002";

pub(super) fn check(system: &System, _path: &Path, out: &mut Vec<Finding>) {
    let mut on_bus = Vec::new();
    for address in system.list("/sys/bus/pci/devices") {
        let device = format!("/sys/bus/pci/devices/{address}");
        let class = system.read(&format!("{device}/class")).unwrap_or_default();
        // Display controllers of all kinds.
        if class.starts_with("0x03") {
            on_bus.push((address, system.read(&format!("{device}/vendor")).unwrap_or_default()));
        }
    }
    out.extend(driver(system));
    for (address, vendor) in &on_bus {
        match vendor.as_str() {
            NVIDIA => nvidia(system, address, out),
            AMD => out.push(
                Finding::info("gpu", address, "an AMD GPU")
                    .needs("an NVIDIA GPU: this version drives no others"),
            ),
            _ => {}
        }
    }
    let found = on_bus.iter().filter(|(_, vendor)| vendor == NVIDIA).count();
    if system.is_live() {
        cuda(found, out);
    } else if found == 0 {
        out.push(none("no NVIDIA GPU is on the bus"));
    }
}

/// The kernel's NVIDIA driver; none where it is not loaded, which the GPU's line says.
fn driver(system: &System) -> Option<Finding> {
    let text = system.read("/proc/driver/nvidia/version");
    // "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build ..."
    let release =
        |text: &str| text.split_whitespace().find(|word| version(word).is_some()).map(str::to_owned);
    let found =
        text.as_deref().and_then(release).or_else(|| release(&system.read("/sys/module/nvidia/version")?));
    let Some(found) = found else {
        let text = text?;
        let said = text.lines().next().unwrap_or_default().to_owned();
        return Some(
            Finding::unknown(
                "gpu",
                "driver",
                format!("/proc/driver/nvidia/version names no release: {said}"),
            )
            .needs(DRIVER),
        );
    };
    let modules = match text {
        Some(text) if text.contains("Open Kernel Module") => ", open kernel modules",
        Some(_) => ", proprietary kernel modules",
        None => "",
    };
    let lost = lost(|release| version(&found).is_some_and(|found| found < release.driver));
    let finding = Finding::ok("gpu", "driver", format!("{found}{modules}")).needs(DRIVER);
    Some(older(finding, &lost))
}

fn older(finding: Finding, lost: &[&str]) -> Finding {
    match lost.is_empty() {
        true => finding,
        false => finding.degraded(
            format!("lost: {}", lost.join("; ")),
            "a newer driver (580, open kernel modules); in a container it is the host's",
        ),
    }
}

/// `580.65.06`: a release of the driver, its first two numbers.
fn version(word: &str) -> Option<(u32, u32)> {
    let mut parts = word.split('.').map(|part| part.parse::<u32>().ok());
    let (first, second) = (parts.next()??, parts.next()??);
    // Not a version of a compiler: these are below 100.
    (first >= 100 && parts.all(|part| part.is_some())).then_some((first, second))
}

fn none(found: impl Into<String>) -> Finding {
    Finding::ok("gpu", "GPU", found).needs("an NVIDIA GPU and its driver").degraded(
        "nothing goes to VRAM; pools, mounts and loads into host memory work",
        "a GPU of the Ampere generation or newer, and its driver",
    )
}

fn nvidia(system: &System, address: &str, out: &mut Vec<Finding>) {
    let model = system.field(&format!("/proc/driver/nvidia/gpus/{address}/information"), "Model");
    match &model {
        Some(model) => out.push(table(address, model)),
        None => out.push(
            Finding::ok("gpu", address, "an NVIDIA GPU whose driver is not loaded")
                .needs("the driver")
                .degraded(
                    "it cannot be used",
                    "install the vendor's driver (580 or newer, open kernel modules)",
                ),
        ),
    }
    out.extend(link(system, address, &format!("/sys/bus/pci/devices/{address}"), "gpu", 16));
}

fn table(address: &str, model: &str) -> Finding {
    let ran = if tables::ran_on(model) { "ran" } else { "did not run" };
    match tables::gpu(model) {
        Some(row) => {
            let memory = row.memory_bytes / 1_000_000_000;
            let found = format!(
                "{model}: {}, {memory} GB {}, validated by aiDAPTIV's vendor, nvtier {ran} on it",
                row.architecture, row.memory_type
            );
            let finding = Finding::ok("gpu", address, found).needs(GPU);
            match row.memory_bytes {
                ..FINE_TUNE => finding.degraded("small models only", "smaller models, or quantized ones"),
                FINE_TUNE..INFER => Finding {
                    status: crate::Status::Info,
                    effect: "enough to fine-tune; inference of 8B models in 16 bits needs more".into(),
                    remedy: "quantized models, or models that stream (nvtier.stream)".into(),
                    ..finding
                },
                _ => finding,
            }
        }
        None => {
            let found = format!("{model}: not in the table of validated GPUs, nvtier {ran} on it");
            Finding::info("gpu", address, found).needs(GPU)
        }
    }
}

/// The driver's library, which a container may have in another release than the kernel.
fn libcuda(found: &str) -> Finding {
    let mut parts = found.split('.').map(|part| part.parse::<u32>().ok());
    let version = parts.next().flatten().zip(parts.next().flatten());
    let lost = lost(|release| version.is_some_and(|found| found < release.cuda));
    older(Finding::ok("gpu", "CUDA", found).needs("11.4 at least, 12.8 for all"), &lost)
}

/// What CUDA says.
fn cuda(on_bus: usize, out: &mut Vec<Finding>) {
    for ordinal in 0.. {
        let info = gpudirect::driver::open(&format!("cuda:{ordinal}")).and_then(|driver| driver.info());
        match info {
            Ok(info) => {
                let memory = crate::system::human(info.memory_bytes);
                let free = crate::system::human(info.free_bytes);
                let found =
                    format!("{} at {}: {memory}, {free} free, CUDA {}", info.name, info.pci, info.driver);
                if ordinal == 0 {
                    out.push(libcuda(&info.driver));
                }
                let finding = Finding::ok("gpu", info.id, found).needs(GPU);
                out.push(match info.memory_bytes {
                    ..FINE_TUNE => finding.degraded("small models only", "smaller models, or quantized ones"),
                    FINE_TUNE..INFER => Finding { status: crate::Status::Info, ..finding },
                    _ => finding,
                });
            }
            Err(error) if ordinal == 0 && on_bus == 0 => {
                out.push(none(format!("none ({error})")));
                return;
            }
            Err(error) if ordinal == 0 => {
                out.push(
                    Finding::ok("gpu", "CUDA", format!("{error}"))
                        .needs("the driver's libcuda.so.1")
                        .degraded(
                            "nothing goes to VRAM",
                            "install the vendor's driver; in a container, its container toolkit (--gpus all)",
                        ),
                );
                return;
            }
            Err(_) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Status;

    #[test]
    fn releases_are_told_from_other_numbers() {
        assert_eq!(version("580.65.06"), Some((580, 65)));
        assert_eq!(version("570.26"), Some((570, 26)));
        for other in ["12.2.0", "580", "580.x", "x86_64", "", "580."] {
            assert_eq!(version(other), None, "{other}");
        }
    }

    #[test]
    fn an_old_library_says_what_is_lost() {
        assert_eq!(libcuda("13.0").status, Status::Ok);
        assert_eq!(libcuda("12.8").status, Status::Ok);
        let old = libcuda("12.2");
        assert!(old.status == Status::Degraded && old.effect.contains("cuMemcpyBatchAsync"), "{old:#?}");
        assert!(!old.effect.contains("all of VRAM") && libcuda("11.2").effect.contains("all of VRAM"));
    }
}
