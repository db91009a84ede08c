//! GPUs: on the bus, in the table, and as CUDA sees them.

use std::path::Path;

use super::drive::link;
use crate::{Finding, System, tables};

/// What the table of requirements asks for: 16 GB to fine-tune with a tier of NVMe, 20 GB to infer with an 8B model.
pub(crate) const FINE_TUNE: u64 = 15_500_000_000;
pub(crate) const INFER: u64 = 19_500_000_000;

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
    match tables::gpu(model) {
        Some(row) => {
            let memory = row.memory_bytes / 1_000_000_000;
            Finding::ok(
                "gpu",
                address,
                format!("{model}: {}, {memory} GB {}, in the table", row.architecture, row.memory_type),
            )
            .needs("Ampere or newer")
        }
        None => Finding::info("gpu", address, format!("{model}: not in the table of known GPUs"))
            .needs("Ampere or newer"),
    }
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
                let finding = Finding::ok("gpu", info.id, found)
                    .needs("16 GB to fine-tune, 20 GB to infer with 8B models");
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
